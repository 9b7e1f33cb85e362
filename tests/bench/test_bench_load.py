"""bench/bench_load.py runs, checks what it times, and states its bound first."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "bench_load.py"


def test_smoke_prints_the_bound_first_and_json_last():
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--smoke"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:6]] == ["bound", "load", "touch", "total", "first"]
    result = json.loads(lines[-1])
    # 1000 x 256 tied; a layer: q, o 256 x 256, k, v 64 x 256, gate, up, down 512 x 256, two norms; the final norm.
    num_parameters = 256_000 + 2 * (2 * 256 * 256 + 2 * 64 * 256 + 3 * 512 * 256 + 2 * 256) + 256
    assert 2 * num_parameters <= result["file_bytes"] <= 2 * num_parameters + 8192
    assert result["bound_ms"] == pytest.approx(1e3 * result["file_bytes"] / result["read_bytes_per_s"])
    assert result["share_of_bound"] == pytest.approx(result["bound_ms"] / result["total_ms"]["median"])
    assert {"device", "commit", "versions", "dtype", "model", "first_ms"} <= result.keys()
    if Path("/proc/self/smaps").exists():
        assert result["written_mapped_bytes"] == 0  # reading a mapped weight must not copy its page
        assert result["peak_file_bytes"] >= 2 * num_parameters


def test_an_existing_checkpoint_is_measured(tmp_path, bench, monkeypatch, capsys):
    bench.write_checkpoint(tmp_path, "tiny", seed=1)
    monkeypatch.setattr(bench, "in_new_process", lambda name, folder: {"first_ms": 1.0} if name == "first" else {})
    monkeypatch.setattr(sys, "argv", ["bench_load.py", "--model", str(tmp_path), "--repeats", "1"])
    assert bench.main() == 0
    out = capsys.readouterr().out
    assert "memory  not measured" in out  # as on a system without /proc
    assert json.loads(out.splitlines()[-1])["model"] == str(tmp_path)


def test_the_same_seed_writes_the_same_file(tmp_path, bench):
    contents = []
    for folder, seed in ((tmp_path / "a", 0), (tmp_path / "b", 0), (tmp_path / "c", 1)):
        folder.mkdir()
        bench.write_checkpoint(folder, "tiny", seed)
        contents.append((folder / "model.safetensors").read_bytes())
    assert contents[0] == contents[1] != contents[2]


def test_a_difference_from_the_file_is_seen_and_refused(tmp_path, bench, monkeypatch, capsys):
    bench.write_checkpoint(tmp_path, "tiny", seed=0)
    model = bench.load(tmp_path)
    assert bench.differing_tensors(model, tmp_path) == []
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.view(torch.int16)[511, 255] ^= 1  # one bit
    changed = ["model.layers.1.mlp.up_proj.weight"]
    assert bench.differing_tensors(model, tmp_path) == changed

    monkeypatch.setattr(bench, "load", lambda folder: model)
    assert bench.run(tmp_path, "smoke", repeats=1, bandwidth_bytes=2**20) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert f"refusing to time: 1 tensors differ from the file: {changed}" in err


def test_written_mapped_pages_are_counted(tmp_path, bench):
    if not Path("/proc/self/smaps").exists():
        pytest.skip("written pages are read from Linux' /proc")
    bench.write_checkpoint(tmp_path, "tiny", seed=0)
    paths = bench.weight_files(tmp_path)
    model = bench.load(tmp_path)
    bench.touch(model)
    assert bench.dirty_bytes(paths) == 0
    model.model.norm.weight.zero_()
    assert 0 < bench.dirty_bytes(paths) <= 2 * os.sysconf("SC_PAGE_SIZE")


def exit_status(bench, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench_load.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        bench.main()
    return stopped.value.code


def test_help_has_examples(bench, monkeypatch, capsys):
    assert exit_status(bench, monkeypatch, "--help") == 0
    assert "python bench/bench_load.py --smoke" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--repeats", "0"], ["--smoke", "--model", "x"], ["--shape", "llama-9b"]])
def test_wrong_arguments_are_usage_errors(bench, monkeypatch, arguments):
    assert exit_status(bench, monkeypatch, *arguments) == 2
