"""The free choices of kernels/configs.py, measured on this GPU: tiles of linear, int4_linear and attention.

Choices    one for each tile of the tables: what stays is its outputs by rows (or its head size); what varies is the
           step along in_features, warps and stages. Then tiles that the tables do not have. `--list` prints them.
Candidates fit the chip's shared memory and registers; take the table's family of matrix instructions (read from the
           compiled kernel); and give every output the bits that the first tile of the table gives it. The others are
           named and dropped: a table of mixed bits would break "one answer".
Timed      as bench_kernels.py does, on the shapes of Llama 3.2 1B and 3.1 8B: all candidates on a few of them, then the
           best and the current one on all. The score is the geometric mean of time over the current one's time.
Prints     a table for each choice, the current configuration first; then lines to paste into configs.py; then JSON.
"""

import argparse
import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_timing import Gpu, num_sets
from kernel_cases import DTYPE, GROUP_SIZE, MODELS, Setup, Shape, attention_setup, int4_setup, linear_setup, projections
from timing import json_line
from tqdm import tqdm

from llama_fast.kernels import attention, configs, int4_linear, linear

_FINALISTS = 4
# Less than this is the spread of the measurement.
_MIN_GAIN = 0.01
_MAX_ACCUMULATORS = 128  # registers of a thread that hold sums
_EXAMPLES = """examples:
  python bench/tune.py --list                        every choice and its candidates, without a GPU
  python bench/tune.py --minutes 4                   all choices that four minutes allow
  python bench/tune.py --only linear:64x16,gated     one tile of linear; all of gate and up
  python bench/tune.py --only linear:1               the tiles that are timed at one row
  python bench/tune.py --only attention_prompt:128 --json tune.json"""


@dataclass(frozen=True)
class Choice:
    """One free choice.

    Attributes:
        kind, slot: its name, and what stays.
        lookup: the function of configs that makes it.
        kernel: the module and name of the kernel that it shapes.
        current: what configs says.
        base: decides what bits are right.
        candidates: without the current one.
        rows: what it is timed at, for selection.
        cases: label and a function that makes inputs (device, L2 bytes), the first ones for the first round.
        first: how many cases the first round takes.
        new: whether the candidates are tiles that the table does not have; `current` is then what has their rows.
    """

    kind: str
    slot: str
    lookup: str
    kernel: tuple[Any, str]
    current: Any
    base: Any
    candidates: tuple[Any, ...]
    rows: tuple[int, ...]
    cases: tuple[tuple[str, Callable[[torch.device, int], Setup]], ...]
    first: int
    new: bool = False

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.slot}"


@dataclass
class Result:
    """One candidate: what the compiler made of it, times in us by case, or why it is out."""

    tile: Any
    family: str = ""
    registers: int | None = None
    spills: int | None = None
    shared: int | None = None
    us: dict[str, float] = field(default_factory=dict)
    score: float = math.inf
    dropped: str | None = None


# --- which tile a launch takes ---------------------------------------------------------------------------------------


# Of this thread: the tile that launches take, and the compiled kernels of its launches. Candidates compile in threads.
_trial = threading.local()


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Another value for a module's name."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def forced(tile: Any) -> Iterator[list[Any]]:
    """Launches of this thread take `tile`, inside `open_to_trials`; yields the list of kernels they compiled to."""
    _trial.tile, _trial.compiled = tile, []
    try:
        yield _trial.compiled
    finally:
        _trial.tile = None


@contextlib.contextmanager
def open_to_trials(choice: Choice) -> Iterator[None]:
    """Where `forced` has an effect."""
    lookup = getattr(configs, choice.lookup)
    module, name = choice.kernel
    kernel = getattr(module, name)

    def tile(*arguments: Any, **options: Any) -> Any:
        trial = getattr(_trial, "tile", None)
        return lookup(*arguments, **options) if trial is None else trial

    class Recorder:
        def __getitem__(self, grid: Any) -> Callable[..., Any]:
            def launch(*arguments: Any, **options: Any) -> Any:
                compiled = kernel[grid](*arguments, **options)
                getattr(_trial, "compiled", []).append(compiled)
                return compiled

            return launch

    with replaced(configs, choice.lookup, tile), replaced(module, name, Recorder()):
        yield


