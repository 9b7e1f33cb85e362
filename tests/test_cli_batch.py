"""`llama-fast batch`: what it prints, how it ends, and that its files are those of the engine's batches."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama_fast import LLM, SamplingParams, cli, demo
from llama_fast.engine.engine import Engine
from llama_fast.serving.batch_files import BatchFiles
from llama_fast.serving.batch_lines import seed_of
from tests.byte_model import save_byte_model

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    path.mkdir()
    return save_byte_model(path)


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "in.jsonl", 12)


def write(path, count, **body):
    """An input whose lines 3 and 7 are wrong."""
    body = {"prompt": "abc", "max_tokens": 6, "temperature": 1, **body}
    lines = [{"custom_id": f"line {i}", "method": "POST", "url": "/v1/completions", "body": body} for i in range(count)]
    lines[3]["body"] = {**body, "temperature": -1}
    lines[7]["url"] = "/v2"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def run(folder, source, tmp_path, capsys):
    """`run(*args)` is `llama-fast batch in.jsonl out.jsonl --model FOLDER args`: (status, stdout, stderr, output)."""
    target = tmp_path / "out.jsonl"

    def run(*args, source=source, target=target):
        status = cli.main(["batch", str(source), str(target), "--model", str(folder), *args])
        captured = capsys.readouterr()
        return status, captured.out, captured.err, target.read_bytes() if target.is_file() else None

    return run


def test_it_answers_every_line_and_counts(run, folder):
    status, out, err, data = run()
    assert (status, out) == (0, "")
    assert re.fullmatch(
        r"llama-fast: 12 lines, 2 errors, 40 prompt tokens, 60 generated, \d+\.\d tokens/s\n", err.splitlines(True)[-1]
    )
    params = [SamplingParams(max_tokens=6, temperature=1, seed=seed_of(i, 0)) for i in range(12)]
    expected = LLM(folder).generate(["abc"] * 12, params)
    records = [json.loads(line) for line in data.splitlines()]
    assert [record["id"] for record in records] == [f"batch_req_{i}" for i in range(12)]
    for i, (record, output) in enumerate(zip(records, expected, strict=True)):
        if i in (3, 7):
            assert record["response"] is None and record["error"]["code"] == "invalid_request"
        else:
            body = record["response"]["body"]
            assert (body["choices"][0]["text"], body["model"]) == (output.outputs[0].text, "tiny")


def test_options_reach_the_run(run, tmp_path):
    _, _, _, data = run("--quiet")
    for number, args in enumerate([("--max-batch", "1"), ("--max-batch=8", "--load=copy"), ("--seed=0",)]):
        assert run("--quiet", *args, target=tmp_path / f"{number}.jsonl") == (0, "", "", data)
    for number, args in enumerate(
        [("--seed=1",), ("--max-seq-len=50",), ("--dtype=float64",), ("--backend=reference",)]
    ):
        other = run("--quiet", *args, target=tmp_path / f"other {number}.jsonl")
        assert other[:3] == (0, "", "") and other[3] != data


def test_json(run, folder):
    status, out, err, _ = run("--json", "--quiet")
    told = json.loads(out)
    assert (status, err) == (0, "")
    counts = {"lines": 12, "written": 12, "resumed": 0, "errors": 2, "prompt_tokens": 40, "generated_tokens": 60}
    assert {name: told[name] for name in counts} == counts
    assert told["model"] == str(folder) and told["seconds"] > 0 and told["tokens_per_s"] > 0


def test_the_demo_model_is_the_default(folder, source, tmp_path, monkeypatch, run):
    monkeypatch.setattr(demo, "PATH", folder)
    assert cli.main(["batch", str(source), str(tmp_path / "default.jsonl"), "--quiet"]) == 0
    assert (tmp_path / "default.jsonl").read_bytes() == run()[3]


def test_an_output_is_neither_overwritten_nor_mixed(run, tmp_path):
    _, _, _, data = run()
    status, out, err, after = run()
    assert (status, out, after) == (1, "", data)
    told = r"llama-fast: error: .*out.jsonl holds [\d,]+ bytes already; continue it with --resume, .*\n"
    assert re.fullmatch(told, err)
    status, _, err, after = run("--resume", "--seed", "5")
    assert (status, after) == (1, data)
    assert "out.jsonl, line 1 was written with another --seed or --max-seq-len" in err and err.count("\n") == 1
    other = write(tmp_path / "other.jsonl", 12, max_tokens=7)
    status, _, err, after = run("--resume", source=other)
    assert (status, after) == (1, data)
    assert "line 1 of the input has changed" in err and err.count("\n") == 1


def test_resume_of_a_part_and_of_all(run, tmp_path):
    _, _, _, data = run("--resume")
    target = tmp_path / "out.jsonl"
    status, _, err, after = run("--resume")
    assert (status, after) == (0, data)
    assert err.splitlines()[-1].startswith("llama-fast: 12 lines (12 of them before), 2 errors, 0 prompt tokens, 0 gen")
    target.write_bytes(data[: len(data) // 2])
    status, _, err, after = run("--resume")
    assert (status, after) == (0, data)
    assert re.search(r"llama-fast: 12 lines \([4-8] of them before\), 2 errors, ", err)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (("in.jsonl", "in.jsonl"), "is the input"),
        (("none.jsonl", "out.jsonl"), "No such file or directory: '.*none.jsonl'"),
        (("in.jsonl", "no/out.jsonl"), "No such file or directory: '.*no/out.jsonl'"),
        (("in.jsonl", "."), "is a folder; give a file"),
        ((".", "out.jsonl"), "is a folder; give a file"),
        (("in.jsonl", "/dev/null"), "not a regular file"),
    ],
)
def test_files_that_cannot_be_are_one_line_of_error(run, tmp_path, source, paths, message):
    content = source.read_bytes()
    status, out, err, _ = run(source=tmp_path / paths[0], target=tmp_path / paths[1])
    assert (status, out, source.read_bytes()) == (1, "", content)
    assert re.fullmatch(f"llama-fast: error: .*{message}.*\n", err)


def test_two_processes_on_one_output(run, source, tmp_path):
    with BatchFiles(source, tmp_path / "out.jsonl"):
        status, _, err, data = run("--resume")
    assert (status, data) == (1, b"")
    assert "another process is writing it" in err and err.count("\n") == 1


def test_a_full_disk_is_one_line_of_error(run, monkeypatch):
    def full(fd, data, offset):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    status, _, err, data = run()
    assert (status, data) == (1, b"")
    assert re.fullmatch(
        r"llama-fast: error: No space left on device; the 0 lines before are whole, go on later with --resume: "
        r"'.*out.jsonl'\n",
        err,
    )


@pytest.mark.parametrize("args", [[], ["in.jsonl"], ["in.jsonl", "out.jsonl", "--max-batch=0"], ["a", "b", "--seed=x"]])
def test_wrong_usage(capsys, args):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["batch", *args])
    assert capsys.readouterr().err.startswith("usage: llama-fast batch INPUT OUTPUT [options]")


def test_examples_of_help_are_accepted(capsys):
    with pytest.raises(SystemExit):
        cli.main(["batch", "--help"])
    examples = capsys.readouterr().out.partition("\nexamples:\n")[2].splitlines()
    assert len(examples) >= 3
    for example in examples:
        words = re.split(r"\s{4,}| \| ", example.strip())[0].split()
        assert cli._parser().parse_args(words[1:]).output == Path("out.jsonl")


def test_the_files_are_checked_before_torch_is_loaded(tmp_path):
    program = (
        "import sys; from llama_fast.cli import main\n"
        "assert main(['batch', 'none.jsonl', 'out.jsonl']) == 1; sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [[], ["--quiet"], ["--json"]])
def test_interrupt_tells_how_to_go_on(run, tmp_path, monkeypatch, args):
    _, _, _, expected = run("--max-batch=2")
    (tmp_path / "out.jsonl").unlink()
    step, steps = Engine.step, iter(range(20))

    def interrupted(engine):
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return step(engine)

    with monkeypatch.context() as patched:
        patched.setattr(Engine, "step", interrupted)
        status, out, err, data = run("--max-batch=2", *args)
    assert status == 130
    written = data.count(b"\n")
    assert 2 < written < 10 and data == b"".join(expected.splitlines(True)[:written])
    assert err.endswith(f"llama-fast: interrupted: {written} of 12 lines are written; continue with --resume\n")
    assert ("--json" in args) == bool(out) and (not out or json.loads(out)["written"] == written)
    assert run("--max-batch=2", "--resume")[::3] == (0, expected)


def test_interrupt_of_a_process(folder, tmp_path):
    source, target = write(tmp_path / "long.jsonl", 3000, ignore_eos=True), tmp_path / "out.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "llama_fast", "batch", source, target, "--model", folder],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        # A shell that runs the tests in the background has SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while process.poll() is None and (not target.exists() or not target.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=120)[1].decode()
    assert process.returncode == 130, err
    data = target.read_bytes()
    assert data.endswith(b"\n")
    assert err == f"llama-fast: interrupted: {data.count(10):,} of 3,000 lines are written; continue with --resume\n"
