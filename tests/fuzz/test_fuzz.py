"""The fuzzer sees what it is there to see, its cases repeat, a few hundred of each target find nothing, and what longer
campaigns found stays fixed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama_fast.errors import TokenizerFileError
from tests.bad_inputs.harness import check_message
from tests.fuzz import target
from tests.fuzz.targets.broken import FAULTS
from tests.fuzz.targets.template import LLAMA_3
from tests.tokenizer_samples import BUILT

ROOT = Path(__file__).resolve().parents[2]
ARGUMENTS = [sys.executable, "-m", "tests.fuzz", "--workers", "1"]


def fuzz(report, *arguments):
    """(exit status, report) of the command."""
    process = subprocess.run([*ARGUMENTS, "--json", report, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode in (0, 1), process.stderr
    return process.returncode, json.loads(report.read_text())


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return fuzz(tmp_path_factory.mktemp("fuzz") / "report.json", "--cases", "300")[1]


@pytest.mark.parametrize("name", target.NAMES)
def test_nothing_is_found(smoke, name):
    count = smoke[name]
    findings = [f"{one['kind']} {one['what']} at {one['where']}, case {one['case']}" for one in count["findings"]]
    assert findings == []
    assert count["runs"] == 300
    assert count["accepted"] > 0, "nothing was accepted, so that no oracle was asked"
    assert sum(count["refused"].values()) > 0


def test_every_fault_is_found(tmp_path):
    status, report = fuzz(tmp_path / "report.json", "--target", "broken", "--cases", "90")
    found = {" ".join((one["kind"], one["what"])).strip() for one in report["broken"]["findings"]}
    assert status == 1
    assert found == {
        "raised KeyError",
        "raised SystemExit",
        "raised MemoryError",
        "refused by another kind CheckpointError",
        "bad message ConfigError, not printable",
        "bad message ConfigError, the message has",
        "wrong result",
        "logged TypeError",
        "memory",
        "died SIGSEGV",
        "hung SIGPROF",
    }
    assert len(found) == len(FAULTS) - 2, "all but what is right and what is refused as it should be"
    assert report["broken"]["runs"] == 90, "cases go on behind a dead worker"
    assert report["broken"]["refused"].keys() == {"ConfigError"}
    assert report["broken"]["accepted"] > 0


def test_a_case_is_a_function_of_target_and_number():
    code = (
        "import hashlib; from tests.fuzz.target import load, make\n"
        "for name in ('generation_config', 'tokenizer_json', 'tokenizer_model', 'template'):\n"
        "    one = load(name)\n"
        "    print(name, *(hashlib.sha256(one.show(make(one, case))).hexdigest() for case in range(50)))"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1]
    assert all(len(set(line.split())) > 45 for line in runs[0].splitlines()), "cases of a target differ"


def test_one_case_is_repeated_and_shown(tmp_path):
    arguments = [*ARGUMENTS, "--target", "generation_config", "--case", "3", "--save", tmp_path / "input"]
    process = subprocess.run(arguments, cwd=ROOT, capture_output=True)
    loaded = target.load("generation_config")
    assert (tmp_path / "input").read_bytes() == loaded.show(target.make(loaded, 3))
    assert process.stdout.startswith((tmp_path / "input").read_bytes())
    assert process.returncode == 0


def test_ctrl_c_ends_with_the_counts_so_far(tmp_path):
    arguments = [*ARGUMENTS, "--target", "generation_config", "--minutes", "10", "--json", tmp_path / "report.json"]
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not children.read_text():
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) in (1, 130)
    assert json.loads((tmp_path / "report.json").read_text())["generation_config"]["runs"] > 0


CONFIG = {
    **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 320, "max_position_embeddings": 64},
    **{"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1},
}


def config(**changes):
    return {"config.json": json.dumps({**CONFIG, **changes}).encode()}


def index(**weight_map):
    return {"model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode()}


def header(name):
    text = json.dumps({name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}).encode()
    return {"model.safetensors": len(text).to_bytes(8, "little") + text}


def tokenizer(**changes):
    return {"tokenizer.json": json.dumps({**json.loads(BUILT["llama2"].to_str()), **changes}).encode()}


# What was wrong: the target and the input that showed it, smallest first. All must be refused as their kind.
FOUND = {
    "message_of_a_megabyte": ("config", config(model_type="x" * (1 << 20))),
    "10^9_labels_made": ("config", config(num_labels=10**9)),
    "inf_in_an_unknown_field": ("config", {"config.json": b'{"x": 1e999}'}),
    "2000_ends_that_a_request_refused_later": ("config", config(eos_token_id=[0] * 2000)),
    "OSError_of_a_long_name": ("index", index(a="x" * 5000)),
    "UnicodeEncodeError_of_a_shard": ("index", index(a="\ud800")),
    "surrogate_as_a_tensor": ("safetensors", header("\ud800")),
    "surrogate_as_a_token": ("tokenizer_json", {"tokenizer_config.json": b'{"eos_token": "\\ud800"}'}),
    "control_character_shown": ("tokenizer_json", tokenizer(version="\0")),
    "TypeError_of_a_list_as_token": ("tokenizer_model", {"tokenizer_config.json": b'{"bos_token": []}'}),
    "item_of_undefined": ("template", "{% set x = undefined_name[0] %}"),
    "address_of_an_iterator": ("template", "{{ (messages | reverse,) }}"),
    "address_in_a_message": ("template", "{{ undefined_name[raise_exception].x }}"),
    "hang_in_the_compiler": ("template", "{{ 9**9**9 }}"),
    "integer_of_5000_digits": ("messages", ("", [{"role": "user", "content": "x", "name": 10**5000}], {})),
    "infinity_as_JSON": ("messages", ("", [{"role": "user", "content": "x", "name": float("inf")}], {})),
    "address_of_a_message": ("messages", ("", [object()], {})),
}


@pytest.fixture
def load(tmp_path, monkeypatch):
    """A target by name, its files in the current folder."""

    def load(name):
        loaded = target.load(name)
        for file, content in loaded.files.items():
            (tmp_path / file).write_bytes(content)
        return loaded

    monkeypatch.chdir(tmp_path)
    return load


SOUND = {
    "config": config(),
    "tokenizer_json": tokenizer(),
    "tokenizer_model": {"tokenizer_config.json": b'{"bos_token": "<s>", "legacy": true}'},
    "safetensors": {},
    "index": {},
    "template": "{% set x = messages[0] %}{{ (messages,) }}",
    "messages": (LLAMA_3, [{"role": "user", "content": "x", "name": 10**50}], {}),
}


@pytest.mark.parametrize(("name", "value"), SOUND.items(), ids=SOUND)
def test_what_the_inputs_are_made_of_is_accepted(name, value, load, tmp_path):
    load(name).run(value, tmp_path)


@pytest.mark.parametrize(("name", "value"), FOUND.values(), ids=FOUND)
def test_what_was_found_is_refused(name, value, load, tmp_path):
    loaded = load(name)
    with pytest.raises(loaded.refusals) as refusal:
        loaded.run(value, tmp_path)
    check_message(refusal.value)


def test_warning_with_a_control_character(load, tmp_path, caplog):
    decoder = {"type": "Replace", "pattern": {"Regex": "\ufeff"}, "content": "a"}
    load("tokenizer_json").run(tokenizer(decoder=decoder), tmp_path)
    assert "streamed text comes all at the end" in caplog.text
    assert all(record.getMessage().isprintable() for record in caplog.records)


@pytest.mark.parametrize(
    "source",
    ["{{ 'a' | float }}", "{{ 'a' | int }}", "{{ 'a' | float(7) }}", "{{ \"'a' b\" | title }}"],
)
def test_what_was_rendered_wrongly(source, load, tmp_path):
    load("template").run(source, tmp_path)


@pytest.mark.parametrize(
    "field", [b"\x00\x01", b"\x80\x80\x80\x80\x80\x01\x01"], ids=["number_0", "number_beyond_29_bits"]
)
def test_field_that_no_protocol_buffer_has(field, load, tmp_path):
    loaded = load("tokenizer_model")
    good = loaded.files["tokenizer.model"]
    loaded.run({"tokenizer.model": good + b"\xf8\x07\x01"}, tmp_path)  # number 127: unknown, and so skipped
    with pytest.raises(TokenizerFileError):
        loaded.run({"tokenizer.model": good + field}, tmp_path)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        # tokenizers cuts a merged piece inside a character.
        (lambda model: {"continuing_subword_prefix": "##"}, "continuing_subword_prefix"),
        # It makes a list of all ids that are not there.
        (lambda model: {"vocab": {**model["vocab"], "a": 2**31}}, str(2**31)),
    ],
    ids=["prefix", "id"],
)
def test_what_ended_the_process(change, field, tmp_path):
    """Rust aborts, and no exception can be caught."""
    spec = json.loads(BUILT["llama2"].to_str())
    spec["model"] |= change(spec["model"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
        "from llama_fast import LlamaTokenizer; from llama_fast.errors import TokenizerFileError\n"
        "try: LlamaTokenizer.from_pretrained(sys.argv[1]).encode('a', parse_special_tokens=True)\n"
        "except TokenizerFileError as error: print(error)"
    )
    process = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert field in process.stdout
