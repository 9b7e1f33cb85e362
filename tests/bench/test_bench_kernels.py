"""bench/bench_kernels.py: its bounds, what it refuses, and its whole way through every kernel, without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {"rms_norm", "rope_and_cache", "silu_mul", "linear", "int4_linear", "attention", "sample", "log_probs"}


def run_script(*arguments, module=None, **environment):
    command = [sys.executable, *(["-m", module] if module else [str(ROOT / "bench" / "bench_kernels.py")]), *arguments]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # No GPU in this process, whatever the machine has.
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=600, check=False)


class Pretended:
    """A GPU that the kernels are not run on: cases bring functions of their own."""

    device = torch.device("cpu")
    name = "pretended"
    l2_bytes = 0
    bandwidth, flops, launch_us = 1e12, 1e15, 1.0

    def __init__(self, bench):
        self.summary = bench.sys.modules["timing"].Summary(2.0, 1.0, 3.0)
        self.timed = []

    def time(self, function, sets):
        for arguments in sets:
            function(*arguments)
        self.timed.append(function)
        return self.summary

    def release(self):
        pass


@pytest.fixture
def case(bench):
    """Function: a case with the setup that it is given."""

    def make(ours=None, check=lambda: None, peers=None):
        setup = bench.Setup([(torch.zeros(1),)], ours or (lambda x: x), check, peers or {})
        return bench.Case("rms_norm", "test", "smoke", 1, None, 2_000_000, 0, lambda device, l2_bytes: setup)

    return make


def test_bounds_of_shapes_computed_by_hand(bench):
    found = {
        (c.kernel, c.op, c.rows, c.context): c for c in bench.cases(["8b"], sorted(KERNELS), [1, 64], [512], [1024])
    }
    # Llama 3.1 8B's gate and up at one row: 28672 x 4096 weights in bf16, x, and 14336 outputs.
    gate_up = found["linear", "gate-up + silu", 1, None]
    assert gate_up.num_bytes == 2 * 28672 * 4096 + 2 * 4096 + 2 * 14336
    assert gate_up.flops == 2 * 28672 * 4096
    assert gate_up.bound_us(1e12, 1e15) == pytest.approx(1e6 * gate_up.num_bytes / 1e12)
    # At 512 rows the matrix units decide: 1.2e11 FLOP.
    assert found["linear", "gate-up + silu", 512, None].bound_us(1e12, 1e14) == pytest.approx(
        1e6 * 512 * gate_up.flops / 1e14
    )
    # o adds a residual; the LM head writes fp32.
    assert found["linear", "o + residual", 64, None].num_bytes == 2 * (4096 * 4096 + 3 * 64 * 4096)
    assert found["linear", "LM head", 64, None].num_bytes == 2 * (128256 * 4096 + 64 * 4096) + 4 * 64 * 128256
    # int4: half a byte a weight, a scale for 128 of them.
    down = found["int4_linear", "down + residual", 1, None]
    assert down.num_bytes == 4096 * 14336 // 2 + 2 * 4096 * 112 + 2 * (14336 + 2 * 4096)
    # K and V of 8 heads of 128 in bf16 for 64 x 1024 slots, q and the output.
    attention = found["attention", "generated", 64, 1024]
    assert attention.num_bytes == 64 * 1024 * 2 * 8 * 128 * 2 + 2 * 64 * 4096 * 2
    assert attention.flops == 4 * 64 * 1024 * 4096
    # A prompt: 512 * 513 / 2 visible pairs.
    assert found["attention", "prompt", 512, 512].flops == 4 * (512 * 513 // 2) * 4096
    assert found["rms_norm", "4096", 512, None].num_bytes == 2 * (2 * 512 * 4096 + 4096)
    assert found["silu_mul", "14336", 64, None].num_bytes == 3 * 64 * 14336 * 2
    assert found["rope_and_cache", "32+8 heads", 1, None].num_bytes == 2 * (2 * 32 + 4 * 8) * 128 + 8 * 128 + 16
    assert found["sample", "greedy", 64, None].num_bytes == 64 * (4 * 128256 + 8)


def test_every_kernel_of_both_models_is_there(bench):
    found = bench.cases(["1b", "8b"], list(bench.KERNELS), [1, 8, 64], [512, 4096], [1024, 4096, 32768])
    assert {case.kernel for case in found} == KERNELS
    assert len({case.name for case in found}) == len(found)
    assert {case.op for case in found if case.kernel == "linear"} == {
        "qkv",
        "o + residual",
        "gate-up + silu",
        "down + residual",
        "LM head",
    }


def test_criteria(bench):
    checks = sys.modules["checks"]
    exact = torch.randn(4096, dtype=torch.float64) + 3
    plain = exact.bfloat16()
    assert checks.worse_than_twice([(plain, plain, exact)]) is None
    assert "beyond one ulp" in checks.worse_than_twice([(plain * 1.05, plain, exact)])
    assert "not finite" in checks.worse_than_twice([(plain / 0, plain, exact)])
    assert "instead of" in checks.worse_than_twice([(plain[1:], plain, exact)])
    assert checks.worse_than_twice([]) == "nothing was compared"
    # What follows POOL outputs is not drawn.
    endless = iter(lambda: (plain[:2048], plain[:2048], exact[:2048]), None)
    assert checks.worse_than_twice(endless) is None

    magnitude = exact.abs()
    assert checks.sum_inaccurate(exact.float(), exact, magnitude, 64) is None
    assert "beyond the bound" in checks.sum_inaccurate(exact.float() * 1.001, exact, magnitude, 64)
    assert "not finite" in checks.sum_inaccurate(exact.float() / 0, exact, magnitude, 64)


def test_a_kernel_that_fails_its_check_is_not_timed(bench, case):
    gpu = Pretended(bench)
    result = bench.measure(case(check=lambda: "off by 3"), gpu)
    assert result["refused"] == "off by 3"
    assert "us" not in result and gpu.timed == []


def test_a_kernel_that_raises_is_refused_with_the_reason(bench, case):
    def broken(x):
        raise ValueError("no such tile")

    assert bench.measure(case(ours=broken), Pretended(bench))["refused"] == "ValueError: no such tile"


def test_what_others_do_does_not_stop_the_bench(bench, case):
    def missing():
        raise ImportError("no module")

    def failing():
        raise RuntimeError("its kernel does not run")

    peers = {"torch": lambda: (torch.neg, [(torch.ones(1),)]), "liger": missing, "flashinfer": failing}
    result = bench.measure(case(peers=peers), Pretended(bench))
    assert (result["torch_us"], result["share"]) == (2.0, 1.0)
    assert result["others_failed"] == {
        "liger": "not installed",
        "flashinfer": "RuntimeError: its kernel does not run",
    }


@pytest.mark.parametrize("planted", ["result", "nothing written"])
def test_a_planted_error_is_refused_and_the_rest_goes_on(bench, monkeypatch, capsys, planted):
    kernel_cases = sys.modules["kernel_cases"]
    plain = kernel_cases._plain_silu_mul

    def wrong(gate_up):
        if planted == "result":
            return plain(gate_up) * 1.05
        return torch.empty(gate_up.shape[0], gate_up.shape[1] // 2, dtype=gate_up.dtype)

    def right(x, weight, eps):
        return kernel_cases.reference.rms_norm(x, weight, eps)

    # In the place of the modules: their kernels do not run on this process's CPU tensors.
    for name, function in (("silu_mul", wrong), ("rms_norm", right)):
        module = type(sys)(f"llama_fast.kernels.{name}")
        setattr(module, name, function)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    gpu = Pretended(bench)
    assert bench.main(["--smoke", "--kernels", "silu_mul,rms_norm"], gpu=gpu) == 1
    out = capsys.readouterr().out
    assert out.count("refusing to time: ") == 3
    result = json.loads(out.splitlines()[-1])
    assert [("us" in row, "refused" in row) for row in result["rows"]] == 3 * [(False, True)] + 3 * [(True, False)]
    assert wrong not in gpu.timed and right in gpu.timed


def test_after_the_given_seconds_no_case_starts(bench, monkeypatch, capsys, case):
    made = [case(), case(), case()]
    monkeypatch.setattr(bench, "cases", lambda *arguments: made)
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    assert bench.main(["--kernels", "rms_norm", "--seconds", "25"], gpu=Pretended(bench)) == 0
    out = capsys.readouterr().out
    assert "1 of 3 cases not run: --seconds 25 were over" in out
    assert ["skipped" in row for row in json.loads(out.splitlines()[-1])["rows"]] == [False, False, True]


def test_compiling_ahead_survives_a_kernel_that_does_not_compile(bench, case):
    called = []

    def broken(x):
        called.append(x)
        raise RuntimeError("no such instruction")

    bench.compile_ahead([case(ours=broken)], Pretended(bench), jobs=1)
    assert len(called) == 1


def test_without_a_gpu_there_are_bounds_only():
    done = run_script("--kernels", "linear,sample", "--bandwidth", "4.8")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "assumed, not measured: 4.8 TB/s, 989.0 TFLOP/s" in lines[0]
    assert lines[-2] == "nothing was measured: PyTorch finds no GPU here"
    result = json.loads(lines[-1])
    assert (result["bench"], result["measured"], result["bytes_per_s"]) == ("kernels", False, 4.8e12)
    assert {"device", "commit", "versions", "sources"} <= result.keys()
    assert result["rows"] and all(row["bound_us"] > 0 and "us" not in row for row in result["rows"])


def test_the_whole_run_in_the_interpreter(tmp_path):
    path = tmp_path / "new" / "kernels.json"
    arguments = ["bench_kernels", "--smoke", "--json", str(path), "--commit", "0123abc"]
    done = run_script(*arguments, module="tests.bench.dry_run", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(path.read_text())
    assert (result["device"], result["measured"], result["commit"]) == ("pretended", True, "0123abc")
    assert {row["kernel"] for row in result["rows"]} == KERNELS
    for row in result["rows"]:
        assert row["us"] == {"median": 2.0, "p10": 1.0, "p90": 3.0}, row
        assert row["share"] == pytest.approx(row["bound_us"] / 2.0)
        assert row["torch_us"] == 2.0 or row["kernel"] == "int4_linear", row
    assert all(len(digest) == 64 for digest in result["sources"].values())
    assert "liger is not installed: pip install liger-kernel" in done.stdout


def test_help_has_examples(bench, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(["--help"])
    assert stopped.value.code == 0
    assert "python bench/bench_kernels.py --smoke" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "70b"], "'70b' is unknown; use 1b, 8b, smoke"),
        (["--kernels", "linear,softmax"], "'softmax' is unknown; use rms_norm"),
        (["--rows", "1,x"], "'1,x' is not a list like 1,8,64"),
        (["--rows", "0"], "'0': give numbers of at least 1"),
        (["--jobs", "0"], "--jobs 0: give at least 1"),
    ],
)
def test_wrong_usage(bench, capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        bench.main(arguments)
    assert message in capsys.readouterr().err


def test_rates_are_not_assumed_where_they_are_measured(bench, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--flops", "989"], gpu=Pretended(bench))
    assert "for machines without a GPU" in capsys.readouterr().err
