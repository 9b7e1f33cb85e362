"""Models of ours and of transformers from one folder."""

import json

import pytest

from llama_fast import LlamaForCausalLM
from tests.api.transformers_runs import save_checkpoint, tiny_fields


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """(ours, theirs) without eos and pad; not to be changed."""
    folder = tmp_path_factory.mktemp("pair")
    theirs = save_checkpoint(tiny_fields(), folder)
    return LlamaForCausalLM.from_pretrained(folder, device="cpu"), theirs


@pytest.fixture
def load(tmp_path):
    """Function: (ours, theirs) with these changed fields and this generation_config.json (None for none)."""

    def load_with(generation_config=None, **changes):
        theirs = save_checkpoint(tiny_fields(**changes), tmp_path)
        path = tmp_path / "generation_config.json"
        path.unlink(missing_ok=True)
        if generation_config is not None:
            path.write_text(json.dumps(generation_config))
        return LlamaForCausalLM.from_pretrained(tmp_path, device="cpu"), theirs

    return load_with
