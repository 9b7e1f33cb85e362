"""A: config.json and the files beside it."""

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from llama_fast import LLM, LlamaConfig, LlamaForCausalLM, SamplingParams
from llama_fast.engine.generation_config import GenerationDefaults
from llama_fast.errors import CheckpointMismatchError, CheckpointPathError, ConfigError
from llama_fast.model.llama import LlamaLM
from tests.bad_inputs.harness import accepted, check, check_message, refused
from tests.byte_model import save_byte_model

TINY = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
NAN = json.loads("NaN")
MEGABYTE = 900_000  # below the limit on the file


tqdm.monitor_interval = 0  # no thread that watches bars: it would stay after the first, which loading shows


def write(folder: Path, *without: str, **fields: object) -> Path:
    """TINY's config.json with `fields` and `without` those names; the folder."""
    content = {name: value for name, value in {**TINY, **fields}.items() if name not in without}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def field_refused(folder: Path, name: str, value: object, *needles: str) -> None:
    """A file with this value, and a call with it, are refused with the field's name in the message.

    Without the bounds of `refused`, which cost 50 ms: the entries try several hundred values.
    """
    write(folder, **{name: value})
    path = str(folder / "config.json")
    calls = {path: lambda: LlamaConfig.from_pretrained(folder), "": lambda: LlamaConfig(**{**TINY, name: value})}
    for where, call in calls.items():
        try:
            call()
        except ConfigError as error:
            check_message(error)
            for needle in (where, name, *needles):
                check(needle in str(error), f"the message does not name {needle!r}: {error}")
        else:
            check(False, f"{name}={value!r:.80} is not refused")


def read(folder: Path, **kwargs: object) -> LlamaConfig:
    """A legal folder's."""
    return LlamaConfig.from_pretrained(folder, **kwargs)


