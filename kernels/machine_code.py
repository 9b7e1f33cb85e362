"""What the compiler made of a kernel, read from its machine code, and what of that no kernel may have."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import triton
from triton.runtime.cache import get_cache_manager

from llama_fast.kernels import configs

# By table of configs: warps, programs and KiB of shared memory of one multiprocessor; all have 65,536 registers. CUDA
# programming guide, "Technical Specifications per Compute Capability".
_MULTIPROCESSOR = {80: (64, 32, 164), 89: (48, 24, 100), 90: (64, 32, 228), 100: (64, 32, 228)}
_REGISTERS = 65536
# Registers come in units of 256 a warp; the driver takes 1 KiB of shared memory for each program.
_REGISTER_UNIT, _SHARED_OVERHEAD = 256, 1024
_TENSOR_MEMORY_COLUMNS = 512
_WIDE_BYTES = 16
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
# What was measured by another version of this file is measured again.
_VERSION = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
# An instruction in a listing, after its address and the predicate that it may have.
_OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_USAGE = re.compile(r"\bREG:(\d+) STACK:(\d+)\b")
_DOT = re.compile(r"\btt\.dot\b.*:\s*tensor<[\dx]+x(\w+)>")
# Without int64: those are indices, few, and masked in ways that rule out wide loads.
_LOAD = re.compile(r"\btt\.load\b.*tensor<([\dx]+)x!tt\.ptr<(?!i64)\w*?(\d+)>>")


@dataclass(frozen=True)
class Row:
    """One configuration of a kernel on one chip.

    Attributes:
        arch: 90 for sm_90.
        kernel: module and function.
        config: arguments and options (see Launch.config).
        source: hash of the kernel's source.
        uses: by route and model, the least and the most rows.
        registers: of a thread.
        stack: bytes of a thread's stack frame.
        spills: loads and stores of local memory, in instructions.
        shared: bytes of a program's shared memory.
        wide_loads, narrow_loads: instructions that load 128 bits or more from global memory, and fewer.
        mma: families of matrix instructions: name and depth of the sum that one takes.
        programs: that fit one multiprocessor at once.
        dot: element type of the matrix products in the source, if any.
        bulk: whether a load in the source gives each thread 16 bytes or more.
        error: why it did not compile.
    """

    arch: int
    kernel: str
    config: dict[str, Any]
    source: str
    uses: dict[str, dict[str, list[int]]]
    registers: int = 0
    stack: int = 0
    spills: int = 0
    shared: int = 0
    wide_loads: int = 0
    narrow_loads: int = 0
    mma: list[str] = field(default_factory=list)
    programs: int = 0
    dot: str | None = None
    bulk: bool = False
    error: str | None = None

    @property
    def dtype(self) -> str:
        """Element type of the first tensor."""
        return next(kind for kind in self.config.values() if str(kind).startswith("*")).strip("*").partition(":")[0]

    def __str__(self) -> str:
        tile = (f"{name}={value}" for name, value in self.config.items() if name.isupper() or name in OPTIONS)
        uses = (f"{route} {'/'.join(models)}" for route, models in self.uses.items())
        return f"sm_{self.arch} {self.kernel} {self.dtype} ({', '.join(uses)}; {' '.join(tile)})"


def measure(kernel: Any, arch: int) -> dict[str, Any]:
    """Row's fields from a triton.compiler.CompiledKernel; kept in Triton's cache, beside the kernel."""
    cache = get_cache_manager(kernel.hash)
    name = f"measured-{_VERSION}.json"
    if path := cache.get_file(name):
        return json.loads(Path(path).read_text(encoding="utf-8"))
    measured = _measure(kernel, arch)
    cache.put(json.dumps(measured), name, binary=False)
    return measured


def _measure(kernel: Any, arch: int) -> dict[str, Any]:
    usage, instructions = _inspect(kernel.asm["cubin"])
    registers, stack = parse_usage(usage)
    metadata = kernel.metadata
    dot, bulk = parse_source(kernel.asm["ttir"], 32 * metadata.num_warps)
    programs = programs_per_multiprocessor(
        arch, registers, metadata.shared, metadata.num_warps, getattr(metadata, "tmem_size", 0) or 0
    )
    return {
        "registers": registers,
        "stack": stack,
        "shared": metadata.shared,
        "programs": programs,
        "dot": dot,
        "bulk": bulk,
        **parse_instructions(instructions),
    }


def _inspect(cubin: bytes) -> tuple[str, str]:
    """Resource usage and instructions, as the tools that come with Triton print them."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        # cuobjdump -sass says the same as nvdisasm in half as much time again.
        commands = [f"{tools}/cuobjdump", "--dump-resource-usage"], [f"{tools}/nvdisasm", "-c", "--no-dataflow"]
        usage, instructions = (
            subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout
            for command in commands
        )
    return usage, instructions


