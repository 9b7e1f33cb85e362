"""Tables and pictures of serving results. rich and matplotlib are optional: without them, plain text and no picture."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

_INSTALL = "pip install 'llama-fast[bench]'"
_PERCENTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


def percentiles(samples: Sequence[float]) -> dict[str, float]:
    """p50, p90, p99, mean and number of at least one sample; between two samples the quantiles are interpolated."""
    values = torch.tensor(samples, dtype=torch.float64)
    quantiles = values.quantile(torch.tensor(list(_PERCENTILES.values()), dtype=torch.float64)).tolist()
    return {**dict(zip(_PERCENTILES, quantiles, strict=True)), "mean": values.mean().item(), "count": len(samples)}


def all_gaps(times: Sequence[Sequence[float]]) -> list[float]:
    """Seconds between tokens of each request, whatever the others do."""
    return [b - a for own in times for a, b in pairwise(own)]


def ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.3f} ms"


def energy(joules: float | None) -> str:
    return "-" if joules is None else f"{joules:.3g} J/token"


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """With rich if it is installed; as wide as its cells, also where no terminal says how wide it is."""
    rows = [list(row) for row in rows]
    if not rows:
        print(f"{title}: nothing was measured")
        return
    widths = [max(len(line[index]) for line in [list(columns), *rows]) for index in range(len(columns))]
    if importlib.util.find_spec("rich") is None:
        print(title)
        for line in [list(columns), *rows]:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < 2 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=max(len(title), sum(widths) + 3 * len(widths) + 2), highlight=False).print(table)


def print_mixed(rows: Sequence[Mapping[str, Any]]) -> None:
    """The rows of bench_throughput.py --mixed."""

    def share(row: Mapping[str, Any], name: str) -> str:
        return f"{row[name]:.1%}" if name in row else "-"

    def points(values: Mapping[str, float]) -> str:
        return " / ".join(f"{values[name]:,.3f}" for name in ("p50", "p90", "p99"))

    lines = []
    for r in rows:
        rate = r["output_tokens_per_s"]
        name = f"{r['batch_size']} at once" + (", one cache" if r.get("unified") else "")
        ratio = f"{r['times_one_by_one'].median:.2f}x" if "times_one_by_one" in r else "-"
        cells = [
            f"{r['output_tokens'] / r['bound_s']:,.1f}",
            f"{rate.median:,.1f}",
            f"{rate.p10:,.1f} - {rate.p90:,.1f}",
        ]
        cells += [ratio, share(r, "share_of_ideal"), share(r, "host_share"), share(r, "scheduler_share")]
        cells += [f"{r['ours_to_it'].median:.2f}x" if "ours_to_it" in r else "-"]
        lines.append(
            [name, r["program"], *cells, points(r["ttft_s"]), points(r["itl_s"]), energy(r["joules_per_token"])]
        )
    columns = ["setting", "program", "bound", "result", "p10 - p90", "to one by one", "of ideal", "host", "scheduler"]
    columns += ["ours to it", "first token p50/90/99 (s)", "between tokens (s)", "energy"]
    print_table("mixed lengths: generated tokens per second", columns, lines)


def plot_problem() -> str | None:
    """Why no picture can be drawn here; None if one can."""
    if importlib.util.find_spec("matplotlib") is None:
        return f"matplotlib is not installed: {_INSTALL}"
    return None


def _figure(panels: int) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * panels, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def plot_latency(path: Path, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Time to first token and between tokens against the context: a colour a batch size, a marker a program."""
    figure, axes = _figure(2)
    panels = (("ttft", "time to first token (ms)"), ("itl", "time between tokens (ms)"))
    programs, batches = (list(dict.fromkeys(row[key] for row in rows)) for key in ("program", "batch_size"))
    for axis, (name, label) in zip(axes, panels, strict=True):
        for program in programs:
            for index, batch_size in enumerate(batches):
                own = sorted(
                    (r for r in rows if (r["program"], r["batch_size"]) == (program, batch_size)),
                    key=lambda row: row["context"],
                )
                contexts, style = [row["context"] for row in own], {"color": f"C{index}", "lw": 1}
                marker, of = "osv^D"[programs.index(program) % 5], f"{program}, batch {batch_size}"
                p50 = [1e3 * row[f"{name}_s"]["p50"] for row in own]
                axis.plot(contexts, p50, marker=marker, label=of, **style)
                axis.plot(contexts, [1e3 * row[f"{name}_s"]["p99"] for row in own], ls="--", **style)
                if program == programs[0]:
                    axis.plot(contexts, [1e3 * row[f"{name}_bound_s"] for row in own], ls=":", **style)
        axis.set(xscale="log", yscale="log", xlabel="context (tokens)", ylabel=label)
        ticks = sorted({row["context"] for row in rows})
        axis.set_xticks(ticks, labels=[f"{tick:,}" for tick in ticks])
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    figure.suptitle(f"{title}\nsolid p50, dashed p99, dotted the bound", fontsize="medium")
    figure.savefig(path, dpi=120)


