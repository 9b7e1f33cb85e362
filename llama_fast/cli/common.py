"""What the commands share: their common options, and reading text."""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_fast.errors import RequestError

if TYPE_CHECKING:
    from llama_fast.engine.sampling import SamplingParams

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
    modes = "mmap shares the files' pages; copy reads them into memory of its own (default: %(default)s)"
    command.add_argument("--load", choices=("mmap", "copy"), default="mmap", help=modes)
    rounded = "int4 rounds the weights while they are read"
    command.add_argument("--quantization", choices=("int4",), help=f"{rounded} (default: as they are)")


def where(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of LLM that `add_where` and `add_command` made."""
    return {name: getattr(args, name) for name in ("device", "dtype", "backend", "load", "quantization", "revision")}


def add_sampling(command: argparse.ArgumentParser) -> Any:
    """Options whose destinations are fields of SamplingParams; returns their group."""
    group = command.add_argument_group("sampling", "What is not given comes from the model's generation_config.json.")
    group.add_argument("--max-tokens", type=int, metavar="N", help="most new tokens (default: to the context's end)")
    group.add_argument("--min-tokens", type=int, default=0, metavar="N", help="no end before this many new tokens")
    group.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    group.add_argument("--top-k", type=int, metavar="K", help="draw from the K most probable tokens")
    group.add_argument("--top-p", type=float, metavar="P", help="draw from the most probable tokens that hold mass P")
    group.add_argument("--min-p", type=float, metavar="P", help="drop tokens below P times the most probable one")
    group.add_argument("--repetition-penalty", type=float, metavar="X", help="above 1: less of prompt and answer")
    group.add_argument("--frequency-penalty", type=float, default=0.0, metavar="X", help="per occurrence in the answer")
    group.add_argument("--presence-penalty", type=float, default=0.0, metavar="X", help="once if in the answer")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    group.add_argument("--ignore-eos", action="store_true", help="go on after the end-of-text token")
    group.add_argument("--seed", type=int, help="makes sampling repeatable (default: random; the last line tells it)")
    return group


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """SamplingParams of the options; what they refuse is wrong usage."""
    from llama_fast.engine.sampling import SamplingParams

    try:
        return SamplingParams(**{f.name: getattr(args, f.name) for f in fields(SamplingParams) if f.name in args})
    except RequestError as error:
        args.usage_error(str(error))
        raise  # not reached


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


def one_line(error: Exception) -> str:
    """Its message without the number that an OSError's begins with."""
    return re.sub(r"^\[Errno \d+\] ", "", " ".join(str(error).split()))


def positive(text: str) -> int:
    """A positive integer, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive integer")
    return value
