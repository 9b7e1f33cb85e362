"""When the CUDA extension is used, and what is said where it cannot be. No GPU is needed.

tests/cuda_kernels has its kernel, emulated and compiled, and who is sent to it.
"""

import contextlib
import importlib
import importlib.machinery
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import llama_fast
from llama_fast.errors import BackendError
from llama_fast.kernels.int4_linear import PlanarInt4
from llama_fast.ops import cuda_extension
from llama_fast.ops.cuda_extension import CHECKED, INTERFACE, VARIABLE, extension, in_use, serves
from tests.cuda_kernels.fakes import Module, forget

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="about compiled kernels")

GPU = torch.device("cuda", 0)
PACKAGE = Path(llama_fast.__file__).parent


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """The module is looked for anew, in this test and after it."""
    monkeypatch.delenv(VARIABLE, raising=False)
    forget()
    yield monkeypatch
    monkeypatch.undo()
    forget()


@pytest.fixture
def machine(fresh, tmp_path):
    """Function (module, capability, table, setting): a machine with that module and a GPU of that capability."""

    def make(module=None, capability=(9, 0), table=None, setting=None):
        forget()
        fresh.setitem(sys.modules, "llama_fast._cuda", module)
        fresh.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        fresh.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
        path = tmp_path / "checked.json"
        path.write_text(json.dumps(table or {}))
        fresh.setattr(cuda_extension, "CHECKED", path)
        if setting is None:
            fresh.delenv(VARIABLE, raising=False)
        else:
            fresh.setenv(VARIABLE, setting)
        return module

    return make


CHECKED_90 = {"abc": {"9.0": {"gpu": "a GPU", "report": "bench/results/a.json"}}}


# --- when it is used --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "capability", "used"),
    [
        (CHECKED_90, (9, 0), True),
        (CHECKED_90, (8, 0), False),
        (CHECKED_90, (9, 1), False),
        ({}, (9, 0), False),
        ({"abd": CHECKED_90["abc"]}, (9, 0), False),  # other sources
        ({"abc": {}}, (9, 0), False),
    ],
)
@pytest.mark.parametrize("setting", [None, "", "auto"])
def test_auto_takes_what_was_checked_on_such_a_gpu(machine, table, capability, used, setting):
    module = machine(Module(), capability, table, setting)
    assert in_use(GPU) is used
    assert module.loads == used


def test_on_and_off(machine):
    machine(Module(), setting="on")
    assert in_use(GPU)
    machine(Module(), table=CHECKED_90, setting="off")
    assert not in_use(GPU)
    machine(None, setting="off")
    assert not in_use(GPU)


@pytest.mark.parametrize("value", ["ON", "1", "yes", "auto "])
@pytest.mark.parametrize("device", [GPU, torch.device("cpu")])
def test_a_wrong_setting(machine, value, device):
    machine(Module(), table=CHECKED_90, setting=value)
    with pytest.raises(BackendError, match=f"{VARIABLE}='{value}' is unknown; use one of auto, on, off"):
        in_use(device)


@pytest.mark.parametrize("setting", ["auto", "on", "off"])
def test_other_devices_do_without(machine, setting):
    machine(None, setting=setting)
    for device in ("cpu", "meta"):
        assert not in_use(torch.device(device))


def test_no_weight_is_served_where_it_is_not_in_use(machine):
    machine(Module(), table=CHECKED_90)
    scales = torch.ones(1, 8, dtype=torch.bfloat16)
    assert not serves(PlanarInt4(torch.ones(1, 8, 16, dtype=torch.int32), scales, None, None, 128))  # on the CPU


WRONG_INTERFACE = Module()
WRONG_INTERFACE.interface = INTERFACE + 1
CANNOT = {
    "missing": (None, (9, 0), "was not built when llama_fast was installed .*install the CUDA toolkit.*"),
    "another version": (WRONG_INTERFACE, (9, 0), "of another version of llama_fast; install llama_fast again"),
    "an older GPU": (
        Module(),
        (7, 5),
        "built for compute capability 8.0, 9.0, 10.0 and this GPU is 7.5; .*LLAMA_FAST_CUDA_ARCHS=75",
    ),
    "another GPU": (Module([80, 100]), (9, 0), "this GPU is 9.0; .*LLAMA_FAST_CUDA_ARCHS=90"),
    "a driver": (Module(problem="CUDA error 35"), (9, 0), "does not run on this GPU: CUDA error 35"),
}