def plot_roofline(path: Path, title: str, rates: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """FLOP/s against FLOP per byte: the two ceilings, and a point for each setting and program."""
    figure, (axis, beside) = _figure(2)
    ridge = rates.flops_per_s / rates.bytes_per_s
    reached = [row["flops_per_byte"] for row in rows]
    low, high = min([ridge, *reached]) / 4, max([ridge, *reached]) * 4
    axis.plot([low, ridge, high], [low * rates.bytes_per_s, *[rates.flops_per_s] * 2], color="black", lw=1)
    axis.annotate(f"{rates.bytes_per_s / 1e9:,.0f} GB/s", (low, low * rates.bytes_per_s))
    axis.annotate(f"{rates.flops_per_s / 1e9:,.0f} GFLOP/s", (high, rates.flops_per_s), ha="right", va="bottom")
    programs = list(dict.fromkeys(row["program"] for row in rows))
    settings = list(dict.fromkeys((r["batch_size"], r["prompt_len"], r["output_len"]) for r in rows))
    for row in rows:
        setting = (row["batch_size"], row["prompt_len"], row["output_len"])
        of = f"{row['program']}, batch {setting[0]}, {setting[1]}/{setting[2]}"
        marker, color = "osv^D"[programs.index(row["program"]) % 5], f"C{settings.index(setting) % 10}"
        axis.plot(row["flops_per_byte"], row["flops_per_s"], marker=marker, color=color, ls="", label=of)
    axis.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="FLOP/s")
    axis.set_title(title, fontsize="medium")
    axis.grid(alpha=0.3)
    beside.axis("off")
    beside.legend(*axis.get_legend_handles_labels(), loc="upper left", fontsize="small", ncols=-(-len(rows) // 24))
    figure.savefig(path, dpi=120)


def plot_mixed(path: Path, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Tokens per second, and percentiles of the time to first token, against sequences at once: a colour a program."""
    figure, (rates, firsts) = _figure(2)
    programs = list(dict.fromkeys(row["program"] for row in rows))
    for program in programs:
        own = sorted((row for row in rows if row["program"] == program), key=lambda row: row["batch_size"])
        places, style = [row["batch_size"] for row in own], {"color": f"C{programs.index(program)}", "lw": 1}
        marker = "osv^D"[programs.index(program) % 5]
        rate = [row["output_tokens_per_s"].median for row in own]
        rates.plot(places, rate, marker=marker, label=program, **style)
        for name, line in (("p50", "-"), ("p90", "--"), ("p99", ":")):
            firsts.plot(places, [row["ttft_s"][name] for row in own], marker=marker, ls=line, **style)
        ideal = [(row["batch_size"], row["ideal_tokens_per_s"]) for row in own if row.get("ideal_tokens_per_s")]
        if ideal:
            rates.plot(*zip(*ideal, strict=True), color="black", ls=":", lw=1, label="ideal schedule of measured steps")
            rates.axhline(rate[0], color="gray", ls="--", lw=1, label="one by one")
    ticks = sorted({row["batch_size"] for row in rows})
    for axis, label in ((rates, "generated tokens per second"), (firsts, "time to first token (s)")):
        axis.set(xscale="log", xlabel="sequences at once", ylabel=label, ylim=(0, None))
        axis.set_xticks(ticks, labels=[f"{tick:,}" for tick in ticks])
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
    rates.legend(fontsize="small")
    figure.suptitle(f"{title}\ntime to first token: solid p50, dashed p90, dotted p99", fontsize="medium")
    figure.savefig(path, dpi=120)
