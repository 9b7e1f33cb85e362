"""Compile every kernel configuration that Llama models launch, without a GPU, and judge the machine code.

Exit status 1 on what no kernel may have: a stack frame or spills, more shared memory than the chip has, no 128-bit
loads where a thread has 16 bytes to load, a 16-bit matrix product without MMA, two MMA families in one route.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from tqdm import tqdm

from llama_fast.kernels.arguments import INTERPRETED
from llama_fast.kernels.configs import SHARED_BYTES
from llama_fast.kernels.launches import DTYPES, MODELS, Launch, Use, model_launches, set_chip, source_hash
from llama_fast.kernels.machine_code import OPTIONS, Row, measure, violations

_EXAMPLES = """examples:
  python -m llama_fast.kernels.compile_report --quick
  python -m llama_fast.kernels.compile_report --arch 90 --model 1b,8b --dtype bf16
  python -m llama_fast.kernels.compile_report --arch 90 --out bench/results/compile/triton-3.7.1/sm_90.json
  python -m llama_fast.kernels.compile_report --check bench/results/compile/*/*.json
"""
_EVERY: dict[str, list[Any]] = {"arch": list(SHARED_BYTES), "model": list(MODELS), "dtype": list(DTYPES)}
_QUICK: dict[str, list[Any]] = {"arch": [80, 90], "model": ["8b"], "dtype": ["bf16"]}
# What is measured: heading and field of Row.
_COLUMNS = {
    "regs": "registers",
    "stack": "stack",
    "spills": "spills",
    "shared": "shared",
    "128-bit loads": "wide_loads",
    "narrower": "narrow_loads",
    "MMA": "mma",
    "programs/SM": "programs",
}


def compile_launches(launches: dict[Launch, list[Use]], jobs: int) -> list[Row]:
    """Compile and measure, several at a time."""
    tqdm.monitor_interval = 0  # no thread: the pool forks
    results: dict[Launch, dict[str, Any]] = {}
    with tqdm(total=len(launches), desc="compiled", unit="kernel", file=sys.stderr, disable=None) as bar:
        for launch, result in _run(list(launches), jobs):
            results[launch] = result
            bar.update()
    return [_row(launch, uses, **results[launch]) for launch, uses in launches.items()]


def _run(launches: list[Launch], jobs: int) -> Iterator[tuple[Launch, dict[str, Any]]]:
    crashed = []
    with ProcessPoolExecutor(jobs, get_context("fork")) as pool:
        futures: dict[Future, Launch] = {pool.submit(_compile, launch): launch for launch in launches}
        for future in as_completed(futures):
            try:
                yield futures[future], future.result()
            except BrokenProcessPool:
                crashed.append(futures[future])
    # A compiler that crashes takes the pool with it, and only alone does it show which kernel it was.
    for launch in crashed:
        with ProcessPoolExecutor(1, get_context("fork")) as pool:
            try:
                yield launch, pool.submit(_compile, launch).result()
            except BrokenProcessPool:
                yield launch, {"error": "the compiler crashed"}


def _compile(launch: Launch) -> dict[str, Any]:
    set_chip(launch.arch)
    try:
        kernel = launch.kernel.preload(launch.data)
    # Anything can come out of a compiler.
    except Exception as error:
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    return measure(kernel, launch.arch)


def _row(launch: Launch, uses: Iterable[Use] = (), **measured: Any) -> Row:
    by_route: dict[str, dict[str, list[int]]] = {}
    for use in uses:
        rows = by_route.setdefault(use.route, {}).setdefault(use.model, [use.rows, use.rows])
        rows[:] = min(rows[0], use.rows), max(rows[1], use.rows)
    name = f"{launch.module.rpartition('.')[2]}.{launch.name}"
    return Row(launch.arch, name, launch.config, source_hash(launch.kernel), by_route, **measured)


def table(rows: Sequence[Row]) -> str:
    """Markdown, readable as it is: a table for each kernel, a column for each argument that differs."""
    groups: dict[tuple[int, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.arch, row.kernel, row.dtype), []).append(row)
    parts = []
    for (arch, kernel, dtype), group in groups.items():
        names = list(group[0].config)
        own = [name for name in names if any(row.config[name] != group[0].config[name] for row in group)]
        same = {n: group[0].config[n] for n in names if n not in own and (n.isupper() or n in OPTIONS)}
        lines = [["for", "rows", *own, *_COLUMNS], *(_cells(row, own) for row in group)]
        parts.append(f"## sm_{arch} {kernel} {dtype}\n\n{_words(same)}\n\n{_aligned(lines)}")
    return "\n\n".join(parts)


def _cells(row: Row, own: list[str]) -> list[str]:
    uses = ", ".join(f"{route} {'/'.join(models)}" for route, models in row.uses.items())
    least = min(rows[0] for models in row.uses.values() for rows in models.values())
    most = max(rows[1] for models in row.uses.values() for rows in models.values())
    measured = ["-" for _ in _COLUMNS]
    if not row.error:
        values = asdict(row)
        measured = [
            ", ".join(v) or "none" if isinstance(v, list) else str(v) for v in map(values.get, _COLUMNS.values())
        ]
    return [uses, str(least) if least == most else f"{least}-{most}", *(str(row.config[n]) for n in own), *measured]


def _words(config: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in config.items()) or "-"


def _aligned(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def write(path: Path, rows: Sequence[Row], selection: dict[str, Any]) -> None:
    """One JSON object, a line for each row, so that a change shows as a line."""
    head = json.dumps({"bench": "compile", "triton": triton.__version__, **selection})
    lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head[:-1]}, "rows": [\n{lines}\n]}}\n', encoding="utf-8")


def differences(path: Path) -> list[str]:
    """What a file says that the kernels of today would not, without compiling anything."""
    file = json.loads(path.read_text(encoding="utf-8"))
    told = {_key(row["arch"], row["kernel"], row["config"]): row["source"] for row in file["rows"]}
    launches = [
        launch for arch in file["arch"] for launch in model_launches(arch, file["model"], file["dtype"], file["quick"])
    ]
    now = {_key(row.arch, row.kernel, row.config): row.source for row in map(_row, launches)}
    return (
        [f"{path}: no longer launched: {key}" for key in told if key not in now]
        + [f"{path}: not in the file: {key}" for key in now if key not in told]
        + [f"{path}: the source changed: {key}" for key in now if told.get(key, now[key]) != now[key]]
    )


def changes(path: Path, rows: Sequence[Row]) -> list[str]:
    """Measured columns of `rows` that differ from a file's, if the same Triton made it."""
    file = json.loads(path.read_text(encoding="utf-8"))
    if file["triton"] != triton.__version__:
        return []
    told = {_key(row["arch"], row["kernel"], row["config"]): row for row in file["rows"]}
    found = []
    for row in rows:
        key = _key(row.arch, row.kernel, row.config)
        now = asdict(row)
        if key in told:
            different = [
                f"{name} {told[key][name]} -> {now[name]}" for name in _COLUMNS.values() if told[key][name] != now[name]
            ]
            found += [f"{path}: {key}: {', '.join(different)}"] * bool(different)
    return found


def _key(arch: int, kernel: str, config: dict[str, Any]) -> str:
    return f"sm_{arch} {kernel} {_words(config)}"


def _list_of(choices: Iterable[Any]) -> Callable[[str], list]:
    by_name = {str(choice): choice for choice in choices}

    def parse(text: str) -> list:
        for name in text.split(","):
            if name not in by_name:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(by_name)}")
        return [by_name[name] for name in dict.fromkeys(text.split(","))]

    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llama_fast.kernels.compile_report",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, what in (
        ("arch", "chips by compute capability"),
        ("model", "Llama models"),
        ("dtype", "dtypes of weights and activations"),
    ):
        every, quick = (",".join(map(str, choices[name])) for choices in (_EVERY, _QUICK))
        told = f"{what} (default: {every}; with --quick: {quick})"
        parser.add_argument(f"--{name}", type=_list_of(_EVERY[name]), metavar="A,B", help=told)
    parser.add_argument("--quick", action="store_true", help="few configurations: each kernel, its least and most rows")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the rows as JSON")
    parser.add_argument("--check", type=Path, nargs="+", metavar="FILE", help="compile nothing; are these files stale?")
    parser.add_argument(
        "--against", type=Path, nargs="+", metavar="FILE", help="also compare with these files' numbers"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="compilers at once")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(arguments)
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set, and interpreted kernels cannot be compiled; unset it")
    if args.jobs < 1:
        parser.error(f"argument --jobs: {args.jobs} is not a positive number")
    for path in (args.check or []) + (args.against or []):
        if not path.is_file():
            parser.error(f"no file {path}")
    if args.check:
        return _tell("stale; run compile_report again", [line for path in args.check for line in differences(path)])

    default = _QUICK if args.quick else _EVERY
    selection: dict[str, Any] = {name: getattr(args, name) or default[name] for name in _EVERY}
    launches: dict[Launch, list[Use]] = {}
    for arch in selection["arch"]:
        launches |= model_launches(arch, selection["model"], selection["dtype"], args.quick)
    rows = compile_launches(launches, args.jobs)
    print(table(rows))
    if args.out:
        write(args.out, rows, {**selection, "quick": args.quick})
    print(f"\n{len(rows)} configurations, Triton {triton.__version__}")
    changed = [line for path in args.against or [] for line in changes(path, rows)]
    return max(_tell("forbidden", violations(rows)), _tell("not what the file says", changed))


def _tell(what: str, problems: list[str]) -> int:
    for problem in problems:
        print(f"{what}: {problem}")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
