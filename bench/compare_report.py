"""What compare_cpu.py's samples say: medians, shares of bounds, ratios of ours to a peer's, and the targets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from timing import Summary

OURS, LLAMA_CPP, TRANSFORMERS = "llama_fast", "llama.cpp", "transformers"
LLAMA_CPP_INT4 = f"{LLAMA_CPP} q4_0"
DECODE_1, DECODE_8, PREFILL = "decode batch 1", "decode batch 8", "prefill"

# Work -> peer -> least ratio of our tokens/s to its.
_LEAST_RATIO = {
    DECODE_1: {LLAMA_CPP: 1.0, LLAMA_CPP_INT4: 1.15},
    DECODE_8: {LLAMA_CPP: 1.25, LLAMA_CPP_INT4: 1.25},
    PREFILL: {LLAMA_CPP: 1.15, TRANSFORMERS: 1.15, LLAMA_CPP_INT4: 1.0},
}
_LEAST_SHARE = {DECODE_1: 0.8}
_MOST_OVERHEAD_SHARE, _MOST_DEMO_OVERHEAD_US = 0.03, 400.0
_EXTRA_BYTES = 100_000_000
_MOST_LOAD = 1.2  # times its bound


@dataclass(frozen=True)
class Target:
    """What was wanted and what came."""

    name: str
    value: float
    limit: float
    at_least: bool
    unit: str = ""

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        sign, verdict = ">=" if self.at_least else "<=", "met" if self.met else "MISSED"
        value, limit = shown(self.value, self.unit), shown(self.limit, self.unit)
        return f"target   {self.name:40} {value:>10}  {sign} {limit:11} {verdict}"

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, "value": self.value, "limit": self.limit, "at_least": self.at_least, "met": self.met}


def shown(value: float, unit: str) -> str:
    if unit == "%":
        return f"{value:.1%}"
    if unit == "x":
        return f"{value:.2f}x"
    return f"{value:,.1f}{' ' if unit else ''}{unit}"


def ratios(ours: Sequence[float], others: Sequence[float]) -> Summary:
    """Each round's ratio, then their median: other load on the machine, and its speed, drift between rounds."""
    return Summary.of([a / b for a, b in zip(ours, others, strict=True)])


def speed_rows(
    samples: Mapping[str, Mapping[str, Sequence[float]]], bounds: Mapping[str, Sequence[float]]
) -> list[dict[str, Any]]:
    """A row for each work and program, from tokens/s by round of both and by round of the bound."""
    rows = []
    for work, by_program in samples.items():
        for program, rates in by_program.items():
            row = {"work": work, "program": program, "tokens_per_s": Summary.of(rates), "samples": list(rates)}
            row |= {"bound": Summary.of(bounds[work]), "share_of_bound": ratios(rates, bounds[work])}
            if program != OURS and OURS in by_program:
                row["ours_to_it"] = ratios(by_program[OURS], rates)
            rows.append(row)
    return rows


def speed_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [f"{'':16} {'program':16} {'tokens/s':>10} {'p10':>10} {'p90':>10} {'of bound':>9} {'ours/it':>8}  target"]
    for row in rows:
        rate, work, program = row["tokens_per_s"], row["work"], row["program"]
        ratio = f"{row['ours_to_it'].median:.2f}x" if "ours_to_it" in row else ""
        least = _LEAST_RATIO.get(work, {}).get(program)
        target = "" if least is None else f">= {least:.2f}x"
        if program == OURS and work in _LEAST_SHARE:
            target = f">= {_LEAST_SHARE[work]:.0%} of bound"
        numbers = f"{rate.median:>10,.2f} {rate.p10:>10,.2f} {rate.p90:>10,.2f} {row['share_of_bound'].median:>9.1%}"
        lines.append(f"{work:16} {program:16} {numbers} {ratio:>8}  {target}".rstrip())
    return lines