@contextmanager
def warnings() -> Iterator[list[str]]:
    """The messages that the package logs as warnings in the block."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("llama_fast")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def A01_missing(folder: Path) -> None:
    refused(ConfigError, lambda: LlamaConfig.from_pretrained(folder), str(folder / "config.json"))
    refused(CheckpointPathError, lambda: LlamaConfig.from_pretrained(folder / "none"), str(folder / "none"), "hub id")


def A01_no_regular_file(folder: Path) -> None:
    path = folder / "config.json"
    path.mkdir()
    refused(ConfigError, lambda: LlamaConfig.from_pretrained(folder), str(path), "is a folder")
    path.rmdir()
    os.mkfifo(path)  # opening it would wait for a writer
    refused(ConfigError, lambda: LlamaConfig.from_pretrained(folder), str(path), "not a regular file")
    path.unlink()
    path.symlink_to(path)
    refused(ConfigError, lambda: LlamaConfig.from_pretrained(folder), str(path), "not a regular file")


def A01_unreadable(folder: Path) -> None:
    write(folder)
    path = folder / "config.json"
    path.chmod(0)
    if os.geteuid() == 0:  # root reads everything, but not memory that is not there
        path.unlink()
        path.symlink_to("/proc/self/mem")
    refused(ConfigError, lambda: LlamaConfig.from_pretrained(folder), str(path), "cannot be read")


def A01_content(folder: Path) -> None:
    path = folder / "config.json"
    good = json.dumps(TINY).encode()
    for content, needle in (
        (b"", "the file is empty"),
        (b" \n", "the file is empty"),
        (good.replace(b"llama", b"ll\xffma"), "is not UTF-8"),
        (good.decode().encode("utf-16"), "is not UTF-8"),
        (b"\xef\xbb\xbf" + good, "byte order mark"),
        (good[:-1], "is not strict JSON"),
        (good + good, "is not strict JSON"),
        (b"<html>", "is not strict JSON"),
        (b"\0" * 100, "is not strict JSON"),
    ):
        path.write_bytes(content)
        refused(ConfigError, lambda: LlamaConfig.from_pretrained(folder), str(path), needle)
    path.write_bytes(good)
    check(read(folder).hidden_size == 16, "the file itself is good")


def A02_no_object(folder: Path) -> None:
    path = folder / "config.json"
    for content, needle in (
        ("[]", "a list"),
        ("3", "a number"),
        ("null", "null"),
        ('"a"', "a string"),
        ("true", "true"),
    ):
        path.write_text(content)
        refused(ConfigError, lambda: LlamaConfig.from_pretrained(folder), str(path), needle)


def A03_deep(folder: Path) -> None:
    path = folder / "config.json"
    for depth in (65, 1000, 100_000, 1_000_000):
        for opening, closing in (("[", "]"), ('{"a":', "}")):
            text = '{"a":' + opening * depth + "1" + closing * depth + "}"
            path.write_text(text)
            needle = "such a file has at most" if len(text) > 1 << 20 else "nested"
            refused(ConfigError, lambda: LlamaConfig.from_pretrained(folder), str(path), needle)
    write(folder, note=json.loads("[" * 62 + "]" * 62))
    read(folder)


def A03_a_gigabyte(folder: Path) -> None:
    path = folder / "config.json"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    refused(ConfigError, lambda: LlamaConfig.from_pretrained(folder), str(path), "1,048,576")


def A03_many_labels(folder: Path) -> None:
    """A small file may not ask for gigabytes either."""
    field_refused(folder, "num_labels", 2**31 - 1, "65536")
    field_refused(folder, "id2label", {"9" * 5000: "a"})
    write(folder, num_labels=65536)
    check(read(folder).num_labels == 65536, "as many as that are legal")


def A04_duplicate_keys(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(TINY)[:-1] + ', "vocab_size": 32}')
    refused(ConfigError, lambda: LlamaConfig.from_pretrained(folder), str(path), "'vocab_size' appears twice")
    path.write_text(json.dumps(TINY)[:-1] + ', "rope_scaling": {"factor": 1, "factor": 2}}')
    refused(ConfigError, lambda: LlamaConfig.from_pretrained(folder), "'factor' appears twice")
    key = json.dumps("\x1b[2J" + "k" * 300_000)
    path.write_text(json.dumps(TINY)[:-1] + f", {key}: 1, {key}: 2}}")
    refused(ConfigError, lambda: LlamaConfig.from_pretrained(folder), "appears twice")


def A04_no_numbers(folder: Path) -> None:
    path = folder / "config.json"
    for literal in ("NaN", "Infinity", "-Infinity", "1e999", "1" * 5000):
        path.write_text(json.dumps(TINY)[:-1] + f', "rms_norm_eps": {literal}}}')
        refused(ConfigError, lambda: LlamaConfig.from_pretrained(folder), str(path), "number")


def A05_other_models(folder: Path) -> None:
    for model_type in ("phi3", "mistral", "LLAMA", "", 5, ["llama"], "x" * MEGABYTE):
        field_refused(folder, "model_type", model_type, "runs model_type 'llama'")
    for names in (["Phi3ForCausalLM"], ["MistralForCausalLM", "\x1b[31m"], [""], "LlamaForCausalLM", [5], {"a": 1}):
        field_refused(folder, "architectures", names)
    write(folder, architectures=["Phi3ForCausalLM"])
    refused(
        ConfigError, lambda: LlamaConfig.from_pretrained(folder), "LlamaForCausalLM", "LlamaForSequenceClassification"
    )


def A05_what_is_a_llama(folder: Path) -> None:
    heads = ("CausalLM", "SequenceClassification", "TokenClassification", "QuestionAnswering")
    for name in ("LlamaModel", "LLaMAForCausalLM", "FSDPLlamaForCausalLM", *(f"LlamaFor{head}" for head in heads)):
        read(write(folder, architectures=[name]))
    read(write(folder, architectures=["LlamaForCausalLM", "MyOwnModel"]))
    read(write(folder, architectures=[]))
    for without in (["model_type"], ["architectures"], ["model_type", "architectures"]):
        read(write(folder, *without))
    write(folder, "model_type", architectures=["Phi3ForCausalLM"])
    refused(ConfigError, lambda: LlamaConfig.from_pretrained(folder), "architectures")


def A06_code_of_a_checkpoint(folder: Path) -> None:
    trace = folder / "it ran"
    code = f"open({str(trace)!r}, 'w')"
    for name in ("configuration_x", "modeling_x", "__init__", "tokenization_x"):
        (folder / f"{name}.py").write_text(code)
    maps = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    write(folder, auto_map=maps, custom_code=True, trust_remote_code=True)
    with warnings() as messages:
        config = read(folder)
    check(len(messages) == 1 and "auto_map, custom_code" in messages[0], f"one warning: {messages}")
    accepted(lambda: GenerationDefaults.from_folder(folder))
    LlamaForCausalLM(config)
    config.save_pretrained(folder)
    read(folder)
    check(not trace.exists(), "code of the folder ran")
    check(not any(name.endswith("_x") for name in sys.modules), "a module of the folder was imported")


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def A07_sizes(folder: Path) -> None:
    values = (0, -1, 2**63, 2**31, 10**300, 4096.5, 4096.0, "4096", True, [4096], {"a": 1}, "4" * MEGABYTE)
    for name in (*SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings"):
        for value in values:
            field_refused(folder, name, value, "use an integer from 1 to")
    refused(ConfigError, lambda: LlamaConfig(hidden_size=10**5000), "hidden_size")


def A07_a_megabyte_in_a_field(folder: Path) -> None:
    wide: object = "x" * 15
    for _ in range(6):  # each list short, all together 46,656 texts
        wide = [wide] * 6
    for name in ("vocab_size", "hidden_act", "rope_scaling", "eos_token_id", "torch_dtype", "model_type"):
        for value in (wide, "\x1b" * (MEGABYTE // 6), list(range(MEGABYTE // 8)), {"k" * (MEGABYTE // 2): ["v"]}):
            if name != "rope_scaling" or isinstance(value, str):
                write(folder, **{name: value})
                refused(ConfigError, lambda: LlamaConfig.from_pretrained(folder), name)


def A07_sizes_that_multiply(folder: Path) -> None:
    """The largest of each are legal together, and the model that they make can be built without its memory."""
    write(folder, hidden_size=2**24, vocab_size=2**24, intermediate_size=2**24, head_dim=2**16)
    config = read(folder, num_attention_heads=2**16, num_key_value_heads=2**16)
    with torch.device("meta"):
        accepted(lambda: LlamaLM(config))
    write(folder, num_hidden_layers=1024)
    with torch.device("meta"):
        accepted(lambda: LlamaLM(read(folder)), seconds=5)
    field_refused(folder, "num_hidden_layers", 1025)


def A08_heads(folder: Path) -> None:
    write(folder, hidden_size=18)
    refused(ConfigError, lambda: LlamaConfig.from_pretrained(folder), "hidden_size=18", "num_attention_heads=4")
    check(read(write(folder, hidden_size=18, head_dim=4)).head_dim == 4, "with head_dim it is legal")
    for kv_heads in (3, 8, 5):
        field_refused(folder, "num_key_value_heads", kv_heads, f"={kv_heads} ", "num_attention_heads=4")
    field_refused(folder, "num_key_value_heads", 0, "=0")


def A09_head_dim(folder: Path) -> None:
    """Every even one runs on the reference backend; tests/test_config_head_dim.py compares with transformers."""
    for head_dim in (7, 1, 511):
        field_refused(folder, "head_dim", head_dim, f"={head_dim} ", "even")
    for head_dim in (2, 80, 96, 512):
        model = LlamaForCausalLM(read(write(folder, head_dim=head_dim)))
        logits = accepted(lambda: model(torch.tensor([[1, 2, 3]])).logits)  # noqa: B023
        check(bool(logits.isfinite().all()), f"head_dim={head_dim}")


def A10_rope_scaling(folder: Path) -> None:
    llama3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8}
    llama3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    for scaling, needle in (
        ("linear", "use an object"),
        ([], "use an object"),
        ({"rope_type": "su", "factor": 2.0}, "rope_type='su'"),
        ({"type": "x" * MEGABYTE, "factor": 2.0}, "rope_type='xxx"),
        ({"rope_type": None, "factor": 2.0}, "lacks rope_type"),
        ({"rope_type": ["linear"], "factor": 2.0}, "rope_type=['linear']"),
        *(({"rope_type": name}, "lacks factor") for name in ("linear", "dynamic", "yarn")),
        *(({"rope_type": "linear", "factor": value}, "factor") for value in (0, -2, "2", True, 1e300, 10**300, [2])),
        ({**llama3, "high_freq_factor": 1.0}, "low_freq_factor and high_freq_factor are both 1.0"),
        ({**llama3, "low_freq_factor": 0}, "low_freq_factor"),
        ({**llama3, "original_max_position_embeddings": 0}, "original_max_position_embeddings=0"),
        ({**llama3, "type": "linear"}, "rope_type is given more than once"),
        ({"full_attention": {"rope_type": "linear", "factor": 2.0}, "\x1b": {}}, "nested by"),
        ({"rope_type": "longrope", "short_factor": [1], "long_factor": [1] * 2}, "short_factor has 1 values"),
    ):
        write(folder, rope_scaling=scaling)
        refused(ConfigError, lambda: LlamaConfig.from_pretrained(folder), str(folder / "config.json"), needle)
    nan = {"rope_type": "linear", "factor": NAN}
    refused(ConfigError, lambda: LlamaConfig(rope_scaling=nan), "factor")  # strict JSON has none


def A10_two_that_disagree(folder: Path) -> None:
    linear, dynamic = ({"rope_type": name, "factor": 2.0} for name in ("linear", "dynamic"))
    for parameters in (dynamic, {**linear, "factor": 4.0}, {"rope_type": "default"}):
        write(folder, rope_scaling=linear, rope_parameters=parameters)
        refused(ConfigError, lambda: LlamaConfig.from_pretrained(folder), "more than once with different values")
    write(folder, rope_theta=1e4, rope_parameters={**linear, "rope_theta": 1e6})
    refused(ConfigError, lambda: LlamaConfig.from_pretrained(folder), "rope_theta", "10000.0, 1000000.0")
    read(write(folder, rope_scaling=linear, rope_parameters=linear))


def A11_rope_theta(folder: Path) -> None:
    for value in (0, 0.0, -1e4, 1e300, 1e-300, 10**300, "10000", True, [1e4]):
        field_refused(folder, "rope_theta", value, "use a number")
    refused(ConfigError, lambda: LlamaConfig(rope_theta=NAN), "rope_theta=nan")
    refused(ConfigError, lambda: LlamaConfig(rope_theta=1e999), "rope_theta=inf")


def A12_missing_fields(folder: Path) -> None:
    for name in (*SIZES, "max_position_embeddings"):
        for change in ((name,), ()):  # absent, or null
            write(folder, *change, **({} if change else {name: None}))
            refused(ConfigError, lambda: LlamaConfig.from_pretrained(folder), name, "add it", "keyword argument")
            check(getattr(read(folder, **{name: TINY[name]}), name) == TINY[name], "an argument stands in for it")
    write(folder, *SIZES)
    refused(ConfigError, lambda: LlamaConfig.from_pretrained(folder), ", ".join(SIZES))
    (folder / "config.json").write_text("{}")
    refused(ConfigError, lambda: LlamaConfig.from_pretrained(folder), "lacks vocab_size")


def A12_longer_than_trained(folder: Path) -> None:
    """The context that is asked for is the explicit override: it is given, with one warning."""
    save_byte_model(folder)
    LLM(folder, max_seq_len=2048)
    with warnings() as messages:
        llm = LLM(folder, max_seq_len=2112)
    check(llm.engine.max_seq_len == 2112, "it is given")
    check(len(messages) == 1 and "2112" in messages[0] and "2048" in messages[0], f"one warning: {messages}")


def A13_rms_norm_eps(folder: Path) -> None:
    for value in (0, 0.0, -1e-6, 1, 1.0, 0.011, 1e300, "1e-6", True, [1e-6]):
        field_refused(folder, "rms_norm_eps", value, "above 0 and at most 0.01")
    refused(ConfigError, lambda: LlamaConfig(rms_norm_eps=NAN), "rms_norm_eps=nan")
    for value in (1e-12, 1e-5, 1e-2):
        check(read(write(folder, rms_norm_eps=value)).rms_norm_eps == value, "legal")


def with_fields(folder: Path, **fields: object) -> None:
    """Change fields of a saved model's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def A14_vocabularies(folder: Path) -> None:
    save_byte_model(folder)
    with_fields(folder, vocab_size=300)
    refused(CheckpointMismatchError, lambda: LlamaForCausalLM.from_pretrained(folder), "embed_tokens", "258", "300")
    refused(CheckpointMismatchError, lambda: LLM(folder), "embed_tokens", "258", "300")


