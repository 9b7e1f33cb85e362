"""llama-fast perplexity: score a text."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from llama_fast.cli.common import add_command, add_where, positive, read_text, where

_EXAMPLES = """examples:
  llama-fast perplexity ./Llama-3.2-1B text.txt
  llama-fast perplexity ./Llama-3.2-1B text.txt --context 1024 --stride 512
  cat *.md | llama-fast perplexity ./Llama-3.2-1B - --json"""


def add(commands: Any) -> None:
    """Add the subcommand to the parser."""
    command = add_command(
        commands,
        "perplexity MODEL TEXT_FILE [options]",
        "Score a text: perplexity per token, and bits per byte.\n"
        "Windows of --context tokens move by --stride; each token is scored once, what windows share is context.",
        _EXAMPLES,
    )
    command.set_defaults(run=run)
    add_where(command)
    command.add_argument("model", metavar="MODEL", help="checkpoint folder or hub id owner/name")
    command.add_argument("text_file", metavar="TEXT_FILE", help="UTF-8 text; - is stdin")
    command.add_argument(
        "--context", type=positive, metavar="N", help="tokens a window (default: the model's, up to 2048)"
    )
    command.add_argument(
        "--stride", type=positive, metavar="N", help="1 to context - 1 (default: context - 1, no overlap)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the score."""
    text = read_text(args.text_file)

    from llama_fast.engine.perplexity import load_for_perplexity, perplexity

    llm = load_for_perplexity(args.model, args.context, **where(args))
    progress = False if args.quiet else None
    result = perplexity(llm, text, context=args.context, stride=args.stride, show_progress=progress)
    told = {"model": args.model, "file": args.text_file, **asdict(result)}
    print(json.dumps(told) if args.json else result)
    return 0
