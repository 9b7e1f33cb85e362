"""What nvcc makes of the CUDA kernels, for every architecture of the default build: no GPU is needed."""

import hashlib
import importlib
import os
import re
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

import pytest
import triton

from llama_fast.kernels.machine_code import parse_instructions, parse_usage, programs_per_multiprocessor
from tests.cuda_kernels.emulation import ROOT, SOURCES, TILES

ARCHS = [80, 89, 90, 100]
INSTANCES = [(*tile, gated) for gated in (False, True) for tile in TILES[gated]]
NUM_WARPS = 4
# LinearShape::blocks of csrc/cuda/linear.h: with 16 loads of 16 bytes in a thread's flight at least 64 KiB each.
BLOCKS = {1: 4, 2: 4, 4: 3, 8: 2}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def source_hash():
    """As setup.py has it."""
    digest = hashlib.sha256()
    for path in sorted(path for path in SOURCES.iterdir() if path.suffix in (".cpp", ".cu", ".h")):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def built_module():
    """The extension, if it was built from these sources and for all of ARCHS."""
    try:
        module = importlib.import_module("llama_fast._cuda")
    except ImportError:
        return None
    fits = module.source_hash == source_hash() and set(ARCHS) <= set(module.architectures)
    return Path(module.__file__) if fits else None


@pytest.fixture(scope="module")
def machine_code(tmp_path_factory):
    """Function (architecture, (token tiles, weight tiles, gated)): resource usage and instructions, as listed."""
    module = built_module()
    nvcc = shutil.which("nvcc", path=os.pathsep.join([os.environ["PATH"], f"{os.environ.get('CUDA_HOME', '')}/bin"]))
    if module is None and nvcc is None:
        pytest.skip("neither llama_fast._cuda of these sources nor nvcc is here")

    @lru_cache
    def listings(arch):
        path = module
        if path is None:
            path = tmp_path_factory.mktemp("cubin") / f"{arch}.cubin"
            flags = ["-std=c++20", "-O3", "-cubin", f"-arch=sm_{arch}"]
            subprocess.run([nvcc, *flags, str(SOURCES / "linear.cu"), "-o", str(path)], check=True)
        commands = ([CUOBJDUMP, what, "-arch", f"sm_{arch}", path] for what in ("--dump-resource-usage", "-sass"))
        runs = [subprocess.run(command, capture_output=True, text=True, check=True) for command in commands]
        return [part_of(run.stdout, arch) for run in runs]

    def of(arch, instance):
        usage, code = listings(arch)
        return function(usage, instance, "Function "), function(code, instance, "Function : ")

    return of


def part_of(listing, arch):
    """What a listing says of one architecture; that of a cubin, which holds one, as it is."""
    parts = re.split(r"\narch = ", listing)
    return "".join(part for part in parts if part.startswith(f"sm_{arch}\n")) if len(parts) > 1 else listing


def function(listing, instance, heading):
    """What it says of one instance of the kernel."""
    token_tiles, weight_tiles, gated = instance
    mangled = f"linear_kernelILi{token_tiles}ELi{weight_tiles}ELb{int(gated)}E"
    (found,) = (body for body in listing.split(heading) if mangled in body.partition("\n")[0])
    return found


def test_the_sources_are_those_of_setup_py():
    """It names them one by one, and the architectures that are looked at here."""
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    units = {f"csrc/cuda/{path.name}" for path in SOURCES.iterdir() if path.suffix in (".cpp", ".cu")}
    assert f"CUDA_SOURCES = {sorted(units)}".replace("'", '"') in setup
    assert f'CUDA_ARCHS = "{",".join(map(str, ARCHS))}"' in setup


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("instance", INSTANCES, ids=str)
def test_registers_loads_and_matrix_instructions(machine_code, arch, instance):
    usage, code = machine_code(arch, instance)
    registers, stack = parse_usage(usage)
    shared = int(re.search(r"\bSHARED:(\d+)", usage)[1])
    token_tiles, weight_tiles, gated = instance
    height = weight_tiles * (2 if gated else 1)
    blocks = 3 if (token_tiles, height) == (8, 1) else BLOCKS[token_tiles]
    assert stack == 0
    # cuobjdump counts what the driver takes for itself from sm_90 on.
    assert shared in (4 * 4 * 8 * token_tiles * 16 * height + own for own in (0, 1024))
    assert programs_per_multiprocessor(arch, registers, shared, NUM_WARPS) >= blocks, f"{registers} registers"
    found = parse_instructions(code)
    assert found["spills"] == 0
    assert found["mma"] == ["HMMA.16816"]
    # Ahead of the loop and in it: 16 loads of the weight, and the tokens'. The rest are bias and residual.
    depth, x_depth = 8 // height, max(1, 4 // token_tiles)
    assert found["wide_loads"] == 2 * 16 + token_tiles * (x_depth + depth)
    assert code.count("HMMA.16816.F32.BF16") == 2 * depth * height * token_tiles
    # The weight passes L1 by.
    assert len(re.findall(r"LDG\.E\.NA\.128\.CONSTANT", code)) == 32


def test_control_a_listing_with_spills_is_noticed():
    listing = (
        "        /*0090*/                   STL.128 [R1], R4 ;\n        /*00a0*/                   HMMA.1688 R24 ;\n"
    )
    found = parse_instructions(listing)
    assert found["spills"] == 1 and found["mma"] == ["HMMA.1688"]
