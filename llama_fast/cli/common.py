"""What the commands share: their common options, and reading text."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from llama_fast.errors import RequestError

INTERRUPTED = 130  # 128 + SIGINT


def add_command(commands: Any, usage: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """A subcommand with --json, --quiet and --revision; `usage` begins with its name."""
    command: argparse.ArgumentParser = commands.add_parser(
        usage.split()[0],
        usage=f"llama-fast {usage}",
        help=description.partition(".")[0],
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(usage_error=command.error)
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.add_argument("--quiet", action="store_true", help="nothing on stderr but errors and warnings")
    command.add_argument("--revision", help="branch, tag or commit of a hub id")
    return command


def add_where(command: argparse.ArgumentParser) -> None:
    """Options that say where and in which dtype the model runs."""
    command.add_argument("--device", help="cpu, cuda or cuda:N (default: the first GPU, else the CPU)")
    dtypes = ("auto", "bfloat16", "float16", "float32", "float64")
    command.add_argument("--dtype", choices=dtypes, default="auto", help="default: the model's")
    backends = ("auto", "reference", "cpu", "gpu")
    command.add_argument("--backend", choices=backends, default="auto", help="default: %(default)s")


def where(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of LLM that `add_where` and `add_command` made."""
    return {name: getattr(args, name) for name in ("device", "dtype", "backend", "revision")}


def read_text(source: str, data: bytes | None = None) -> str:
    """All of a UTF-8 file, of stdin for "-", or `data` under the name `source`."""
    if source == "-":
        source, data = "stdin", b"" if sys.stdin is None else sys.stdin.buffer.read()
    elif data is None:
        data = Path(source).read_bytes()
    try:
        return data.decode("utf-8").removeprefix("\ufeff")  # the mark that some editors put before UTF-8
    except UnicodeDecodeError as error:
        byte = f"byte {error.start} is 0x{data[error.start]:02x}"
        raise RequestError(f"{source} is not UTF-8: {byte}; convert it, for example with iconv") from error


def positive(text: str) -> int:
    """A positive integer, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive integer")
    return value
