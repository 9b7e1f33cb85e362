"""What nvcc makes of the CUDA kernels: no GPU is needed. Ampere, Ada and Blackwell take `pytest --full`."""

import hashlib
import importlib
import json
import os
import re
import shutil
import subprocess
from collections import Counter
from functools import lru_cache
from pathlib import Path

import pytest
import triton

from llama_fast.kernels.machine_code import parse_instructions, parse_usage, programs_per_multiprocessor
from tests.cuda_kernels.emulation import ROOT, SOURCES, TILES

CHECKED = [90]  # of the default build
ARCHS = [80, 89, 90, 100]
GROUP_SIZES = (32, 64, 128)
INSTANCES = [(*tile, gated, size) for gated in (False, True) for tile in TILES[gated] for size in GROUP_SIZES]
# Instructions of the loop for a weight. Of these some 0.5 are for zeros, for the next slice and for waits at other
# depths, and 0.4 for rows of x from the second on. An H200 issues 4.0 in the time that it reads an int4 weight.
MOST_LISTED = 3.8
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def source_hash():
    """As setup.py has it."""
    digest = hashlib.sha256()
    for path in sorted(path for path in SOURCES.iterdir() if path.suffix in (".cpp", ".cu", ".h")):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def built_module(arch):
    """The extension, if it was built from these sources and for this architecture."""
    try:
        module = importlib.import_module("llama_fast._cuda")
    except ImportError:
        return None
    fits = module.source_hash == source_hash() and arch in module.architectures
    return Path(module.__file__) if fits else None


@pytest.fixture(scope="module")
def machine_code(tmp_path_factory, pytestconfig):
    """Function (architecture, (token tiles, weight tiles, slices, gated, group size)): usage and instructions."""
    nvcc = shutil.which("nvcc", path=os.pathsep.join([os.environ["PATH"], f"{os.environ.get('CUDA_HOME', '')}/bin"]))

    @lru_cache
    def listings(arch):
        path = built_module(arch)
        if path is None:
            if nvcc is None:
                pytest.skip("neither llama_fast._cuda of these sources nor nvcc is here")
            path = tmp_path_factory.mktemp("cubin") / f"{arch}.cubin"
            flags = ["-std=c++20", "-O3", "-cubin", f"-arch=sm_{arch}"]
            subprocess.run([nvcc, *flags, str(SOURCES / "int4_linear.cu"), "-o", str(path)], check=True)
        commands = ([CUOBJDUMP, what, "-arch", f"sm_{arch}", path] for what in ("--dump-resource-usage", "-sass"))
        runs = [subprocess.run(command, capture_output=True, text=True, check=True) for command in commands]
        return [part_of(run.stdout, arch) for run in runs]

    def of(arch, instance):
        if arch not in CHECKED and not pytestconfig.getoption("--full"):
            pytest.skip("not of the default build: pytest --full looks at it")
        usage, code = listings(arch)
        return function(usage, instance, "Function "), function(code, instance, "Function : ")

    return of


def part_of(listing, arch):
    """What a listing says of one architecture; that of a cubin, which holds one, as it is."""
    parts = re.split(r"\narch = ", listing)
    return "".join(part for part in parts if part.startswith(f"sm_{arch}\n")) if len(parts) > 1 else listing


def function(listing, instance, heading):
    """What it says of one instance of the kernel."""
    *tile, gated, group_size = instance
    numbers = "".join(f"Li{number}E" for number in tile)
    mangled = f"int4_linear_kernelI{numbers}Lb{int(gated)}ELi{group_size}E"
    (found,) = (body for body in listing.split(heading) if mangled in body.partition("\n")[0])
    return found


def test_the_sources_are_those_of_setup_py():
    """It names them one by one, and the architectures on which they were checked."""
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    units = {f"csrc/cuda/{path.name}" for path in SOURCES.iterdir() if path.suffix in (".cpp", ".cu")}
    assert f"CUDA_SOURCES = {sorted(units)}".replace("'", '"') in setup
    assert f'CUDA_ARCHS = "{",".join(map(str, CHECKED))}"' in setup
    checked = json.loads((ROOT / "llama_fast/ops/cuda_checked.json").read_text(encoding="utf-8"))
    assert sorted({int(float(arch) * 10) for of in checked.values() for arch in of}) == CHECKED


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("instance", INSTANCES, ids=str)
def test_registers_copies_and_matrix_instructions(machine_code, arch, instance):
    usage, code = machine_code(arch, instance)
    registers, stack = parse_usage(usage)
    token_tiles, weight_tiles, slices, _, group_size = instance
    num_warps = weight_tiles * slices
    assert stack == 0
    # Shared memory is asked for at the launch; here registers count.
    blocks = 1 if token_tiles == 4 or (token_tiles, group_size) == (2, 32) else 16 // num_warps
    assert programs_per_multiprocessor(arch, registers, 0, num_warps) >= blocks, f"{registers} registers"
    found = parse_instructions(code)
    assert found["spills"] == 0
    assert found["mma"] == ["HMMA.16816"]
    loop = step_loop(code)
    count = Counter(name for name in loop)
    # Two blocks of eight planes; the words of two rows, and each token's part of a plane.
    assert sum(name.startswith("HMMA.16816.F32.BF16") for name in loop) == 16 * token_tiles
    assert count["LDS.128"] == 4 and count["LDS.64"] == 16 * token_tiles
    # The words pass L1 by; scales and zeros, 4 bytes each, and x do not.
    numbers = 2 * (1 if group_size > 32 else 2)
    assert count["LDGSTS.E.BYPASS.LTC128B.128"] + count["LDGSTS.E.BYPASS.128"] == 4
    assert sum(name.startswith("LDGSTS") for name in loop) == 4 + numbers + 8 * token_tiles // weight_tiles


@pytest.mark.parametrize("arch", ARCHS)
def test_instructions_of_a_weight(machine_code, arch):
    """What decoding is bound by, if memory does not bind it."""
    for tile, gated in (((1, 1, 4), False), ((1, 1, 8), False), ((1, 2, 4), True)):
        _, code = machine_code(arch, (*tile, gated, 128))
        # A lane unpacks 128 weights of a step.
        assert len(step_loop(code)) / 128 < MOST_LISTED, (tile, len(step_loop(code)))


def step_loop(code):
    """Names of the instructions of the innermost loop that multiplies."""
    lines = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P[0-9T]+ )?([A-Z0-9_.]+)([^;]*);", code)
    found = []
    for address, name, rest in lines:
        target = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        if target and int(target[1], 16) < int(address, 16):
            body = [n for a, n, _ in lines if int(target[1], 16) <= int(a, 16) <= int(address, 16)]
            if any(n.startswith("HMMA") for n in body):
                found.append(body)
    return min(found, key=len)


def test_control_a_listing_with_spills_is_noticed():
    listing = (
        "        /*0090*/                   STL.128 [R1], R4 ;\n        /*00a0*/                   HMMA.1688 R24 ;\n"
    )
    found = parse_instructions(listing)
    assert found["spills"] == 1 and found["mma"] == ["HMMA.1688"]
