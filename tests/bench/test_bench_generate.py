"""bench/bench_generate.py runs, checks what it times, and states its bound first."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM as HFModel

from llama_fast.model.llama import LlamaLM
from tests.tiny import make_model

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "bench_generate.py"


@pytest.fixture(scope="module")
def folder(bench, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    bench.write_checkpoint(folder, "tiny", seed=0)
    return folder


@pytest.fixture
def run(bench, folder, monkeypatch, capsys):
    """The smallest run on that checkpoint: (status, stdout, stderr)."""

    def run(*args):
        sizes = ["--batch-sizes", "1", "3", "--prompt-len", "9", "--output-len", "4", "--repeats", "2"]
        monkeypatch.setattr(sys, "argv", ["bench_generate.py", "--model", str(folder), *sizes, *args])
        monkeypatch.setattr(bench, "read_bandwidth", lambda num_bytes: 1e9)
        status = bench.main()
        return status, *capsys.readouterr()

    return run


def test_smoke_prints_the_bound_first_and_json_last():
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--smoke", "--threads", "1"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:7]] == ["bound", "bound", "prefill", "decode", "prefill", "decode"]
    result = json.loads(lines[-1])
    assert result["checks"] == {"batch_equals_alone": "passed", "equals_transformers_in_fp32": "passed"}
    assert {"device", "commit", "versions", "model", "backend", "config"} <= result.keys()
    assert (result["dtype"], result["num_threads"]) == ("bfloat16", 1)
    # 1000 x 256 tied; a layer: q, o 256 x 256, k, v 64 x 256, gate, up, down 512 x 256, two norms; the final norm.
    num_parameters = 256_000 + 2 * (2 * 256 * 256 + 2 * 64 * 256 + 3 * 512 * 256 + 2 * 256) + 256
    assert result["weight_bytes"] == 2 * num_parameters
    for rates in result["tokens_per_s"]:
        # K and V of 2 layers, 8 heads of 8, bf16, for each of 24 prompt tokens and half of 8 new ones.
        step_bytes = result["weight_bytes"] + rates["batch_size"] * 28 * (2 * 2 * 64 * 2)
        assert rates["decode_bound"] == pytest.approx(rates["batch_size"] * result["read_bytes_per_s"] / step_bytes)
        for kind in ("prefill", "decode"):
            assert rates[kind]["p10"] <= rates[kind]["median"] <= rates[kind]["p90"]
            assert rates[f"{kind}_share_of_bound"] == pytest.approx(rates[kind]["median"] / rates[f"{kind}_bound"])


def test_an_existing_checkpoint_is_measured(run, folder):
    status, out, _ = run("--dtype", "float32")
    result = json.loads(out.splitlines()[-1])
    assert status == 0
    assert (result["model"], result["dtype"], result["prompt_len"]) == (str(folder), "float32", 9)
    assert [rates["batch_size"] for rates in result["tokens_per_s"]] == [1, 3]


def test_weight_bytes_of_a_step(bench):
    tied, untied = make_model(tie_word_embeddings=True), make_model(tie_word_embeddings=False)
    # The untied model has a head more, and reads only rows of its embedding.
    assert bench.decode_weight_bytes(tied) == bench.decode_weight_bytes(untied)
    assert bench.decode_weight_bytes(tied) == sum(parameter.nbytes for parameter in tied.parameters())


def test_prefill_flops_are_what_transformers_multiplies(bench, folder):
    model = bench.load_model(bench.LlamaLM, folder, dtype="float32", device="cpu")
    theirs = HFModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    prompt_len = 10
    with FlopCounterMode(display=False) as counter:
        theirs(torch.zeros(3, prompt_len, dtype=torch.int64), logits_to_keep=1)
    # Eager attention computes the masked half too.
    config = model.config
    attended = 2 * 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    masked = 3 * attended * prompt_len * (prompt_len - 1) // 2
    assert bench.prefill_flops(model, 3, prompt_len) == counter.get_total_flops() - masked


def test_every_full_decode_step_is_timed_and_no_other(bench, folder):
    model = bench.load_model(bench.LlamaLM, folder, dtype=None, device="cpu")
    # 3 x 300 prompt tokens take two steps of 512: two prompts get their first token a step before the last one.
    prompts = [[index] * 300 for index in range(3)]
    run = bench.run_batch(model, prompts, 6, "auto")
    assert [len(token_ids) for token_ids in run.token_ids] == [6, 6, 6]
    assert len(run.decode_step_s) in (4, 5)
    assert len(bench.run_batch(model, prompts[:1], 6, "auto").decode_step_s) == 5


def test_refuses_to_time_batches_that_change_the_answer(run, monkeypatch):
    exact = LlamaLM.logits

    def worse(model, hidden_states, ops):
        # A rounding error that depends on the company; far too small to change a token.
        logits = exact(model, hidden_states, ops)
        return logits if len(logits) == 1 else logits + 1e-3 * torch.randn_like(logits)

    monkeypatch.setattr(LlamaLM, "logits", worse)
    status, out, err = run()
    assert (status, out) == (1, "")
    assert "refusing to time: batch_equals_alone: prompt 0 alone and in a batch of 3" in err


def test_refuses_to_time_what_transformers_answers_differently(run, monkeypatch):
    exact = LlamaLM.logits
    monkeypatch.setattr(LlamaLM, "logits", lambda model, hidden_states, ops: -exact(model, hidden_states, ops))
    status, out, err = run()
    assert (status, out) == (1, "")
    assert "refusing to time: equals_transformers_in_fp32: at token" in err


def test_without_transformers_the_check_is_named_as_not_run(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    status, out, _ = run()
    assert status == 0
    checks = json.loads(out.splitlines()[-1])["checks"]
    assert checks["equals_transformers_in_fp32"].startswith("not run: ")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--output-len", "1"], "--output-len 1: give at least 2"),
        (["--repeats", "0"], "--repeats 0: give at least 1"),
        (["--prompt-len", "0"], "--prompt-len 0: give at least 1"),
        (["--batch-sizes", "0"], "--batch-sizes 0: give at least 1"),
    ],
)
def test_wrong_usage(run, capsys, args, message):
    with pytest.raises(SystemExit, match="2"):
        run(*args)
    assert message in capsys.readouterr().err
