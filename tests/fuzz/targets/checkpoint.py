"""A whole folder, in which files do not fit each other. What loads generates tokens of its vocabulary."""

import json
import random
import tempfile
from pathlib import Path

from llama_fast.engine.llm import LLM
from llama_fast.engine.sampling import SamplingParams
from llama_fast.errors import (
    CheckpointError,
    ConfigError,
    NonFiniteLogitsError,
    OutOfMemoryError,
    TokenizerFileError,
    UnsupportedError,
)
from tests.bad_inputs.harness import check
from tests.byte_model import save_byte_model
from tests.fuzz.mutate import mutate_document, to_json
from tests.fuzz.safetensors_bytes import mutate_safetensors
from tests.fuzz.target import Files, FileTarget
from tests.fuzz.targets.config import KEYS, ROPES
from tests.fuzz.targets.generation_config import KEYS as GENERATION_KEYS

_WEIGHTS = "model.safetensors"
_KEYS = {
    "config.json": {
        **KEYS,
        "vocab_size": (257, 259, 1 << 20),
        "num_hidden_layers": (1, 3, 10**6),
        "hidden_size": (64,),
    },
    "generation_config.json": {**GENERATION_KEYS, "eos_token_id": (257, 258, [257, 300]), "max_length": (1, 10)},
    "tokenizer_config.json": {"eos_token": ("</s>", "a", "absent"), "add_bos_token": (True, False)},
    "tokenizer.json": {"zz": (5, 258, 10**6), "</s>": (258, 5), "id": (256, 258)},
}
_PARAMS = SamplingParams(max_tokens=2, temperature=0.7, seed=1)


class Target(FileTarget):
    refusals = (CheckpointError, ConfigError, OutOfMemoryError, TokenizerFileError, UnsupportedError)

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            save_byte_model(Path(folder))
            self.files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        self.files.setdefault("generation_config.json", b'{"eos_token_id": 257}')

    def make(self, rng: random.Random) -> Files:
        files: Files = {}
        for _ in range(rng.choice((1, 1, 2))):
            name = rng.choice(("config.json", "config.json", *sorted(self.files)))
            if name == _WEIGHTS:
                files[name] = rng.choice((None, mutate_safetensors(rng, self.files[name])))
            else:
                document = json.loads(self.files[name])
                files[name] = to_json(rng, mutate_document(rng, document, also=ROPES, keys=_KEYS[name]))
        return files

    def load(self, folder: Path, files: Files) -> None:
        llm = LLM(folder)
        vocab_size = llm.model.config.vocab_size
        if llm.engine.max_seq_len < 8:
            return
        [output] = llm.generate([0, vocab_size - 1], _PARAMS)
        if isinstance(output.error, NonFiniteLogitsError):  # weights may be any numbers
            return
        ids = output.outputs[0].token_ids
        check(output.outputs[0].finish_reason in ("stop", "length"), f"ended by {output.outputs[0].finish_reason!r}")
        check(1 <= len(ids) <= 2 and all(0 <= token_id < vocab_size for token_id in ids), f"tokens {ids}")