def family(compiled: Any) -> str:
    """The matrix instructions of a compiled kernel."""
    ptx = getattr(compiled, "asm", {}).get("ptx", "")
    for name in ("tcgen05.mma", "wgmma.mma_async", "mma.sync"):
        if name in ptx:
            return name.removesuffix(".mma").removesuffix(".mma_async")
    return "none" if ptx else "not compiled"


# --- choices ---------------------------------------------------------------------------------------------------------


def linear_fits(table: int, gated: bool, tile: configs.LinearTile) -> bool:
    """Whether a tile's buffers fit shared memory and its sums the registers."""
    weights = tile.block_out * (2 if gated else 1)
    shared = tile.num_stages * (weights + tile.block_rows) * tile.block_k * DTYPE.itemsize
    sums = weights * tile.block_rows // (32 * tile.num_warps)
    return shared <= configs.SHARED_BYTES[table] and sums <= _MAX_ACCUMULATORS


def int4_fits(table: int, tile: configs.Int4Tile) -> bool:
    """The same for int4_linear, whose sums of a group stand beside those of all groups."""
    words = tile.block_out * 16 * 4
    shared = tile.num_stages * (words + GROUP_SIZE * tile.block_rows * DTYPE.itemsize)
    sums = 2 * tile.block_out * tile.block_rows // (32 * tile.num_warps)
    return shared <= configs.SHARED_BYTES[table] and sums <= _MAX_ACCUMULATORS


def attention_fits(table: int, head_dim: int, tile: configs.AttentionTile) -> bool:
    """The same for attention: pages of K and V in stages; sums of a split, sums of all, and scores."""
    page = 64
    shared = (tile.num_stages * 2 * page + tile.block_m) * head_dim * DTYPE.itemsize
    sums = tile.block_m * (head_dim + page) // (32 * tile.num_warps)
    return shared <= configs.SHARED_BYTES[table] and sums <= _MAX_ACCUMULATORS


def _rows_of(block_rows: int, smoke: bool) -> tuple[int, ...]:
    """Rows that a tile of this width is for."""
    if smoke:
        return (3,)
    return {16: (1, 16), 32: (32,), 64: (64,), 128: (128, 512), 256: (512, 4096)}.get(block_rows, (block_rows,))


def _projection_cases(
    models: Sequence[str], rows: Sequence[int], gated: bool, make: Callable[..., Setup], weight_bytes: float
) -> tuple[tuple[str, Callable[[torch.device, int], Setup]], ...]:
    """The projections of some models; those of one size of the first round first."""
    found = []
    for model in models:
        for p in projections(model):
            # The head is another epilogue of the same loop, and large.
            if p.head or p.gated != gated:
                continue
            for count in rows:

                def build(device: torch.device, l2_bytes: int, p: Any = p, count: int = count) -> Setup:
                    size = int(p.out_features * p.in_features * weight_bytes) + p.bytes_beside_weight(count)
                    return make(p, count, device, num_sets(size, l2_bytes))

                found.append((p.op != "qkv" and not gated, f"{model} {p.op.split()[0]} x{count}", build))
    found.sort(key=lambda case: case[0])
    return tuple(case[1:] for case in found)


def choices(table: int, models: Sequence[str], smoke: bool = False) -> list[Choice]:
    """All choices of a table, with the candidates that fit; `smoke`: of few rows."""
    makers = (_linear_choices, _int4_choices, _attention_choices)
    found = [choice for make in makers for choice in make(table, models, smoke)]
    return sorted(found, key=lambda choice: choice.new)


