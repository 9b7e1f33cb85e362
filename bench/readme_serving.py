"""README's tables of what the serving benches measured."""

from types import UnionType
from typing import Any

# Of rows of bench_latency.py and bench_throughput.py: what bounds are made of, and what stands there in another form.
_NOT_SHOWN = ("num_bytes", "flops", "flops_per_byte", "flops_per_s", "itl_all_s")


def _median(values: dict[str, float]) -> float:
    """Of a summary (median) or of percentiles (p50)."""
    return values["median"] if "median" in values else values["p50"]


def serving_rows(results: list[dict[str, Any]]) -> list[list[str]]:
    """Rows of bench_latency.py or bench_throughput.py, whose columns are their own: settings, then times and rates."""
    every = [row for r in results for row in r["rows"]]
    names = [name for name in {name: None for row in every for name in row} if name not in ("program", *_NOT_SHOWN)]

    def of(kind: type | UnionType, *ends: str) -> list[str]:
        found = {
            name: [row[name] for row in every if row.get(name) is not None] for name in names if name.endswith(ends)
        }
        return [name for name, values in found.items() if values and all(isinstance(v, kind) for v in values)]

    shares = of(float, "share_of_bound")
    settings, bounds, shown = of(int | str, ""), of(float, "bound_s", "joules_per_token"), of(dict, "")
    columns = ["model", "program", *settings, *bounds, *shown, *shares, "where"]
    rows = []
    for r in results:
        for row in r["rows"]:
            cells = [f"{r['model']}, {r['dtype']}", str(row.get("program", ""))]
            cells += [
                f"{row[name]:,}" if isinstance(row.get(name), int) else str(row.get(name, "")) for name in settings
            ]
            cells += [_number(row[name], name) if row.get(name) is not None else "" for name in bounds]
            cells += [_number(_median(row[name]), name) if row.get(name) else "" for name in shown]
            cells += [f"{row[name]:.1%}" if row.get(name) is not None else "" for name in shares]
            rows.append([*cells, r["where"]])
    return [[name.replace("_", " ") for name in columns], *rows]


def _number(value: float, name: str) -> str:
    if name.endswith("per_s"):
        return f"{value:,.1f}"
    return f"{1e3 * value:,.2f} ms" if name.endswith("_s") or name == "seconds" else f"{value:,.3g}"


def mixed_rows(results: list[dict[str, Any]]) -> list[list[str]]:
    """Of bench_throughput.py --mixed: requests of many lengths, one by one, all at once, and beside llama.cpp."""
    header = ["model", "prompts/outputs", "program", "at once", "tokens/s", "to one by one", "of the ideal schedule"]
    header += ["host", "ours to it", "first token p50 / p90 / p99", "between tokens p50 / p90 / p99", "where"]

    def ratio(row: dict[str, Any], name: str) -> str:
        return f"{row[name]['median']:.2f}x" if row.get(name) else ""

    def share(row: dict[str, Any], name: str) -> str:
        return f"{row[name]:.1%}" if row.get(name) is not None else ""

    def points(values: dict[str, float], factor: float, unit: str) -> str:
        return " / ".join(f"{factor * values[name]:,.1f}" for name in ("p50", "p90", "p99")) + f" {unit}"

    rows = []
    for r in results:
        for row in r["rows"]:
            mix = f"{row['num_requests']} of {r['mix']}"
            cells = [f"{r['model']}, {r['dtype']}", mix, row["program"], str(row["batch_size"])]
            cells += [f"{row['output_tokens_per_s']['median']:,.1f}", ratio(row, "times_one_by_one")]
            cells += [share(row, "share_of_ideal"), share(row, "host_share"), ratio(row, "ours_to_it")]
            cells += [points(row["ttft_s"], 1, "s"), points(row["itl_s"], 1e3, "ms"), r["where"]]
            rows.append(cells)
    return [header, *rows]
