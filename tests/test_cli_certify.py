"""llama-fast certify: the table, the certificate, the exit status."""

import json
import re

import pytest

from llama_fast import cli, demo
from llama_fast.engine import certify_paths
from tests.byte_model import save_byte_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    path.mkdir()
    return save_byte_model(path)


@pytest.fixture
def run(capsys):
    """`run(*args)` is `llama-fast certify args --quiet` in this process: (status, stdout, stderr)."""

    def run(*args):
        status = cli.main(["certify", *map(str, args), "--quiet"])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def few_paths(monkeypatch):
    """Only the first paths of the table."""
    plain = certify_paths.paths_of
    monkeypatch.setattr("llama_fast.engine.certify.paths_of", lambda runner: plain(runner)[:3])


def test_the_demo_model_has_one_answer(run, tmp_path):
    target = tmp_path / "certificate.json"
    status, out, err = run(demo.PATH, "--quick", "--out", target)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "demo: bfloat16, backend cpu, cpu, size medium"
    assert re.fullmatch(r"one answer: \d+ passed, 0 failed, 2 skipped; [\d,]+ draws compared", lines[-1])
    rows = {line[:22].strip(): line[22:].split() for line in lines[3:-2]}
    assert rows["together"][2:] == ["passed"] and int(rows["together"][1]) > 100
    assert " ".join(rows["graphs"]) == "skipped: steps are captured on a GPU only"
    assert all(len(line) <= 100 for line in lines)
    told = json.loads(target.read_text())
    assert told["passed"] and told["model"]["name"] == "demo"
    assert [one["path"] for one in told["paths"]] == list(rows)


def test_a_planted_fault_must_fail_and_is_named(run, folder, tmp_path):
    target = tmp_path / "certificate.json"
    status, out, _ = run(folder, "--quick", "--break", "--out", target)
    text = " ".join(out.split())
    assert status == 1
    assert "PLANTED FAULT: linear_residual (down_proj) of layer 1 sums in two halves" in text
    assert "together 1" in text and "FAILED: request 0" in text
    assert "the first op is layer 1, linear_residual (down_proj), at prompt token 0; logits off by" in text
    assert re.search(r"NOT CERTIFIED, a fault was planted: it was found; \d+ passed, \d+ failed", out)
    told = json.loads(target.read_text())
    assert not told["passed"] and told["complete"] and "two halves" in told["planted_fault"]


@pytest.mark.usefixtures("few_paths")
def test_a_planted_fault_that_nobody_finds_fails_too(run, folder, monkeypatch):
    from llama_fast.engine.certify_watch import SplitSum, Watch

    monkeypatch.setattr(SplitSum, "op", Watch.op)
    status, out, _ = run(folder, "--quick", "--break")
    assert status == 1 and "NOT CERTIFIED, a fault was planted: it WAS NOT FOUND; 4 passed" in out


@pytest.mark.usefixtures("few_paths")
def test_json_is_the_certificate(run, folder, tmp_path):
    target = tmp_path / "certificate.json"
    status, out, _ = run(folder, "--quick", "--json", "--out", target, "--dtype", "bfloat16", "--backend", "cpu")
    assert status == 0 and out == target.read_text() and out.count("\n") == 1
    told = json.loads(out)
    assert (told["model"]["dtype"], told["backend"]) == ("bfloat16", "cpu")
    assert told["settings"]["size"]["name"] == "medium"


def test_an_interrupt_prints_what_was_compared(run, folder, tmp_path, monkeypatch):
    def interrupted(runner):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(certify_paths, "_batch_sizes", interrupted)
    target = tmp_path / "certificate.json"
    status, out, err = run(folder, "--quick", "--out", target)
    assert status == 130 and not target.exists()
    assert "\ntogether " in out and "batch sizes" not in out
    assert out.splitlines()[-1].startswith("not complete: 3 passed, 0 failed, 0 skipped; ")
    assert err == "llama-fast: interrupted: the certificate is not complete\n"
    status, out, _ = run(folder, "--quick", "--json")
    told = json.loads(out)
    assert status == 130 and not told["passed"] and not told["complete"] and len(told["paths"]) == 3


def test_wrong_usage_is_told_before_anything_runs(run, folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run(folder, "--out", tmp_path / "missing" / "certificate.json")
    assert ended.value.code == 2 and "no folder" in capsys.readouterr().err
    assert run(tmp_path / "nothing")[0] == 1
