"""What one fuzzing target is: how an input is made, how it is run, how it is shown."""

import importlib
import random
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_fast.errors import LlamaFastError

NAMES = (
    "config",
    "generation_config",
    "safetensors",
    "index",
    "tokenizer_json",
    "tokenizer_model",
    "template",
    "messages",
    "request",
    "checkpoint",
)
Files = dict[str, bytes | None]  # file name -> content, None for no file


class Target:
    """One target; `name` is the module's. What takes long is built in `__init__`, once, before the workers are forked.

    Attributes:
        refusals: the errors that are a documented answer to bad input.
        files: stand in a worker's folder, the current directory, before every case.
    """

    name: str
    refusals: tuple[type[LlamaFastError], ...]
    files: Mapping[str, bytes] = {}

    def make(self, rng: random.Random) -> Any:
        """An input, from `rng` alone."""
        raise NotImplementedError

    def run(self, value: Any, folder: Path) -> None:
        """Returns where the input is accepted and nothing is wrong with the result; `check` says what is."""
        raise NotImplementedError

    def size(self, value: Any) -> int:
        """Bytes of an input, twice which may be allocated."""
        return 0

    def show(self, value: Any) -> bytes:
        """An input as a person reads it."""
        return repr(value).encode("utf-8", "backslashreplace")


class FileTarget(Target):
    """Inputs are files that replace some of `files`."""

    def load(self, folder: Path, files: Files) -> None:
        """`run`, with the files in place."""
        raise NotImplementedError

    def run(self, value: Files, folder: Path) -> None:
        try:
            for name, content in value.items():
                _put(folder / name, content)
            self.load(folder, value)
        finally:
            for name in value:
                _put(folder / name, self.files.get(name))

    def size(self, value: Files) -> int:
        return sum(len(content or b"") for content in value.values())

    def show(self, value: Files) -> bytes:
        if len(value) == 1:
            return next(iter(value.values())) or b""
        return b"\n".join(b"--- %s\n%s" % (name.encode(), content or b"(none)") for name, content in value.items())


def _put(path: Path, content: bytes | None) -> None:
    path.unlink(missing_ok=True)  # never rewritten in place: an earlier case may have it mapped
    if content is not None:
        path.write_bytes(content)


def load(name: str) -> Target:
    """The target of that name; its module, and with it the code under test, is imported only here."""
    target: Target = importlib.import_module(f"tests.fuzz.targets.{name}").Target()
    target.name = name
    return target


def make(target: Target, case: int) -> Any:
    """The input of one case: a pure function of target and number."""
    return target.make(random.Random(f"{target.name} {case}"))


def short(value: object) -> str:
    """`value` for a message of ours."""
    return reprlib.repr(value)
