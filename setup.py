"""Builds llama_fast._C, the native CPU kernels, with ninja; everything else is declared in pyproject.toml.

The extension is optional: without a C++20 compiler, or on another processor, the installation goes on and the package
runs on plain PyTorch, which it says once. CXX chooses the compiler, LLAMA_FAST_CXXFLAGS adds flags (csrc/sanitize.sh).
"""

import os
import platform
import shlex
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


class NinjaBuild(build_ext):
    """Writes a build.ninja for the extension and runs it: all cores, and only what changed."""

    def build_extension(self, ext: Extension) -> None:
        """Build one extension.

        Raises:
            CompileError: no compiler, or it failed; setuptools goes on without the extension and says so.
        """
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            self._build(ext, target)
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            # One of an earlier build would not fit this version's Python code.
            for stale in (target, Path(self.get_ext_filename(ext.name))):
                stale.unlink(missing_ok=True)
            raise CompileError(f"llama_fast._C was not built: {error}") from error

    def _build(self, ext: Extension, target: Path) -> None:
        if platform.machine() not in ("x86_64", "AMD64") or sys.platform != "linux":
            raise OSError(f"it is for x86-64 Linux, this is {platform.machine()} {sys.platform}")
        import ninja
        import pybind11

        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        includes = [sysconfig.get_path("include"), pybind11.get_include()]
        (build / "build.ninja").write_text(_rules(ext.sources, includes, target))
        subprocess.run([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build)], check=True)


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


def _path(path: Path) -> str:
    """A path as build.ninja writes it."""
    return str(path.resolve()).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


setup(
    ext_modules=[Extension("llama_fast._C", SOURCES, depends=HEADERS, optional=True)],
    cmdclass={"build_ext": NinjaBuild},
)
