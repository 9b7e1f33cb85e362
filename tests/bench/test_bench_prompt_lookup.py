"""bench/bench_prompt_lookup.py: it measures both ways in turns, and reports nothing where tokens differ."""

import json
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "bench_prompt_lookup.py"


@pytest.fixture
def run(bench, monkeypatch, capsys):
    """The smoke run in this process, with rates that are made up: (status, stdout, stderr)."""

    def run(*args):
        bounds = sys.modules["serving_bounds"]
        monkeypatch.setattr(sys.modules["serving_session"], "measure_rates", lambda *_: bounds.Rates(1e9, 1e12))
        threads = torch.get_num_threads()
        try:
            status = bench.main(["--smoke", "--device", "cpu", "--threads", "1", *args])
        finally:
            torch.set_num_threads(threads)
        return status, *capsys.readouterr()

    return run


def test_smoke_prints_both_ways_and_json_last(run):
    status, out, _ = run()
    assert status == 0
    result = json.loads(out.strip().splitlines()[-1])
    assert result["bench"] == "prompt_lookup"
    assert result["checks"]["same_tokens"] == "passed"
    rows = {(row["kind"], row["path"]): row for row in result["rows"]}
    assert set(rows) == {(k, p) for k in ("repeating", "elsewhere") for p in ("plain", "prompt lookup")}
    assert rows["repeating", "prompt lookup"]["guessed_right"] > 0
    assert rows["repeating", "plain"]["guessed"] == 0


def test_other_tokens_are_refused(bench, run, monkeypatch):
    plain = bench.timed

    def timed(engine, request):
        seconds, token_ids, request = plain(engine, request)
        return seconds, [*token_ids[:-1], 0] if request.sampling.prompt_lookup_num_tokens else token_ids, request

    monkeypatch.setattr(bench, "timed", timed)
    status, out, err = run()
    assert status == 1
    assert "refusing to time: repeating: " in err
    assert "{" not in out


@pytest.mark.parametrize("args", [["--output-len", "1"], ["--guesses", "0"], ["--prompt-len", "100000"]])
def test_what_cannot_be_measured_is_wrong_usage(bench, args, capsys):
    with pytest.raises(SystemExit):
        bench.main(["--device", "cpu", *args])
    assert args[0] in capsys.readouterr().err
