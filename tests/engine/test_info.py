"""What `model_info` tells of a folder: values in effect, where each comes from, what has no effect, what is wrong."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama_fast import LlamaConfig, LlamaTokenizer, SamplingParams, demo
from llama_fast.engine.generation_config import GenerationDefaults
from llama_fast.engine.info import _GENERATION_DEFAULTS, Entry, model_info
from llama_fast.model.checkpoint_files import CheckpointFiles
from llama_fast.ops import describe_backend, select_backend
from tests.byte_model import save_byte_model

TINY = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}


@pytest.fixture
def folder(tmp_path):
    return save_byte_model(tmp_path)


def write(folder, name="config.json", /, **content):
    (folder / name).write_text(json.dumps(content))
    return folder


def change(folder, name, **fields):
    content = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    return write(folder, name, **{**content, **fields})


def test_every_field_of_a_config_and_its_origin(tmp_path):
    write(tmp_path, **TINY, num_key_value_heads=None, hidden_act="gelu", torch_dtype="float16")
    model, config = model_info(tmp_path).sections["model"], LlamaConfig.from_pretrained(tmp_path)
    for name in set(model) - {"dtype"}:
        assert model[name].value == getattr(config, name), name
    assert model["vocab_size"] == Entry(300, "config.json")
    assert model["hidden_act"] == Entry("gelu", "config.json")
    assert model["num_key_value_heads"] == Entry(4, "default")  # null says nothing
    assert model["head_dim"] == Entry(16, "default")
    assert model["rms_norm_eps"] == Entry(1e-6, "default")
    assert model["dtype"] == Entry("float16", "config.json")


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0}},
    ],
    ids=["v4", "v5"],
)
def test_rope_in_both_spellings(tmp_path, spelling):
    rope = model_info(write(tmp_path, **TINY, **spelling)).sections["rope"]
    assert {name: entry.value for name, entry in rope.items()} == {
        "rope_theta": 5e5,
        "rope_type": "linear",
        "factor": 4.0,
    }
    assert {entry.origin for entry in rope.values()} == {"config.json"}
    plain = model_info(write(tmp_path, **TINY)).sections["rope"]
    assert plain == {"rope_type": Entry("default", "default"), "rope_theta": Entry(10000.0, "default")}


def test_generation_after_precedence(tmp_path):
    write(tmp_path, **TINY, bos_token_id=3, eos_token_id=4, pad_token_id=5, temperature=0.1)
    write(tmp_path, "generation_config.json", do_sample=True, temperature=0.6, eos_token_id=[4, 7], pad_token_id=5, x=1)
    info = model_info(tmp_path)
    generation = info.sections["generation"]
    assert generation["temperature"] == Entry(0.6, "generation_config.json")
    assert generation["top_p"] == Entry(1.0, "default")
    assert generation["eos_token_id"] == Entry([4, 7], "generation_config.json")
    assert generation["bos_token_id"] == Entry(3, "config.json")
    assert generation["pad_token_id"] == Entry(5, "generation_config.json")
    assert info.ignored == [
        "config.json: eos_token_id=4 (generation_config.json counts)",
        "config.json: temperature",
        "generation_config.json: x",
    ]


def test_generation_parameters_in_config_json(tmp_path):
    info = model_info(write(tmp_path, **TINY, do_sample=True, temperature=0.6))
    assert info.sections["generation"]["temperature"] == Entry(0.6, "config.json")
    assert info.sections["generation"]["eos_token_id"] == Entry(2, "default")
    assert info.ignored == []


def test_generation_defaults_are_those_of_sampling():
    resolved = SamplingParams(temperature=1.0, seed=0).resolve(
        GenerationDefaults(), None, prompt_len=1, max_seq_len=8, vocab_size=9
    )
    for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
        assert getattr(resolved, name) == _GENERATION_DEFAULTS[name]
    greedy = SamplingParams(seed=0).resolve(GenerationDefaults(), None, prompt_len=1, max_seq_len=8, vocab_size=9)
    assert (greedy.temperature, _GENERATION_DEFAULTS["do_sample"]) == (0.0, False)


def test_what_has_no_effect(tmp_path):
    write(
        tmp_path,
        **TINY,
        auto_map={"AutoConfig": "x.X"},
        pretraining_tp=1,
        note=1,
        torch_dtype="float16",
        dtype="float32",
    )
    info = model_info(tmp_path)
    assert info.sections["model"]["dtype"].value == "float32"
    assert info.ignored == [
        "config.json: torch_dtype='float16' (dtype counts)",
        "config.json: auto_map (no code of a checkpoint is ever run)",
        "config.json: note",
        "config.json: pretraining_tp",
    ]


def test_tokenizer(folder):
    tokenizer = LlamaTokenizer.from_pretrained(folder)
    change(
        folder,
        "tokenizer_config.json",
        chat_template=[{"name": "default", "template": ""}, {"name": "b", "template": ""}],
    )
    section = model_info(folder).sections["tokenizer"]
    assert section["kind"] == Entry("byte-level BPE (as Llama 3)", "tokenizer.json")
    assert section["tokens"].value == len(tokenizer) == 258
    assert section["bos_token"] == Entry("<s>", "tokenizer_config.json")
    assert section["bos_token_id"].value == tokenizer.bos_token_id
    assert section["unk_token"] == Entry(None, "default")
    assert section["model_max_length"] == Entry(None, "default")
    assert section["chat_templates"] == Entry(["b", "default"], "tokenizer_config.json")


def test_tokenizer_files_that_are_shadowed(folder):
    change(folder, "tokenizer_config.json", chat_template="x", some_key=1)
    write(folder, "special_tokens_map.json", bos_token="</s>")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    info = model_info(folder)
    assert info.sections["tokenizer"]["bos_token"] == Entry("</s>", "special_tokens_map.json")
    assert info.sections["tokenizer"]["chat_templates"] == Entry(["default"], "*.jinja")
    assert "tokenizer_config.json: bos_token (special_tokens_map.json counts)" in info.ignored
    assert "tokenizer_config.json: chat_template (*.jinja counts)" in info.ignored
    assert "tokenizer_config.json: some_key" in info.ignored
    change(folder, "tokenizer_config.json", added_tokens_decoder={})
    info = model_info(folder)
    assert info.sections["tokenizer"]["bos_token"] == Entry("<s>", "tokenizer_config.json")
    assert any(line.startswith("special_tokens_map.json (tokenizer_config.json counts") for line in info.ignored)


@pytest.mark.parametrize(("name", "kind"), [("llama2", "SentencePiece"), ("llama3", "byte-level")])
def test_genuine_tokenizers(shared_data, tmp_path, name, kind):
    for path in (shared_data / "tokenizers" / name).iterdir():
        shutil.copy(path, tmp_path)
    info = model_info(write(tmp_path, **{**TINY, "vocab_size": 128256}))
    section, tokenizer = info.sections["tokenizer"], LlamaTokenizer.from_pretrained(tmp_path)
    assert kind in section["kind"].value
    assert section["tokens"].value == len(tokenizer)
    for token in ("bos_token", "eos_token", "unk_token", "pad_token"):
        assert section[token].value == getattr(tokenizer, token)
        assert section[f"{token}_id"].value == getattr(tokenizer, f"{token}_id")
    (tmp_path / "tokenizer.json").unlink(missing_ok=True)
    if (tmp_path / "tokenizer.model").exists() and name == "llama2":
        converted = model_info(tmp_path).sections["tokenizer"]
        assert (converted["tokens"].value, converted["kind"].origin) == (len(tokenizer), "tokenizer.model")


def test_weights_from_headers(folder):
    files, weights = CheckpointFiles.open(folder), model_info(folder).sections["weights"]
    assert weights["files"] == Entry(["model.safetensors"], "model.safetensors")
    assert weights["tensors"].value == len(files.shapes)
    assert weights["parameters"].value * 4 == weights["bytes"].value == files.total_bytes
    assert weights["tensors_by_dtype"].value == {"float32": len(files.shapes)}


def test_shards(tmp_path):
    save_file({"a": torch.zeros(3)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(2, dtype=torch.bfloat16)}, tmp_path / "model-00002-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    write(tmp_path, "model.safetensors.index.json", metadata={"total_size": 16}, weight_map=weight_map)
    weights = model_info(write(tmp_path, **TINY)).sections["weights"]
    assert weights["files"] == Entry(sorted(weight_map.values()), "model.safetensors.index.json")
    assert (weights["parameters"].value, weights["bytes"].value) == (5, 16)
    assert weights["tensors_by_dtype"].value == {"float32": 1, "bfloat16": 1}


def test_weights_that_do_not_fit_the_config(folder):
    change(folder, "config.json", num_hidden_layers=3)
    (problem,) = model_info(folder).problems
    assert "model.layers.2" in problem
    change(folder, "config.json", num_hidden_layers=2, intermediate_size=47)
    (problem,) = model_info(folder).problems
    assert "mlp" in problem
    change(folder, "config.json", intermediate_size=48)
    assert model_info(folder).problems == []
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.norm.weight": tensors["model.norm.weight"].half()}, folder / "model.safetensors")
    assert model_info(folder).problems == []
    del tensors["lm_head.weight"]
    save_file({**tensors, "model.norm.weight": tensors["model.norm.weight"].half()}, folder / "model.safetensors")
    (problem,) = model_info(folder).problems
    assert "1 missing: lm_head.weight" in problem


def test_a_folder_with_config_json_alone(tmp_path):
    info = model_info(write(tmp_path, **TINY))
    assert info.problems == []
    assert info.missing == {
        "tokenizer": "neither tokenizer.json nor tokenizer.model is here",
        "weights": "neither model.safetensors nor model.safetensors.index.json is here",
    }
    assert info.sections["tokenizer"] == info.sections["weights"] == {}
    assert model_info(tmp_path, weights=False).missing["weights"] == "not downloaded"


def test_the_demo_has_nothing_missing_and_nothing_wrong():
    info = model_info(demo.PATH)
    assert (info.missing, info.problems) == ({}, [])


def test_an_empty_folder(tmp_path):
    (problem,) = model_info(tmp_path).problems
    assert "config.json: cannot be read" in problem


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("config.json", "{", "config.json: is not strict JSON"),
        ("config.json", json.dumps({**TINY, "hidden_size": 65}), "hidden_size=65"),
        ("config.json", json.dumps({**TINY, "model_type": "phi3"}), "model_type='phi3'"),
        ("config.json", json.dumps({**TINY, "quantization_config": {"quant_method": "gptq", "bits": 3}}), "bits=3"),
        ("quantize_config.json", '{"bits": 3, "group_size": 128}', "quantize_config.json has quant_method='gptq'"),
        ("generation_config.json", '{"num_beams": 4}', "num_beams=4"),
        ("generation_config.json", '{"eos_token_id": 300}', "eos_token_id=300"),
        ("tokenizer.json", "[", "tokenizer.json"),
        ("model.safetensors", "<html>", "model.safetensors"),
        ("pytorch_model.bin", "", "pickles"),
    ],
)
def test_what_is_wrong_is_told_beside_the_rest(tmp_path, name, content, problem):
    write(tmp_path, **TINY, note=1)
    (tmp_path / name).write_text(content)
    info = model_info(tmp_path)
    (told,) = info.problems
    assert problem in told
    assert list(info.sections) == ["model", "rope", "generation", "tokenizer", "weights", "machine"]
    if content != "{":
        assert info.sections["model"]["vocab_size"] == Entry(300, "config.json")


def test_the_machine_says_what_would_run(tmp_path):
    machine = model_info(write(tmp_path, **TINY)).sections["machine"]
    assert machine["backend"] == Entry(describe_backend(torch.device(machine["device"].value)), "this machine")
    served = select_backend("auto", torch.device(machine["device"].value)).__name__.rpartition(".")[2]
    assert machine["backend"].value.startswith(f"{served}: ")
