"""The tables of README.md, from the result files in bench/results/<device>/*.json.

    python bench/readme_table.py          writes them into README.md
    python bench/readme_table.py --check  fails if README.md says something else

A result file is the last line that a bench prints, or the report.json of gpu_report.py:
    python bench/bench_load.py | tail -n 1 > bench/results/amd-epyc-2-cores/load-llama-3.2-1b.json

A kernel's number is marked as stale once its sources are no longer those that were measured; a report's numbers of
whole models are once any kernel's are.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from gpu_report_targets import amount, steps_of
from readme_serving import mixed_rows, serving_rows
from sources import source_hash

_ROOT = Path(__file__).resolve().parent.parent
_CHECKED = _ROOT / "llama_fast" / "ops" / "cuda_checked.json"
_BEGIN, _END = "<!-- bench/readme_table.py writes this -->", "<!-- until here -->"


def read_results(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Results by bench, each with `where`, in the order of their files' names."""
    results: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*/*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        # A GPU's kernels do not care how many threads PyTorch has on the CPU.
        if "certificate" in result:  # of `llama-fast certify`: no figures
            continue
        on_gpu = result["bench"] in ("kernels", "gpu_report") or result.get("backend") == "gpu"
        result["where"] = path.parent.name + ("" if on_gpu else f", {result['num_threads']} threads")
        results.setdefault(result["bench"], []).append(result)
    for report in results.get("gpu_report", []):
        kernels = report["sections"].get("kernel_times", {}).get("results", {}).get("kernels")
        if kernels is not None and report["measured"]:
            _take_the_place(results.setdefault("kernels", []), {**kernels, "where": report["where"]})
    return results


def _take_the_place(of: list[dict[str, Any]], newer: dict[str, Any]) -> None:
    """Add a report's kernels; where bench_kernels.py measured the same on that GPU, the report's count."""
    names = ("kernel", "op", "model", "rows", "context")
    there = {tuple(row[name] for name in names) for row in newer["rows"] if "us" in row or "refused" in row}
    for result in of:
        if result["where"] == newer["where"]:
            result["rows"] = [row for row in result["rows"] if tuple(row[name] for name in names) not in there]
    of.append(newer)


def load_rows(results: list[dict[str, Any]]) -> list[list[str]]:
    """Loading and reading every byte once, against reading the file from the page cache."""
    header = ["checkpoint", "file", "bound", "load + touch", "share", "anonymous memory", "where"]
    rows = [
        [
            f"{r['model']}, {r['dtype']}",
            f"{r['file_bytes'] / 1e9:.2f} GB" if r["file_bytes"] > 1e9 else f"{r['file_bytes'] / 1e6:.1f} MB",
            f"{r['bound_ms']:.2f} ms",
            f"{r['total_ms']['median']:.2f} ms",
            f"{r['share_of_bound']:.1%}",
            f"{r['peak_anon_bytes'] / 1e6:.1f} MB",
            r["where"],
        ]
        for r in results
    ]
    return [header, *rows]


def generate_rows(results: list[dict[str, Any]]) -> list[list[str]]:
    """Tokens per second of prefill and decode, against FLOPs and memory bandwidth."""
    header = [
        "model",
        "backend",
        "batch",
        "prefill tokens/s",
        "of its bound",
        "decode tokens/s",
        "of its bound",
        "where",
    ]
    rows = [
        [
            f"{r['model']}, {r['dtype']}",
            r["backend"],
            str(point["batch_size"]),
            f"{point['prefill']['median']:,.1f}",
            f"{point['prefill_share_of_bound']:.1%}",
            f"{point['decode']['median']:,.1f}",
            f"{point['decode_share_of_bound']:.1%}",
            r["where"],
        ]
        for r in results
        for point in r["tokens_per_s"]
    ]
    return [header, *rows]


def kernel_rows(results: list[dict[str, Any]]) -> list[list[str]]:
    """Kernels on the shapes of the 8B model, against bytes over bandwidth or FLOPs over the matmul rate.

    A selection: the files have more rows, contexts and the 1B model.
    """
    header = ["kernel", "shape", "rows", "bound", "measured", "share", "PyTorch's own", "where"]
    rows = []
    for result in results:
        for r in result["rows"]:
            selected = r["model"] == "8b" and r["rows"] in (1, 64, 4096) and r["context"] in (None, 4096)
            if ("us" not in r or not selected) and "refused" not in r:
                continue
            measured_hash = result["sources"].get(r["kernel"])
            stale = "" if measured_hash and measured_hash == source_hash(r["kernel"]) else " (stale)"
            context = "" if r["context"] is None else f", context {r['context']:,}"
            measured, share = (f"{r['us']['median']:.2f} us", f"{r['share']:.1%}") if "us" in r else ("refused", "")
            torch_us = r.get("torch_us")
            rows.append(
                [
                    r["kernel"],
                    f"{r['model']}, {r['op']}{context}",
                    f"{r['rows']:,}",
                    f"{r['bound_us']:.2f} us",
                    measured + stale,
                    share,
                    "" if torch_us is None else f"{torch_us:.2f} us",
                    result["where"],
                ]
            )
    return [header, *rows]


def evidence_rows(results: dict[str, list[dict[str, Any]]], root: Path) -> list[list[str]]:
    """How each kernel is proven: interpreted, compiled for which chips, measured on which GPUs."""
    header = ["kernel", "interpreted", "compiled", "measured"]
    compiled = [
        json.loads(path.read_text(encoding="utf-8")) for path in (root / "bench/results").glob("compile/*/*.json")
    ]
    rows = []
    for path in sorted((root / "kernels").glob("*.py")):
        kernel = path.stem
        test = root / "tests" / "kernels" / f"test_{kernel}.py"
        if not test.exists():
            continue
        chips = {
            row["arch"]
            for result in compiled
            for row in result["rows"]
            if row["kernel"].partition(".")[0] == kernel or kernel in row["uses"]
        }
        measured: dict[str, str] = {}
        for result in results.get("kernels", []):
            if any(row["kernel"] == kernel and "us" in row for row in result["rows"]):
                current = result["sources"].get(kernel) == source_hash(kernel, root / "kernels")
                # Of several files of one GPU the last counts, which is the report.
                measured[result["where"]] = result["where"] + ("" if current else " (stale)")
        if chips or measured:
            on = ", ".join(sorted(measured.values())) or "not measured yet"
            rows.append([kernel, test.name, ", ".join(f"sm_{chip}" for chip in sorted(chips)) or "no", on])
    return [header, *rows]


