"""Programmatic dependent launch: where kernels overlap each waits before it reads, and on older chips none does."""

import json
import os
import subprocess
import sys

import pytest

from llama_fast.kernels import overlap

# Its own process: Triton compiles for a chip that is not here until the end.
COMPILED = """
import json, re, sys
from llama_fast.kernels.launches import model_launches, set_chip

arch = int(sys.argv[1])
launches = model_launches(arch, ["1b"], ["bf16"], quick=True)
set_chip(arch)
found = []
for launch in launches:
    if "OVERLAP" in launch.config:
        compiled = launch.kernel.preload(launch.data)
        ptx = compiled.asm["ptx"]
        read = re.search(r"\\b(ld|cp\\.async|st|red|atom)\\S*\\.global", ptx).start()
        waits = ptx.count("griddepcontrol.wait")
        first = waits > 0 and ptx.index("griddepcontrol.wait") < ptx.index("griddepcontrol.launch_dependents") < read
        found.append([launch.name, waits, first, bool(compiled.metadata.launch_pdl), launch.config["OVERLAP"]])
print(json.dumps(found))
"""
NAMES = {
    "_generated_kernel",
    "_int4_linear_kernel",
    "_linear_kernel",
    "_merge_kernel",
    "_prompt_kernel",
    "_rms_norm_kernel",
    "_rope_and_cache_kernel",
}


@pytest.mark.parametrize("arch", [80, 90])
def test_a_kernel_waits_before_it_touches_memory_or_is_launched_plainly(arch):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED, str(arch)], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {name for name, *_ in found} == NAMES
    for name, waits, first, launched, overlaps in found:
        expected = (1, True, True, True) if arch >= 90 else (0, False, False, False)
        assert (waits, first, launched, overlaps) == expected, name


def test_options(monkeypatch):
    overlap.options.cache_clear()
    monkeypatch.setattr(overlap, "INTERPRETED", False)
    assert overlap.options(90) == overlap.options(100) == {"OVERLAP": True, "launch_pdl": True}
    assert overlap.options(89) == overlap.options(80) == {"OVERLAP": False}
    overlap.options.cache_clear()
    monkeypatch.setenv("LLAMA_FAST_OVERLAP", "off")
    assert overlap.options(90) == {"OVERLAP": False}
    overlap.options.cache_clear()
