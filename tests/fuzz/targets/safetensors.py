"""model.safetensors. What is loaded has the names, shapes and bytes that the safetensors library reads."""

import random
from pathlib import Path

import safetensors

from llama_fast.errors import CheckpointError, UnsupportedError
from llama_fast.model.checkpoint import CheckpointFiles, load_weights
from llama_fast.model.verify import verify_checkpoint
from tests.bad_inputs.harness import CheckFailedError, check
from tests.fuzz.safetensors_bytes import as_bytes, mutate_safetensors, parse
from tests.fuzz.target import Files, FileTarget
from tests.fuzz.tiny_checkpoint import checkpoint_files, meta_model

_FILE = "model.safetensors"


class Target(FileTarget):
    refusals = (CheckpointError, UnsupportedError)

    def __init__(self) -> None:
        self.files = checkpoint_files(10**9)
        self._model = meta_model()

    def make(self, rng: random.Random) -> Files:
        return {_FILE: mutate_safetensors(rng, self.files[_FILE])}

    def load(self, folder: Path, files: Files) -> None:
        opened = CheckpointFiles.open(folder)
        try:
            expected = parse({**self.files, **files}[_FILE] or b"")
        except safetensors.SafetensorError as error:
            raise CheckFailedError(f"opened, but the safetensors library refuses it: {error}") from error
        check(dict(opened.shapes) == {name: shape for name, (shape, _) in expected.items()}, "other names or shapes")
        for name, (_, content) in expected.items():
            check(as_bytes(opened.tensor(name)) == content, f"{name!r:.80} has other bytes")
        verify_checkpoint(folder, show_progress=False)
        for load in ("mmap", "copy"):
            load_weights(self._model, folder, load=load)
            for name, parameter in self._model.named_parameters():
                check(as_bytes(parameter) == expected[name][1], f"{name} was loaded with other bytes, load={load}")
