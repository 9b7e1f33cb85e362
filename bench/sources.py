"""What a kernel's measured number depends on: a hash of its sources, by which a stale number is known."""

import ast
import hashlib
import re
from pathlib import Path

KERNELS = Path(__file__).resolve().parent.parent / "kernels"
# Checks of arguments: no kernel's speed depends on it.
_IGNORED = {"arguments"}


def source_hash(kernel: str, folder: Path = KERNELS) -> str | None:
    """sha256 of kernels/<kernel>.py and of what it imports there (tile sizes too); None without it.

    Comments and the imports themselves aside.
    """
    if not (folder / f"{kernel}.py").exists():
        return None
    found: dict[str, str] = {}
    _collect(kernel, folder, found)
    digest = hashlib.sha256()
    for name in sorted(found):
        digest.update(f"{name}\0{found[name]}\0".encode())
    return digest.hexdigest()


def _collect(name: str, folder: Path, found: dict[str, str]) -> None:
    path = folder / f"{name}.py"
    if name in found or name in _IGNORED or not path.exists():
        return
    source = path.read_text(encoding="utf-8")
    # Comments cost no time. A "#" in a string ends its line too, which matters to nobody.
    lines = re.sub(r"[ \t]*#.*|^(import|from) .*", "", source, flags=re.MULTILINE).splitlines()
    found[name] = "\n".join(line for line in lines if line)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            package, _, module = node.module.partition("llama_fast.kernels")
            if not package and node.module.startswith("llama_fast.kernels"):
                # `from llama_fast.kernels import configs` and `from llama_fast.kernels.silu_mul import activate`.
                for imported in [module.lstrip(".")] if module else [alias.name for alias in node.names]:
                    _collect(imported, folder, found)
