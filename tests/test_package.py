"""What `import llama_fast` gives and costs, and that pyproject.toml lists what is in the tree."""

import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import llama_fast

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]


def modules_added_by(statement: str, after: str = "pass") -> set[str]:
    """Top-level packages that `statement` loads in a fresh interpreter in which `after` has run."""
    program = (
        f"import sys; {after}; before = set(sys.modules); {statement}; "
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_import_is_light():
    assert modules_added_by("import llama_fast").isdisjoint({"numpy", "tokenizers", "torch", "transformers", "triton"})


def test_import_after_torch_adds_no_triton():
    added = modules_added_by("import llama_fast", after="import torch")
    assert "llama_fast" in added
    assert "triton" not in added


def test_no_public_name_loads_triton_or_transformers():
    added = modules_added_by("from llama_fast import *")
    assert "torch" in added  # the names were resolved
    assert added.isdisjoint({"matplotlib", "sentencepiece", "transformers", "triton"})


@pytest.mark.parametrize("module", ["llama_fast.engine.page_allocator", "llama_fast.engine.scheduler"])
def test_scheduling_loads_no_torch(module):
    assert modules_added_by(f"import {module}").isdisjoint({"numpy", "torch", "triton"})


@pytest.mark.parametrize("name", llama_fast.__all__)
def test_public_name_resolves(name):
    value = getattr(llama_fast, name)
    assert getattr(value, "__name__", "").rpartition(".")[2] == {"LlamaTokenizerFast": "LlamaTokenizer"}.get(name, name)
    assert name in dir(llama_fast)
    assert vars(llama_fast)[name] is value


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'llama_fast' has no attribute 'LlamaForGolf'"):
        llama_fast.LlamaForGolf  # noqa: B018
    with pytest.raises(ImportError, match="LlamaForGolf"):
        from llama_fast import LlamaForGolf  # noqa: F401


@pytest.fixture
def installed() -> importlib.metadata.Distribution:
    """The installed package; a checkout on sys.path runs too, but without version, command and llama_fast.kernels."""
    found = importlib.metadata.distributions(name="llama-fast")
    # An egg-info in the checkout says that some interpreter installed it, not that this one did.
    elsewhere = [distribution for distribution in found if Path(str(distribution.locate_file(""))).resolve() != ROOT]
    if not elsewhere:
        pytest.skip("llama-fast is not installed, only importable: pip install -e .")
    return elsewhere[0]


def test_version_is_the_installed_one(installed):
    assert llama_fast.__version__ == installed.version


def test_kernels_folder_is_a_subpackage(installed):
    import llama_fast.kernels

    assert Path(llama_fast.kernels.__file__) == ROOT / "kernels" / "__init__.py"


def test_command_is_installed(installed):
    (command,) = (entry for entry in installed.entry_points if entry.group == "console_scripts")
    assert command.name == "llama-fast"
    assert callable(command.load())


def test_every_package_is_listed():
    """setuptools ships a folder only if pyproject.toml names it."""
    moved = SETUPTOOLS["package-dir"]
    folders = {ROOT / moved.get(package, package.replace(".", "/")) for package in SETUPTOOLS["packages"]}
    in_tree = {path.parent for top in ("llama_fast", "kernels") for path in (ROOT / top).rglob("*.py")}
    assert folders == in_tree
    assert all((folder / "__init__.py").is_file() for folder in folders)


def test_package_data_matches_files():
    for package, patterns in SETUPTOOLS["package-data"].items():
        folder = ROOT / package.replace(".", "/")
        for pattern in patterns:
            assert list(folder.glob(pattern)), f"{package}: nothing matches {pattern}"


def test_every_demo_file_is_shipped():
    demo = ROOT / "llama_fast" / "demo"
    shipped = {path for pattern in SETUPTOOLS["package-data"]["llama_fast.demo"] for path in demo.glob(pattern)}
    assert {path for path in demo.iterdir() if path.is_file() and path.suffix != ".py"} == shipped
