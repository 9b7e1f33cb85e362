"""What gpu_report.py found, as JSON, Markdown and pictures."""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from typing import Any

from gpu_report_targets import amount, invariance_costs, kernels_of, results_of, steps_of, targets

RESULTS = Path(__file__).resolve().parent / "results"
RATES = ("bytes_per_s", "flops_per_s", "launch_us")
# Which builds of the CUDA extension were shown to be right on which GPU; the package reads it.
TABLE = RESULTS.parent.parent / "llama_fast" / "ops" / "cuda_checked.json"
# NVIDIA's datasheet of the H100 SXM, as in bench_kernels.py: serves until a report of one is among the results.
_H100_DATASHEET = {"bytes_per_s": 3.35e12, "flops_per_s": 989e12}


def assumed_rates(chip: str) -> dict[str, Any]:
    """Rates of a chip for bounds where there is no GPU: measured ones where the results have them.

    Args:
        chip: "h200" or "h100"; its results are in folders with that name in theirs.
    """
    for path in sorted(RESULTS.glob(f"*{chip}*/*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        rates = result.get("rates", result)
        if result.get("measured") and "bytes_per_s" in rates:
            found = {name: rates[name] for name in RATES}
            return {**found, "source": f"assumed: bench/results/{path.parent.name}/{path.name}"}
    return {**_H100_DATASHEET, "launch_us": None, "source": "assumed: NVIDIA's datasheet of the H100 SXM"}


def record(entry: dict[str, Any], path: Path) -> None:
    """Add an entry {hash: {compute capability: {gpu, report}}} to a table that may be there already."""
    table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for digest, capabilities in entry.items():
        table[digest] = {**table.get(digest, {}), **capabilities}
    path.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# --- Markdown --------------------------------------------------------------------------------------------------------


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown; a bar in a cell would end it."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _ms(row: dict[str, Any]) -> list[str]:
    if "ms" not in row:
        return ["not measured", "", ""]
    spread = f"{row['ms']['p10']:.3f} - {row['ms']['p90']:.3f}"
    return [f"{row['ms']['median']:.3f}", spread, f"{row['share']:.1%}"]


def _kernel_cells(row: dict[str, Any]) -> list[str]:
    name = f"{row['model']}, {row['op']}" + ("" if row["context"] is None else f", context {row['context']:,}")
    cells = [row["kernel"], name, f"{row['rows']:,}", f"{row['bound_us']:.2f}"]
    if "us" in row:
        beside = "" if row.get("torch_us") is None else f"{row['torch_us']:.2f}"
        return [*cells, f"{row['us']['median']:.2f}", f"{row['share']:.1%}", beside]
    reason = f"refused: {row['refused']}" if "refused" in row else f"not run: {row.get('skipped', 'bound only')}"
    return [*cells, reason, "", ""]


def markdown(report: dict[str, Any]) -> str:
    """The whole report: what failed first."""
    rates = report["rates"] or {}
    sections = report["sections"]
    parts = [f"# {report['device']}", ""]
    if not report["measured"]:
        parts += ["**Nothing here was measured: there was no GPU.** Times are bounds at assumed rates.", ""]
    if "bytes_per_s" in rates:
        launch = "" if rates.get("launch_us") is None else f", a launch {rates['launch_us']:.2f} us"
        speed = f"{rates['bytes_per_s'] / 1e12:.3f} TB/s, {rates['flops_per_s'] / 1e12:.1f} TFLOP/s in bf16"
        parts += [f"Rates: {speed}{launch} ({rates['source']}).", ""]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    parts += [f"Commit {report['commit']}; {versions}; {report.get('seconds', 0):.0f} s.", ""]
    bad = {name: entry for name, entry in sections.items() if entry["status"] in ("failed", "timed out")}
    parts += (
        ["## Failed", "", *(f"- **{name}** {e['status']}: {e['reason']}" for name, e in bad.items())] if bad else []
    )
    parts += ["", "## Sections", ""]
    rows = [[name, e["group"], e["status"], f"{e['seconds']:.0f} s", e["reason"] or ""] for name, e in sections.items()]
    parts += [table(["section", "group", "status", "took", "why"], rows), ""]
    late = [f"- {name}: {what}" for name, e in sections.items() for what in e["results"].get("left_out", [])]
    parts += ["## Left out", "", *late, ""] if late else []
    reached = [
        [t["name"], f"{t['sign']} {amount(t['wanted'], t['unit'])}", amount(t["reached"], t["unit"]), _met(t["met"])]
        for t in report.get("targets", [])
    ]
    parts += ["## Targets", "", table(["target", "wanted", "reached", "met"], reached), ""]
    if steps := steps_of(report):
        header = ["model", "step", "batch", "context", "on", "bound ms", "ms", "p10 - p90", "share"]
        cells = [
            [
                r["model"],
                r["kind"],
                str(r["batch"]),
                f"{r['context']:,}",
                r["variant"] or "",
                f"{r['bound_ms']:.3f}",
                *_ms(r),
            ]
            for r in steps
        ]
        parts += ["## Whole models, random weights", "", table(header, cells), ""]
    if costs := invariance_costs(report):
        cells = [[*map(str, key), f"{cost:+.1%}"] for key, cost in costs.items()]
        parts += ["## What one answer costs", "", table(["model", "step", "batch", "context", "more time"], cells), ""]
    if starts := results_of(report, "starts").get("starts"):
        names = ("imports_s", "load_s", "ready_s", "first_token_s", "total_s")
        cells = [
            [s["model"], run, *(f"{s[run][name]:.2f}" for name in names)] for s in starts for run in ("first", "warm")
        ]
        parts += ["## Starts", "", table(["model", "start", *names], cells), ""]
    if rows_of_extension := results_of(report, "extension_times").get("rows"):
        header = ["model", "op", "rows", "bound us", "us", "share", "Triton us", "Triton bf16 us", "PyTorch int4 us"]
        cells = [
            [
                r["model"],
                r["op"],
                str(r["rows"]),
                f"{r['bound_us']:.2f}",
                f"{r['us']['median']:.2f}",
                f"{r['share']:.1%}",
            ]
            + ["" if r.get(name) is None else f"{r[name]:.2f}" for name in ("triton_us", "bf16_us", "torch_us")]
            for r in rows_of_extension
        ]
        parts += ["## CUDA extension: int4_linear", "", table(header, cells), ""]
    if kernels := kernels_of(report):
        header = ["kernel", "shape", "rows", "bound us", "us", "share", "PyTorch us"]
        parts += ["## Kernels", "", table(header, list(map(_kernel_cells, kernels))), ""]
    checks = [
        [name, check["check"], check["subject"], check["status"], check["detail"]]
        for name, entry in sections.items()
        for check in entry["results"].get("checks", [])
    ]
    if checks:
        parts += ["## Checks", "", table(["section", "check", "of", "status", "detail"], checks), ""]
    failing = [
        f"- `{test['test']}`: {test['why']}"
        for found in results_of(report, "kernel_tests").get("kernels", {}).values()
        for test in found["failing"]
    ]
    parts += ["## Failing tests", "", *failing, ""] if failing else []
    return "\n".join(parts)


def _met(met: bool | None) -> str:
    return "" if met is None else "yes" if met else "no"


# --- files -----------------------------------------------------------------------------------------------------------


def write_report(report: dict[str, Any], out: Path, *, pictures: bool = False) -> None:
    """report.json and report.md, each whole at every moment; pictures at the end, where there is something to show."""
    _write(out / "report.json", json.dumps(report, indent=1) + "\n")
    try:
        report["targets"] = targets(report)
        text = markdown(report)
    # A table that cannot be made of it must not cost what was measured.
    except Exception:
        traceback.print_exc()
        text = f"report.json could not be made a table of:\n\n```\n{traceback.format_exc()}```"
    _write(out / "report.json", json.dumps(report, indent=1) + "\n")
    _write(out / "report.md", text + "\n")
    if pictures and report["measured"]:
        try:
            _draw(report, out)
        except ImportError:
            print("no pictures: matplotlib is not installed")
        except Exception:
            traceback.print_exc()


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _draw(report: dict[str, Any], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kernels = [row for row in kernels_of(report) if "share" in row and row["model"] == "8b"]
    if kernels:
        labels = [" ".join(_kernel_cells(row)[:3]) for row in kernels]
        figure, axes = pyplot.subplots(figsize=(9, 0.22 * len(kernels) + 1.5))
        axes.barh(labels, [100 * row["share"] for row in kernels], color="tab:blue")
        axes.axvline(100, color="black", linewidth=0.8)
        axes.set_xlabel(f"% of the bound on {report['device']}")
        axes.invert_yaxis()
        figure.savefig(out / "kernels.png", dpi=120, bbox_inches="tight")
        pyplot.close(figure)
    decode = [row for row in steps_of(report) if row["kind"] == "decode" and "ms" in row and row["variant"] is None]
    if decode:
        figure, axes = pyplot.subplots(figsize=(7, 5))
        for key in sorted({(row["model"], row["context"]) for row in decode}):
            rows = sorted((r for r in decode if (r["model"], r["context"]) == key), key=lambda row: row["batch"])
            batches = [row["batch"] for row in rows]
            (line,) = axes.plot(
                batches, [row["ms"]["median"] for row in rows], "o-", label=f"{key[0]}, context {key[1]:,}"
            )
            axes.plot(batches, [row["bound_ms"] for row in rows], "--", color=line.get_color(), linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel="batch", ylabel="ms a step; dashed: bound", title=report["device"])
        axes.legend()
        figure.savefig(out / "decode.png", dpi=120, bbox_inches="tight")
        pyplot.close(figure)