@pytest.mark.parametrize("case", CANNOT)
def test_where_it_cannot_serve(machine, caplog, case):
    """Triton's kernel and one line in the log; an error where it was asked for."""
    module, capability, reason = CANNOT[case]
    table = {"abc": {"{}.{}".format(*capability): {}}}
    machine(module, capability, table)
    with caplog.at_level(logging.INFO):
        assert not in_use(GPU) and not in_use(GPU)
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "generated rows of 4-bit weights run on Triton's int4_linear: llama_fast._cuda "
    )
    machine(module, capability, table, "on")
    with pytest.raises(BackendError, match=f"{VARIABLE}=on cannot be: llama_fast._cuda .*{reason}; or set .*=off"):
        in_use(GPU)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)])
def test_machine_code_of_the_same_major_version_and_ptx_for_later_ones(machine, capability):
    machine(Module(), capability, setting="on")
    assert in_use(GPU)


def test_what_is_not_checked_is_said_once(machine, caplog):
    machine(Module())
    with caplog.at_level(logging.INFO):
        assert not in_use(GPU) and not in_use(GPU)
    (record,) = caplog.records
    assert "llama_fast._cuda has not been checked on compute capability 9.0" in record.getMessage()


def test_F16_a_module_that_cannot_be_loaded(tmp_path):
    """Cut short or of another machine: the package imports, the CPU serves, and a GPU's user is told why not."""
    for path in PACKAGE.rglob("*"):
        if path.is_file() and path.suffix != ".pyc" and not path.name.startswith("_cuda."):
            target = tmp_path / "llama_fast" / path.relative_to(PACKAGE)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    shutil.copytree(PACKAGE.parent / "kernels", tmp_path / "llama_fast" / "kernels", dirs_exist_ok=True)
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    (tmp_path / "llama_fast" / f"_cuda{suffix}").write_bytes(b"\x7fELF garbage" * 100)
    lines = _python(_BROKEN, tmp_path).splitlines()
    assert lines[0].startswith("served by llama_fast.ops."), lines
    assert lines[1].startswith("None llama_fast._cuda cannot be loaded ("), lines
    assert lines[1].endswith("; install llama_fast again")
    assert lines[2].startswith("refused LLAMA_FAST_CUDA_EXTENSION=on cannot be: llama_fast._cuda cannot be loaded")


_BROKEN = """
import os
from llama_fast import LLM, SamplingParams, demo
llm = LLM(demo.PATH, device="cpu", max_seq_len=32, max_batch=1)
assert llm.generate([[1, 2, 3]], SamplingParams(max_tokens=3, temperature=0.0))[0].outputs[0].token_ids
print("served by", llm.engine.ops.__name__)
import torch
from llama_fast.errors import BackendError
from llama_fast.kernels.int4_linear import PlanarInt4
from llama_fast.ops import cuda_extension
print(*cuda_extension.extension())
os.environ["LLAMA_FAST_CUDA_EXTENSION"] = "on"
try:
    cuda_extension.in_use(torch.device("cuda", 0))
except BackendError as error:
    print("refused", error)
"""


def _python(script, folder):
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def _built():
    module, reason = extension()
    if module is None:
        pytest.skip(reason)
    return module


# Addresses and sizes of a call that never comes to run.
_CALL = (16, 128, 1, 16, 16, 0, 0, 0, 16, 8, 128, 128, 0, False, 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_F16_a_launch_without_a_driver():
    """The built module imports anywhere, and says what is missing when it is asked to work."""
    module = _built()
    for work in (module.load, lambda: module.int4_linear(*_CALL)):
        with pytest.raises(RuntimeError, match=r"CUDA error (35|100|999) \(cudaError\w+: .*\); .*(driver|GPU)"):
            work()


def test_the_table_is_well_formed():
    for source_hash, by_capability in json.loads(CHECKED.read_text(encoding="utf-8")).items():
        assert len(source_hash) == 64 and int(source_hash, 16)
        for capability, entry in by_capability.items():
            assert [str(int(part)) for part in capability.split(".")] == capability.split(".")
            assert set(entry) == {"gpu", "report"} and (PACKAGE.parent / entry["report"]).is_file()
