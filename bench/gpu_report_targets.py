"""What gpu_report.py's numbers are to reach, and what they reached."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def results_of(report: dict[str, Any], section: str) -> dict[str, Any]:
    """What a section found; {} where it found nothing or did not run."""
    found: dict[str, Any] = report["sections"].get(section, {}).get("results", {})
    return found


def steps_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of both models."""
    return [row for name in ("model_1b", "model_8b") for row in results_of(report, name).get("steps", [])]


def kernels_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of kernels, as bench_kernels.py writes them."""
    rows: list[dict[str, Any]] = results_of(report, "kernel_times").get("kernels", {}).get("rows", [])
    return rows


def _share(rows: list[dict[str, Any]], /, **wanted: Any) -> float | None:
    return next((row.get("share") for row in rows if all(row[name] == value for name, value in wanted.items())), None)


def _step(**wanted: Any) -> Callable[[dict[str, Any]], float | None]:
    return lambda report: _share(steps_of(report), variant=None, **wanted)


def _kernel(**wanted: Any) -> Callable[[dict[str, Any]], float | None]:
    return lambda report: _share(kernels_of(report), model="8b", **wanted)


def _at_64_mb(kernel: str) -> Callable[[dict[str, Any]], float | None]:
    def reached(report: dict[str, Any]) -> float | None:
        rows = [row for row in kernels_of(report) if row["kernel"] == kernel and "share" in row]
        # The rows that are next to it: one more or less cannot be told from it.
        near = [row for row in rows if abs(row["num_bytes"] - 64e6) < 1e6]
        return near[0]["share"] if near else None

    return reached


def _capture(report: dict[str, Any]) -> float | None:
    return results_of(report, "model_8b").get("capture_s")


def _warm_start(report: dict[str, Any]) -> float | None:
    rows = results_of(report, "starts").get("starts", [])
    return next((row["warm"]["total_s"] for row in rows if row["model"] == "8b"), None)


def invariance_costs(report: dict[str, Any]) -> dict[tuple[str, str, int, int], float]:
    """By model, kind, batch and context: how much longer our step takes than that of the best variant."""
    times: dict[tuple[str, str, int, int], dict[str | None, float]] = {}
    for row in steps_of(report):
        if "ms" in row:
            key = (row["model"], row["kind"], row["batch"], row["context"])
            times.setdefault(key, {})[row["variant"]] = row["ms"]["median"]
    costs = {}
    for key, found in times.items():
        others = [ms for variant, ms in found.items() if variant not in (None, "eager", "int4")]
        if None in found and others:
            costs[key] = found[None] / min(others) - 1
    return costs


def _invariance(report: dict[str, Any]) -> float | None:
    return max(invariance_costs(report).values(), default=None)


# (name, at least or at most, wanted, unit, how it is found)
_TARGETS: list[tuple[str, str, float, str, Callable[[dict[str, Any]], float | None]]] = [
    (
        "8B decode, batch 1, context 1024",
        ">=",
        0.85,
        "of bound",
        _step(model="8b", kind="decode", batch=1, context=1024),
    ),
    (
        "1B decode, batch 1, context 1024",
        ">=",
        0.70,
        "of bound",
        _step(model="1b", kind="decode", batch=1, context=1024),
    ),
    (
        "decode attention, batch 64, context 4096",
        ">=",
        0.85,
        "of bound",
        _kernel(kernel="attention", op="generated", rows=64, context=4096),
    ),
    (
        "8B decode, batch 128, context 1024",
        ">=",
        0.75,
        "of bound",
        _step(model="8b", kind="decode", batch=128, context=1024),
    ),
    ("8B prefill, 4096 tokens", ">=", 0.70, "of bound", _step(model="8b", kind="prefill", batch=1, context=4096)),
    (
        "prompt attention, causal, 16384 tokens, head_dim 128",
        ">=",
        0.60,
        "of bound",
        _kernel(kernel="attention", op="prompt", rows=16384),
    ),
    *(
        (f"{kernel}, 64 MB", ">=", 0.90, "of bound", _at_64_mb(kernel))
        for kernel in ("rms_norm", "rope_and_cache", "silu_mul")
    ),
    ("8B, capture of all batch sizes", "<=", 2.0, "s", _capture),
    ("8B, warm start to the first token", "<=", 6.0, "s", _warm_start),
    ("one answer costs, beside linears of cuBLAS", "<=", 0.05, "more time", _invariance),
]


def targets(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Every target with what this report reached; null where it did not measure that."""
    rows = []
    for name, sign, wanted, unit, find in _TARGETS:
        reached = find(report) if report["measured"] else None
        met = None if reached is None else reached >= wanted if sign == ">=" else reached <= wanted
        rows.append({"name": name, "sign": sign, "wanted": wanted, "unit": unit, "reached": reached, "met": met})
    return rows


def amount(value: float | None, unit: str) -> str:
    """A target's number as people read it."""
    if value is None:
        return "not measured yet"
    return f"{value:.2f} s" if unit == "s" else f"{value:.1%} {unit}"