def A14_tokenizer_larger_than_the_model(folder: Path) -> None:
    save_byte_model(folder)
    smaller = LlamaConfig.from_pretrained(folder, vocab_size=256, bos_token_id=1, eos_token_id=2)
    LlamaForCausalLM(smaller).save_pretrained(folder)
    refused(CheckpointMismatchError, lambda: LLM(folder), "</s> (257)", "vocab_size=256")


def A14_tokenizer_smaller_than_the_model(folder: Path) -> None:
    """Ids without a text are drawn without failure: they decode to nothing."""
    save_byte_model(folder)
    LlamaForCausalLM(LlamaConfig.from_pretrained(folder, vocab_size=300)).save_pretrained(folder)
    llm = LLM(folder)
    bias = dict.fromkeys(range(258), -100.0)
    (output,) = llm.generate("a", SamplingParams(max_tokens=8, temperature=1.0, seed=0, logit_bias=bias))
    ids = output.outputs[0].token_ids
    check(len(ids) == 8 and min(ids) >= 258, f"the bias leaves ids that the tokenizer lacks: {ids}")
    check(output.outputs[0].text == "", f"they have no text: {output.outputs[0].text!r}")


def A15_ties(folder: Path) -> None:
    save_byte_model(folder)  # not tied
    with_fields(folder, tie_word_embeddings=True)
    refused(CheckpointMismatchError, lambda: LlamaForCausalLM.from_pretrained(folder), "lm_head.weight", "tie_word")
    LlamaForCausalLM(LlamaConfig.from_pretrained(folder)).save_pretrained(folder)  # tied: stored once
    with_fields(folder, tie_word_embeddings=False)
    refused(CheckpointMismatchError, lambda: LlamaForCausalLM.from_pretrained(folder), "lm_head.weight", "tie_word")


