"""Real config.json files, each in a folder with the files from beside it: loaded as transformers does, or refused."""

import shutil

import pytest
import torch
from transformers import AutoConfig

from llama_fast.config import LlamaConfig
from llama_fast.engine.generation_config import GenerationDefaults
from llama_fast.errors import ConfigError, UnsupportedError
from llama_fast.model.quantization import Layout, stored_scheme

BITSANDBYTES = (
    r"config\.json: quantization_config has quant_method='bitsandbytes', bits=%d: supported are 4 bits of gptq"
)
INT4 = Layout(128, symmetric=True)
OUTCOMES = {
    "genz-70b-gptq": (
        UnsupportedError,
        r"config\.json: .*quant_method='gptq', bits=3, group_size=-1: supported are 4 bits of gptq",
    ),
    "ipex-llama3": None,
    "llama-3.2-1b-compeng": (UnsupportedError, BITSANDBYTES % 8),
    "mlc.codellama_13b": None,
    "mlc.codellama_7b": None,
    "mlc.llama2_70b": None,
    "mlc.llama3_1_70b": None,
    "mlc.llama3_2_1b": None,
    "mlc.phi-3_5.longrope-only": (ConfigError, r"config\.json: model_type='phi3' is not supported; .*'llama'"),
    "mlc.smollm2_360m": None,
    "mlc.smollm_1_7b": None,
    "mlc.tinyllama_1b_chat_v0.4": None,
    "orpheus-3b": (UnsupportedError, BITSANDBYTES % 4),
    "tinyllama-betterthanany": None,
    "wizard-mega-13b-gptq": INT4,  # says quantize_config.json
}


def test_every_real_config_is_here(shared_data):
    names = {path.name.removesuffix(".config.json") for path in (shared_data / "configs").glob("*.config.json")}
    assert names == set(OUTCOMES)


@pytest.mark.parametrize(("name", "refusal"), OUTCOMES.items(), ids=OUTCOMES)
def test_real_config(shared_data, tmp_path, name, refusal):
    for path in (shared_data / "configs").glob(f"{name}.*.json"):
        shutil.copy(path, tmp_path / path.name.removeprefix(f"{name}."))
    if isinstance(refusal, tuple) and refusal[0] is ConfigError:
        with pytest.raises(refusal[0], match=refusal[1]):
            LlamaConfig.from_pretrained(tmp_path)
        return

    ours, theirs = LlamaConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)
    not_fields = {"chunk_size_feed_forward", "is_encoder_decoder", "transformers_version"}  # never a Llama's
    compared = {field for field in theirs.to_dict() if field not in not_fields}
    assert len(compared) > 30
    for field in compared:
        assert getattr(ours, field) == getattr(theirs, field), field
    assert isinstance(ours.dtype, torch.dtype)
    GenerationDefaults.from_folder(tmp_path).check_vocab(ours.vocab_size)

    if refusal is None:
        assert stored_scheme(ours, tmp_path) is None
    elif refusal is INT4:
        scheme = stored_scheme(ours, tmp_path)
        assert scheme.layout_of("model.layers.0.mlp.up_proj", ours.hidden_size) == INT4
        assert scheme.layout_of("lm_head", ours.hidden_size) is None
    else:
        with pytest.raises(refusal[0], match=refusal[1]):
            stored_scheme(ours, tmp_path)
