"""Choosing the native kernels: instruction sets, a module that is missing or broken, threads, forks."""

import importlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import llama_fast
from llama_fast import LLM, SamplingParams, demo, ops
from llama_fast.errors import BackendError
from llama_fast.ops import reference
from llama_fast.ops.native import ISA_VARIABLE, native

_C, _reason = native()
SETS = [] if _C is None else _C.instruction_sets()
CPU = torch.device("cpu")
PACKAGE = Path(llama_fast.__file__).parent

needs_module = pytest.mark.skipif(_C is None, reason=_reason)
# In the interpreter "auto" is the GPU's kernels.
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="about the CPU's backend")


def test_the_module_is_there_where_it_can_be_built():
    if (platform.machine(), sys.platform) != ("x86_64", "linux"):
        pytest.skip("the kernels are for x86-64 Linux")
    assert importlib.import_module("llama_fast._C").instruction_sets(), "no set of this processor is known"
    assert native()[0] is not None, native()[1]


@pytest.fixture
def fresh(monkeypatch):
    """The module is looked for anew, in this test and after it; the instruction set is kept."""
    monkeypatch.delenv(ISA_VARIABLE, raising=False)
    before = None if _C is None else _C.selected()
    for cached in (native, ops._warn_once):
        cached.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    for cached in (native, ops._warn_once):
        cached.cache_clear()
    if before is not None:
        _C.select(before)


# --- instruction sets -------------------------------------------------------------------------------------------------


