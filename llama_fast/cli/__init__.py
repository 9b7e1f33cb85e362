"""The command `llama-fast`: one module a subcommand.

Results go to stdout in UTF-8, everything else to stderr. Exit status: 0 done, 2 wrong usage, 130 interrupted (Ctrl-C),
141 the reader of stdout went away, 1 any other error, told in one line; LLAMA_FAST_TRACEBACK=1 shows its traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper

from llama_fast import __version__
from llama_fast.cli import batch, certify, chat, generate, info, perplexity, plan, quantize
from llama_fast.cli.common import INTERRUPTED, one_line
from llama_fast.errors import LlamaFastError

_COMMANDS = (generate, chat, batch, perplexity, quantize, plan, info, certify)  # in the order of --help

_EXAMPLES = """examples:
  llama-fast generate "Once upon a time"
  llama-fast chat ./Llama-3.2-1B-Instruct
  llama-fast batch requests.jsonl answers.jsonl --model ./Llama-3.2-1B
  llama-fast perplexity ./Llama-3.2-1B text.txt
  llama-fast quantize ./Llama-3.2-1B ./Llama-3.2-1B-int4 --calibrate text.txt
  llama-fast plan ./Llama-3.2-1B --max-batch 8 --max-seq-len 4096
  llama-fast info ./Llama-3.2-1B
  llama-fast certify ./Llama-3.2-1B --quick
  llama-fast generate --help      all its options, more examples"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (argparse raises SystemExit for wrong usage and --help)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")  # also where the locale is C
    args = _parser().parse_args(argv)
    try:
        status = args.run(args)
        if sys.stdout is not None:  # closed by the caller
            sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("llama-fast: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # flushed once more at exit
        return 141  # 128 + SIGPIPE
    except (LlamaFastError, OSError) as error:
        if os.environ.get("LLAMA_FAST_TRACEBACK") == "1":
            raise
        print(f"llama-fast: error: {one_line(error)}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llama-fast",
        description="Llama inference with one answer: the same prompt, parameters and seed give the same tokens.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"llama-fast {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add(commands)
    return parser
