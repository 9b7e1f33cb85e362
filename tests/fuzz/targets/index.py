"""model.safetensors.index.json and its shards. What is loaded is what plain JSON and the safetensors library say."""

import json
import random
from pathlib import Path

import safetensors

from llama_fast.errors import CheckpointError, UnsupportedError
from llama_fast.model.checkpoint import CheckpointFiles, load_weights
from tests.bad_inputs.harness import CheckFailedError, check
from tests.fuzz.mutate import mutate_document, to_json
from tests.fuzz.safetensors_bytes import as_bytes, mutate_safetensors, parse
from tests.fuzz.target import Files, FileTarget
from tests.fuzz.tiny_checkpoint import checkpoint_files, meta_model

_INDEX = "model.safetensors.index.json"


class Target(FileTarget):
    refusals = (CheckpointError, UnsupportedError)

    def __init__(self) -> None:
        self.files = checkpoint_files(4000)
        self._model = meta_model()
        self._shards = [name for name in self.files if name != _INDEX]
        outside = ("/dev/zero", "/proc/self/mem", "../files/" + self._shards[0], "./" + self._shards[0], "a//b", _INDEX)
        self._also = (*self._shards, *outside)
        weights = list(json.loads(self.files[_INDEX])["weight_map"])
        self._keys = {
            **dict.fromkeys((*weights, "lm_head.weight_scale"), self._shards),
            "total_size": (1, 10**15, 1.5),
            "metadata": ({"total_size": 10**15}, []),
            "weight_map": ({},),
        }

    def make(self, rng: random.Random) -> Files:
        files: Files = {}
        if rng.random() < 0.8:
            document = json.loads(self.files[_INDEX])
            files[_INDEX] = to_json(rng, mutate_document(rng, document, also=self._also, keys=self._keys))
        if not files or rng.random() < 0.1:
            one, other = rng.choice(self._shards), rng.choice(self._shards)
            files[one] = rng.choice((None, self.files[other], mutate_safetensors(rng, self.files[one])))
        return files

    def load(self, folder: Path, files: Files) -> None:
        load_weights(self._model, folder)
        opened = CheckpointFiles.open(folder)
        content = {**self.files, **files}
        weight_map = json.loads(content[_INDEX] or b"")["weight_map"]
        try:
            shards = {name: parse(content[name] or b"") for name in set(weight_map.values())}
        except (KeyError, safetensors.SafetensorError) as error:
            raise CheckFailedError(f"loaded, but a shard is none: {error!r}") from error
        check(opened.shapes.keys() == weight_map.keys(), "other names than the index has")
        for name, shard in weight_map.items():
            shape, data = shards[shard][name]
            check(opened.shapes[name] == shape, f"{name} has another shape")
            check(as_bytes(opened.tensor(name)) == data, f"{name} has other bytes")
        for name, parameter in self._model.named_parameters():
            check(as_bytes(parameter) == shards[weight_map[name]][name][1], f"{name} was loaded with other bytes")
