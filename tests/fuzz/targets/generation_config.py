"""generation_config.json. Where it is accepted, the fields that count are what plain json.loads gives."""

import json
import math
import random
from dataclasses import fields
from pathlib import Path

from llama_fast.engine.generation_config import GenerationDefaults
from llama_fast.errors import ConfigError, UnsupportedError
from tests.bad_inputs.harness import check
from tests.fuzz.mutate import mutate_document, to_json
from tests.fuzz.target import Files, FileTarget, short

_LLAMA_3 = {
    "_from_model_config": True,
    "bos_token_id": 1,
    "do_sample": True,
    "eos_token_id": [2, 300],
    "max_length": 4096,
    "pad_token_id": 0,
    "temperature": 0.6,
    "top_k": 50,
    "top_p": 0.9,
    "transformers_version": "4.45.0",
}
KEYS = {
    "min_p": (0.05, 0),
    "max_new_tokens": (16, 0),
    "repetition_penalty": (1.1, 0.01),
    "num_beams": (1, 4),
    "suppress_tokens": ([], [1]),
    "bad_words_ids": ([[1]],),
    "guidance_scale": (1.0, 1.5),
    "stop_strings": (["a"], []),
    "min_length": (0, 1),
    "typical_p": (1.0, 0.5),
    "cache_implementation": ("static",),
    "eos_token_id": (-1, 0, []),
}
_NOT_AS_WRITTEN = {"other", "pad_token_id", "bos_token_id"}  # a negative id is none


class Target(FileTarget):
    refusals = (ConfigError, UnsupportedError)

    def make(self, rng: random.Random) -> Files:
        document = json.loads(json.dumps(_LLAMA_3))
        return {"generation_config.json": to_json(rng, mutate_document(rng, document, keys=KEYS))}

    def load(self, folder: Path, files: Files) -> None:
        defaults = GenerationDefaults.from_folder(folder)
        written = json.loads(files["generation_config.json"] or b"")
        for name in {field.name for field in fields(defaults)} - _NOT_AS_WRITTEN:
            ours, theirs = getattr(defaults, name), written.get(name)
            same = ours == theirs and isinstance(ours, bool) == isinstance(theirs, bool)
            check(same, f"{name}: {short(theirs)} became {short(ours)}")
            check(not isinstance(ours, float) or math.isfinite(ours), f"{name} is {ours}")
