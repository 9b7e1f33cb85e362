"""llama-fast info: the table, the JSON, the exit status."""

import hashlib
import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama_fast import cli, demo
from llama_fast.engine.info import model_info
from tests.byte_model import save_byte_model


@pytest.fixture
def folder(tmp_path):
    return save_byte_model(tmp_path / "model")


@pytest.fixture
def run(capsys):
    """`run(*args)` is `llama-fast info args` in this process: (status, stdout, stderr)."""

    def run(*args):
        status = cli.main(["info", *map(str, args)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def change(folder, name, **fields):
    content = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    (folder / name).write_text(json.dumps({**content, **fields}))


def test_table_has_every_value_with_its_origin(run, folder):
    change(folder, "config.json", auto_map={"AutoConfig": "x.X"})
    change(folder, "generation_config.json", temperature=0.5, do_sample=True)
    status, out, _ = run(folder)
    assert status == 0
    rows, tensors = [line.split() for line in out.splitlines()], load_file(folder / "model.safetensors")
    for row in (
        ["vocab_size", "258", "config.json"],
        ["rope_theta", "10000.0", "config.json"],
        ["temperature", "0.5", "generation_config.json"],
        ["top_k", "0", "default"],
        ["eos_token", "</s>", "tokenizer_config.json"],
        ["tensors", str(len(tensors)), "model.safetensors"],
        ["parameters", f"{sum(tensor.numel() for tensor in tensors.values()):,}", "model.safetensors"],
        ["config.json:", "auto_map", "(no", "code", "of", "a", "checkpoint", "is", "ever", "run)"],
    ):
        assert row in rows, row
    assert all([section] in rows for section in ("model", "rope", "generation", "tokenizer", "weights"))
    assert all(len(line) <= 100 for line in out.splitlines()[1:])


def test_table_is_aligned_and_narrow_whatever_the_values_are(run, folder):
    long = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.123456789] * 4}
    change(folder, "config.json", rope_scaling=long, architectures=["LlamaForCausalLM", "A" * 300, "\x1b[31m"])
    change(folder, "config.json", **{"unknown" * 40: 1, "\x1b[2J": 2})
    status, out, _ = run(folder)
    assert status == 0
    assert out.replace("\n", "").isprintable()
    assert all(len(line) <= 100 for line in out.splitlines()[1:])
    rows = [line for line in out.splitlines() if line.startswith("  ") and line.endswith("  config.json")]
    assert len({line.rindex("config.json") for line in rows}) == 1


def test_json_is_what_model_info_returns(run, folder):
    status, out, _ = run(folder, "--json")
    told, info = json.loads(out), model_info(folder)
    assert status == 0
    assert set(told) == {"name", *info.sections, "missing", "ignored", "problems", "verified"}
    for section, entries in info.sections.items():
        assert told[section] == {
            name: {"value": entry.value, "origin": entry.origin} for name, entry in entries.items()
        }
    assert told["generation"]["eos_token_id"] == {"value": 257, "origin": "config.json"}
    assert (told["ignored"], told["problems"], told["verified"]) == (info.ignored, [], None)


def test_folder_with_config_json_alone(run, folder, tmp_path):
    shutil.copy(folder / "config.json", tmp_path)
    status, out, _ = run(tmp_path)
    assert status == 0
    assert "tokenizer\n  neither tokenizer.json nor tokenizer.model is here\n" in out
    assert "weights\n  neither model.safetensors nor model.safetensors.index.json is here\n" in out


def test_what_cannot_be_loaded_is_told_after_the_rest(run, folder):
    change(folder, "config.json", quantization_config={"quant_method": "gptq", "bits": 3, "group_size": -1})
    status, out, _ = run(folder)
    assert status == 1
    assert ["vocab_size", "258", "config.json"] in [line.split() for line in out.splitlines()]
    assert out.splitlines()[-1].startswith(
        f"cannot be loaded: {folder}/config.json: quantization_config has quant_method="
    )
    status, out, _ = run(folder, "--json")
    assert status == 1
    assert "quant_method='gptq', bits=3, group_size=-1" in json.loads(out)["problems"][0]


def test_missing_folder_is_one_message(run, tmp_path):
    status, out, err = run(tmp_path / "none")
    assert (status, out) == (1, "")
    assert err.startswith("llama-fast: error: no folder")
    assert err.count("\n") == 1


def test_empty_folder(run, tmp_path):
    status, out, _ = run(tmp_path)
    assert status == 1
    assert f"cannot be loaded: {tmp_path}/config.json: cannot be read" in out


@pytest.mark.parametrize("args", [[], ["a", "b"], ["a", "--no-such-option"]])
def test_wrong_usage(run, args):
    with pytest.raises(SystemExit) as caught:
        run(*args)
    assert caught.value.code == 2


def test_help_has_examples(run, capsys):
    with pytest.raises(SystemExit) as caught:
        run("--help")
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "llama-fast info ./Llama-3.2-1B --verify" in out
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "llama-fast info ./Llama-3.2-1B" in capsys.readouterr().out


def test_of_a_hub_id_no_weights_are_downloaded(run, folder, monkeypatch):
    asked = []

    def find_folder(name, *, revision, weights):
        asked.append((name, revision, weights))
        return folder

    monkeypatch.setattr("llama_fast.hub.find_folder", find_folder)
    (folder / "model.safetensors").unlink()
    status, out, _ = run("owner/name", "--revision", "v1")
    assert (status, asked) == (0, [("owner/name", "v1", False)])
    assert "weights\n  not downloaded\n" in out
    run("owner/name", "--verify")
    assert asked[-1] == ("owner/name", None, True)


# --- --verify --------------------------------------------------------------------------------------------------------


def test_verify_without_a_problem(run, folder):
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (folder / "SHA256SUMS").write_text(f"{digest}  model.safetensors\n")
    status, out, err = run(folder, "--verify", "--quiet")
    assert (status, err) == (0, "")
    assert out.endswith("verified: 21 tensors, 1 files against their sha256\n  no problems\n")
    told = json.loads(run(folder, "--verify", "--json", "--quiet")[1])["verified"]
    assert (told["num_tensors"], told["checked_sha256"], told["problems"]) == (21, 1, [])


def test_verify_tells_what_it_finds(run, folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, path)
    (folder / "SHA256SUMS").write_text(f"{'0' * 64}  model.safetensors\n")
    assert run(folder)[0] == 0  # headers alone do not show it
    status, out, _ = run(folder, "--verify")
    assert status == 1
    assert "model.norm.weight: 1 of (32,) values are NaN or infinite" in " ".join(out.split())
    assert "model.safetensors: its sha256 is" in out
    status, out, _ = run(folder, "--verify", "--json")
    assert status == 1
    assert len(json.loads(out)["verified"]["problems"]) == 2


def test_verify_of_what_cannot_be_loaded(run, folder, tmp_path):
    (folder / "model.safetensors").write_bytes(b"\x10")
    status, out, _ = run(folder, "--verify")
    assert status == 1
    assert "cannot be loaded: " in out
    assert "verified" not in out
    shutil.copy(folder / "config.json", tmp_path)
    status, out, err = run(tmp_path, "--verify")
    assert (status, out) == (1, "")
    assert err.startswith(f"llama-fast: error: {tmp_path} has no weights")


def test_demo(run):
    assert run(demo.PATH)[0] == 0


def test_the_module_of_the_command_loads_no_torch():
    """`llama-fast --help` is to be quick (test_package.py checks the package)."""
    program = "import sys, llama_fast.cli.info; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "False\n"
    )
