"""Sections of gpu_report.py about the CUDA extension's int4_linear: right or not, one answer for a row, how fast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from gpu_report_bits import BUCKETS, Rows, changes, differs, same_bits
from gpu_report_section import NotHere, Section, gpu_is_broken, has_gpu
from gpu_report_times import rates_of
from gpu_timing import Gpu, num_sets
from kernel_cases import GROUP_SIZE, ITEM, Projection, Setup, int4_setup, linear_setup, projections
from serving_bounds import Work
from torch import Tensor

_DEVICE = "cuda"
# One answer is shown for batches up to this, row count by row count; further forms of a weight up to fewer.
_MOST_ROWS, _FEW_ROWS = 130, 40
_ACCURACY_ROWS = (1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 130)
_TIMED_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
# The others' times at these; of bf16 at all from 8 on for the larger model, where the extension must win too.
_PEER_ROWS = (1, 8, 64)
_MORE_ROWS = {"8b": (16, 32, 128)}
_REPEATS = 20


@dataclass(frozen=True)
class _Form:
    """How a weight is quantized."""

    group_size: int = GROUP_SIZE
    has_zeros: bool = False

    def __str__(self) -> str:
        return f"groups of {self.group_size}{', zeros' if self.has_zeros else ''}"


# Every group size with each number of token and weight tiles of the kernel whose rows of x stay is among them.
_FORMS = {
    "8b": (_Form(), _Form(has_zeros=True)),
    "1b": (_Form(), _Form(32, has_zeros=True), _Form(32), _Form(64, has_zeros=True)),
}


def extension() -> Any:
    """The module of the extension's ops.

    Raises:
        NotHere: it is not part of this version, was not built, or there is no GPU.
    """
    if not has_gpu():
        raise NotHere("no GPU")
    try:
        from llama_fast.ops import cuda_extension
    except ImportError as error:
        raise NotHere(f"this version has no CUDA extension ({error})") from None
    module, reason = cuda_extension.extension()
    if module is None:
        raise NotHere(reason)
    return cuda_extension


def checks(section: Section) -> None:
    """Accuracy, one answer for 1 to 130 rows, repeats; where all passes, the entry of cuda_checked.json."""
    module = extension()
    complete = True
    with torch.no_grad():
        for model, p, form in _uses():
            if not section.has(3, f"extension on {model} {p.op}, {form}"):
                complete = False
                continue
            torch.manual_seed(0)
            rows = _MOST_ROWS if form == _Form() else _FEW_ROWS
            setup = int4_setup(p, rows, torch.device(_DEVICE), 1, form.group_size, form.has_zeros)
            if not _serves(module, setup.sets[0][1], p):
                section.report("serves", f"cuda {model} {p.op}, {form}", "not served: Triton's kernel runs")
                continue
            if not _check(section, module, f"{model}, {form}", p, setup, rows):
                return
    outcomes = [check["status"] for check in section.results.get("checks", [])]
    section.results["all_passed"] = complete and "passed" in outcomes and "failed" not in outcomes
    if section.results["all_passed"]:
        major, minor = torch.cuda.get_device_capability()
        entry = {f"{major}.{minor}": {"gpu": torch.cuda.get_device_name(), "report": section.options.get("report", "")}}
        section.results["entry"] = {module.extension()[0].source_hash: entry}


def _check(section: Section, module: Any, label: str, p: Projection, setup: Setup, most: int) -> bool:
    """All checks of one weight; False if the GPU no longer answers."""
    ours, arguments = _call(module, p), setup.sets[0]
    rows = Rows("cuda", f"{label} {p.op}", most, list(range(1, most + 1)), _rows(ours, arguments))
    checks: tuple[tuple[str, Callable[[], str | None]], ...] = (
        ("accuracy", lambda: _inaccurate(ours, setup, most)),
        ("bits of rows", lambda: differs(rows)),
        ("repeats", lambda: changes(rows, _REPEATS)),
    )
    return all(section.attempt(f"{check}, {p.op}", f"cuda {label}", work) for check, work in checks)


def _uses() -> Iterator[tuple[str, Projection, _Form]]:
    """The plainest form of each model first."""
    for index in range(max(map(len, _FORMS.values()))):
        for model, forms in _FORMS.items():
            for p in _projections(model) if index < len(forms) else ():
                yield model, p, forms[index]


def _projections_of_all() -> Iterator[tuple[str, Projection]]:
    for model in _FORMS:
        for p in _projections(model):
            yield model, p


def _projections(model: str) -> list[Projection]:
    """Those that are quantized."""
    return [p for p in projections(model) if not p.head]


def _serves(module: Any, weight: Any, p: Projection) -> bool:
    return bool(module.serves(weight, p.options["activation"]))


def _call(module: Any, p: Projection) -> Callable[..., Tensor]:
    def ours(x: Tensor, weight: Any, residual: Tensor | None) -> Tensor:
        out: Tensor = module.int4_linear(x, weight, residual=residual, **p.options)
        return out

    return ours


def _part(arguments: tuple[Any, ...], start: int, end: int) -> tuple[Any, ...]:
    x, weight, residual = arguments
    return x[start:end], weight, None if residual is None else residual[start:end]


def _rows(ours: Callable[..., Tensor], arguments: tuple[Any, ...]) -> Callable[[int, int], tuple[Tensor, ...]]:
    return lambda start, end: (ours(*_part(arguments, start, end)),)


def _inaccurate(ours: Callable[..., Tensor], setup: Setup, most: int) -> str | None:
    """Triton's check of a setup, of the extension on parts of its rows."""
    assert setup.check_with is not None
    for count in (rows for rows in _ACCURACY_ROWS if rows <= most):
        problem = setup.check_with(ours, [_part(setup.sets[0], 0, count)])
        # A gated projection of few rows compares fewer outputs than the criterion wants only at toy widths.
        if problem is not None:
            return f"{count} rows: {problem}"
    return None


