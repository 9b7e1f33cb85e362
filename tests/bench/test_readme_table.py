"""README's figures are those of the committed result files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]


def _report(root, *arguments):
    command = [sys.executable, str(root / "bench" / "readme_table.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_readme_says_what_the_results_say():
    assert _report(_ROOT, "--check").returncode == 0


@pytest.fixture
def root(tmp_path):
    """A checkout with the report, one kernel and an empty table."""
    for folder in ("bench/results/machine", "kernels"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "llama_fast" / "ops").mkdir(parents=True)
    (tmp_path / "llama_fast" / "ops" / "cuda_checked.json").write_text("{}")
    for name in ("readme_table.py", "readme_serving.py", "sources.py", "gpu_report_targets.py"):
        (tmp_path / "bench" / name).write_text((_ROOT / "bench" / name).read_text())
    (tmp_path / "README.md").write_text(
        "before\n<!-- bench/readme_table.py writes this -->\n<!-- until here -->\nafter\n"
    )
    return tmp_path


def test_a_changed_figure_and_a_missing_result_show(root):
    readme = root / "README.md"
    assert _report(root, "--check").returncode == 1
    assert _report(root).returncode == 0
    assert readme.read_text().count("not measured yet") == 9
    assert readme.read_text().startswith("before\n")
    assert readme.read_text().endswith("\nafter\n")

    result = {
        "bench": "load",
        "model": "tiny",
        "dtype": "bfloat16",
        "num_threads": 2,
        "file_bytes": 2_000_000,
        "bound_ms": 1.0,
        "total_ms": {"median": 4.0},
        "share_of_bound": 0.25,
        "peak_anon_bytes": 3_000_000,
    }
    (root / "bench" / "results" / "machine" / "load.json").write_text(json.dumps(result))
    assert _report(root, "--check").returncode == 1
    _report(root)
    expected = "| tiny, bfloat16 | 2.0 MB | 1.00 ms | 4.00 ms | 25.0% | 3.0 MB | machine, 2 threads |"
    assert expected in readme.read_text()
    readme.write_text(readme.read_text().replace("25.0%", "99.0%"))
    assert _report(root, "--check").returncode == 1


def _kernel_row(**values):
    row = {"kernel": "linear", "op": "qkv", "model": "8b", "rows": 1, "context": None, "bound_us": 16.8}
    return {**row, "us": {"median": 21.0, "p10": 20.5, "p90": 21.5}, "share": 0.8, "torch_us": 24.25} | values


def _kernels_say(root, name, sources, rows):
    result = {"bench": "kernels", "num_threads": 2, "measured": True, "sources": sources, "rows": rows}
    (root / "bench" / "results" / "machine" / f"{name}.json").write_text(json.dumps(result))
    assert _report(root).returncode == 0
    return (root / "README.md").read_text()


def _hash(root, kernel):
    code = f"import sources; print(sources.source_hash({kernel!r}))"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=root / "bench", capture_output=True, text=True, check=True).stdout.strip()


def test_kernels_are_a_table_and_stale_ones_say_so(root):
    source = root / "kernels" / "linear.py"
    source.write_text("from llama_fast.kernels import configs\n")
    (root / "kernels" / "configs.py").write_text("TILE = 64\n")
    sources = {"linear": _hash(root, "linear"), "attention": "0" * 64}
    rows = [
        _kernel_row(),
        _kernel_row(rows=4096, torch_us=None),
        _kernel_row(kernel="attention", op="generated", context=4096),
        # Not of the selection that stands in README.
        _kernel_row(model="1b"),
        _kernel_row(rows=8),
        _kernel_row(context=32768),
    ]
    text = _kernels_say(root, "kernels", sources, rows)
    assert "Kernels: 3 results" in text and text.count("not measured yet") == 8
    assert "| linear | 8b, qkv | 1 | 16.80 us | 21.00 us | 80.0% | 24.25 us | machine |" in text
    assert "| linear | 8b, qkv | 4,096 | 16.80 us | 21.00 us | 80.0% |  | machine |" in text
    # attention.py is not there any more, or never was what was measured.
    assert "| attention | 8b, generated, context 4,096 | 1 | 16.80 us | 21.00 us (stale) | 80.0% |" in text

    # A number is as stale where only a module that the kernel imports has changed.
    (root / "kernels" / "configs.py").write_text("TILE = 128\n")
    assert _report(root, "--check").returncode == 1
    assert _report(root).returncode == 0
    assert (root / "README.md").read_text().count("(stale)") == 3


def test_refused_kernels_show_and_bounds_alone_do_not(root):
    refused = _kernel_row(refused="off by 3")
    del refused["us"], refused["share"], refused["torch_us"]
    text = _kernels_say(root, "kernels-1", {}, [refused])
    assert "| linear | 8b, qkv | 1 | 16.80 us | refused (stale) |  |  | machine |" in text
    bound = {name: value for name, value in refused.items() if name != "refused"}
    text = _kernels_say(root, "kernels-1", {}, [bound])
    assert text.count("not measured yet") == 9


def test_what_a_hash_depends_on(root):
    kernels = root / "kernels"
    (kernels / "a.py").write_text("from llama_fast.kernels.b import x\nfrom llama_fast.kernels import c\n")
    (kernels / "b.py").write_text("from llama_fast.kernels.arguments import refuse\nx = 1\n")
    (kernels / "c.py").write_text("from llama_fast.kernels.a import y\n")
    for name in ("arguments", "d"):
        (kernels / f"{name}.py").write_text("")
    first = _hash(root, "a")
    assert len(first) == 64 and _hash(root, "missing") == "None"
    for name, matters in (("a", True), ("b", True), ("c", True), ("d", False), ("arguments", False)):
        path = kernels / f"{name}.py"
        before = path.read_text()
        path.write_text(before + "changed = 1\n")
        assert (_hash(root, "a") != first) == matters, name
        path.write_text(before + "  # a comment\n")
        assert _hash(root, "a") == first, name
        path.write_text(before)
    assert _hash(root, "a") == first


def _report_file(root, measured=True, **changes):
    """A report of gpu_report.py with one kernel and one model."""
    kernels = {
        "bench": "kernels",
        "measured": True,
        "sources": {"linear": _hash(root, "linear")},
        "rows": [_kernel_row()],
    }
    step = {"model": "8b", "kind": "decode", "batch": 1, "context": 1024, "variant": None, "bound_ms": 4.0}
    step |= {"ms": {"median": 5.0, "p10": 4.9, "p90": 5.1}, "share": 0.8}
    target = {"name": "8B decode", "sign": ">=", "wanted": 0.85, "unit": "of bound", "reached": 0.8, "met": False}
    result = {
        "bench": "gpu_report",
        "measured": measured,
        "num_threads": 2,
        "sources": {"linear": _hash(root, "linear"), "cuda_extension": "0" * 64},
        "sections": {
            "kernel_times": {"results": {"kernels": kernels}},
            "model_8b": {"results": {"steps": [step]}},
        },
        "targets": [target, {**target, "name": "unknown", "reached": None, "met": None}],
        **changes,
    }
    (root / "bench" / "results" / "machine" / "report.json").write_text(json.dumps(result))
    assert _report(root).returncode == 0
    return (root / "README.md").read_text()


def test_a_report_gives_targets_models_and_kernels(root):
    (root / "kernels" / "linear.py").write_text("TILE = 64\n")
    text = _report_file(root)
    assert "| 8B decode | at least 85.0% of bound | 80.0% of bound | no | machine |" in text
    assert "| unknown | at least 85.0% of bound | not measured yet |  | machine |" in text
    assert "| 8b | decode | 1 | 1,024 | 4.00 ms | 5.00 ms | 80.0% | machine |" in text
    assert "| linear | 8b, qkv | 1 | 16.80 us | 21.00 us | 80.0% | 24.25 us | machine |" in text

    (root / "kernels" / "linear.py").write_text("TILE = 128\n")
    assert _report(root, "--check").returncode == 1
    assert _report(root).returncode == 0
    text = (root / "README.md").read_text()
    assert "| 80.0% of bound (stale) |" in text and "| 5.00 ms (stale) |" in text and "| 21.00 us (stale) |" in text


def test_a_report_takes_the_place_of_older_rows_of_its_gpu(root):
    (root / "kernels" / "linear.py").write_text("TILE = 64\n")
    older = [_kernel_row(us={"median": 99.0, "p10": 99.0, "p90": 99.0}), _kernel_row(rows=64)]
    _kernels_say(root, "kernels", {"linear": _hash(root, "linear")}, older)
    text = _report_file(root)
    assert "99.00 us" not in text and "Kernels: 2 results" in text


def test_a_report_without_a_gpu_claims_nothing(root):
    text = _report_file(root, measured=False)
    assert "of bound" not in text and text.count("not measured yet") == 9


def test_how_a_kernel_is_proven(root):
    (root / "kernels" / "linear.py").write_text("TILE = 64\n")
    (root / "kernels" / "helper.py").write_text("")
    (root / "tests" / "kernels").mkdir(parents=True)
    (root / "tests" / "kernels" / "test_linear.py").write_text("")
    compiled = root / "bench" / "results" / "compile" / "triton"
    compiled.mkdir(parents=True)
    rows = [{"kernel": "linear._linear_kernel", "arch": 90, "uses": {}}]
    (compiled / "sm_90.json").write_text(json.dumps({"bench": "compile", "rows": rows}))
    _report(root)
    text = (root / "README.md").read_text()
    assert "| linear | test_linear.py | sm_90 | not measured yet |" in text and "helper" not in text
    assert "| linear | test_linear.py | sm_90 | machine |" in _report_file(root)
    stale = {"linear": "0" * 64}
    text = _kernels_say(root, "kernels", stale, [_kernel_row(rows=8)])
    assert "| linear | test_linear.py | sm_90 | machine |" in text
    (root / "bench" / "results" / "machine" / "report.json").unlink()
    _report(root)
    assert "| linear | test_linear.py | sm_90 | machine (stale) |" in (root / "README.md").read_text()


def test_serving_benches_are_shown_as_they_are(root):
    row = {
        "program": "llama_fast",
        "batch_size": 16,
        "context": 1024,
        "ttft_bound_s": 0.1,
        "ttft_s": {"p50": 0.2, "p99": 0.3},
    }
    row |= {"ttft_share_of_bound": 0.5, "joules_per_token": None, "num_bytes": 10}
    result = {"bench": "latency", "model": "8b", "dtype": "bfloat16", "backend": "gpu", "num_threads": 2, "rows": [row]}
    (root / "bench" / "results" / "machine" / "latency.json").write_text(json.dumps(result))
    assert _report(root).returncode == 0
    text = (root / "README.md").read_text()
    assert "| model | program | batch size | context | ttft bound s | ttft s | ttft share of bound | where |" in text
    assert "| 8b, bfloat16 | llama_fast | 16 | 1,024 | 100.00 ms | 200.00 ms | 50.0% | machine |" in text


def test_requests_of_many_lengths_are_a_table_of_their_own(root):
    seconds = {"p50": 1.5, "p90": 2.0, "p99": 2000.25, "mean": 1.0, "count": 3}
    row = {"program": "llama_fast", "batch_size": 16, "num_requests": 64, "output_tokens_per_s": {"median": 1234.5}}
    row |= {"times_one_by_one": {"median": 4.126}, "share_of_ideal": 0.912, "host_share": 0.0125}
    row |= {"ttft_s": seconds, "itl_s": {**seconds, "p99": 0.0625}}
    peer = {**row, "program": "llama.cpp", "batch_size": 8, "ours_to_it": {"median": 1.5}, "unified": True}
    for name in ("times_one_by_one", "share_of_ideal", "host_share"):
        del peer[name]
    result = {"bench": "throughput_mixed", "model": "1b", "dtype": "bfloat16", "backend": "cpu", "num_threads": 2}
    result |= {"mix": "32-512/16-128", "rows": [row, peer]}
    (root / "bench" / "results" / "machine" / "throughput-mixed-1b.json").write_text(json.dumps(result))
    assert _report(root).returncode == 0
    text = (root / "README.md").read_text()
    times = "1.5 / 2.0 / 2,000.2 s | 1,500.0 / 2,000.0 / 62.5 ms | machine, 2 threads |"
    ours = "| 1b, bfloat16 | 64 of 32-512/16-128 | llama_fast | 16 | 1,234.5 | 4.13x | 91.2% | 1.2% |  |"
    assert f"{ours} {times}" in text
    theirs = "| 1b, bfloat16 | 64 of 32-512/16-128 | llama.cpp | 8 | 1,234.5 |  |  |  | 1.50x |"
    assert f"{theirs} {times}" in text
    assert "--mixed`: not measured yet" not in text and "`bench_throughput.py`: not measured yet." in text
