"""Builds llama_fast._C, the native CPU kernels, with ninja; everything else is declared in pyproject.toml.

The extension is optional: without a C++20 compiler, or on another processor, the installation goes on and the package
runs on plain PyTorch, which it says once. LLAMA_FAST_CXXFLAGS adds compiler flags (sanitizers, see CONTRIBUTING.md).
"""

import os
import platform
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import ninja
import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
SOURCES = [
    "csrc/bindings.cpp",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cpu").glob("*.cpp") if "_test" not in path.stem),
]
# The instruction sets are chosen function by function, so the rest runs on every x86-64. No contraction: where a product
# is rounded before a sum is part of the result. gcc's own AVX-512 header trips its warning of uninitialised values.
FLAGS = "-std=c++20 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra -Wno-uninitialized -pthread"


class NinjaBuild(build_ext):
    """Writes a build.ninja for the extension and runs it: all cores, and only what changed."""

    def build_extension(self, ext: Extension) -> None:
        """Build one extension.

        Raises:
            CompileError: no compiler, or it failed; setuptools goes on without the extension and says so.
        """
        if platform.machine() not in ("x86_64", "AMD64") or sys.platform != "linux":
            raise CompileError(f"llama_fast._C is for x86-64 Linux, this is {platform.machine()} {sys.platform}")
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        (build / "build.ninja").write_text(self._rules(ext.sources, target))
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build)]
        try:
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(f"llama_fast._C was not built: {error}") from error

    def _rules(self, sources: list[str], target: Path) -> str:
        includes = [sysconfig.get_path("include"), pybind11.get_include()]
        extra = shlex.split(os.environ.get("LLAMA_FAST_CXXFLAGS", ""))
        flags = " ".join([FLAGS, *(f"-isystem {_escaped(path)}" for path in includes), *extra])
        compiler = os.environ.get("CXX", "c++")
        objects = [f"{Path(source).stem}.o" for source in sources]
        return "\n".join(
            [
                f"cxx = {compiler}",
                f"flags = {flags}",
                "rule compile",
                "  command = $cxx $flags -MMD -MF $out.d -c $in -o $out",
                "  depfile = $out.d",
                "  deps = gcc",
                "rule link",
                "  command = $cxx $flags -shared $in -o $out",
                *(
                    f"build {name}: compile {_escaped(str(ROOT / source))}"
                    for name, source in zip(objects, sources, strict=True)
                ),
                f"build {_escaped(str(target))}: link {' '.join(objects)}",
                f"default {_escaped(str(target))}",
                "",
            ]
        )


def _escaped(path: str) -> str:
    """A path in a build.ninja."""
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


setup(
    ext_modules=[Extension("llama_fast._C", SOURCES, optional=True)],
    cmdclass={"build_ext": NinjaBuild},
)