def _is_stale(report: dict[str, Any]) -> bool:
    """Whether a kernel is no longer the one that a report's models ran on."""
    known = {kernel: digest for kernel, digest in report["sources"].items() if kernel != "cuda_extension"}
    return any(source_hash(kernel) != digest for kernel, digest in known.items())


def target_rows(results: list[dict[str, Any]]) -> list[list[str]]:
    """What each report reached of the project's targets."""
    header = ["target", "wanted", "reached", "met", "where"]
    rows: dict[tuple[str, str], list[str]] = {}
    for report in results:
        stale = " (stale)" if _is_stale(report) else ""
        for target in report["targets"] if report["measured"] else []:
            reached = amount(target["reached"], target["unit"])
            met = {True: "yes", False: "no", None: ""}[target["met"]]
            wanted = f"{'at least' if target['sign'] == '>=' else 'at most'} {amount(target['wanted'], target['unit'])}"
            reached += stale if target["reached"] is not None else ""
            # Of several reports of a GPU the last that reached something counts.
            key = target["name"], report["where"]
            if target["reached"] is not None or key not in rows:
                rows[key] = [target["name"], wanted, reached, met, report["where"]]
    return [header, *rows.values()]


def step_rows(results: list[dict[str, Any]]) -> list[list[str]]:
    """Decoding steps and prefill of whole models with random weights."""
    header = ["model", "work", "batch", "context", "bound", "measured", "share", "where"]
    checked = json.loads(_CHECKED.read_text(encoding="utf-8"))
    rows = []
    for report in results:
        for r in steps_of(report):
            if "ms" not in r or not report["measured"]:
                continue
            # Generated rows of int4 weights run on the extension: on another one's sources the number is another's.
            other = r["variant"] == "int4" and report["sources"].get("cuda_extension") not in checked
            stale = " (stale)" if other or _is_stale(report) else ""
            work = r["kind"] + (f", {r['variant']}" if r["variant"] else "")
            times = [f"{r['bound_ms']:.2f} ms", f"{r['ms']['median']:.2f} ms{stale}", f"{r['share']:.1%}"]
            rows.append([r["model"], work, str(r["batch"]), f"{r['context']:,}", *times, report["where"]])
    return [header, *rows]