def _linear_choices(table: int, models: Sequence[str], smoke: bool) -> Iterator[Choice]:
    for gated in (False, True):
        tiles = configs.linear_tiles(table, DTYPE, gated)
        sizes = [(tile.block_out, tile) for tile in tiles]
        # Twice the outputs of the least that has as many rows.
        known = {(tile.block_out, tile.block_rows) for tile in tiles}
        doubled = {tile.block_rows: (2 * tile.block_out, tile) for tile in reversed(tiles)}
        sizes += [(outs, tile) for outs, tile in doubled.values() if (outs, tile.block_rows) not in known]
        for outs, current in sizes:
            rows = _rows_of(current.block_rows, smoke)
            steps = (64, 128, 256) if current.block_rows <= 64 else (32, 64, 128)
            stages = (3, 4, 5, 6, 8) if current.block_rows <= 64 else (2, 3, 4, 5, 6)
            candidates = [
                configs.LinearTile(outs, current.block_rows, step, warps, depth, current.step_ns)
                for warps in (4, 8)
                for step in steps
                for depth in stages
            ]
            choice = Choice(
                kind="gated" if gated else "linear",
                slot=f"{outs}x{current.block_rows}",
                lookup="linear_tile",
                kernel=(linear, "_linear_kernel"),
                current=current,
                base=tiles[0],
                candidates=_nearest_first(current, [t for t in candidates if linear_fits(table, gated, t)]),
                rows=rows,
                cases=_projection_cases(models, rows, gated, linear_setup, DTYPE.itemsize),
                first=len(rows) * len(models),
                new=outs != current.block_out,
            )
            if choice.candidates:
                yield choice


def _nearest_first(current: Any, candidates: list[Any]) -> tuple[Any, ...]:
    """Candidates but the current one, those that differ from it in the fewest fields first: time may run out."""

    def differing(tile: Any) -> int:
        return sum(value != asdict(current)[name] for name, value in asdict(tile).items())

    return tuple(sorted((tile for tile in candidates if tile != current), key=differing))


def _int4_choices(table: int, models: Sequence[str], smoke: bool) -> Iterator[Choice]:
    tiles = configs.int4_tiles(table, DTYPE, GROUP_SIZE)
    for most, current in tiles:
        rows = _rows_of(128 if most is None else most, smoke)
        candidates = [
            configs.Int4Tile(outs, width, warps, depth)
            for outs in (64, 128)
            for width in ((current.block_rows,) if most is not None else (64, 128, 256))
            for warps in (4, 8)
            for depth in (2, 3, 4, 5, 6, 8)
        ]
        size = 0.5 + DTYPE.itemsize / GROUP_SIZE
        cases = [_projection_cases(models, rows, gated, int4_setup, size) for gated in (True, False)]
        yield Choice(
            kind="int4",
            slot="any" if most is None else str(most),
            lookup="int4_tile",
            kernel=(int4_linear, "_int4_linear_kernel"),
            current=current,
            base=tiles[0][1],
            candidates=_nearest_first(current, [t for t in candidates if int4_fits(table, t)]),
            rows=rows,
            cases=tuple(case for part in cases for case in part),
            first=len(rows) * len(models),
        )


def _attention_choices(table: int, models: Sequence[str], smoke: bool) -> Iterator[Choice]:
    for generated in (False, True):
        sizes = ((1, 4096), (8, 1024), (64, 1024), (8, 4096)) if generated else ((512, 512), (4096, 4096))
        if smoke:
            sizes = ((3, 70),) if generated else ((70, 70),)
        for model in models:
            shape = MODELS[model]
            lookup = "generated_attention_tile" if generated else "prompt_attention_tile"
            current = getattr(configs, lookup)(table, DTYPE, shape.head_dim)
            candidates = [
                configs.AttentionTile(height, warps, depth)
                for height in ((16,) if generated else (64, 128))
                for warps in ((1, 2, 4, 8) if generated else (4, 8))
                for depth in (1, 2, 3, 4, 5)
            ]
            build = partial(_attention_case, shape, generated)
            yield Choice(
                kind="attention_generated" if generated else "attention_prompt",
                slot=str(shape.head_dim),
                lookup=lookup,
                kernel=(attention, "_generated_kernel" if generated else "_prompt_kernel"),
                current=current,
                base=current,
                candidates=_nearest_first(current, [t for t in candidates if attention_fits(table, shape.head_dim, t)]),
                rows=tuple(sorted({count for count, _ in sizes})),
                cases=tuple(
                    (f"{model} {count} rows, context {context}", partial(build, count, context))
                    for count, context in sizes
                ),
                first=2 if generated else 1,
            )