def parse_usage(listing: str) -> tuple[int, int]:
    """Registers and bytes of stack, from cuobjdump --dump-resource-usage."""
    usage = _USAGE.findall(listing)
    return max(int(registers) for registers, _ in usage), max(int(stack) for _, stack in usage)


def parse_instructions(listing: str) -> dict[str, Any]:
    """Spills, loads and MMA families, from nvdisasm or cuobjdump -sass."""
    counts: Counter[str] = Counter()
    mma = set()
    for opcode in _OPCODE.findall(listing):
        name, *modifiers = opcode.split(".")
        if name in ("LDL", "STL"):
            counts["spills"] += 1
        elif name in ("LDG", "LDGSTS"):
            # sm_100 loads 256 bits as LDG.E.ENL2.256.
            counts["wide_loads" if {"128", "256"} & set(modifiers) else "narrow_loads"] += 1
        elif name.endswith("MMA"):
            mma.add(_family(name, modifiers))
    return {**{key: counts[key] for key in ("spills", "wide_loads", "narrow_loads")}, "mma": sorted(mma)}


def _family(name: str, modifiers: Sequence[str]) -> str:
    """What decides the order of a sum: HMMA.16816 sums 16 products and HMMA.1688 eight; a HGMMA.64x128x16 sums 16 in
    any width."""
    shape = next((part for part in modifiers if part[0].isdigit()), "")
    depth = shape.rpartition("x")[2] if "x" in shape else shape
    return f"{name}.{depth}" if depth else name


def parse_source(ttir: str, num_threads: int) -> tuple[str | None, bool]:
    """Element type of the matrix products in Triton's first representation; whether loads can be 128 bits wide."""
    dots = _DOT.findall(ttir)
    bulk = any(
        prod(map(int, shape.split("x"))) * max(1, int(bits) // 8) >= _WIDE_BYTES * num_threads
        for shape, bits in _LOAD.findall(ttir)
    )
    return (dots[0] if dots else None), bulk


def programs_per_multiprocessor(arch: int, registers: int, shared: int, num_warps: int, tensor_memory: int = 0) -> int:
    """How many programs run at once on one multiprocessor."""
    warps, programs, shared_kib = _MULTIPROCESSOR[configs.TABLES[arch]]
    units = -(-registers * 32 // _REGISTER_UNIT)
    # A quarter of a multiprocessor has a quarter of the registers, and takes whole warps.
    by_registers = _REGISTERS // 4 // (_REGISTER_UNIT * units) * 4 if units else warps
    limits = [programs, min(warps, by_registers) // num_warps, shared_kib * 1024 // (shared + _SHARED_OVERHEAD)]
    if tensor_memory:
        limits.append(_TENSOR_MEMORY_COLUMNS // tensor_memory)
    return min(limits)


def violations(rows: Iterable[Row]) -> list[str]:
    """What no kernel may have, a line each."""
    found = []
    families: dict[tuple[int, str, str, str], dict[str, Row]] = {}
    for row in rows:
        if problems := _problems(row):
            found.append(f"{row}: {'; '.join(problems)}")
        for route, models in row.uses.items():
            for model in models if row.dot else ():
                same = families.setdefault((row.arch, route, model, str(row.dot)), {})
                same |= dict.fromkeys(row.mma, row)
    for (arch, route, model, dot), by_family in families.items():
        if len(by_family) > 1:
            examples = "".join(f"\n    {family}: {row}" for family, row in sorted(by_family.items()))
            found.append(f"sm_{arch} {route} {model} {dot}: {len(by_family)} MMA families in one route{examples}")
    return found


def _problems(row: Row) -> list[str]:
    if row.error:
        return [f"does not compile: {row.error}"]
    most_shared = configs.SHARED_BYTES[configs.TABLES[row.arch]]
    problems = []
    if row.stack:
        problems.append(f"a stack frame of {row.stack} bytes")
    if row.spills:
        problems.append(f"{row.spills} loads and stores of local memory")
    if row.shared > most_shared:
        problems.append(f"{row.shared} bytes of shared memory; the chip has {most_shared}")
    elif not row.programs:
        problems.append("no program fits a multiprocessor")
    if row.bulk and not row.wide_loads:
        problems.append(f"no 128-bit load among {row.narrow_loads}")
    if row.dot in ("bf16", "f16") and not row.mma:
        problems.append(f"{row.dot} matrix product without MMA")
    if row.dot == "f32" and row.mma:
        problems.append(f"fp32 matrix product by {', '.join(row.mma)}, which is tf32")
    return problems