def compare_rows(results: list[dict[str, Any]]) -> list[list[str]]:
    """Tokens per second on a CPU beside the peers', from the same run; a peer that was not there has an empty cell."""
    peers = ("llama.cpp", "transformers")
    header = ["model", "work", "tokens/s", "of its bound", *(f"{peer} (ours to it)" for peer in peers), "where"]
    rows = []
    for r in results:
        by_work: dict[str, dict[str, Any]] = {}
        for row in r["speed"]:
            by_work.setdefault(row["work"], {})[row["program"]] = row
        is_int4 = r.get("weights") == "int4"
        for work, programs in by_work.items():
            ours = programs["llama_fast"]
            cells = []
            for peer in peers:
                kind = f"{peer} q4_0" if is_int4 else peer
                rate = f"{programs[kind]['tokens_per_s']['median']:,.1f}" if kind in programs else ""
                cells.append(f"{rate} ({programs[kind]['ours_to_it']['median']:.2f}x)" if rate else "")
            speed = f"{ours['tokens_per_s']['median']:,.1f}"
            share = f"{ours['share_of_bound']['median']:.0%}"
            weights = f"int4 in groups of {r['group_size']}, beside q4_0" if is_int4 else r["dtype"]
            rows.append([f"{r['model']}, {weights}", work, speed, share, *cells, r["where"]])
    return [header, *rows]


def quantization_rows(results: list[dict[str, Any]]) -> list[list[str]]:
    """Perplexity, and divergence from the original, of int4 weights by plain and by calibrated rounding."""
    header = ["model", "groups", "text", "perplexity", "plain int4", "KL", "calibrated", "KL", "calibrated to plain"]
    rows = []
    for r in (row for result in results for row in result["rows"]):
        cells = [r["model"], r["layout"], r["text"], f"{r['original']['perplexity']:.3f}"]
        for name in ("plain", "calibrated"):
            cells += [f"{r[name]['perplexity']:.3f}", f"{r[name]['kl']:.5f}"]
        rows.append([*cells, f"{r['calibrated']['kl'] / r['plain']['kl']:.0%} of its KL"])
    return [header, *rows]


def tables(folder: Path) -> str:
    """Markdown of all tables; what has no result file is not measured yet."""
    results = read_results(folder)
    parts = []
    reports = results.get("gpu_report", [])
    benches: tuple[tuple[str, str, list[list[str]]], ...] = (
        ("bench_load", "", load_rows(results.get("load", []))),
        ("bench_generate", "", generate_rows(results.get("generate", []))),
        ("bench_latency", "", serving_rows(results.get("latency", []))),
        ("bench_throughput", "", serving_rows(results.get("throughput", []))),
        ("bench_throughput.py --mixed", "", mixed_rows(results.get("throughput_mixed", []))),
        ("compare_cpu", "", compare_rows(results.get("compare_cpu", []))),
        ("bench_quantization", "", quantization_rows(results.get("quantization", []))),
        ("gpu_report", "", target_rows(reports)),
        ("", "Whole models on a GPU", step_rows(reports)),
        ("", "", evidence_rows(results, _ROOT)),
        # Some hundred lines: folded.
        ("bench_kernels", "Kernels", kernel_rows(results.get("kernels", []))),
    )
    for script, folded, (header, *body) in benches:
        if not body:
            name = script if ".py" in script else f"{script}.py"
            parts += [f"`{name}`: not measured yet."] if script else []
            continue
        lines = [header, ["---"] * len(header), *body]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        if folded:
            table = f"<details><summary>{folded}: {len(body)} results</summary>\n\n{table}\n\n</details>"
        parts.append(table)
    return "\n\n".join(parts)


def render(readme: str, folder: Path) -> str:
    """README's text with the tables between its two marks."""
    before, rest = readme.split(_BEGIN)
    _, after = rest.split(_END)
    return f"{before}{_BEGIN}\n\n{tables(folder)}\n\n{_END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if README.md differs")
    args = parser.parse_args()
    path = _ROOT / "README.md"
    readme = path.read_text(encoding="utf-8")
    rendered = render(readme, _ROOT / "bench" / "results")
    if args.check:
        if readme != rendered:
            print("README.md is not what bench/results say; run python bench/readme_table.py", file=sys.stderr)
        return int(readme != rendered)
    path.write_text(rendered, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