def A16_ids_in_config(folder: Path) -> None:
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for value in (32, 2**40, -2, 10**300):
            field_refused(folder, name, value, "vocab_size=32")
        for value in ("1", 1.0, True, {"a": 1}, "1" * MEGABYTE):
            field_refused(folder, name, value)
        for value in (0, 31, None):
            check(getattr(read(write(folder, **{name: value})), name) == value, "legal")
    for value in ([1, 32], [1, -1], [1, None], [1, "2"], [[1]]):
        field_refused(folder, "eos_token_id", value)
    field_refused(folder, "bos_token_id", [1])
    field_refused(folder, "bos_token_id", -1, "vocab_size=32")
    check(read(write(folder, eos_token_id=[1, 31])).eos_token_id == [1, 31], "a list is legal")
    write(folder, pad_token_id=-1)
    with warnings() as messages:
        check(read(folder).pad_token_id is None, "-1 is none")
    check(len(messages) == 1 and "pad_token_id=-1" in messages[0], f"one warning: {messages}")


def A16_ids_in_generation_config(folder: Path) -> None:
    save_byte_model(folder)
    path = folder / "generation_config.json"
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        path.write_text(json.dumps({name: 258}))
        for load in (LlamaForCausalLM.from_pretrained, LLM):
            refused(ConfigError, lambda: load(folder), "generation_config.json", f"{name}=258", "258")  # noqa: B023
    path.write_text(json.dumps({"eos_token_id": [1, 258]}))
    refused(ConfigError, lambda: LLM(folder), "generation_config.json", "eos_token_id=258")
    path.write_text(json.dumps({"eos_token_id": None, "bos_token_id": None}))
    LLM(folder)


