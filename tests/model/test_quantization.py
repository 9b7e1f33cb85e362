"""Quantized checkpoints are refused by the name of their method, from whichever file says it."""

import json

import pytest
from transformers import AwqConfig, BitsAndBytesConfig, FineGrainedFP8Config, GPTQConfig

from llama_fast.config import LlamaConfig
from llama_fast.errors import CheckpointIOError, ConfigError, UnsupportedError
from llama_fast.model.quantization import refuse_quantized

W4A16 = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 128, "type": "int"}}}
INT4 = {"default": {"_type": "Int4WeightOnlyConfig", "_data": {"group_size": 64}}}
METHODS = [
    ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "'gptq', bits=4, group_size=128: .* yet"),
    ({"quant_method": "gptq", "bits": 8, "group_size": 32}, "'gptq', bits=8, group_size=32: .*supported;"),
    ({"quant_method": "awq", "bits": 4, "group_size": 64}, "'awq', bits=4, group_size=64: .* yet"),
    ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "'bitsandbytes', bits=4: .*supported;"),
    (
        {"quant_method": "compressed-tensors", "config_groups": W4A16},
        "'compressed-tensors', bits=4, group_size=128: .*yet",
    ),
    ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "'fp8': .*supported;"),
    ({"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4}}}, "'hqq', bits=4: .*supported;"),
    ({"quant_method": "torchao", "quant_type": INT4}, "'torchao', bits=4, group_size=64: .* yet"),
    ({"quant_method": "torchao", "quant_type": "int8_weight_only"}, "'torchao': .*supported;"),
    ({"quant_method": "exl2", "bits": 4.65, "head_bits": 6}, r"'exl2', bits=4\.65: .*supported;"),
    ({"bits": 4, "group_size": 64}, "'mlx', bits=4, group_size=64: .*supported;"),
    ({"quant_method": "no_such_method"}, "'no_such_method': .*supported;"),
]


@pytest.mark.parametrize(("content", "message"), METHODS)
def test_method_bits_and_group_size_are_named(tmp_path, content, message):
    with pytest.raises(UnsupportedError, match=rf"config\.json: quantization_config has quant_method={message}"):
        refuse_quantized(LlamaConfig(quantization_config=content), tmp_path)


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (GPTQConfig(bits=4, group_size=128, dataset="c4", tokenizer="x"), "'gptq', bits=4, group_size=128: .* yet"),
        (AwqConfig(bits=4, group_size=128), "'awq', bits=4, group_size=128: .* yet"),
        (BitsAndBytesConfig(load_in_8bit=True), "'bitsandbytes', bits=8: .*supported;"),
        (FineGrainedFP8Config(), "'fp8': .*supported;"),
    ],
    ids=lambda value: getattr(value, "quant_method", ""),
)
def test_what_transformers_writes(tmp_path, theirs, message):
    content = json.loads(json.dumps(theirs.to_dict(), default=str))
    content["quant_method"] = theirs.quant_method.value
    with pytest.raises(UnsupportedError, match=message):
        refuse_quantized(LlamaConfig(quantization_config=content), tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"bits": 4}, "quant_method=None"),
        ({}, "quant_method=None"),
        ({"quant_method": 5}, "quant_method=5"),
        ({"quant_method": "gptq", "bits": "four"}, "bits='four'"),
        ([1], r"quantization_config=\[1\]; use an object"),
        ("gptq", "quantization_config='gptq'; use an object"),
    ],
)
def test_malformed(tmp_path, content, message):
    with pytest.raises(ConfigError, match=message):
        refuse_quantized(LlamaConfig(quantization_config=content), tmp_path)


SIDE_FILES = {
    "quantize_config.json": ({"bits": 4, "group_size": 128}, "'gptq', bits=4, group_size=128: .* yet"),
    "quant_config.json": ({"w_bit": 4, "q_group_size": 128}, "'awq', bits=4, group_size=128: .* yet"),
    "hf_quant_config.json": ({"quantization": {"quant_algo": "FP8"}}, "'modelopt': .*supported;"),
}


@pytest.mark.parametrize(("name", "case"), SIDE_FILES.items(), ids=SIDE_FILES)
def test_files_that_older_tools_wrote_beside_config_json(tmp_path, name, case):
    (tmp_path / name).write_text(json.dumps(case[0]))
    with pytest.raises(UnsupportedError, match=rf"/{name} has quant_method={case[1]}"):
        refuse_quantized(LlamaConfig(), tmp_path)
    (tmp_path / name).write_text("[")
    with pytest.raises(ConfigError, match=rf"/{name}: is not strict JSON"):
        refuse_quantized(LlamaConfig(), tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(CheckpointIOError, match=rf"/{name}: is a folder"):
        refuse_quantized(LlamaConfig(), tmp_path)


def test_a_plain_checkpoint_passes(tmp_path):
    refuse_quantized(LlamaConfig(), tmp_path)
    refuse_quantized(LlamaConfig(quantization_config=None), tmp_path)
    (tmp_path / "quantization.md").touch()
    refuse_quantized(LlamaConfig(), tmp_path)


def test_compression_config_is_the_older_name(tmp_path):
    with pytest.raises(
        UnsupportedError, match=r"config\.json: compression_config has quant_method='compressed-tensors'"
    ):
        refuse_quantized(LlamaConfig(compression_config={"quant_method": "compressed-tensors"}), tmp_path)
