"""The tables of README.md, from the result files in bench/results/<device>/*.json.

    python bench/report.py          writes them into README.md
    python bench/report.py --check  fails if README.md says something else

A result file is the last line that a bench prints:
    python bench/bench_load.py | tail -n 1 > bench/results/amd-epyc-2-cores/load-llama-3.2-1b.json

A kernel's number is marked as stale once its sources are no longer those that were measured.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from sources import source_hash

_ROOT = Path(__file__).resolve().parent.parent
_BEGIN, _END = "<!-- bench/report.py writes this -->", "<!-- until here -->"


def read_results(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Results by bench, each with `where`, in the order of their files' names."""
    results: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*/*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        # A GPU's kernels do not care how many threads PyTorch has on the CPU.
        threads = "" if result["bench"] == "kernels" else f", {result['num_threads']} threads"
        result["where"] = path.parent.name + threads
        results.setdefault(result["bench"], []).append(result)
    return results


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


def compare_rows(results: list[dict[str, Any]]) -> list[list[str]]:
    """Tokens per second on a CPU beside the peers', from the same run; a peer that was not there has an empty cell."""
    peers = ("llama.cpp", "transformers")
    header = ["model", "work", "tokens/s", "of its bound", *(f"{peer} (ours to it)" for peer in peers), "where"]
    rows = []
    for r in results:
        by_work: dict[str, dict[str, Any]] = {}
        for row in r["speed"]:
            by_work.setdefault(row["work"], {})[row["program"]] = row
        for work, programs in by_work.items():
            ours = programs["llama_fast"]
            cells = [
                f"{programs[peer]['tokens_per_s']['median']:,.1f} ({programs[peer]['ours_to_it']['median']:.2f}x)"
                if peer in programs
                else ""
                for peer in peers
            ]
            speed = f"{ours['tokens_per_s']['median']:,.1f}"
            share = f"{ours['share_of_bound']['median']:.0%}"
            rows.append([f"{r['model']}, {r['dtype']}", work, speed, share, *cells, r["where"]])
    return [header, *rows]


def tables(folder: Path) -> str:
    """Markdown of all tables; what has no result file is not measured yet."""
    results = read_results(folder)
    parts = []
    benches = (
        ("load", load_rows),
        ("generate", generate_rows),
        ("compare_cpu", compare_rows),
        ("kernels", kernel_rows),
    )
    for bench, rows in benches:
        header, *body = rows(results.get(bench, []))
        if not body:
            script = bench if bench == "compare_cpu" else f"bench_{bench}"
            parts.append(f"`{script}.py`: not measured yet.")
            continue
        lines = [header, ["---"] * len(header), *body]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        if bench == "kernels":
            # Some hundred lines: folded.
            table = f"<details><summary>Kernels: {len(body)} results</summary>\n\n{table}\n\n</details>"
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
            print("README.md is not what bench/results say; run python bench/report.py", file=sys.stderr)
        return int(readme != rendered)
    path.write_text(rendered, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
