"""Sections of gpu_report.py that compare bits of single kernels: rows in any company, repeats, prompt and generated.

Without a GPU the kernels are interpreted, on a tiny model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from gpu_report_section import NotHere, Section, as_hardware_sums, gpu_is_broken, has_gpu
from kernel_cases import DTYPE, attention_setup, cases, int4_setup, linear_setup, projections
from torch import Tensor

from llama_fast.model.kv_cache import PAGE_SIZE, SPLIT_SIZE, LayerPages

# Batches that an engine runs are padded to such numbers.
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
_REPEATS = 20
# More rows than this are a prompt's, and of a tile that only prompts have.
_MOST_GENERATED, _MOST_PROMPT = 130, 1100


@dataclass(frozen=True)
class Rows:
    """One use of a kernel on rows that must not see each other.

    Attributes:
        kernel, label: which kernel, on what.
        most: rows that there are.
        thresholds: numbers of rows at which the kernel takes another tile.
        run: results of rows [start, end), each with a row first.
        buckets: further numbers of rows.
        step: parts start at multiples of it. Triton compiles a kernel anew for an address that is no multiple of 16
            bytes, which no buffer of an engine has.
    """

    kernel: str
    label: str
    most: int
    thresholds: list[int]
    run: Callable[[int, int], tuple[Tensor, ...]]
    buckets: tuple[int, ...] = BUCKETS
    step: int = 1

    @property
    def counts(self) -> list[int]:
        """Beside every threshold and bucket, and all rows."""
        beside = {count + step for count in (*self.thresholds, *self.buckets) for step in (-1, 0, 1)}
        return sorted({count for count in beside if 1 <= count <= self.most} | {self.most})


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal shape, dtype and bytes."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def differs(rows: Rows) -> str | None:
    """Where a row's bits depend on how many others there are, or None."""
    whole = rows.run(0, rows.most)
    for count in rows.counts:
        # From the front, from the back, and with other neighbours.
        last = rows.most - count
        for start in sorted({first // rows.step * rows.step for first in (0, last, last // 2)}):
            part = rows.run(start, start + count)
            for ours, all_of_them in zip(part, whole, strict=True):
                if not same_bits(ours, all_of_them[start : start + count]):
                    return f"{rows.label}: rows {start} to {start + count} alone and among {rows.most} differ"
    return None


def changes(rows: Rows, repeats: int) -> str | None:
    """Whether the same call gives other bits at another time."""
    for count in sorted({1, min(64, rows.most), rows.most}):
        first = [x.clone() for x in rows.run(0, count)]
        for repeat in range(1, repeats):
            if not all(map(same_bits, rows.run(0, count), first)):
                return f"{rows.label}: {count} rows, call {repeat + 1} differs from the first"
    return None


def every_use(models: list[str], device: torch.device, most: int, most_prompt: int) -> Iterator[Rows]:
    """Every kernel on the shapes of the models, one after the other: inputs are made when they are asked for."""
    for model in models:
        yield from _attention(model, device, most)
        yield from _others(model, device, most)
        # The most tiles, and so the most time.
        yield from _linear(model, device, most, most_prompt)
        yield from _int4(model, device, most_prompt)


def _linear(model: str, device: torch.device, most: int, most_prompt: int) -> Iterator[Rows]:
    from llama_fast.kernels import configs

    for p in projections(model):
        # A prompt's logits are those of its last row.
        rows = most if p.head else most_prompt
        setup = linear_setup(p, rows, device, 1)
        thresholds = configs.row_thresholds(configs.table_of(device), DTYPE, p.gated, p.out_features, rows)
        yield Rows("linear", f"{model} {p.op}", rows, thresholds, _sliced(setup.ours, setup.sets[0]))


def _int4(model: str, device: torch.device, most: int) -> Iterator[Rows]:
    from llama_fast.kernels import configs

    tiles = configs.int4_tiles(configs.table_of(device), DTYPE, 128)
    thresholds = [rows + 1 for rows, _ in tiles if rows is not None]
    for p in projections(model):
        if not p.head:
            setup = int4_setup(p, most, device, 1)
            yield Rows("int4_linear", f"{model} {p.op}", most, thresholds, _sliced(setup.ours, setup.sets[0]))


def _sliced(ours: Callable[..., Tensor], arguments: tuple[Any, ...]) -> Callable[[int, int], tuple[Tensor, ...]]:
    x, weight, residual = arguments
    return lambda start, end: (ours(x[start:end], weight, None if residual is None else residual[start:end]),)


def _attention(model: str, device: torch.device, most: int) -> Iterator[Rows]:
    from kernel_cases import MODELS

    # On both sides of the borders of pages and splits.
    borders = [PAGE_SIZE, SPLIT_SIZE, 2 * SPLIT_SIZE]
    lengths = [1, *(border + step for border in borders for step in (-1, 0, 1)), 2 * SPLIT_SIZE + PAGE_SIZE + 5]
    setup = attention_setup(MODELS[model], most, max(lengths), True, device, 1)
    q, pages, batch = setup.sets[0]
    seen = torch.tensor(list(itertools.islice(itertools.cycle(lengths), most)), device=device)
    batch = replace(batch, slots=seen - 1, seq_lens=seen)
    for generated in (True, False):
        label = f"{model} {'generated' if generated else 'prompts of one token'}"
        role = replace(batch, generated=generated)

        def run(start: int, end: int, role: Any = role) -> tuple[Tensor, ...]:
            return (setup.ours(q[start:end], pages, _part(role, start, end)),)

        yield Rows("attention", label, most, [], run)


def _part(batch: Any, start: int, end: int) -> Any:
    """Sequences [start, end) of a batch with one token a sequence."""
    count = end - start
    parts = {name: getattr(batch, name)[start:end] for name in ("token_ids", "slots", "seq_lens", "page_table")}
    parts |= {"cos": batch.cos[start:end], "sin": batch.sin[start:end]}
    return replace(batch, **parts, seq_ids=batch.seq_ids[:count], query_starts=batch.query_starts[: count + 1])


def _others(model: str, device: torch.device, most: int) -> Iterator[Rows]:
    kernels = ["rms_norm", "silu_mul", "rope_and_cache", "sample", "log_probs"]
    for case in cases([model], kernels, [most], [], []):
        setup = case.build(device, 0)
        arguments = setup.sets[0]

        def run(start: int, end: int, kernel: str = case.kernel, setup: Any = setup, a: Any = arguments) -> Any:
            if kernel == "rope_and_cache":
                return _rotated(setup.ours, a, start, end)
            if kernel == "sample":
                batch = replace(a[1], **{f.name: _cut(getattr(a[1], f.name), start, end) for f in fields(a[1])})
                return (setup.ours(a[0][start:end], batch),)
            given = [x[start:end] if isinstance(x, Tensor) and x.shape[0] == most else x for x in a]
            out = setup.ours(*given)
            return (out,) if isinstance(out, Tensor) else tuple(out)

        yield Rows(case.kernel, f"{model} {case.op}", most, [], run)


def _cut(value: Tensor | None, start: int, end: int) -> Tensor | None:
    return None if value is None else value[start:end]


def _rotated(ours: Callable[..., Tensor], arguments: tuple[Any, ...], start: int, end: int) -> tuple[Tensor, ...]:
    q, k, v, batch, pages = arguments
    written, part = LayerPages(pages.k.clone(), pages.v.clone()), _part(batch, start, end)
    rotated = ours(q[start:end], k[start:end], v[start:end], part, written)
    page, offset = part.pages_of_slots(PAGE_SIZE)
    return rotated, written.k[page, :, offset], written.v[page, :, offset]


# --- sections --------------------------------------------------------------------------------------------------------


def _uses(section: Section) -> tuple[Iterator[Rows], torch.device]:
    torch.manual_seed(0)
    if has_gpu():
        device, models = torch.device("cuda"), ["8b"] if section.quick else ["8b", "1b"]
        uses = every_use(models, device, _MOST_GENERATED, _MOST_PROMPT)
        # Four numbers of the smallest dtype are 16 bytes.
        return (replace(use, step=4) for use in uses), device
    if section.options.get("interpreted") is None:
        raise NotHere("no GPU")
    section.results["interpreted"] = True
    device = torch.device("cpu")
    # Interpreted launches take a tenth of a second: one tile and its neighbour, a row and three.
    uses = every_use(["smoke"], device, 3, 17)
    return (replace(use, buckets=(), thresholds=use.thresholds[:1]) for use in _one_of_each(uses)), device


def _one_of_each(uses: Iterator[Rows]) -> Iterator[Rows]:
    """The first use of every kernel."""
    seen: set[str] = set()
    for use in uses:
        if use.kernel not in seen:
            seen.add(use.kernel)
            yield use


def _each(section: Section, check: str, what: Callable[[Rows], str | None]) -> None:
    with torch.no_grad(), as_hardware_sums():
        uses, _ = _uses(section)
        while section.has(2, "further uses of the kernels"):
            try:
                rows = next(uses, None)
            except Exception as error:
                section.check(check, "inputs", f"{type(error).__name__}: {error}")
                return
            if rows is None or not section.attempt(f"{check}, {rows.label}", rows.kernel, lambda r=rows: what(r)):
                return


def rows(section: Section) -> None:
    """A row has the bits that it has alone, for numbers of rows on both sides of every threshold and bucket."""
    _control(section)
    _each(section, "bits of rows", _compiled_differs if has_gpu() else differs)


def _compiled_differs(rows: Rows) -> str | None:
    """As `differs`; what Triton compiles, threads compile before, and not one after the other when it is met."""
    rows.run(0, 1)  # alone: it also starts Triton's driver
    # A thread's first launch must find a context.
    with ThreadPoolExecutor(8, initializer=lambda: torch.zeros(1, device="cuda")) as pool:
        list(pool.map(lambda count: rows.run(0, count), rows.counts))
    return differs(rows)


def _control(section: Section) -> None:
    """A sum whose order follows the number of rows must be noticed."""
    x, weight = torch.randn(8, 4096), torch.randn(64, 4096)

    def by_rows(start: int, end: int) -> tuple[Tensor, ...]:
        part = x[start:end].double().float()
        if end - start < 2:
            return ((part[:, None] * weight).sum(-1),)
        return ((part[:, None, :2048] * weight[:, :2048]).sum(-1) + (part[:, None, 2048:] * weight[:, 2048:]).sum(-1),)

    noticed = differs(Rows("control", "a split that follows the rows", 8, [], by_rows)) is not None
    section.check("control", "bits of rows", None if noticed else "a split that follows the rows was not noticed")


def repeats(section: Section) -> None:
    """The same call gives the same bits each time."""
    count = 3 if section.options.get("interpreted") else _REPEATS
    _each(section, "repeats", lambda use: changes(use, count))


def roles(section: Section) -> None:
    """Whether a token has the same bits as a prompt's token and as a generated one: found, not demanded."""
    if not has_gpu():
        raise NotHere("no GPU")
    device = torch.device("cuda")
    with torch.no_grad():
        for model in ("8b", "1b"):
            generated, prompt = (use.run(0, use.most) for use in _attention(model, device, _MOST_GENERATED))
            section.report("prompt and generated", f"attention {model}", _equal(generated, prompt))
            if gpu_is_broken():
                return
    from gpu_report_extension import roles_of_linear

    roles_of_linear(section)


def _equal(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> str:
    different = sum(int((x != y).any(dim=-1).sum()) for x, y in zip(a, b, strict=True))
    return "equal bits" if all(map(same_bits, a, b)) else f"{different} of {len(a[0])} rows differ"