def A16_generation_config_disagrees(folder: Path) -> None:
    """It wins over config.json, whose eos is 257."""
    save_byte_model(folder)

    def first_token_ends(token_id: int) -> bool:
        bias = {token_id: 100.0}
        (output,) = LLM(folder).generate("a", SamplingParams(max_tokens=4, logit_bias=bias))
        return output.outputs[0].finish_reason == "stop"

    (folder / "generation_config.json").unlink(missing_ok=True)
    check(first_token_ends(257) and not first_token_ends(65), "config.json's alone")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [65, 66]}))
    check(first_token_ends(65) and first_token_ends(66) and not first_token_ends(257), "generation_config.json's")


def A17_dtypes(folder: Path) -> None:
    """All that is accepted runs on every CPU: reference computes in fp32 what the CPU has no instructions for."""
    for name in ("torch_dtype", "dtype"):
        for value in ("float8_e4m3fn", "float8_e5m2", "int8", "float", "auto", "", 16, ["float16"], "f" * MEGABYTE):
            field_refused(folder, name, value, "use one of bfloat16, float16, float32, float64")
    for value in ("bfloat16", "float16", "float32", "float64", "torch.bfloat16", None):
        config = read(write(folder, torch_dtype=value))
        LlamaForCausalLM(config).save_pretrained(folder)
        model = LlamaForCausalLM.from_pretrained(folder, dtype=config.dtype or torch.float32)
        check(bool(model(torch.tensor([[1, 2]])).logits.isfinite().all()), f"{value} runs")


