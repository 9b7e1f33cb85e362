"""llama-fast certify: one answer, shown on this machine."""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_fast.cli.common import INTERRUPTED, add_command, add_where, where
from llama_fast.errors import shown

if TYPE_CHECKING:
    from llama_fast.engine.certify import Certification

_DESCRIPTION = """Show that this model gives one answer on this machine.
A fixed set of requests is run alone, then by every path: in batches of every size, in every row and order, in chunks,
from shared prefixes, preempted, guessed ahead, in captured steps, beside requests that are aborted. Tokens, logits and
log probabilities must be the same bit for bit. A path that the device does not have is skipped, and told why.
Exit status 0 only if all the others passed; where one fails, the first request, token, layer and op that differ are
told. --break plants a sum whose order depends on the number of rows: the command must find it, and exits with 1."""

_EXAMPLES = """examples:
  llama-fast certify ./Llama-3.2-1B --quick
  llama-fast certify ./Llama-3.2-1B --out certificate.json
  llama-fast certify ./Llama-3.2-1B --quick --break       must fail, and name the op
  llama-fast certify ./Llama-3.2-1B --json | jq .passed"""

_WIDTH, _NAME_WIDTH = 100, 22


def add(commands: Any) -> None:
    """Add the subcommand to the parser."""
    command = add_command(commands, "certify MODEL [options]", _DESCRIPTION, _EXAMPLES)
    command.set_defaults(run=run)
    add_where(command)
    command.add_argument("model", metavar="MODEL", help="checkpoint folder or hub id owner/name")
    command.add_argument("--quick", action="store_true", help="fewer and shorter requests")
    command.add_argument("--out", type=Path, metavar="FILE", help="write the certificate there, as JSON")
    command.add_argument("--break", dest="planted", action="store_true", help="plant a fault, which must be found")


def run(args: argparse.Namespace) -> int:
    """Run the matrix, print it; 0 if every path passed that the device has."""
    from llama_fast.engine.certificate import certificate
    from llama_fast.engine.certify import Certification
    from llama_fast.engine.certify_loading import load
    from llama_fast.files import written_whole
    from llama_fast.hub import find_folder

    if args.out is not None and not args.out.parent.is_dir():
        # Before the minutes that the matrix takes.
        args.usage_error(f"--out {args.out}: no folder {args.out.parent}")
    folder = find_folder(args.model, revision=args.revision)
    name = folder.resolve().name if os.path.isdir(os.path.expanduser(args.model)) else args.model
    options = where(args)
    backend = options.pop("backend")
    model, tokenizer = load(folder, **{key: options[key] for key in ("device", "dtype", "load", "quantization")})
    certification = Certification(model, tokenizer, backend=backend, quick=args.quick, planted=args.planted)
    interrupted = False
    try:
        certification.run(show_progress=False if args.quiet else None)
    except KeyboardInterrupt:
        interrupted = True
    if args.json or (args.out is not None and not interrupted):
        text = json.dumps(certificate(certification, folder, name), indent=None if args.json else 1)
    print(text if args.json else table(name, certification))
    if args.out is not None and not interrupted:
        with written_whole(args.out) as path:
            path.write_text(text + "\n", encoding="utf-8")
    if interrupted:
        print("llama-fast: interrupted: the certificate is not complete", file=sys.stderr)
        return INTERRUPTED
    return 0 if certification.passed else 1


def table(name: str, certification: Certification) -> str:
    """The matrix, a path a line."""
    runner = certification.runner
    size, results = runner.requests.size, certification.results
    dtype = str(runner.model.dtype).removeprefix("torch.")
    lines = [f"{shown(name)}: {dtype}, backend {runner.backend}, {runner.model.device}, size {size.name}"]
    if certification.planted is not None:
        lines += [*_wrapped(f"PLANTED FAULT: {certification.planted}", "")]
    lines += ["", f"{'path':{_NAME_WIDTH}}{'requests':>9}{'draws':>8}  result"]
    for one in results:
        told = {"passed": "passed", "failed": "FAILED", "skipped": "skipped"}[one.result]
        counts = f"{'':>9}{'':>8}" if one.result == "skipped" else f"{one.requests:>9}{one.draws:>8}"
        first, *more = _wrapped(told + (f": {one.reason}" if one.reason else ""), " " * (_NAME_WIDTH + 19))
        lines += [f"{one.path:{_NAME_WIDTH}}{counts}  {first.strip()}", *more]
    return "\n".join([*lines, "", _last_line(certification)])


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=indent or "  ", break_on_hyphens=False)


def _last_line(certification: Certification) -> str:
    counts = {
        kind: sum(one.result == kind for one in certification.results) for kind in ("passed", "failed", "skipped")
    }
    draws = sum(one.draws for one in certification.results[1:])
    told = (
        f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped; {draws:,} draws compared"
    )
    if not certification.complete:
        return f"not complete: {told}"
    if certification.planted is not None:
        found = "was found" if "failed" in [one.result for one in certification.results] else "WAS NOT FOUND"
        return f"NOT CERTIFIED, a fault was planted: it {found}; {told}"
    return f"{'one answer' if certification.passed else 'NOT CERTIFIED'}: {told}"