def _attention_case(
    shape: Shape, generated: bool, count: int, context: int, device: torch.device, l2_bytes: int
) -> Setup:
    num_seqs = count if generated else 1
    size = num_seqs * context * 2 * shape.num_kv_heads * shape.head_dim * DTYPE.itemsize
    return attention_setup(shape, count, context, generated, device, num_sets(size, l2_bytes))


def selected(found: list[Choice], only: str | None) -> list[Choice]:
    """Those that `--only` names: kind, kind:slot or kind:rows.

    Raises:
        ValueError: a name fits nothing.
    """
    if only is None:
        return found
    chosen: list[Choice] = []
    for part in only.split(","):
        kind, _, slot = part.partition(":")
        fitting = [c for c in found if c.kind == kind and slot in ("", c.slot)]
        if not fitting and slot.isdecimal():
            fitting = [c for c in found if c.kind == kind and int(slot) in c.rows]
        if not fitting:
            raise ValueError(
                f"--only {part}: use {', '.join(sorted({c.kind for c in found} | {c.name for c in found}))}"
            )
        chosen += [choice for choice in fitting if choice not in chosen]
    return chosen


# --- measuring -------------------------------------------------------------------------------------------------------


def describe(result: Result, compiled: list[Any]) -> None:
    """What the compiler made of the last launch."""
    kernel = compiled[-1] if compiled else None
    result.family = family(kernel)
    metadata = getattr(kernel, "metadata", None)
    result.shared = getattr(metadata, "shared", None)
    result.registers, result.spills = getattr(kernel, "n_regs", None), getattr(kernel, "n_spills", None)


def try_out(tile: Any, setups: Sequence[tuple[str, Setup]]) -> Result:
    """Compile for each case and launch once."""
    result = Result(tile)
    try:
        with forced(tile) as compiled:
            for _, setup in setups:
                setup.ours(*setup.sets[0])
        describe(result, compiled)
    # Out of shared memory, or a compiler that gives up: the others go on.
    except Exception as error:
        result.dropped = f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
    return result


def tune(choice: Choice, gpu: Any, jobs: int, over: Callable[[], bool]) -> list[Result]:
    """Results of a choice: the current tile first, then the others, best first.

    Args:
        over: whether the time is up; then what has been measured is what there is.
    """
    setups = [(label, build(gpu.device, gpu.l2_bytes)) for label, build in choice.cases[: choice.first]]
    with open_to_trials(choice):
        base = try_out(choice.base, setups)
        if base.dropped is not None:
            raise RuntimeError(f"the table's first tile {choice.base} does not run: {base.dropped}")
        tiles = [choice.current, *choice.candidates]
        # The interpreter knows one thread.
        with ThreadPoolExecutor(jobs if gpu.device.type == "cuda" else 1) as pool:
            results = list(pool.map(lambda tile: try_out(tile, setups), tiles))
        current = results[0]
        for result in results:
            if result.dropped is None and result.family != base.family:
                result.dropped = f"{result.family} instead of {base.family}"
        expected = [_output(choice.base, setup) for _, setup in setups]
        for result in tqdm(results, desc=choice.name, unit="tile", disable=None, leave=False):
            if over() and result is not current:
                result.dropped = result.dropped or "not run: the time was up"
            _measure(result, current, setups, expected, gpu)
        if current.dropped is None:
            best = sorted((r for r in results if r.dropped is None and r is not current), key=lambda r: r.score)
            for label, build in choice.cases[choice.first :]:
                if over():
                    break
                more = [(label, build(gpu.device, gpu.l2_bytes))]
                expected = [_output(choice.base, setup) for _, setup in more]
                for result in (current, *best[:_FINALISTS]):
                    _measure(result, current, more, expected, gpu)
                gpu.release()
    # A finalist has been timed on more cases: only those with all of them compare.
    others = sorted(results[1:], key=lambda r: (r.dropped is not None, -len(r.us), r.score))
    return [current, *others]


def _output(tile: Any, setup: Setup) -> torch.Tensor:
    with forced(tile):
        return setup.ours(*setup.sets[0])


