"""What a certificate is about: which weights, which code, which machine."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from llama_fast import __version__
from llama_fast.errors import CheckpointIOError
from llama_fast.model.checkpoint_files import CheckpointFiles
from llama_fast.ops.native import native

# Weights up to this are hashed byte by byte, larger ones by samples: reading them would take longer than the rest.
MAX_HASHED_BYTES = 1 << 32
_SAMPLE_BYTES, _SAMPLE_STEP = 1 << 16, 1 << 26
_CHUNK_BYTES = 1 << 24
_FOLDERS = ("engine", "model", "ops", "kernels")


def weights_identity(folder: Path) -> dict[str, Any]:
    """sha256 over config.json and the safetensors files, each with its name and size, in the order of names.

    Of files of more than MAX_HASHED_BYTES together only the beginning, which names the tensors, and 64 KiB of every
    64 MiB are read.

    Raises:
        CheckpointError: the folder cannot be loaded, or a file not be read.
    """
    files = CheckpointFiles.open(folder)
    paths = sorted(files.paths, key=lambda path: path.name)
    total = sum(path.stat().st_size for path in paths)
    whole = total <= MAX_HASHED_BYTES
    found = hashlib.sha256()
    for path in (folder / "config.json", *paths):
        try:
            size = path.stat().st_size
            found.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as file:
                for start in range(0, size, _CHUNK_BYTES if whole else _SAMPLE_STEP):
                    file.seek(start)
                    found.update(file.read(_CHUNK_BYTES if whole else _SAMPLE_BYTES))
        except OSError as error:
            raise CheckpointIOError(f"{path} cannot be read: {error.strerror or error}") from error
    files.check_unchanged()
    how = "every byte" if whole else "64 KiB of every 64 MiB"
    return {"sha256": found.hexdigest(), "sha256_of": f"config.json and the safetensors files, {how}", "bytes": total}


def sources_identity() -> dict[str, Any]:
    """sha256 of the code that ran: the Python sources, and the native modules as they are here.

    `csrc` is of the native modules' sources where llama_fast runs from a checkout, else None.
    """
    package = Path(__file__).resolve().parents[1]
    folders = {name: package / name for name in _FOLDERS}
    kernels = importlib.util.find_spec("llama_fast.kernels")
    if kernels is not None and kernels.submodule_search_locations:
        folders["kernels"] = Path(next(iter(kernels.submodule_search_locations)))
    sources = {f"{name}/{path.name}": path for name, folder in folders.items() for path in folder.glob("*.py")}
    checkout = package.parent / "csrc"
    native_sources = {
        path.relative_to(checkout).as_posix(): path
        for kind in ("*.cpp", "*.cu", "*.h")
        for path in checkout.rglob(kind)
    }
    binaries = {path.name: path for path in package.glob("_*.so")}
    return {
        "python": _sha256_of(sources),
        "csrc": _sha256_of(native_sources) if native_sources else None,
        "binaries": {name: _sha256_of({name: path}) for name, path in sorted(binaries.items())},
    }


def _sha256_of(paths: dict[str, Path]) -> str:
    found = hashlib.sha256()
    for name in sorted(paths):
        content = paths[name].read_bytes()
        found.update(f"{name} {len(content)}\n".encode() + content)
    return found.hexdigest()


def device_identity(device: torch.device) -> dict[str, Any]:
    """The device's name and what else may have a say in its arithmetic."""
    found: dict[str, Any] = {"type": device.type, "threads": torch.get_num_threads()}
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        found |= {"name": torch.cuda.get_device_name(device), "compute_capability": f"{major}.{minor}"}
        found["driver"] = _first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"])
    else:
        found |= {"name": _cpu_name(), "instructions": native()[1]}
    # Triton's kernels in Python, on the CPU.
    return {**found, "interpreted": os.environ.get("TRITON_INTERPRET") == "1"}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _first_line(command: Iterable[str]) -> str | None:
    try:
        done = subprocess.run(list(command), capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.splitlines()), "").strip() or None


def versions() -> dict[str, str | None]:
    """Of what runs."""
    try:
        triton: str | None = version("triton")
    except PackageNotFoundError:
        triton = None
    return {
        "llama_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton,
    }