def start_rows(samples: Mapping[str, Sequence[Mapping[str, float]]]) -> list[dict[str, Any]]:
    """A row for each program, from what its new processes told: load to first token against its parts, peak memory."""
    rows = []
    for program, starts in samples.items():
        seconds = {key: [start[key] for start in starts] for key in ("first_token_s", "read_s", "prefill_s")}
        bound = [read + prefill for read, prefill in zip(seconds["read_s"], seconds["prefill_s"], strict=True)]
        row: dict[str, Any] = {"program": program, **{key: Summary.of(values) for key, values in seconds.items()}}
        row |= {"bound_s": Summary.of(bound), "times_bound": ratios(seconds["first_token_s"], bound)}
        if all("peak_bytes" in start for start in starts):
            row["peak_bytes"] = max(int(start["peak_bytes"]) for start in starts)
        rows.append(row)
    return rows


def start_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    titles = f"{'seconds':>13} {'p10':>8} {'p90':>8} {'bound':>8} {'times it':>9} {'peak memory':>12}"
    lines = [f"load to first token {titles}"]
    for row in rows:
        first = row["first_token_s"]
        memory = f"{row['peak_bytes'] / 1e6:,.0f} MB" if "peak_bytes" in row else "unknown"
        numbers = f"{first.median:>13.3f} {first.p10:>8.3f} {first.p90:>8.3f} {row['bound_s'].median:>8.3f}"
        lines.append(f"{row['program']:19} {numbers} {row['times_bound'].median:>8.2f}x {memory:>12}")
    return lines


def overhead_row(model: str, ops: Mapping[str, Any], native: Mapping[str, Any] | None) -> dict[str, Any]:
    """Of each decode step, what was spent outside the backend's ops and outside compiled functions, if it has any.

    `overhead_*` is the latter where there is one.
    """
    outside_ops = [step - inside for step, inside in zip(ops["step_s"], ops["inside_s"], strict=True)]
    row = {"model": model, "outside_ops_us": Summary.of([1e6 * s for s in outside_ops]), "native": native is not None}
    steps = ops if native is None else native
    outside = [step - inside for step, inside in zip(steps["step_s"], steps["inside_s"], strict=True)]
    row["step_us"] = Summary.of([1e6 * s for s in steps["step_s"]])
    row["overhead_us"] = Summary.of([1e6 * s for s in outside])
    row["overhead_share"] = ratios(outside, steps["step_s"])
    return row


def overhead_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for row in rows:
        us, step_us, share = row["overhead_us"], row["step_us"].median, row["overhead_share"].median
        spread = f"(p10 {us.p10:,.0f}, p90 {us.p90:,.0f})"
        where = "compiled functions" if row["native"] else "the ops"
        part = f", {row['outside_ops_us'].median:,.0f} us outside the ops" if row["native"] else ""
        lines.append(f"overhead {row['model']}: {us.median:,.0f} us {spread} of a step's {step_us:,.0f}, {share:.1%}")
        lines[-1] += f", outside {where}{part}"
    return lines


def targets(
    speed: Sequence[Mapping[str, Any]],
    starts: Sequence[Mapping[str, Any]],
    overheads: Sequence[Mapping[str, Any]],
    held_bytes: int,
) -> list[Target]:
    """Every target that was measured; `held_bytes` are those of the weights and the cache."""
    found = []
    for row in speed:
        work, program = row["work"], row["program"]
        if program == OURS and work in _LEAST_SHARE:
            share = row["share_of_bound"].median
            found.append(Target(f"{work}: share of the bound", share, _LEAST_SHARE[work], True, "%"))
        least = _LEAST_RATIO.get(work, {}).get(program)
        if least is not None and "ours_to_it" in row:
            found.append(Target(f"{work}: ours / {program}", row["ours_to_it"].median, least, True, "x"))
    for row in starts:
        if row["program"] != OURS:
            continue
        found.append(Target("load to first token / bound", row["times_bound"].median, _MOST_LOAD, False, "x"))
        if "peak_bytes" in row:
            limit = (held_bytes + _EXTRA_BYTES) / 1e6
            found.append(Target("peak memory", row["peak_bytes"] / 1e6, limit, False, "MB"))
    for row in overheads:
        if row["model"] == "demo":
            us = row["overhead_us"].median
            found.append(Target("engine overhead, demo", us, _MOST_DEMO_OVERHEAD_US, False, "us"))
        else:
            share = row["overhead_share"].median
            found.append(Target(f"engine overhead, {row['model']}", share, _MOST_OVERHEAD_SHARE, False, "%"))
    return found
