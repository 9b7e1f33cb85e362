"""Reading and writing generation_config.json."""

import json

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


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b"[" * 200_000, b"null", b'{"temperature": NaN}'])
def test_file_that_is_no_json_object(tmp_path, content):
    (tmp_path / "generation_config.json").write_bytes(content)
    with pytest.raises(
        ConfigError, match=r"generation_config\.json: (is not (strict JSON|UTF-8)|must hold a JSON object|is nested)"
    ):
        GenerationDefaults.from_folder(tmp_path)


def test_file_that_cannot_be_read_or_written(tmp_path):
    (tmp_path / "generation_config.json").mkdir()
    with pytest.raises(CheckpointIOError, match="is a folder"):
        GenerationDefaults.from_folder(tmp_path)
    with pytest.raises(CheckpointIOError, match="cannot be written"):
        GenerationDefaults().save(tmp_path)


def test_negative_ids_of_old_files_mean_none():
    defaults = GenerationDefaults.from_dict({"pad_token_id": -1, "bos_token_id": 1})
    assert (defaults.pad_token_id, defaults.bos_token_id) == (None, 1)


def test_save_leaves_the_old_file_whole(tmp_path, monkeypatch):
    GenerationDefaults(temperature=0.6).save(tmp_path)

    def disk_full(path, text, **kwargs):
        path.write_bytes(text.encode()[:5])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", disk_full)
    with pytest.raises(CheckpointIOError, match=r"generation_config\.json: cannot be written \(No space left"):
        GenerationDefaults(temperature=0.7).save(tmp_path)
    assert GenerationDefaults.from_folder(tmp_path).temperature == 0.6
    assert [path.name for path in tmp_path.iterdir()] == ["generation_config.json"]


@pytest.mark.parametrize("field", ["eos_token_id", "pad_token_id", "bos_token_id"])
def test_A16_ids_outside_the_vocabulary(field):
    GenerationDefaults(**{field: 31}).check_vocab(32)
    with pytest.raises(ConfigError, match=rf"generation_config\.json: {field}=32 .* vocab_size=32 of config\.json"):
        GenerationDefaults(**{field: 32}).check_vocab(32)


def test_A16_every_id_of_a_list_counts():
    GenerationDefaults(eos_token_id=[1, 31]).check_vocab(32)
    with pytest.raises(ConfigError, match="eos_token_id=40"):
        GenerationDefaults(eos_token_id=[1, 40]).check_vocab(32)


OLD_CONFIG = {
    "model_type": "llama",
    "vocab_size": 32,
    "temperature": 0.6,
    "top_p": 0.9,
    "do_sample": True,
    "eos_token_id": 5,
}


def test_C35_parameters_in_config_json_count_without_the_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**OLD_CONFIG, "max_length": 4096}))
    defaults = GenerationDefaults.from_folder(tmp_path)
    # From the file's content: transformers 5 drops these fields when it makes a LlamaConfig of them, 4 kept them.
    theirs = GenerationConfig.from_model_config(json.loads((tmp_path / "config.json").read_text()))
    for name in ("do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_length"):
        assert getattr(defaults, name) == getattr(theirs, name), name
    assert (defaults.temperature, defaults.eos_token_id) == (0.6, None)
    (tmp_path / "generation_config.json").write_text(json.dumps({"top_k": 5}))
    assert GenerationDefaults.from_folder(tmp_path) == GenerationDefaults(top_k=5)


def test_C35_a_default_that_was_written_out_is_no_limit(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**OLD_CONFIG, "max_length": 20}))
    assert GenerationDefaults.from_folder(tmp_path).max_length is None
    (tmp_path / "generation_config.json").write_text(json.dumps({"max_length": 20}))
    assert GenerationDefaults.from_folder(tmp_path).max_length == 20


def test_C35_what_is_not_supported_is_refused_there_too(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**OLD_CONFIG, "num_beams": 4}))
    with pytest.raises(UnsupportedError, match=r"config\.json: num_beams=4 is not supported"):
        GenerationDefaults.from_folder(tmp_path)
