"""llama-fast plan: the table and the JSON tell what the plan says; exit status 1 where it does not fit."""

import json
import re

import pytest

from llama_fast import cli, demo
from llama_fast.engine.plan import MemoryPlan
from llama_fast.model.checkpoint import CheckpointFiles
from llama_fast.model.loading import open_checkpoint
from llama_fast.ops import device_memory

MODEL = str(demo.PATH)


@pytest.fixture(autouse=True)
def nothing_is_read(monkeypatch):
    def tensor(self, name):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(CheckpointFiles, "tensor", tensor)
    monkeypatch.setattr(device_memory, "free_bytes", lambda device, weight_bytes: 40_000_000)


def run(capsys, *args):
    status = cli.main(["plan", MODEL, "--device", "cpu", *args])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_json_is_the_plan(capsys):
    status, out, err = run(capsys, "--max-batch", "2", "--max-seq-len", "100", "--dtype", "float32", "--json")
    told = json.loads(out)
    plan = MemoryPlan.of(open_checkpoint(demo.PATH, dtype="float32", device="cpu"), 2, 100)
    assert (status, err) == (0, "")
    assert {row["part"] for row in told["rows"]} == {"weights", "cache", "step"}
    assert sum(row["bytes"] for row in told["rows"]) == told["needed_bytes"] == plan.needed_bytes
    assert told["dtype"] == "float32" and told["device"] == "cpu" and told["fits"] is True
    assert (told["max_batch"], told["max_seq_len"]) == (2, 100)
    assert told["available_bytes"] == 40_000_000
    assert told["largest_max_batch"] == plan.largest_max_batch > 2
    assert told["largest_max_seq_len"] == plan.largest_max_seq_len == 512
    # 4 layers, K and V of 1 head of 64 dimensions in the demo's shape, 4 bytes each.
    config = json.loads((demo.PATH / "config.json").read_text())
    width = config["num_key_value_heads"] * config["head_dim"]
    assert told["cache_bytes_per_token"] == 2 * config["num_hidden_layers"] * width * 4
    assert told["cache_bytes_per_page"] == 64 * told["cache_bytes_per_token"]


def test_defaults_are_the_engines(capsys):
    told = json.loads(run(capsys, "--json")[1])
    assert (told["max_batch"], told["max_seq_len"], told["dtype"]) == (16, 512, "bfloat16")


def test_table(capsys):
    status, out, _ = run(capsys, "--max-batch", "2", "--max-seq-len", "100")
    lines = out.splitlines()
    assert status == 0
    assert lines[0] == f"{MODEL} on cpu in bfloat16: 2 sequences of 100 tokens"
    assert "weights embeddings        1.05 MB     1.05 MB" in lines
    assert "fits: yes" in lines
    assert "largest max_seq_len with max_batch=2: 512" in lines
    ends = {
        match.end()
        for line in lines
        if (match := re.match(r"(?:weights|cache|step|needed|available).*? [kMG]?B", line))
    }
    assert len(ends) == 1  # sizes stand under each other


def test_status_1_where_it_does_not_fit_and_what_would(capsys):
    status, out, err = run(capsys, "--max-batch", "1000", "--max-seq-len", "512")
    assert (status, err) == (1, "")
    assert "\nfits: no\n" in out
    largest = int(re.search(r"largest max_batch with max_seq_len=512: (\d+)", out)[1])
    assert run(capsys, "--max-batch", str(largest), "--max-seq-len", "512")[0] == 0
    assert run(capsys, "--max-batch", str(largest + 1), "--max-seq-len", "512")[0] == 1


def test_weights_that_leave_nothing(capsys, monkeypatch):
    monkeypatch.setattr(device_memory, "free_bytes", lambda device, weight_bytes: 1000)
    status, out, _ = run(capsys)
    assert status == 1
    assert "largest max_seq_len with max_batch=16: none fits" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--device", "tpu"], "device='tpu' is not a device"),
        (["--backend", "gpu"], "backend='gpu' cannot run: the device is cpu"),
    ],
)
def test_refusals_are_one_line(capsys, args, message):
    status, out, err = run(capsys, *args)
    assert (status, out) == (1, "")
    assert message in err and err.count("\n") == 1


def test_a_folder_without_a_model(capsys, tmp_path):
    assert cli.main(["plan", str(tmp_path)]) == 1
    assert "config.json" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "x"])
def test_sizes_are_positive_integers(capsys, value):
    with pytest.raises(SystemExit) as exit_:
        run(capsys, f"--max-batch={value}")
    assert exit_.value.code == 2
    assert "--max-batch" in capsys.readouterr().err
