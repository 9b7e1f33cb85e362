"""Sections of gpu_report.py about the CUDA extension: is it right, has a row one answer, how fast is it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_report_bits import BUCKETS, Rows, changes, differs, same_bits
from gpu_report_section import NotHere, Section, gpu_is_broken, has_gpu
from gpu_report_times import rates_of
from gpu_timing import Gpu, num_sets
from kernel_cases import Projection, check_projection, linear_setup, projections
from serving_bounds import Work
from torch import Tensor

_DEVICE = "cuda"
# One answer is shown for batches up to this, row count by row count.
_MOST_ROWS = 130
_ACCURACY_ROWS = (1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 130)
_TIMED_ROWS = (1, 2, 4, 8, 16, 32, 64)
_REPEATS = 20


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
        for model, p in _projections(["8b", "1b"]):
            if not section.has(3, f"extension on {model} {p.op}"):
                complete = False
                continue
            torch.manual_seed(0)
            setup = linear_setup(p, _MOST_ROWS, torch.device(_DEVICE), 1)
            if not _serves(module, setup.sets[0][1], p):
                section.report("serves", f"cuda {model} {p.op}", "not served: Triton's kernel runs")
                continue
            if not _check(section, module, model, p, setup.sets[0]):
                return
    outcomes = [check["status"] for check in section.results.get("checks", [])]
    section.results["all_passed"] = complete and "passed" in outcomes and "failed" not in outcomes
    if section.results["all_passed"]:
        major, minor = torch.cuda.get_device_capability()
        entry = {f"{major}.{minor}": {"gpu": torch.cuda.get_device_name(), "report": section.options.get("report", "")}}
        section.results["entry"] = {module.extension()[0].source_hash: entry}


def _check(section: Section, module: Any, model: str, p: Projection, arguments: tuple[Any, ...]) -> bool:
    """All checks of one projection; False if the GPU no longer answers."""
    ours = _call(module, p)
    rows = Rows("cuda", f"{model} {p.op}", _MOST_ROWS, list(range(1, _MOST_ROWS + 1)), _rows(ours, arguments))
    checks: tuple[tuple[str, Callable[[], str | None]], ...] = (
        ("accuracy", lambda: _inaccurate(p, ours, arguments)),
        ("bits of rows", lambda: differs(rows)),
        ("repeats", lambda: changes(rows, _REPEATS)),
    )
    return all(section.attempt(f"{check}, {p.op}", f"cuda {model}", work) for check, work in checks)


def _projections(models: list[str]) -> Iterator[tuple[str, Projection]]:
    for model in models:
        for p in projections(model):
            yield model, p


def _serves(module: Any, weight: Tensor, p: Projection) -> bool:
    return bool(module.serves(weight, p.options["activation"]))


def _call(module: Any, p: Projection) -> Callable[..., Tensor]:
    def ours(x: Tensor, weight: Tensor, residual: Tensor | None) -> Tensor:
        out: Tensor = module.linear(x, weight, residual=residual, **p.options)
        return out

    return ours


def _rows(ours: Callable[..., Tensor], arguments: tuple[Any, ...]) -> Callable[[int, int], tuple[Tensor, ...]]:
    x, weight, residual = arguments
    return lambda start, end: (ours(x[start:end], weight, None if residual is None else residual[start:end]),)


def _inaccurate(p: Projection, ours: Callable[..., Tensor], arguments: tuple[Any, ...]) -> str | None:
    from torch.nn.functional import linear

    x, weight, residual = arguments
    for count in _ACCURACY_ROWS:
        part = (x[:count], weight, None if residual is None else residual[:count])
        problem = check_projection(p, ours, linear, [part], lambda weight: weight)
        # A gated projection of few rows compares fewer outputs than the criterion wants only at toy widths.
        if problem is not None:
            return f"{count} rows: {problem}"
    return None


def times(section: Section) -> None:
    """The extension beside Triton's kernel and cuBLAS, 1 to 64 rows."""
    module = extension()
    if not section.earlier("extension").get("all_passed"):
        raise NotHere("its checks did not all pass in this run: not timed")
    gpu, rates = Gpu(seconds_per_case=0.02), rates_of(section)
    section.results["rows"] = rows = []
    with torch.no_grad():
        for count in _TIMED_ROWS if not section.quick else (1, 8, 64):
            for model, p in _projections(["8b", "1b"]):
                if not section.has(2, f"{model} {p.op}, {count} rows"):
                    return
                num_bytes = 2 * p.out_features * p.in_features + p.bytes_beside_weight(count)
                flops = 2 * count * p.out_features * p.in_features
                setup = linear_setup(p, count, gpu.device, num_sets(num_bytes, gpu.l2_bytes))
                if not _serves(module, setup.sets[0][1], p):
                    continue
                cublas, sets = setup.peers["torch"]()
                bound_us = 1e6 * rates.seconds(Work(num_bytes, flops))
                row: dict[str, Any] = {"model": model, "op": p.op, "rows": count, "bound_us": bound_us}
                row["us"] = gpu.time(_call(module, p), setup.sets)
                row["triton_us"] = gpu.time(setup.ours, setup.sets).median
                row["cublas_us"] = gpu.time(cublas, sets).median
                rows.append({**row, "share": bound_us / row["us"].median})
                section.save()
                gpu.release()


def roles_of_linear(section: Section) -> None:
    """Whether the extension's rows have the bits of Triton's kernel, which prompts take: found, not demanded."""
    try:
        module = extension()
    except NotHere as reason:
        section.not_run("prompt and generated", "cuda linear", str(reason))
        return
    with torch.no_grad():
        for model, p in _projections(["8b", "1b"]):
            setup = linear_setup(p, 64, torch.device(_DEVICE), 1)
            if not _serves(module, setup.sets[0][1], p):
                continue
            generated, prompt = _call(module, p)(*setup.sets[0]), setup.ours(*setup.sets[0])
            different = int((generated != prompt).sum())
            finding = (
                "equal bits" if same_bits(generated, prompt) else f"{different} of {prompt.numel()} outputs differ"
            )
            section.report("prompt and generated", f"linear {model} {p.op}", finding)
            if gpu_is_broken():
                return


def launch_extension(device: torch.device) -> None:
    """Every form of the extension's linear on small shapes, for compute-sanitizer; nothing where it is not built."""
    try:
        module = extension()
    except NotHere as reason:
        print(f"cuda linear: {reason}")
        return
    for p in projections("smoke"):
        for count in (1, 3, 17, *BUCKETS[-1:]):
            setup = linear_setup(p, count, device, 1)
            if _serves(module, setup.sets[0][1], p):
                _call(module, p)(*setup.sets[0])
                torch.cuda.synchronize()
                print(f"cuda linear {p.op}, {count} rows")