@needs_module
def test_the_best_set_comes_first():
    cpuinfo = Path("/proc/cpuinfo").read_text()
    # Intel's vdpbf16ps is slower than two multiply-adds (bench/results/cpu-experiments.md).
    intel = "GenuineIntel" in cpuinfo
    order = ["avx512", "avx512_bf16", "avx2"] if intel else ["avx512_bf16", "avx512", "avx2"]
    assert [name for name in order if name in SETS] == SETS
    flags = cpuinfo.split("flags", 1)[1].split("\n", 1)[0].split()
    assert ("avx2" in SETS) == ({"avx2", "fma", "f16c"} <= set(flags))
    assert ("avx512" in SETS) == ({"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= set(flags))
    assert ("avx512_bf16" in SETS) == ("avx512_bf16" in flags and "avx512" in SETS)


@pytest.mark.parametrize("name", SETS)
def test_the_variable_chooses_a_set(fresh, name):
    fresh.setenv(ISA_VARIABLE, name)
    assert native() == (_C, name)
    assert _C.selected() == name
    assert ops.select_backend("auto", CPU).__name__ == "llama_fast.ops.cpu"


@needs_module
@pytest.mark.parametrize("name", ["avx1024", "AVX2", "avx2 "])
def test_an_unknown_set_in_the_variable(fresh, caplog, name):
    fresh.setenv(ISA_VARIABLE, name)
    message = f"LLAMA_FAST_CPU_ISA={name!r} is not one of this processor's sets: {', '.join(SETS)}"
    _assert_falls_back(caplog, message)


def _assert_falls_back(caplog, message):
    """ "auto": the reference and one warning; "cpu": an error; both say why and what to do."""
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert ops.select_backend("auto", CPU, torch.float32) is reference
    (record,) = caplog.records
    assert record.levelname == "WARNING" and message in record.getMessage()
    assert "\n" not in record.getMessage()
    with pytest.raises(BackendError, match="backend='cpu' cannot run: .*; use backend='reference'") as caught:
        ops.select_backend("cpu", CPU)
    assert message in str(caught.value)
    assert ops.select_backend("reference", CPU) is reference


@needs_module
def test_an_empty_variable_is_none(fresh):
    fresh.setenv(ISA_VARIABLE, "")
    assert native()[0] is _C


@needs_module
@pytest.mark.parametrize("name", ["", "avx1024", "AVX2"])
def test_select_refuses_an_unknown_set(name):
    before = _C.selected()
    with pytest.raises(ValueError, match="does not run on this processor"):
        _C.select(name)
    assert _C.selected() == before


@needs_module
def test_each_set_computes_the_same_within_roundings(fresh):
    """Other registers, other order of summation: near, and with more than one set not the same bits everywhere."""
    from llama_fast.ops import cpu
    from tests.ops.cpu_cases import projection

    x, parts = torch.randn(5, 500), [projection(torch.randn(70, 500))]
    results = []
    for name in SETS:
        _C.select(name)
        results.append(cpu.linear(x, cpu.prepare_linear(parts)))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-4)


# --- the module is missing or broken ----------------------------------------------------------------------------------


def test_a_module_that_was_not_built(fresh, caplog):
    fresh.setitem(sys.modules, "llama_fast._C", None)
    _assert_falls_back(caplog, "was not built when llama_fast was installed")
    assert "install g++ and install llama_fast again" in caplog.records[0].getMessage()


@needs_module
@pytest.mark.parametrize("interface", [0, 1, None])
def test_a_module_of_another_version(fresh, caplog, interface):
    """Its functions would take addresses in another order."""
    if interface is None:
        fresh.delattr(_C, "interface")
    else:
        fresh.setattr(_C, "interface", interface)
    _assert_falls_back(caplog, "llama_fast._C is of another version of llama_fast; install llama_fast again")


@needs_module
def test_an_old_processor(fresh, caplog):
    fresh.setattr(_C, "instruction_sets", list)
    _assert_falls_back(caplog, "this processor lacks AVX2, FMA or F16C")


@needs_module
def test_other_devices_and_dtypes_are_refused_without_a_warning(caplog):
    for device, dtype, message in (
        (torch.device("meta"), torch.float32, "the device is meta and the native kernels run on the CPU"),
        (CPU, torch.float64, "float16, bfloat16 or float32 and the model is float64"),
    ):
        with pytest.raises(BackendError, match=message):
            ops.select_backend("cpu", device, dtype)
    assert ops.select_backend("auto", CPU, torch.float64) is reference
    assert ops.select_backend("auto", torch.device("meta"), torch.float32) is reference
    assert not caplog.records


_SERVES = """
import logging, sys
logging.basicConfig(format="%(levelname)s %(name)s %(message)s", stream=sys.stdout)
from llama_fast import LLM, SamplingParams, demo
from llama_fast.errors import BackendError
import torch
sizes = {"device": "cpu", "max_seq_len": 32, "max_batch": 1}
for _ in range(2):
    llm = LLM(demo.PATH, **sizes)
    print("served by", llm.engine.ops.__name__)
print("tokens", llm.generate([[1, 2, 3]], SamplingParams(max_tokens=3, temperature=0.0))[0].outputs[0].token_ids)
try:
    LLM(demo.PATH, backend="cpu", **sizes)
except BackendError as error:
    print("refused", error)
"""


def _python(script, folder=None, **variables):
    environment = {name: value for name, value in os.environ.items() if name != ISA_VARIABLE}
    environment |= {"OMP_NUM_THREADS": "1", **variables}
    if folder is not None:
        environment["PYTHONPATH"] = str(folder)
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_F16_a_package_whose_module_cannot_be_loaded(tmp_path):
    """Built for another interpreter, cut short, of another machine: importing the package and generating still work."""
    for path in PACKAGE.rglob("*"):
        if path.is_file() and path.suffix not in (".so", ".pyc"):
            target = tmp_path / "llama_fast" / path.relative_to(PACKAGE)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    (tmp_path / "llama_fast" / f"_C{suffix}").write_bytes(b"\x7fELF garbage" * 100)
    lines = _python(_SERVES, tmp_path).splitlines()
    warnings = [line for line in lines if line.startswith("WARNING")]
    assert len(warnings) == 1, lines
    assert "llama_fast._C cannot be loaded (" in warnings[0] and "install llama_fast again" in warnings[0]
    assert lines.count("served by llama_fast.ops.reference") == 2
    (tokens,) = (line for line in lines if line.startswith("tokens"))
    (refused,) = (line for line in lines if line.startswith("refused"))
    assert "backend='cpu' cannot run: llama_fast._C cannot be loaded" in refused

    plain = LLM(demo.PATH, backend="reference", device="cpu", max_seq_len=32, max_batch=1)
    greedy = SamplingParams(max_tokens=3, temperature=0.0)
    assert tokens == f"tokens {plain.generate([[1, 2, 3]], greedy)[0].outputs[0].token_ids}"


# --- threads and forks ------------------------------------------------------------------------------------------------

_THREADS = """
import os, threading
import torch
from llama_fast.ops import cpu
from torch import nn

def tasks():
    return len(os.listdir("/proc/self/task"))

torch.manual_seed(0)
x = torch.randn(40, 300)
weight = cpu.prepare_linear([nn.Linear(300, 2000).requires_grad_(False)])

def linear(num_threads):
    # Threads for the kernel alone: those of torch itself do not survive a fork.
    torch.set_num_threads(num_threads)
    out = cpu.linear(x, weight)
    torch.set_num_threads(1)
    return out

before = tasks()
alone = linear(1)
print("one thread", tasks() - before)
assert torch.equal(linear(3), alone)
print("three threads", tasks() - before)
assert torch.equal(linear(3), alone)
print("again", tasks() - before)
assert torch.equal(linear(2), alone)
print("fewer", tasks() - before)

def child(work):
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(work())
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def same_bits_and_threads_of_its_own():
    same = torch.equal(linear(3), alone) and torch.equal(linear(3), alone)
    return 0 if same and tasks() == 3 else 1

print("fork", child(same_bits_and_threads_of_its_own))
print("fork of a fork", child(lambda: child(same_bits_and_threads_of_its_own)))

# Forks while other threads of the parent are inside a kernel: the child's pool must not wait for theirs.
stop = threading.Event()
def work():
    torch.set_num_threads(3)
    while not stop.is_set():
        cpu.linear(x, weight)
workers = [threading.Thread(target=work) for _ in range(2)]
for worker in workers:
    worker.start()
print("forks in the middle", {child(same_bits_and_threads_of_its_own) for _ in range(10)})
stop.set()
for worker in workers:
    worker.join()
assert torch.equal(linear(3), alone)
print("parent afterwards", "same")
"""


@needs_module
@pytest.mark.skipif(sys.platform != "linux", reason="counts the threads in /proc")
def test_F14_threads_are_made_on_request_and_forks_make_their_own():
    lines = dict(line.rsplit(" ", 1) for line in _python(_THREADS).splitlines())
    assert lines == {
        "one thread": "0",  # nobody asked for another
        "three threads": "2",
        "again": "2",
        "fewer": "2",
        "fork": "0",
        "fork of a fork": "0",
        "forks in the middle": "{0}",
        "parent afterwards": "same",
    }


@needs_module
@pytest.mark.parametrize("num_threads", [1, 2, 4])
def test_F14_python_threads_at_the_same_time_get_the_same_bits(num_threads):
    from llama_fast.ops import cpu
    from tests.ops.cpu_cases import projection

    before = torch.get_num_threads()
    weight = cpu.prepare_linear([projection(torch.randn(500, 130))])
    inputs = [torch.randn(rows, 130) for rows in (1, 3, 20, 40)]
    expected = [cpu.linear(x, weight) for x in inputs]
    wrong = []

    def work(index):
        torch.set_num_threads(num_threads)  # each thread of Python has a number of its own
        for _ in range(100):
            if not torch.equal(cpu.linear(inputs[index], weight), expected[index]):
                wrong.append(index)

    try:
        workers = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        torch.set_num_threads(before)
    assert not wrong


@needs_module
def test_F14_more_threads_than_tasks_and_more_tasks_than_a_word_counts(fresh):
    """One task for a hundred threads; and rows of nothing, whose count is all there is to them."""
    from llama_fast.ops import cpu

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(100)
        assert torch.equal(cpu.rms_norm(torch.ones(1, 4), torch.ones(4), 0.0), torch.ones(1, 4))
        torch.set_num_threads(2)
        gate_up = torch.ones(1, 2).expand(2**24 + 3, 2)
        out = cpu.silu_mul(gate_up, "linear")
        assert out.shape == (2**24 + 3, 1) and out.min() == out.max() == 1
    finally:
        torch.set_num_threads(before)
