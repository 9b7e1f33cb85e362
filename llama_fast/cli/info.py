"""llama-fast info: what a checkpoint says, where it says it, and what of it has no effect."""

from __future__ import annotations

import argparse
import json
import os
import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from llama_fast.cli.common import add_command
from llama_fast.errors import shown

if TYPE_CHECKING:
    from llama_fast.engine.info import ModelInfo
    from llama_fast.model.verify import VerifyReport

_EXAMPLES = """examples:
  llama-fast info ./Llama-3.2-1B
  llama-fast info ./Llama-3.2-1B --verify
  llama-fast info meta-llama/Llama-3.2-1B --json | jq .generation.temperature"""

_WIDTH, _NAME_WIDTH, _ORIGIN_WIDTH = 100, 36, 28
_VALUE_WIDTH = _WIDTH - _NAME_WIDTH - _ORIGIN_WIDTH
_MAX_ITEMS = 8  # of a list or object, in the table


def add(commands: Any) -> None:
    """Add the subcommand to the parser."""
    command = add_command(
        commands,
        "info MODEL [options]",
        "What a checkpoint says: every value in effect with the file it comes from, and what has no effect.\n"
        "Of the weights only headers are read, and none are downloaded. Exit status 1 if it cannot be loaded.",
        _EXAMPLES,
    )
    command.set_defaults(run=run)
    command.add_argument("model", metavar="MODEL", help="checkpoint folder or hub id owner/name")
    command.add_argument(
        "--verify",
        action="store_true",
        help="read every weight: search for NaN and infinity, compare known sha256, replay the canary of int4 weights",
    )


def run(args: argparse.Namespace) -> int:
    """Print it; 0 if nothing is wrong."""
    from llama_fast.engine.info import model_info
    from llama_fast.hub import find_folder

    weights = args.verify or os.path.isdir(os.path.expanduser(args.model))
    folder = find_folder(args.model, revision=args.revision, weights=weights)
    info = model_info(folder, weights=weights)
    report = None
    if args.verify and not info.problems:
        from llama_fast.model.verify import verify_checkpoint

        report = verify_checkpoint(folder, show_progress=False if args.quiet else None)
    print(json.dumps(_as_json(args.model, info, report)) if args.json else _table(args.model, info, report))
    return 1 if info.problems or (report and report.problems) else 0


def _as_json(model: str, info: ModelInfo, report: VerifyReport | None) -> dict[str, Any]:
    sections = {
        section: {name: asdict(entry) for name, entry in entries.items()} for section, entries in info.sections.items()
    }
    lists = {"missing": info.missing, "ignored": info.ignored, "problems": info.problems}
    return {"name": model, **sections, **lists, "verified": None if report is None else asdict(report)}


def _table(model: str, info: ModelInfo, report: VerifyReport | None) -> str:
    lines = [shown(model)]
    for section, entries in info.sections.items():
        lines += ["", section]
        if section in info.missing:
            lines.append(f"  {info.missing[section]}")
        for name, entry in entries.items():
            first, *more = textwrap.wrap(_text(name, entry.value), _VALUE_WIDTH - 2) or [""]
            lines.append(f"  {shown(name):{_NAME_WIDTH - 2}}{first:{_VALUE_WIDTH}}{entry.origin}")
            lines += [" " * _NAME_WIDTH + part for part in more]
    if info.ignored:
        lines += ["", "without effect", *(_wrapped(line) for line in info.ignored)]
    if report is not None:
        lines += ["", f"verified: {report.num_tensors:,} tensors, {report.checked_sha256} files against their sha256"]
        if report.canary_deviation is not None:
            lines.append(f"canary: replayed, off by {report.canary_deviation:.3g} at most")
        lines += [_wrapped(problem) for problem in report.problems] or ["  no problems"]
    if info.problems:
        lines += ["", *(f"cannot be loaded: {problem}" for problem in info.problems)]
    return "\n".join(lines)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, _WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)


def _text(name: str, value: Any) -> str:
    if isinstance(value, dict):
        items = [f"{shown(key)}: {_text(name, item)}" for key, item in value.items()]
    elif isinstance(value, list):
        items = [_text(name, item) for item in value]
    elif isinstance(value, str):
        return shown(value)
    elif value is None:
        return "none"
    else:
        return f"{value:,}" if name in ("bytes", "parameters") else json.dumps(value)
    more = [f"and {len(items) - _MAX_ITEMS} more"] if len(items) > _MAX_ITEMS else []
    return ", ".join(items[:_MAX_ITEMS] + more) or "none"