def times(section: Section) -> None:
    """The extension beside Triton's kernels on 4 and 16 bits and PyTorch's int4 product, 1 to 128 rows."""
    module = extension()
    if not section.earlier("extension").get("all_passed"):
        raise NotHere("its checks did not all pass in this run: not timed")
    gpu, rates = Gpu(seconds_per_case=0.02), rates_of(section)
    section.results["rows"] = rows = []
    with torch.no_grad():
        for model, p in _projections_of_all():
            if not section.has(3, f"{model} {p.op}"):
                return
            weights = p.out_features * p.in_features
            weight_bytes = weights // 2 + weights // GROUP_SIZE * ITEM
            setup = int4_setup(p, max(_TIMED_ROWS), gpu.device, num_sets(weight_bytes, gpu.l2_bytes))
            if not _serves(module, setup.sets[0][1], p):
                continue
            peers = _peers(section, gpu, model, p, setup)
            for count in _TIMED_ROWS if not section.quick else (1, 8, 64):
                num_bytes, flops = weight_bytes + p.bytes_beside_weight(count), 2 * count * weights
                sets = [_part(arguments, 0, count) for arguments in setup.sets]
                bound_us = 1e6 * rates.seconds(Work(num_bytes, flops))
                row: dict[str, Any] = {"model": model, "op": p.op, "rows": count, "bound_us": bound_us}
                row["us"] = gpu.time(_call(module, p), sets)
                row["triton_us"] = gpu.time(setup.ours, sets).median
                for name, (function, make) in peers.items():
                    if count in _PEER_ROWS or (name == "bf16_us" and count in _MORE_ROWS.get(model, ())):
                        row[name] = gpu.time(function, make(count)).median
                rows.append({**row, "share": bound_us / row["us"].median})
                section.save()
            gpu.release()


def _peers(section: Section, gpu: Any, model: str, p: Projection, setup: Setup) -> dict[str, Any]:
    """By the name of their time: a function, and what makes its sets for a number of rows."""
    dense_bytes = ITEM * p.out_features * p.in_features
    dense = linear_setup(p, max(_TIMED_ROWS), gpu.device, num_sets(dense_bytes, gpu.l2_bytes))
    peers = {"bf16_us": (dense.ours, lambda count: [_part(arguments, 0, count) for arguments in dense.sets])}
    try:
        function, sets = setup.peers["torch"]()
        function(*sets[0])
        torch.cuda.synchronize()
    # Not every version runs it on every GPU; without it the others are still compared.
    except Exception as error:
        section.not_run(
            "peer", f"torch {model} {p.op}", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        )
        return peers
    return peers | {"torch_us": (function, lambda count: [(x[:count], *rest) for x, *rest in sets])}


def roles_of_linear(section: Section) -> None:
    """Whether the extension's rows have the bits of Triton's kernel, which prompts take: found, not demanded."""
    try:
        module = extension()
    except NotHere as reason:
        section.not_run("prompt and generated", "cuda int4_linear", str(reason))
        return
    with torch.no_grad():
        for model, p in _projections_of_all():
            setup = int4_setup(p, 64, torch.device(_DEVICE), 1)
            if not _serves(module, setup.sets[0][1], p):
                continue
            generated, prompt = _call(module, p)(*setup.sets[0]), setup.ours(*setup.sets[0])
            different = int((generated != prompt).sum())
            finding = (
                "equal bits" if same_bits(generated, prompt) else f"{different} of {prompt.numel()} outputs differ"
            )
            section.report("prompt and generated", f"int4_linear {model} {p.op}", finding)
            if gpu_is_broken():
                return


def launch_extension(device: torch.device) -> None:
    """Every form of the extension's kernel on small shapes, for compute-sanitizer; nothing where it is not built."""
    try:
        module = extension()
    except NotHere as reason:
        print(f"cuda int4_linear: {reason}")
        return
    for p, form in ((p, form) for p in _projections("smoke") for form in _FORMS["1b"]):
        for count in (1, 3, 12, 17, *BUCKETS[-1:]):
            setup = int4_setup(p, count, device, 1, form.group_size, form.has_zeros)
            if _serves(module, setup.sets[0][1], p):
                _call(module, p)(*setup.sets[0])
                torch.cuda.synchronize()
                print(f"cuda int4_linear {p.op}, {form}, {count} rows")
