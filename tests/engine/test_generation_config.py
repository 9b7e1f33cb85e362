"""Reading and writing generation_config.json."""

import json
import math

import pytest
from transformers import GenerationConfig

from llama_fast.engine.generation_config import GenerationDefaults
from llama_fast.errors import CheckpointIOError, ConfigError, UnsupportedError

CHAT_FILE = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [5, 6], "pad_token_id": 0}


def test_missing_file_means_nothing_is_set(tmp_path):
    assert GenerationDefaults.from_folder(tmp_path) == GenerationDefaults()


def test_G2_real_files(shared_data):
    paths = sorted((shared_data / "configs").glob("*generation_config.json"))
    assert paths
    for path in paths:
        content = json.loads(path.read_text())
        defaults = GenerationDefaults.from_dict(content)
        theirs = GenerationConfig(**content)
        for name in ("temperature", "top_p", "top_k", "max_length", "eos_token_id", "pad_token_id", "bos_token_id"):
            assert getattr(defaults, name) == getattr(theirs, name), (path.name, name)


@pytest.mark.parametrize("file", [{}, CHAT_FILE, {"eos_token_id": 5, "_from_model_config": True, "num_beams": 1}])
def test_save_and_read_back(tmp_path, file):
    defaults = GenerationDefaults.from_dict(file)
    defaults.save(tmp_path)
    assert GenerationDefaults.from_folder(tmp_path) == defaults
    assert json.loads((tmp_path / "generation_config.json").read_text()) == file


def test_G22_file_of_transformers_with_every_default_written_out(tmp_path):
    neutral = GenerationConfig._get_default_generation_params()
    # transformers 5 leaves unset fields out; version 4 wrote them.
    (tmp_path / "generation_config.json").write_text(json.dumps({**neutral, "max_time": None, "stop_strings": None}))
    defaults = GenerationDefaults.from_folder(tmp_path)
    assert (defaults.do_sample, defaults.max_length, defaults.top_k) == (False, 20, 50)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beams", 4),
        ("penalty_alpha", 0.6),
        ("no_repeat_ngram_size", 3),
        ("typical_p", 0.9),
        ("bad_words_ids", [[5]]),
        ("suppress_tokens", [5]),
        ("forced_eos_token_id", 2),
        ("guidance_scale", 1.5),
        ("min_new_tokens", 4),
        ("stop_strings", ["x"]),
        ("sequence_bias", [[[5], 1.0]]),
        ("num_return_sequences", 2),
    ],
)
def test_fields_that_would_change_the_text_are_not_ignored(tmp_path, name, value):
    (tmp_path / "generation_config.json").write_text(json.dumps({name: value}))
    with pytest.raises(UnsupportedError, match=rf"generation_config\.json: {name}=.* is not supported"):
        GenerationDefaults.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("do_sample", "true"),
        ("do_sample", 1),
        ("temperature", "0.6"),
        ("temperature", -1),
        ("temperature", True),
        ("temperature", math.nan),
        ("top_k", 5.5),
        ("top_p", 1.5),
        ("repetition_penalty", 0),
        ("max_new_tokens", -1),
        ("max_length", "20"),
        ("eos_token_id", "2"),
        ("eos_token_id", [2, None]),
        ("pad_token_id", 1.5),
    ],
)
def test_wrong_values_in_the_file(tmp_path, name, value):
    (tmp_path / "generation_config.json").write_text(json.dumps({name: value}))
    with pytest.raises(ConfigError, match=rf"generation_config\.json: {name}.* is not accepted; use"):
        GenerationDefaults.from_folder(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b"[" * 200_000, b"null"])
def test_file_that_is_no_json_object(tmp_path, content):
    (tmp_path / "generation_config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"generation_config\.json: (not valid JSON|expected a JSON object)"):
        GenerationDefaults.from_folder(tmp_path)


def test_file_that_cannot_be_read_or_written(tmp_path):
    (tmp_path / "generation_config.json").mkdir()
    with pytest.raises(CheckpointIOError, match="cannot be read"):
        GenerationDefaults.from_folder(tmp_path)
    with pytest.raises(CheckpointIOError, match="cannot be written"):
        GenerationDefaults().save(tmp_path)


def test_negative_ids_of_old_files_mean_none():
    defaults = GenerationDefaults.from_dict({"pad_token_id": -1, "bos_token_id": 1})
    assert (defaults.pad_token_id, defaults.bos_token_id) == (None, 1)