def _measure(
    result: Result, current: Result, setups: list[tuple[str, Setup]], expected: list[torch.Tensor], gpu: Any
) -> None:
    """Bits, then time, on each case; stops at the first that is wrong."""
    for (label, setup), bits in zip(setups, expected, strict=True):
        if result.dropped is not None:
            return
        try:
            got = _output(result.tile, setup)
            if not torch.equal(got.view(torch.uint8), bits.view(torch.uint8)):
                result.dropped = f"other bits ({label})"
                return
            with forced(result.tile):
                result.us[label] = gpu.time(setup.ours, setup.sets).median
        except Exception as error:
            result.dropped = f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
            return
    ratios = [us / current.us[label] for label, us in result.us.items() if label in current.us]
    result.score = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else math.inf


def step_ns(choice: Choice, tile: Any, table: int, gpu: Any) -> float:
    """Time of one input feature of linear with a program on each processor: LinearTile.step_ns.

    The weight stays in L2, and the difference between two lengths is free of what a launch costs.
    """
    from llama_fast.kernels.linear import linear as function

    gated = choice.kind == "gated"
    weight_rows = tile.block_out * configs.PROCESSORS[table] * (2 if gated else 1)
    most = int(0.6 * gpu.l2_bytes) // (weight_rows * DTYPE.itemsize)
    long = max(4, most // tile.block_k) * tile.block_k
    lengths = (long // 2 // tile.block_k * tile.block_k, long)
    times = []
    with open_to_trials(choice), forced(tile):
        for length in lengths:
            x = torch.randn((tile.block_rows, length), dtype=DTYPE, device=gpu.device)
            weight = torch.randn((weight_rows, length), dtype=DTYPE, device=gpu.device)
            call = partial(function, activation="silu" if gated else None)
            times.append(gpu.time(call, [(x, weight)]).median)
    return 1e3 * (times[1] - times[0]) / (lengths[1] - lengths[0])


# --- output ----------------------------------------------------------------------------------------------------------


def short(tile: Any) -> str:
    """A tile as configs.py writes it."""
    return f"{type(tile).__name__}({', '.join(str(value) for value in asdict(tile).values())})"


def print_choice(choice: Choice, results: list[Result]) -> None:
    """The current tile, the five best of the others, and how many were dropped for which reason."""
    print(f"\n{choice.name}")
    current = results[0]
    for index, result in enumerate([current, *[r for r in results[1:] if r.dropped is None][:5]]):
        label = "current" if not index else f"{result.score - 1:+.1%}"
        times = ", ".join(f"{case} {us:.2f}" for case, us in result.us.items()) or f"dropped: {result.dropped}"
        made = f"{result.family}, {result.registers} registers, {result.spills} spills"
        print(f"  {label:8} {short(result.tile):40} {made:40} us: {times}")
    reasons = [r.dropped.partition(":")[0].partition(" (")[0] for r in results if r.dropped is not None]
    for reason in sorted(set(reasons)):
        example = next(r for r in results if r.dropped is not None and r.dropped.startswith(reason))
        print(f"  dropped  {reasons.count(reason)}: {reason}; {short(example.tile)}: {example.dropped}")


def chosen_of(results: list[Result]) -> Result:
    """The best where it is clearly better on all that the current tile was timed on, otherwise the current one."""
    current = results[0]
    complete = [r for r in results[1:] if r.dropped is None and r.us.keys() == current.us.keys()]
    best = min(complete, key=lambda r: r.score, default=current)
    return best if best.score < 1 - _MIN_GAIN else current


def print_list(found: list[Choice]) -> None:
    for choice in found:
        timed = ", ".join(case for case, _ in choice.cases)
        print(f"{choice.name:24} {short(choice.current)}  current{' for its rows' * choice.new}; timed on {timed}")
        for tile in choice.candidates:
            print(f"{'':24} {short(tile)}")


def run(chosen: list[Choice], table: int, gpu: Any, args: argparse.Namespace) -> int:
    """Tune, print; the exit status: 1 if a choice could not be tuned."""
    start = time.monotonic()

    def over() -> bool:
        return time.monotonic() - start > 60 * args.minutes

    print(f"{gpu.name}, table {table}, bf16; measured: {gpu.bandwidth / 1e12:.3f} TB/s, {gpu.flops / 1e12:.1f} TFLOP/s")
    snippet: list[str] = []
    records: list[dict[str, Any]] = []
    failed = False
    for choice in chosen:
        if over():
            print(f"\n{choice.name}: not run, --minutes {args.minutes:g} were over")
            continue
        torch.manual_seed(args.seed)
        try:
            results = tune(choice, gpu, args.jobs, over)
            print_choice(choice, results)
            best = chosen_of(results)
            if results[0].dropped is not None:
                raise RuntimeError(f"the current tile is out: {results[0].dropped}")
            tile = best.tile
            if choice.kind in ("linear", "gated"):
                tile = replace(tile, step_ns=round(step_ns(choice, tile, table, gpu), 1))
        # One choice that does not run must not cost the others.
        except Exception as error:
            print(f"\n{choice.name}: failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            failed = True
            continue
        gain = f"{1 - best.score:.1%} faster" if best is not results[0] else "as it is"
        if choice.new:
            gain = f"not in the table; beside {short(choice.current)} {gain}"
        if best is not results[0] or not choice.new:
            snippet.append(f"{short(tile)},  # {choice.name}: {gain}")
        measured = [_record(result) for result in results]
        records.append({"choice": choice.name, "best": short(tile), "gain": gain, "results": measured})
        gpu.release()
    print(f"\nfor table {table} of kernels/configs.py:")
    print("\n".join(f"    {line}" for line in snippet))
    print(f"{time.monotonic() - start:.0f} s")
    line = json_line({"bench": "tune", "dtype": "bfloat16", "table": table, "choices": records}, gpu.name, args.commit)
    if args.json is None:
        print(line)
    else:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(line + "\n", encoding="utf-8")
    return int(failed)


def _record(result: Result) -> dict[str, Any]:
    return {**asdict(result), "tile": short(result.tile), "score": None if math.isinf(result.score) else result.score}


def main(argv: list[str] | None = None, gpu: Any | None = None) -> int:
    """The command.

    Args:
        gpu: in the place of the machine's GPU, for tests.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tables = sorted(set(configs.TABLES.values()))
    parser.add_argument("--list", action="store_true", help="print choices and candidates; needs no GPU")
    parser.add_argument("--table", type=int, choices=tables, default=90, help="for --list (default: %(default)s)")
    parser.add_argument("--only", metavar="KIND[:SLOT],...", help="some of the choices")
    parser.add_argument("--minutes", type=float, default=4.0, metavar="N", help="start nothing after (default: 4)")
    parser.add_argument("--models", default="1b,8b", help="shapes that are timed (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and two candidates: only checks the bench")
    parser.add_argument(
        "--jobs", type=int, default=min(8, os.cpu_count() or 1), metavar="N", help="threads that compile"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (default: %(default)s)")
    parser.add_argument("--commit", help="to write down where the copy that runs has no .git")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the line of JSON there instead of printing it")
    args = parser.parse_args(argv)
    if args.minutes <= 0 or args.jobs < 1:
        parser.error("--minutes and --jobs: give more than 0")
    models = ["smoke"] if args.smoke else args.models.split(",")
    for model in models:
        if model not in MODELS:
            parser.error(f"--models {model}: use {', '.join(MODELS)}")
    has_gpu = gpu is not None or torch.cuda.is_available()
    if not args.list and not has_gpu:
        print("tune.py measures, and PyTorch finds no GPU here; --list prints the candidates", file=sys.stderr)
        return 2
    if gpu is None and has_gpu and not args.list:
        gpu = Gpu(seconds_per_case=0.02)
    table = args.table if args.list else configs.table_of(gpu.device)
    if table not in tables:
        parser.error(f"{gpu.name} has no table in kernels/configs.py")
    found = choices(table, models, args.smoke)
    if args.smoke:
        found = [smoke_of(choice) for choice in found]
    try:
        chosen = selected(found, args.only)
    except ValueError as error:
        parser.error(str(error))
    if args.list:
        print_list(chosen)
        return 0
    with torch.no_grad():
        return run(chosen, table, gpu, args)


def smoke_of(choice: Choice) -> Choice:
    """Little of a choice: two candidates, two cases."""
    few = choice.candidates[:1] + choice.candidates[1:][-1:]
    return replace(choice, candidates=few, cases=choice.cases[:2], first=1)


if __name__ == "__main__":
    sys.exit(main())
