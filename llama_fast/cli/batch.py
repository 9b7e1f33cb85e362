"""llama-fast batch: a file of requests, answered line by line."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_fast.cli.common import INTERRUPTED, add_command, add_where, positive, where
from llama_fast.errors import GenerationInterrupted

if TYPE_CHECKING:
    from llama_fast.serving.batch import BatchReport

_DESCRIPTION = """Answer a file of requests, one a line, into a file with an answer a line, in the same order.
A line is as in OpenAI's batches: {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt":
"Once upon a time", "max_tokens": 20}}, or the url /v1/chat/completions and "messages" in place of "prompt". The body
may hold the sampling fields of OpenAI and of SamplingParams; a field that is not known is refused.
A line that is wrong gets an answer that tells the error, and the others go on: the exit status is 0 all the same, and
the last line on stderr counts them. The same input, model and --seed give the same bytes, whatever --max-batch is
and however often the command was killed and continued with --resume."""

_EXAMPLES = """examples:
  llama-fast batch in.jsonl out.jsonl                   with the bundled demo model
  llama-fast batch in.jsonl out.jsonl --model ./Llama-3.2-1B --max-batch 64
  llama-fast batch in.jsonl out.jsonl --model ./Llama-3.2-1B --max-batch 64 --resume
  llama-fast batch in.jsonl out.jsonl --seed 7 --quiet --json | jq .tokens_per_s"""


def add(commands: Any) -> None:
    """Add the subcommand to the parser."""
    command = add_command(commands, "batch INPUT OUTPUT [options]", _DESCRIPTION, _EXAMPLES)
    command.set_defaults(run=run)
    add_where(command)
    command.add_argument("input", metavar="INPUT", type=Path, help="JSON Lines file with the requests")
    command.add_argument("output", metavar="OUTPUT", type=Path, help="file for the answers; must not hold any yet")
    command.add_argument("--resume", action="store_true", help="go on where an earlier run of the same ended")
    command.add_argument("--model", help="checkpoint folder or hub id owner/name (default: the bundled demo model)")
    command.add_argument("--max-batch", type=positive, metavar="N", help="samples at once (default: the engine's)")
    command.add_argument("--max-seq-len", type=positive, metavar="N", help="most tokens of prompt and answer together")
    seed = "with a line's place it is the seed of lines that have none (default: %(default)s)"
    command.add_argument("--seed", type=int, default=0, help=seed)


def run(args: argparse.Namespace) -> int:
    """Write the answers."""
    from llama_fast.serving.batch_files import BatchFiles

    # Before the model is read: what is wrong with the files should not take minutes to be told.
    with BatchFiles(args.input, args.output, resume=args.resume) as files:
        from llama_fast.engine.engine import DEFAULT_MAX_BATCH
        from llama_fast.engine.llm import LLM
        from llama_fast.hub import find_folder
        from llama_fast.serving.batch import fingerprint, run_batch

        if args.model is None:
            from llama_fast.demo import PATH

            args.model = str(PATH)
        folder = find_folder(args.model, revision=args.revision)
        name = folder.resolve().name if os.path.isdir(os.path.expanduser(args.model)) else args.model
        llm = LLM(folder, max_batch=args.max_batch or DEFAULT_MAX_BATCH, max_seq_len=args.max_seq_len, **where(args))
        interrupted = False
        try:
            report = run_batch(
                llm,
                files,
                name=name,
                fingerprint=fingerprint(llm, folder, name, args.seed),
                seed=args.seed,
                show_progress=False if args.quiet else None,
            )
        except GenerationInterrupted as interrupt:
            report, interrupted = interrupt.outputs, True  # type: ignore[assignment]
    if args.json:
        print(json.dumps({"model": args.model, **asdict(report), "tokens_per_s": report.tokens_per_s}))
    if interrupted:
        told = f"interrupted: {report.written:,} of {report.lines:,} lines are written; continue with --resume"
        print(f"llama-fast: {told}", file=sys.stderr)
        return INTERRUPTED
    if not args.quiet:
        print(f"llama-fast: {_last_line(report)}", file=sys.stderr)
    return 0


def _last_line(report: BatchReport) -> str:
    resumed = f" ({report.resumed:,} of them before)" if report.resumed else ""
    counts = f"{report.errors:,} errors, {report.prompt_tokens:,} prompt tokens, {report.generated_tokens:,} generated"
    return f"{report.written:,} lines{resumed}, {counts}, {report.tokens_per_s:.1f} tokens/s"
