"""Builds llama_fast._C, the native CPU kernels, and llama_fast._cuda with ninja; all else stands in pyproject.toml.

Both are optional: without a C++20 compiler, or on another processor, the installation goes on and the package runs on
plain PyTorch, which it says once; without nvcc it runs on Triton's kernels alone. CXX chooses the compiler,
LLAMA_FAST_CXXFLAGS adds flags to _C (csrc/sanitize.sh). nvcc is looked for on PATH and in CUDA_HOME;
LLAMA_FAST_CUDA_ARCHS="80,90" builds for these compute capabilities (times ten), "none" for none; by default it is built
for the GPUs that are here or, where none is, for those on which it was checked (llama_fast/ops/cuda_checked.json).
"""

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
SOURCES = [
    "csrc/bindings.cpp",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cpu").glob("*.cpp") if "_test" not in path.stem),
]
HEADERS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cpu").glob("*.h"))
# Instruction sets are chosen function by function, so the rest runs on every x86-64. No contraction: where a product is
# rounded before a sum is part of the result. gcc's own AVX-512 header trips its warning of uninitialised values.
FLAGS = "-std=c++20 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra -Wno-uninitialized -pthread"


CUDA_SOURCES = ["csrc/cuda/bindings.cpp", "csrc/cuda/int4_linear.cu"]
CUDA_HEADERS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cuda").glob("*.h"))
# Those of ops/cuda_checked.json: elsewhere it is off unless it is asked for. PTX of the last serves what comes later.
CUDA_ARCHS = "90"
CUDA_FLAGS = "-std=c++20 -O3 --threads 0 -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra"


class NinjaBuild(build_ext):
    """Writes a build.ninja for an extension and runs it: all cores, and only what changed."""

    def build_extension(self, ext: Extension) -> None:
        """Build one extension.

        Raises:
            CompileError: no compiler, or it failed; setuptools goes on without the extension and says so.
        """
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            if ext.name == "llama_fast._cuda":
                self._build_cuda(ext, target)
            else:
                self._build(ext, target)
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            # One of an earlier build would not fit this version's Python code.
            for stale in (target, Path(self.get_ext_filename(ext.name))):
                stale.unlink(missing_ok=True)
            raise CompileError(f"{ext.name} was not built: {error}") from error

    def _build(self, ext: Extension, target: Path) -> None:
        if platform.machine() not in ("x86_64", "AMD64") or sys.platform != "linux":
            raise OSError(f"it is for x86-64 Linux, this is {platform.machine()} {sys.platform}")
        build = self._objects()
        self._run_ninja(build, target, _rules(ext.sources, _includes(build), target))

    def _build_cuda(self, ext: Extension, target: Path) -> None:
        nvcc, archs = _nvcc(), os.environ.get("LLAMA_FAST_CUDA_ARCHS") or _archs_here() or CUDA_ARCHS
        if nvcc is None or archs == "none":
            raise OSError("no nvcc on PATH or in CUDA_HOME" if nvcc is None else "LLAMA_FAST_CUDA_ARCHS=none")
        if not re.fullmatch(r"\d+(,\d+)*", archs):
            raise OSError(f"LLAMA_FAST_CUDA_ARCHS={archs!r} must be numbers with commas between, as {CUDA_ARCHS}")
        numbers = sorted(set(map(int, archs.split(","))))
        build = self._objects() / "cuda"
        self._run_ninja(build, target, _cuda_rules(ext.sources, _includes(build.parent), target, nvcc, numbers))

    def _objects(self) -> Path:
        """Where objects lie; of an editable installation in the checkout, where the next one finds them."""
        kept = ROOT / "build" / f"objects-{sysconfig.get_config_var('SOABI')}"
        return kept if self.editable_mode else Path(self.build_temp).resolve()

    def _run_ninja(self, build: Path, target: Path, rules: str) -> None:
        import ninja

        build.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (build / "build.ninja").write_text(rules)
        subprocess.run([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build)], check=True)


