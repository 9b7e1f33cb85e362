"""bench/gpu_report.py without a GPU: its files, what it does with sections that fail or hang, and its minutes."""

import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")

# Sections that are planted: each saves something first.
PLANTED = """
import os, subprocess, sys, time
from gpu_report_section import NotHere

def fine(section):
    section.check("planted", "fine", None, "all of it")
    section.results["entry"] = {"a" * 8: {"9.0": {"gpu": "planted", "report": section.options["report"]}}}

def wrong(section):
    section.check("planted", "linear", "off by 3 | or more")
    section.results["entry"] = {"b" * 8: {"9.0": {"gpu": "planted", "report": ""}}}

def raises(section):
    section.check("planted", "fine", None)
    raise ValueError("no such tile")

def crashes(section):
    section.report("planted", "before", "alive")
    os.abort()

def hangs(section):
    section.report("planted", "before", "alive")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    section.results["child"] = child.pid
    section.save()
    time.sleep(600)

def absent(section):
    raise NotHere("no such tool")
"""


@pytest.fixture
def planted(bench, tmp_path, monkeypatch):
    """Function (names, arguments): the exit status and the report of these planted sections."""
    (tmp_path / "planted.py").write_text(PLANTED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def run(names, *arguments, limit_s=60.0):
        plans = [
            bench.SectionPlan(name, "checks", f"planted:{name}", limit_s, 0.5, runs_without_gpu=True) for name in names
        ]
        status = bench.main(["--out", str(tmp_path / "out"), *arguments], sections=plans)
        return status, json.loads((tmp_path / "out" / "report.json").read_text())

    return run


def test_the_whole_run_without_a_gpu(bench, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "bench" / "gpu_report.py"), "--out", str(out), "--commit", "0123abc"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((out / "report.json").read_text())
    assert (report["bench"], report["schema"], report["measured"], report["commit"]) == (
        "gpu_report",
        1,
        False,
        "0123abc",
    )
    assert {"device", "versions", "minutes", "seconds"} <= report.keys()
    assert report["rates"]["source"] == "assumed: bench/results/nvidia-h200/kernels.json"
    assert all(len(digest) == 64 for digest in report["sources"].values())

    sections = report["sections"]
    assert list(sections) == [plan.name for plan in bench.SECTIONS]
    ran = {"rows", "kernel_times", "model_8b", "model_1b"}
    for name, entry in sections.items():
        assert entry["status"] == ("passed" if name in ran else "not run"), (name, entry["reason"])
        assert name in ran or entry["reason"] == "no GPU"
    # Every kernel's rows were compared, interpreted.
    rows = sections["rows"]["results"]
    assert rows["interpreted"] and "left_out" not in rows
    assert {check["subject"] for check in rows["checks"]} == {*report["sources"], "bits of rows"} - {"advance"}

    # Bounds, and nothing that could be taken for a measurement.
    kernels = sections["kernel_times"]["results"]["kernels"]
    assert not kernels["measured"] and len(kernels["rows"]) > 50
    assert all(row["bound_us"] > 0 and "us" not in row for row in kernels["rows"])
    steps = [row for name in ("model_8b", "model_1b") for row in sections[name]["results"]["steps"]]
    assert all(row["bound_ms"] > 0 and "ms" not in row and "share" not in row for row in steps)
    assert {row["kind"] for row in steps} == {"decode", "prefill"}
    assert report["targets"] and all(t["reached"] is None and t["met"] is None for t in report["targets"])
    text = (out / "report.md").read_text()
    assert "**Nothing here was measured: there was no GPU.**" in text and "not measured yet" in text


def test_bounds_of_whole_models_by_hand(bench):
    models = __import__("gpu_report_models")
    rates = sys.modules["serving_bounds"].Rates(1e12, 1e15)
    model = sys.modules["gpu_report_engine"].empty_model("8b")
    row = models._row("8b", None, ("decode", 1, 1024), rates, model, None)
    # 8.03 billion parameters but for the embedding, and K and V of 1024 tokens and half of those generated.
    weights = 2 * (32 * (4096 * (6144 + 4096 + 3 * 14336) + 2 * 4096) + 128256 * 4096 + 4096)
    assert row["num_bytes"] == weights + 131072 * (1024 + models._STEPS / 2)
    assert row["bound_ms"] == pytest.approx(1e3 * row["num_bytes"] / 1e12)


def test_failures_do_not_stop_the_report(planted, tmp_path, capsys):
    status, report = planted(["wrong", "raises", "crashes", "absent", "fine"])
    assert status == 1
    sections = report["sections"]
    assert {name: entry["status"] for name, entry in sections.items()} == {
        "wrong": "failed",
        "raises": "failed",
        "crashes": "failed",
        "absent": "not run",
        "fine": "passed",
    }
    assert sections["raises"]["reason"] == "ValueError: no such tile"
    assert sections["raises"]["results"]["checks"][0]["status"] == "passed"
    # What a process that died had saved is there.
    assert sections["crashes"]["results"]["checks"][0]["detail"] == "alive"
    assert "exit status -6" in sections["crashes"]["reason"]
    text = (tmp_path / "out" / "report.md").read_text()
    failed = text[text.index("## Failed") : text.index("## Sections")]
    assert "- **wrong** failed: 1 checks: linear (planted)" in failed
    assert "no such tile" in failed and "**crashes**" in failed and "absent" not in failed
    assert "off by 3 \\| or more" in text
    assert "wrong: failed" in capsys.readouterr().out


def test_a_hang_ends_at_its_deadline_and_leaves_nothing(planted):
    start = time.monotonic()
    status, report = planted(["hangs", "fine"], limit_s=8.0)
    assert status == 1 and time.monotonic() - start < 60
    hung = report["sections"]["hangs"]
    assert hung["status"] == "timed out" and 8 <= hung["seconds"] < 20
    assert hung["results"]["checks"][0]["detail"] == "alive"
    assert report["sections"]["fine"]["status"] == "passed"
    # Its child is gone too; where nobody reaps it, a zombie is left.
    state = Path(f"/proc/{hung['results']['child']}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_only_what_passed_is_recorded(planted, tmp_path):
    table = tmp_path / "cuda_checked.json"
    table.write_text(json.dumps({"older": {"8.0": {"gpu": "A100", "report": "x"}}}))
    planted(["wrong", "fine"], "--table", str(table))
    # Without --record the folder alone has it.
    assert json.loads(table.read_text()).keys() == {"older"}
    entry = {"aaaaaaaa": {"9.0": {"gpu": "planted", "report": ""}}}
    assert json.loads((tmp_path / "out" / "cuda_checked.json").read_text()) == entry
    planted(["wrong"], "--table", str(table), "--record")
    assert json.loads(table.read_text()).keys() == {"older"}
    planted(["fine"], "--table", str(table), "--record", "--report-name", "bench/results/h200/report.json")
    recorded = json.loads(table.read_text())
    assert recorded.keys() == {"older", "aaaaaaaa"}
    assert recorded["aaaaaaaa"]["9.0"] == {"gpu": "planted", "report": "bench/results/h200/report.json"}


def test_the_time_is_shared_out(bench):
    def plan(limit_s, minimum_s):
        return bench.SectionPlan("x", "checks", "x:x", limit_s, minimum_s)

    later = [plan(100, 20), plan(100, 30)]
    # All that it wants; what later ones leave; not even its least.
    assert bench.allot(plan(60, 10), 200, later) == 60
    assert bench.allot(plan(60, 10), 100, later) == pytest.approx(50 - bench._RESERVE_S)
    assert bench.allot(plan(60, 10), 65, later) is None
    assert bench.allot(plan(60, 10), -5, []) is None
    # Half the minutes: half of everything.
    assert bench.allot(plan(60, 10), 100, later, scale=0.5) == 30
    # A section that uses all that it gets leaves the next ones their least, whatever the minutes are.
    for minutes in (1, 3, 4, 8, 20):
        left, scale = 60 * minutes, minutes / 8
        for index, section in enumerate(bench.SECTIONS):
            seconds = bench.allot(section, left, bench.SECTIONS[index + 1 :], scale)
            assert seconds is not None and seconds >= scale * section.minimum_s, (minutes, section.name)
            left -= seconds
        assert left >= bench._RESERVE_S * min(1, scale)


def test_what_no_time_is_left_for_is_skipped_by_name(bench, planted, monkeypatch, tmp_path):
    # Every look at the clock takes half a minute.
    clock = iter(range(0, 100_000, 30))
    monkeypatch.setattr(bench, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    entry = {"group": "checks", "status": "passed", "reason": None, "seconds": 1.0, "limit_s": 1.0, "results": {}}
    monkeypatch.setattr(bench, "run_section", lambda plan, *_: dict(entry))
    status, report = planted(["fine", "wrong", "absent"], "--minutes", "1.4")
    assert status == 0
    assert [section["status"] for section in report["sections"].values()] == ["passed", "skipped", "skipped"]
    assert "| wrong | checks | skipped |" in (tmp_path / "out" / "report.md").read_text()


def test_only_takes_what_it_builds_on_along(bench):
    def names(*only):
        return [plan.name for plan in bench._chosen(bench.SECTIONS, only)]

    assert names("rows") == ["rows"]
    assert names("model_8b") == ["ceilings", "extension", "model_8b"]
    assert names() == [plan.name for plan in bench.SECTIONS]


def test_a_kernel_whose_checks_failed_is_not_timed(bench, tmp_path):
    times, section_module = __import__("gpu_report_times"), sys.modules["gpu_report_section"]
    tests = section_module.Section("kernel_tests", tmp_path, 60, False, {})
    tests.check("tests", "linear", "3 of 100 tests failed")
    tests.check("tests", "rms_norm", None)
    section = section_module.Section(
        "kernel_times", tmp_path, 60, True, {"rates": {"bytes_per_s": 1e12, "flops_per_s": 1e15}}
    )
    times.kernel_times(section)
    assert section.results["refused"] == {"linear": "tests: 3 of 100 tests failed"}
    kernels = {row["kernel"] for row in section.results["kernels"]["rows"]}
    assert "linear" not in kernels and "rms_norm" in kernels
    section.options["despite_failed_tests"] = True
    times.kernel_times(section)
    assert "linear" in {row["kernel"] for row in section.results["kernels"]["rows"]}


def test_tests_are_selected_counted_and_end_in_time(bench, tmp_path):
    checks, section_module = sys.modules["gpu_report_checks"], sys.modules["gpu_report_section"]
    folder = tmp_path / "tests"
    folder.mkdir()
    body = "import time, pytest\n@pytest.mark.parametrize('n', range(8))\ndef test_it(n):\n    "
    (folder / "test_linear.py").write_text(body + "assert n != 4, 'four'\n")
    (folder / "test_sample.py").write_text(body + "pass\n")
    (folder / "test_broken.py").write_text("import no_such_module\n")
    section = section_module.Section("kernel_tests", tmp_path, 120, False, {"folder": str(folder), "every": 2})
    checks.kernel_tests(section)
    found = section.results["kernels"]
    assert {name: found["linear"][name] for name in ("passed", "failed", "left_out")} == {
        "passed": 3,
        "failed": 1,
        "left_out": 0,
    }
    assert (
        found["linear"]["failing"][0]["test"].endswith("test_it[4]") and "four" in found["linear"]["failing"][0]["why"]
    )
    assert (found["sample"]["passed"], found["broken"]["failed"]) == (4, 1)
    states = {check["subject"]: check["status"] for check in section.results["checks"]}
    assert states["linear"] == states["broken"] == "failed" and states["sample"] == "passed"


def test_a_program_that_leaves_a_child_ends_in_its_time(bench, tmp_path):
    checks, section_module = sys.modules["gpu_report_checks"], sys.modules["gpu_report_section"]
    section = section_module.Section("sanitizer", tmp_path, 4, False, {})
    # The child has the output open, as pytest's workers and ninja's compilers have.
    code = "import subprocess, sys, time; print('alive', flush=True); "
    code += "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(8)']); time.sleep(60)"
    start = time.monotonic()
    status, output = checks.finish([sys.executable, "-c", code], section, "planted", dict(os.environ))
    assert (status, output.strip()) == (None, "alive") and time.monotonic() - start < 7
    assert checks.finish([sys.executable, "-c", "raise SystemExit(3)"], section, "planted", {}) == (3, "")


def test_a_checkout_that_is_not_installed_is_linked_and_built(bench, tmp_path, monkeypatch):
    checks, section_module = sys.modules["gpu_report_checks"], sys.modules["gpu_report_section"]
    for folder in ("llama_fast", "kernels"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text("")
    (tmp_path / "llama_fast" / "_C.py").write_text("raise ImportError('planted')")
    (tmp_path / "setup.py").write_text(
        "import os, pathlib\n"
        "text = f\"source_hash = {os.environ['LLAMA_FAST_CUDA_ARCHS']!r}\"\n"
        "pathlib.Path('llama_fast/_cuda.py').write_text(text)\n"
    )
    monkeypatch.setattr(checks, "ROOT", tmp_path)
    monkeypatch.setattr(checks, "has_gpu", lambda: True)
    monkeypatch.setattr(checks, "_kernels_import", lambda: False)
    monkeypatch.setattr(checks, "nvidia_smi", lambda *_: {"compute_cap": "9.0"})
    monkeypatch.delenv("LLAMA_FAST_CUDA_ARCHS", raising=False)
    section = section_module.Section("build", tmp_path, 60, False, {})
    checks.build(section)
    assert (tmp_path / "llama_fast" / "kernels").readlink() == Path("../kernels")
    found = {check["subject"]: (check["status"], check["detail"]) for check in section.results["checks"]}
    assert found["native modules"][0] == found["llama_fast.kernels"][0] == "passed"
    assert found["llama_fast._cuda"] == ("passed", "90")
    assert found["llama_fast._C"][0] == "failed" and "ImportError: planted" in found["llama_fast._C"][1]
    # Once more: the link is there.
    checks.build(section)


def test_what_models_launch_is_compiled_ahead(bench, tmp_path, monkeypatch):
    module, section_module = __import__("gpu_report_compile"), sys.modules["gpu_report_section"]
    from llama_fast.kernels import launches

    if launches.arguments.INTERPRETED:
        pytest.skip("about compiled kernels")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    found = [x for x in launches.model_launches(90, ["8b"], ["bf16"], quick=True) if x.name == "_rms_norm_kernel"]
    broken = launches.Launch(
        90, found[0].module, "_rms_norm_kernel", found[0].data.replace("_rms_norm_kernel", "_other")
    )
    monkeypatch.setattr(launches, "model_launches", lambda *_: [*found, broken])
    monkeypatch.setattr(module, "nvidia_smi", lambda *_: {"compute_cap": "9.0"})
    section = section_module.Section("compile", tmp_path, 120, False, {})
    module.compile_models(section)
    assert section.results["kernels"] == section.results["compiled"] == len(found) + 1
    assert [(check["subject"], check["status"]) for check in section.results["checks"]] == [("rms_norm", "failed")]
    assert list((tmp_path / "cache").glob("*/_rms_norm_kernel.cubin"))
    # What the time does not allow is left to those who meet it.
    late = section_module.Section("compile", tmp_path, 0.1, False, {})
    module.compile_models(late)
    assert "they are compiled where they are met" in late.results["left_out"][0]
    monkeypatch.setattr(module, "nvidia_smi", lambda *_: None)
    with pytest.raises(section_module.NotHere, match="no GPU"):
        module.compile_models(section)


def test_what_compute_sanitizer_says(bench):
    problem = sys.modules["gpu_report_checks"].sanitizer_problem
    assert problem("========= ERROR SUMMARY: 0 errors\n", 0) is None
    assert problem("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", 0) is None
    said = ["Invalid __global__ read of size 4 bytes", "    at _linear_kernel", "ERROR SUMMARY: 2 errors"]
    bad = "".join(f"========= {line}\n" for line in said)
    assert problem(bad, 0).startswith("2 errors: Invalid __global__ read of size 4 bytes; at _linear_kernel")
    assert "without a summary" in problem("cannot start", 1)
    assert "exit status 3" in problem("========= ERROR SUMMARY: 0 errors\n", 3)


def test_rows_that_see_their_company_are_noticed(bench):
    bits = __import__("gpu_report_bits")
    x = torch.randn(8, 16)
    right = bits.Rows("linear", "right", 8, [3], lambda start, end: (x[start:end] * 2,))
    assert right.counts == [1, 2, 3, 4, 5, 7, 8] and bits.differs(right) is None and bits.changes(right, 3) is None
    company = bits.Rows("linear", "wrong", 8, [3], lambda start, end: (x[start:end] + (end - start == 3),))
    assert "rows 0 to 3 alone and among 8 differ" in bits.differs(company)
    starts = set()
    bits.differs(bits.Rows("linear", "", 9, [3], lambda start, end: (starts.add(start) or x[start:end],), step=4))
    assert starts == {0, 4, 8}
    calls = iter(range(100))
    unsteady = bits.Rows("linear", "unsteady", 8, [], lambda start, end: (x[start:end] + (next(calls) == 4),))
    assert "differs from the first" in bits.changes(unsteady, 3)


def test_steps_are_timed_over_windows(bench):
    models = __import__("gpu_report_models")
    # Two tokens reach the host at once, every 20 ms; the first ones late.
    seen = [(0.0, 0), (5.0, 1), *((6.0 + 0.02 * n, 2 * n) for n in range(1, 17))]
    windows = models.window_ms(seen)
    assert windows == pytest.approx([10.0] * len(windows)) and len(windows) >= 4


def test_decoding_and_prefill_run_through_an_engine(bench, monkeypatch):
    models, engine_module = __import__("gpu_report_models"), sys.modules["gpu_report_engine"]
    from llama_fast.engine.engine import Engine
    from tests.tiny import make_model

    monkeypatch.setattr(models.torch.cuda, "synchronize", lambda: None)
    engine = Engine(make_model(), max_batch=4, max_seq_len=200)
    engine_module.make_ready(engine)
    engine.cache.pool.normal_()
    assert models.decode_ms(engine, 4, 100).median > 0
    assert models.prefill_ms(engine, 100, repeats=1).median > 0
    assert models.capture_time(engine)() is None
    stats = engine_module.stats_of(engine)
    assert {"allocations", "compilations"} <= stats.keys()


def test_invariance_is_compared_with_the_best_variant(bench):
    write = sys.modules["gpu_report_write"]
    rows = [
        {"model": "8b", "kind": "decode", "batch": 1, "context": 1024, "variant": variant, "ms": {"median": ms}}
        for variant, ms in ((None, 4.2), ("linears of cuBLAS", 4.0), ("eager", 1.0))
    ]
    report = {"measured": True, "sections": {"model_8b": {"results": {"steps": rows}}}}
    assert write.invariance_costs(report) == {("8b", "decode", 1, 1024): pytest.approx(0.05)}
    found = {t["name"]: t for t in write.targets(report)}["one answer costs, beside linears of cuBLAS"]
    assert found["reached"] == pytest.approx(0.05)


@pytest.fixture
def pretended(bench, monkeypatch, tmp_path):
    """Function (name, options): a section on a machine whose GPU is made of Python; its engines run on the CPU."""
    models, engine = __import__("gpu_report_models"), sys.modules["gpu_report_engine"]
    times = sys.modules["gpu_report_times"]
    from llama_fast.engine.engine import Engine
    from tests.bench.dry_run import PretendedGpu
    from tests.tiny import make_model

    cuda = times.torch.cuda
    monkeypatch.setattr(cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(cuda, "mem_get_info", lambda *_: (2**30, 2**30))
    monkeypatch.setattr(cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(cuda, "get_device_name", lambda *_: "pretended")
    for module in (models, engine):
        monkeypatch.setattr(module, "has_gpu", lambda: True)
        monkeypatch.setattr(module, "random_model", lambda name, **_: make_model(max_position_embeddings=8192))
        monkeypatch.setattr(module, "make_engine", lambda model, **sizes: Engine(model, **sizes))
    monkeypatch.setattr(models, "empty_model", lambda name: make_model(max_position_embeddings=8192))
    monkeypatch.setattr(times, "Gpu", lambda **_: PretendedGpu())
    section_module = sys.modules["gpu_report_section"]

    def section(name, **options):
        ceilings = section_module.Section("ceilings", tmp_path, 60, False, {})
        ceilings.results = {"bytes_per_s": 1e12, "read_bytes_per_s": 2e12, "flops_per_s": 1e15, "name": "pretended"}
        ceilings.save()
        return section_module.Section(name, tmp_path, 120, True, options)

    return section


def test_whole_models_on_a_pretended_gpu(bench, pretended, monkeypatch):
    models = sys.modules["gpu_report_models"]
    monkeypatch.setattr(models, "_points", lambda quick: [("decode", 1, 64), ("prefill", 1, 100), ("decode", 4, 64)])
    section = pretended("model_8b")
    models.model_8b(section)
    steps = section.results["steps"]
    assert [(row["kind"], row["variant"]) for row in steps] == [
        *[("decode", None), ("prefill", None), ("decode", None)],
        *[("decode", "linears of cuBLAS"), ("prefill", "linears of cuBLAS"), ("decode", "linears of cuBLAS")],
        ("decode", "eager"),
    ]
    assert all(row["ms"].median > 0 and row["share"] > 0 for row in steps)
    # A read is faster than a copy: the bound follows it.
    assert steps[0]["bound_ms"] == pytest.approx(1e3 * steps[0]["num_bytes"] / 2e12)
    assert section.results["ready_s"] > 0 and "checks" not in section.results
    assert "LLAMA_FAST_CUDA_EXTENSION" not in os.environ


def test_one_answer_of_engines_on_a_pretended_gpu(bench, pretended, monkeypatch):
    engine = sys.modules["gpu_report_engine"]
    section = pretended("graphs")
    engine.graphs(section)
    found = {check["check"]: check["status"] for check in section.results["checks"]}
    # On the CPU none is, which a GPU must not pass over.
    assert found.pop("steps are captured") == "failed" and found.pop("an engine runs") == "passed"
    assert found == {
        "one answer, another order of arrival": "passed",
        "nothing allocated or compiled after ready": "passed",
        "one answer, alone and in a batch": "passed",
        "one answer, graph and eager": "passed",
        "prompt and generated": "reported",
    }, section.results["checks"]
    # What differs is named.
    one, other = {0: ([1, 2], ["a"]), 1: ([3], ["b"])}, {0: ([1, 5], ["a"]), 1: ([3], ["c"])}
    assert engine._difference(one, one) is None
    assert engine._difference(one, other) == "request 0: token 1 differs; request 1: log probabilities differ"
    assert "allocations: 0 -> 3" in engine._growth({"allocations": 0}, {"allocations": 3})


@pytest.mark.parametrize("right", [True, False])
def test_the_extension_on_a_pretended_gpu(bench, pretended, monkeypatch, right):
    times, module = sys.modules["gpu_report_times"], __import__("gpu_report_extension")
    cases = sys.modules["kernel_cases"]
    smoke = cases.projections("smoke")

    def int4_linear(x, packed, *, residual=None, activation=None, out_dtype=None):
        weight = _dense(packed)
        # A row at a time: no other can show.
        out = torch.stack([(row.double() @ weight.t()).to(out_dtype or x.dtype) for row in x])
        if activation:
            return cases._plain_silu_mul(out)
        out = out if residual is None else residual + out
        return out if right or len(x) != 17 else out + 1

    extension = types.SimpleNamespace(
        int4_linear=int4_linear,
        serves=lambda packed, activation: activation is None,
        extension=lambda: (types.SimpleNamespace(source_hash="5" * 16), ""),
    )
    monkeypatch.setattr(module, "extension", lambda: extension)
    monkeypatch.setattr(module, "Gpu", lambda **_: times.Gpu())
    monkeypatch.setattr(module, "_projections", lambda model: smoke[:3])
    monkeypatch.setattr(module, "_FORMS", {"8b": (module._Form(), module._Form(32, has_zeros=True))})
    monkeypatch.setattr(module, "_DEVICE", "cpu")
    for name in ("linear_setup", "int4_setup"):
        monkeypatch.setattr(module, name, _without_kernels(getattr(module, name)))
    monkeypatch.setattr(module, "_REPEATS", 2)
    section = pretended("extension", report="r.json")
    module.checks(section)
    section.save()
    assert section.results["all_passed"] == right
    assert section.results.get("entry") == (
        {"5" * 16: {"9.0": {"gpu": "pretended", "report": "r.json"}}} if right else None
    )
    served = {check["check"].partition(",")[0] for check in section.results["checks"]}
    assert served == {"accuracy", "bits of rows", "repeats", "serves"}
    assert len(section.results["checks"]) == 2 * (3 + 3 + 1)
    timed = pretended("extension_times")
    if right:
        module.times(timed)
        timings = {(row["rows"], row["op"]): row for row in timed.results["rows"]}
        assert timings.keys() == {(count, op) for count in (1, 8, 64) for op in ("qkv", "o + residual")}
        assert all(row["us"].median == row["triton_us"] == row["bf16_us"] == 2.0 for row in timings.values())
    else:
        with pytest.raises(sys.modules["gpu_report_section"].NotHere, match="not timed"):
            module.times(timed)


def _dense(packed):
    """A PlanarInt4 as fp64 [out_features, in_features]."""
    from llama_fast.kernels.int4_linear import from_planes
    from llama_fast.ops.int4 import Int4Weight, unpack_rows

    zeros = None if packed.zeros is None else packed.zeros.t().to(torch.uint8)
    values = unpack_rows(from_planes(packed.words, packed.in_features))
    return Int4Weight(values, packed.scales.t(), zeros, None).dequantized(dtype=torch.float64)


def _without_kernels(real):
    """A setup whose own kernel is a copy of x: Triton's is not interpreted in this process."""

    def setup(*args, **options):
        made = real(*args, **options)
        made.ours = lambda x, weight, residual: x.clone()
        return made

    return setup


def test_a_model_of_4_bits_on_a_pretended_gpu(bench, pretended, monkeypatch):
    models, engine = sys.modules["gpu_report_models"], sys.modules["gpu_report_engine"]
    from llama_fast.engine.engine import Engine
    from tests.tiny import make_model

    shape = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4}
    fields = {**shape, "max_position_embeddings": 2048, "initializer_range": 0.02}
    monkeypatch.setattr(models, "empty_model", lambda name: make_model(torch.bfloat16, **fields))
    monkeypatch.setattr(models, "make_engine", lambda model, **sizes: Engine(model, backend="reference", **sizes))
    monkeypatch.setattr(models, "_INT4_BATCHES", (1, 3))
    monkeypatch.setattr(models, "_INT4_CONTEXT", 64)
    section = pretended("model_1b")
    section.results["left_out"], section.results["steps"] = [], []
    model, rates = make_model(torch.bfloat16, **fields), sys.modules["serving_bounds"].Rates(1e12, 1e15)
    plain = models._row("1b", None, ("decode", 1, 64), rates, model, None)
    models._time_int4(section, "1b", model, rates, make_model(torch.bfloat16, **fields))
    assert [(row["batch"], row["variant"]) for row in section.results["steps"]] == [(1, "int4"), (3, "int4")]
    row = section.results["steps"][0]
    assert row["ms"].median > 0 and row["flops"] == plain["flops"]
    # 16 bits a weight of the layers become 4, and a scale of 16 bits for 128 of them.
    weights = 2 * (128 * (128 + 2 * 64 + 128) + 3 * 128 * 256)
    assert row["num_bytes"] == plain["num_bytes"] - weights * (2 - 1 / 2 - 2 / 128)
    assert engine.quantize(make_model(torch.bfloat16, **fields)).model.layers[0].mlp.down_proj.group_size == 128


def test_a_measured_report_is_written_and_drawn(bench, tmp_path):
    write = sys.modules["gpu_report_write"]
    us = {"median": 4.0, "p10": 3.9, "p90": 4.1}
    kernel = {"model": "8b", "context": None, "bound_us": 3.0, "us": us, "share": 0.75, "torch_us": 5.0, "flops": 0}
    kernels = [
        {**kernel, "kernel": "rms_norm", "op": "4096", "rows": 3906, "num_bytes": 64_004_096},
        {**kernel, "kernel": "attention", "op": "generated", "rows": 64, "context": 4096, "num_bytes": 10},
        {"kernel": "linear", "op": "qkv", "model": "8b", "rows": 1, "context": None, "bound_us": 1.0, "refused": "no"}
        | {"num_bytes": 10},
    ]
    ms = {"median": 5.0, "p10": 4.9, "p90": 5.1}
    steps = [
        {"model": "8b", "kind": "decode", "batch": batch, "context": 1024, "variant": variant, "bound_ms": 4.5}
        | {"ms": ms, "share": 0.9}
        for batch, variant in ((1, None), (128, None), (1, "linears of cuBLAS"))
    ]
    start = dict.fromkeys(("imports_s", "load_s", "ready_s", "first_token_s", "total_s"), 1.5)
    row = {"model": "8b", "op": "qkv", "rows": 1, "bound_us": 3.0, "us": us, "share": 0.75}
    results = {
        "model_8b": {"steps": steps, "capture_s": 2.5, "left_out": ["decode 128 at 4096: does not fit"]},
        "kernel_times": {"kernels": {"rows": kernels}},
        "starts": {"starts": [{"model": "8b", "first": start, "warm": start}]},
        "extension_times": {"rows": [{**row, "triton_us": 5.0, "bf16_us": 6.0}]},
        "kernel_tests": {"kernels": {"linear": {"failing": [{"test": "a::b", "why": "c"}]}}},
    }
    entry = {"group": "timing", "status": "passed", "reason": None, "seconds": 1.0, "limit_s": 2.0}
    report = {
        "device": "pretended",
        "measured": True,
        "commit": "0123abc",
        "versions": {"torch": "2.11"},
        "rates": {"bytes_per_s": 4e12, "flops_per_s": 8e14, "launch_us": 1.0, "source": "measured in this run"},
        "sections": {name: {**entry, "results": found} for name, found in results.items()},
    }
    write.write_report(report, tmp_path, pictures=True)
    targets = {t["name"]: t for t in json.loads((tmp_path / "report.json").read_text())["targets"]}
    assert (
        targets["8B decode, batch 1, context 1024"]["met"]
        and targets["8B decode, batch 1, context 1024"]["reached"] == 0.9
    )
    assert targets["rms_norm, 64 MB"]["met"] is False and targets["silu_mul, 64 MB"]["met"] is None
    assert targets["decode attention, batch 64, context 4096"]["reached"] == 0.75
    assert targets["8B, capture of all batch sizes"]["met"] is False
    assert targets["8B, warm start to the first token"]["met"] is True
    text = (tmp_path / "report.md").read_text()
    for expected in ("could not be made", "Traceback"):
        assert expected not in text
    for expected in (
        "| linear | 8b, qkv | 1 | 1.00 | refused: no |",
        "| 8b | decode | 128 | 1,024 |  | 4.500 | 5.000 | 4.900 - 5.100 | 90.0% |",
        "| 8b | decode | 1 | 1024 | +0.0% |",
        "| 8b | qkv | 1 | 3.00 | 4.00 | 75.0% | 5.00 | 6.00 |  |",
        "- `a::b`: c",
        "does not fit",
    ):
        assert expected in text, expected
    pytest.importorskip("matplotlib")
    assert (tmp_path / "kernels.png").stat().st_size > 1000 and (tmp_path / "decode.png").stat().st_size > 1000


def test_a_report_that_cannot_be_a_table_is_kept(bench, tmp_path, capsys):
    report = {"measured": True, "sections": {"starts": {"results": {"starts": [{"model": "8b"}]}}}}
    sys.modules["gpu_report_write"].write_report(report, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["sections"]
    assert "could not be made" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0"], "--minutes 0: give more than 0"),
        (["--only", "nothing"], "invalid choice"),
        (["--assume", "a100"], "invalid choice"),
    ],
)
def test_wrong_usage(bench, capsys, tmp_path, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--out", str(tmp_path), *arguments])
    assert message in capsys.readouterr().err