def A18_unknown_keys(folder: Path) -> None:
    extra = {"is_llama_config": True, "transformers.js_config": {"a": [1]}, "\x1b[2J": 1, "self": 5, "k" * 200_000: "v"}
    config = read(write(folder, **extra))
    for name, value in extra.items():
        check(getattr(config, name) == value, f"kept: {name[:20]!r}")
    config.save_pretrained(folder)
    check(read(folder) == config, "written back")
    write(folder, **{"k" * MEGABYTE: "v", "note": "v" * 100_000})
    accepted(lambda: LlamaConfig.from_pretrained(folder))
    for name in ("to_dict", "validate", "__class__", "__dict__", "_dtype", "use_return_dict"):
        field_refused(folder, name, 1, "taken")


def A18_other_maths(folder: Path) -> None:
    for name, active, neutral in (
        ("alibi", True, False),
        ("attention_chunk_size", 8192, None),
        ("attention_multiplier", 0.015625, 0.5),  # 1 / sqrt(head_dim)
        ("attn_logit_softcapping", 50.0, None),
        ("attn_temperature_tuning", True, False),
        ("clip_qkv", 8.0, None),
        ("embedding_multiplier", 12.0, 1.0),
        ("final_logit_softcapping", 30.0, None),
        ("is_causal", False, True),
        ("is_encoder_decoder", True, False),
        ("is_moe", True, False),
        ("layer_types", ["sliding_attention"], ["full_attention"]),
        ("layer_types", "full_attention", None),
        ("logit_scale", 0.0625, 1),
        ("logits_scaling", 8.0, 1.0),
        ("mlp_layer_types", ["sparse"], ["dense"]),
        ("n_routed_experts", 64, 0),
        ("no_rope_layer_interval", 4, 0),
        ("no_rope_layers", [0], [1]),
        ("num_experts", 8, 1),
        ("num_local_experts", 8, 1),
        ("parallel_attn", True, False),
        ("prefix_lm", True, False),
        ("qk_layernorm", True, False),
        ("qk_norm", True, False),
        ("query_pre_attn_scalar", 256, 4),
        ("residual_multiplier", 0.22, 1.0),
        ("rope_interleave", True, False),
        ("rope_interleaved", True, False),
        ("rotary_pct", 0.25, 1.0),
        ("scale_depth", 1.4, 1.0),
        ("scale_emb", 12, 1),
        ("sliding_window", 32, 64),
        ("sliding_window", "x" * MEGABYTE, None),
        ("softmax_scale", 0.1, 0.5),
        ("use_bidirectional_attention", True, False),
        ("use_parallel_residual", True, False),
        ("use_qk_norm", True, False),
    ):
        field_refused(folder, name, active, "not supported")
        read(write(folder, **{name: neutral}))
    read(write(folder, sliding_window=32, use_sliding_window=False))


def A18_supported_maths(folder: Path) -> None:
    """Other activations and biases are a Llama's; tests/api compares them with transformers."""
    config = read(write(folder, hidden_act="gelu", attention_bias=True, mlp_bias=True))
    check((config.hidden_act, config.attention_bias, config.mlp_bias) == ("gelu", True, True), "as the file says")
    for name, values in (("hidden_act", ("swiglu", "", ["silu"], None, 5)), ("attention_bias", (1, "true", None))):
        for value in values:
            field_refused(folder, name, value)