def _includes(build: Path) -> list[str]:
    """Folders of headers. pybind11's is a copy: pip has it somewhere else each time, and all would be compiled anew."""
    import pybind11

    copy = build / f"pybind11-{pybind11.__version__}"
    if not copy.exists():
        part = copy.with_name(f"{copy.name}.part")
        shutil.copytree(pybind11.get_include(), part, dirs_exist_ok=True)
        part.rename(copy)
    return [sysconfig.get_path("include"), str(copy)]


def _archs_here() -> str:
    """Of the GPUs of this machine that the extension can run on; empty where there is none."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    found = {int(line.replace(".", "")) for line in listed.split() if re.fullmatch(r"\d+\.\d", line)}
    return ",".join(str(arch) for arch in sorted(found) if arch >= 80)


def _nvcc() -> str | None:
    homes = [home for name in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(name))]
    return shutil.which("nvcc") or next((found for home in homes if (found := shutil.which(f"{home}/bin/nvcc"))), None)


def _rules(sources: list[str], includes: list[str], target: Path) -> str:
    """The text of build.ninja."""
    extra = shlex.split(os.environ.get("LLAMA_FAST_CXXFLAGS", ""))
    options = [*FLAGS.split(), *(option for path in includes for option in ("-isystem", path)), *extra]
    objects = [f"{Path(source).stem}.o" for source in sources]
    compiled = zip(objects, sources, strict=True)
    return "\n".join(
        [
            f"cxx = {os.environ.get('CXX', 'c++')}",
            f"flags = {' '.join(shlex.quote(option).replace('$', '$$') for option in options)}",
            "rule compile",
            "  command = $cxx $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            "  command = $cxx $flags -shared $in -o $out",
            *(f"build {name}: compile {_path(ROOT / source)}" for name, source in compiled),
            f"build {_path(target)}: link {' '.join(objects)}",
            f"default {_path(target)}",
            "",
        ]
    )


def _cuda_rules(sources: list[str], includes: list[str], target: Path, nvcc: str, archs: list[int]) -> str:
    """The text of build.ninja: machine code for each of `archs`, and PTX of the last."""
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    cxx = os.environ.get("CXX", "c++")
    macros = [
        f"-DLLAMA_FAST_SOURCE_HASH={_source_hash(ROOT / 'csrc/cuda')}",
        f"-DLLAMA_FAST_CUDA_ARCHITECTURES={','.join(map(str, archs))}",
    ]
    options = [*FLAGS.split(), *macros, *(option for path in includes for option in ("-isystem", path))]
    objects = [f"{Path(source).stem}.o" for source in sources]
    kinds = ["device" if source.endswith(".cu") else "compile" for source in sources]
    return "\n".join(
        [
            f"cxx = {cxx}",
            f"nvcc = {shlex.quote(nvcc)} -ccbin {shlex.quote(shlex.split(cxx)[-1])}",  # without a ccache before it
            f"flags = {' '.join(shlex.quote(option).replace('$', '$$') for option in options)}",
            "rule compile",
            "  command = $cxx $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule device",
            f"  command = $nvcc {CUDA_FLAGS} {' '.join(codes)} -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = $nvcc -shared -cudart static {' '.join(codes)} $in -o $out",
            *(
                f"build {name}: {kind} {_path(ROOT / source)}"
                for name, kind, source in zip(objects, kinds, sources, strict=True)
            ),
            f"build {_path(target)}: link {' '.join(objects)}",
            f"default {_path(target)}",
            "",
        ]
    )


def _source_hash(folder: Path) -> str:
    """Of the sources of a folder: what a check of the kernels on hardware is true of."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in (".cpp", ".cu", ".h")):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _path(path: Path) -> str:
    """A path as build.ninja writes it."""
    return str(path.resolve()).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


setup(
    ext_modules=[
        Extension("llama_fast._C", SOURCES, depends=HEADERS, optional=True),
        Extension("llama_fast._cuda", CUDA_SOURCES, depends=CUDA_HEADERS, optional=True),
    ],
    cmdclass={"build_ext": NinjaBuild},
)
