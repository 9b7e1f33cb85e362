"""bench/bench_latency.py, and what it shares with bench_throughput.py: bounds, checks, arguments."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from llama_fast.config import LlamaConfig
from llama_fast.model.llama import LlamaLM

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "bench_latency.py"
HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None
RATES = {"bytes_per_s": 1e9, "flops_per_s": 1e12}


@pytest.fixture
def part(bench):
    """Function: a module beside the bench."""
    return lambda name: sys.modules[name]


@pytest.fixture
def run(bench, part, monkeypatch, capsys):
    """The smoke run in this process, with rates that are made up: (status, stdout, stderr)."""

    def run(*args):
        monkeypatch.setattr(part("serving_session"), "measure_rates", lambda *_: part("serving_bounds").Rates(**RATES))
        threads = torch.get_num_threads()
        try:
            status = bench.main(["--smoke", "--device", "cpu", "--threads", "1", *args])
        finally:
            torch.set_num_threads(threads)
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def tiny(part):
    """A model of the shape tiny in bf16."""
    shapes = part("shapes")
    config = LlamaConfig(**shapes.SHAPES["tiny"])
    return shapes.build_model(config, torch.device("cpu"), torch.bfloat16, seed=0)


def test_smoke_prints_the_bound_first_and_json_last(tmp_path):
    picture = tmp_path / "latency.png"
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [
            sys.executable,
            str(SCRIPT),
            "--smoke",
            "--device",
            "cpu",
            "--threads",
            "1",
            *(["--plot", str(picture)] if HAS_MATPLOTLIB else []),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:9]] == ["bound"] * 8 + ["latency"]
    if HAS_MATPLOTLIB:
        assert picture.read_bytes().startswith(b"\x89PNG")
    result = json.loads(lines[-1])
    assert (result["bench"], result["model"], result["dtype"], result["num_threads"]) == (
        "latency",
        "tiny",
        "bfloat16",
        1,
    )
    assert result["checks"] == {
        "batch_equals_alone": "passed",
        "graphs_equal_eager": "not run: no GPU",
        "nothing_new_while_timed": "passed",
    }
    assert {
        "device",
        "commit",
        "versions",
        "backend",
        "graphs",
        "bytes_per_s",
        "flops_per_s",
        "config",
    } <= result.keys()
    assert [(row["batch_size"], row["context"]) for row in result["rows"]] == [(1, 24), (1, 40), (3, 24), (3, 40)]
    for row in result["rows"]:
        for name in ("ttft", "itl"):
            assert 0 < row[f"{name}_s"]["p50"] <= row[f"{name}_s"]["p99"]
            assert row[f"{name}_share_of_bound"] == pytest.approx(row[f"{name}_bound_s"] / row[f"{name}_s"]["p50"])
        # 6 tokens asked for, one more since the prompts take a step; two repeats.
        assert row["tokens_per_request"] == 7
        assert row["ttft_s"]["count"] == 2 * row["batch_size"]
        assert row["itl_all_s"]["count"] == 2 * row["batch_size"] * 6
        assert row["joules_per_token"] is None


def test_bounds_by_hand(part, tiny):
    bounds = part("serving_bounds")
    # Of 256 wide layers: q, o 256 x 256, k, v 64 x 256, gate, up, down 512 x 256; two norms a layer and one more.
    matrices, head = 2 * (2 * 256 * 256 + 2 * 64 * 256 + 3 * 512 * 256), 1000 * 256
    weight_bytes = 2 * (matrices + head + 5 * 256)
    token_bytes = 2 * 2 * 64 * 2  # K and V of 8 heads of 8, two layers, bf16
    attended = 2 * 2 * 256  # Q K^T and P V of all heads, two layers
    prefill = bounds.prefill_work(tiny, 3, 10)
    assert prefill.num_bytes == weight_bytes + 3 * 10 * token_bytes
    assert prefill.flops == 2 * 3 * (10 * matrices + 55 * attended + head)
    decode = bounds.decode_work(tiny, 3, 20.5)
    assert decode.num_bytes == weight_bytes + 3 * 20.5 * token_bytes
    assert decode.flops == 2 * 3 * (matrices + 20.5 * attended + head)
    assert bounds.prefill_work(tiny, 1, 1).flops == bounds.decode_work(tiny, 1, 1).flops
    rates = bounds.Rates(bytes_per_s=100.0, flops_per_s=10.0)
    assert rates.seconds(bounds.Work(200.0, 10.0)) == 2.0
    assert rates.seconds(bounds.Work(200.0, 50.0)) == 5.0


def test_bound_of_the_median_first_token(bench, part, tiny):
    bounds, setting = part("serving_bounds"), part("serving_common").Setting(3, 10, 4, 3)
    session = types.SimpleNamespace(model=tiny, rates=bounds.Rates(**RATES))
    first, step = bench.bounds(session, setting)
    # Of three requests the middle one waits for two prompts; a step is at half of the four new tokens.
    assert first == session.rates.seconds(bounds.prefill_work(tiny, 2, 10))
    assert step == session.rates.seconds(bounds.decode_work(tiny, 3, 12))


def test_percentiles_of_known_samples(part):
    percentiles = part("serving_report").percentiles
    assert percentiles(range(101)) == {"p50": 50.0, "p90": 90.0, "p99": 99.0, "mean": 50.0, "count": 101}
    assert percentiles([3.0]) == {"p50": 3.0, "p90": 3.0, "p99": 3.0, "mean": 3.0, "count": 1}
    assert percentiles([0.0, 10.0])["p99"] == pytest.approx(9.9)


def test_gaps_count_where_all_requests_decode(bench):
    times = [[1.0, 2.0, 4.0, 7.0], [3.0, 4.0, 7.0, 12.0]]
    assert bench.all_gaps(times) == [1.0, 2.0, 3.0, 1.0, 3.0, 5.0]
    # From 3, the second one's first token, to 7, the first one's last.
    assert bench.full_gaps(times) == [3.0, 1.0, 3.0]


def test_refuses_to_time_batches_that_change_the_answer(run, monkeypatch):
    logits = LlamaLM.logits

    def worse(model, hidden_states, ops):
        # A rounding error that depends on the company; far too small to change a token.
        exact = logits(model, hidden_states, ops)
        return exact if len(exact) == 1 else exact + 1e-3 * torch.randn_like(exact)

    monkeypatch.setattr(LlamaLM, "logits", worse)
    status, out, err = run()
    assert (status, out) == (1, "")
    assert "refusing to time: prompt 0 alone and in a batch of 3" in err


def test_repeats_that_differ_are_refused(run, part, monkeypatch):
    common, calls = part("serving_common"), []
    serve = common.serve

    def other_tokens(engine, prompts, output_len, scored=False):
        answer = serve(engine, prompts, output_len, scored)
        calls.append(scored)
        if calls.count(False) == 3:
            answer.token_ids[0] = [*answer.token_ids[0][::-1], 0]
        return answer

    monkeypatch.setattr(common, "serve", other_tokens)
    status, out, err = run()
    assert status == 1 and "p50" not in out
    assert "refusing to time: batch 1, 24 + 7 tokens: repeat 2 gave other tokens" in err


def test_interrupt_prints_what_was_measured(run, part, monkeypatch):
    common, calls = part("serving_common"), []
    serve = common.serve

    def interrupted(engine, prompts, output_len, scored=False):
        calls.append(scored)
        if calls.count(False) == 5:
            raise KeyboardInterrupt
        return serve(engine, prompts, output_len, scored)

    monkeypatch.setattr(common, "serve", interrupted)
    status, out, err = run()
    assert (status, err) == (130, "interrupted\n")
    assert "batch 1, context 24, first token" in out
    assert "batch 1, context 40, first token" not in out
    assert not out.splitlines()[-1].startswith("{")


def test_what_does_not_fit_is_not_run(run, bench, part, tiny, monkeypatch):
    session, shapes = part("serving_session"), part("shapes")
    made = shapes.build_model(tiny.config, tiny.device, tiny.dtype, 0, session.LlamaForCausalLM)
    monkeypatch.setattr(session, "_random_model", lambda *_: made)
    monkeypatch.setattr(bench, "check", lambda *_: None)
    page_bytes = session.PagedKVCache.page_bytes(tiny.config, session.PAGE_SIZE, tiny.dtype)
    # Room for one sequence of 40 + 7 tokens, not for three of 24 + 7.
    pages = -(-47 // session.PAGE_SIZE)
    monkeypatch.setattr(session, "free_bytes", lambda *_: (pages * page_bytes) / 0.89)
    status, out, _ = run()
    result = json.loads(out.splitlines()[-1])
    assert status == 0
    assert [row["batch_size"] for row in result["rows"]] == [1, 1]
    assert list(result["skipped"]) == ["batch 3, 24 + 7 tokens", "batch 3, 40 + 7 tokens"]
    assert "its cache takes" in result["skipped"]["batch 3, 40 + 7 tokens"]


def test_an_engine_that_goes_on_preparing_fails_the_run(run, part, monkeypatch):
    common = part("serving_common")
    counts = iter(range(1000))

    @dataclasses.dataclass
    class Stats:
        compilations: int

    monkeypatch.setattr(common.Engine, "stats", lambda engine: Stats(next(counts)))
    status, out, err = run()
    assert status == 1
    assert "prepared anew while it was timed: batch 1, 24 + 7 tokens: compilations +1" in err
    assert json.loads(out.splitlines()[-1])["engine_stats_grown"]["batch 1, 24 + 7 tokens"] == {"compilations": 1}


def test_missing_peers_are_named_with_what_installs_them(run, tmp_path):
    bare = tmp_path / "python"  # an interpreter without site packages has none
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    peers = ["transformers", "vllm", "llama.cpp"]
    status, out, _ = run("--peers", *peers, "--peers-python", str(bare))
    assert status == 0
    absent = [line for line in out.splitlines() if line.startswith("peer absent: ")]
    for line, install in zip(absent, ("transformers", "vllm", "llama-cpp-python gguf"), strict=True):
        assert line.startswith(f"peer absent: pip install {install} (")
    assert list(json.loads(out.splitlines()[-1])["peers_left_out"]) == peers


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--output-len", "1"], "--output-len 1: give at least 2"),
        (["--repeats", "0"], "--repeats 0: give at least 1"),
        (["--contexts", "0"], "--contexts 0: give at least 1"),
        (["--contexts", "500"], "--contexts 500: takes up to 580 tokens and the model is made for 512"),
        (["--batch-sizes", "0"], "--batch-sizes 0: give at least 1"),
        (["--threads", "0"], "--threads 0: give at least 1"),
        (["--peers", "exllama"], "--peers exllama: give some of transformers, vllm, llama.cpp, or none alone"),
        (["--peers-python", "no-such-python"], "--peers-python no-such-python: no such program"),
        (["--plot", "picture.svg"], "--plot picture.svg: give a name that ends in .png"),
        (["--plot", "nowhere/picture.png"], "--plot nowhere/picture.png: there is no folder "),
        (["--device", "abacus"], "device='abacus' is not a device"),
        (["--backend", "abacus"], "backend='abacus' is unknown"),
        (["--dtype", "int8"], "dtype='int8'; use 'auto', 'bfloat16'"),
        (["--model", "nowhere"], "nowhere"),
    ],
)
def test_wrong_usage(bench, capsys, args, message):
    with pytest.raises(SystemExit, match="2"):
        bench.main(args)
    assert message in capsys.readouterr().err


def test_without_matplotlib_the_picture_is_refused_with_what_installs_it(bench, part, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(part("serving_report").importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--smoke", "--plot", str(tmp_path / "a.png")])
    assert "matplotlib is not installed: pip install 'llama-fast[bench]'" in capsys.readouterr().err


def test_help_has_examples(bench, capsys):
    with pytest.raises(SystemExit, match="0"):
        bench.main(["--help"])
    assert "python bench/bench_latency.py --shape llama-3.1-8b" in capsys.readouterr().out
