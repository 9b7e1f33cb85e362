"""bench/compare_cpu.py: what it checks, computes and prints, without the peers."""

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
import types
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "compare_cpu.py"
SIZES = ["--batch-sizes", "1", "3", "--prompt-len", "8", "--output-len", "3", "--prefill-len", "16", "--rounds", "1"]


@pytest.fixture
def part(bench):
    """Function: a module beside the bench."""
    return lambda name: sys.modules[name]


@pytest.fixture(scope="module")
def cache(bench, tmp_path_factory):
    """A cache folder that has the tiny shape."""
    cache = tmp_path_factory.mktemp("cache")
    sys.modules["compare_programs"].checkpoint(cache, "tiny", 0)
    return cache


@pytest.fixture(scope="module")
def gguf_file(bench):
    spec = importlib.util.spec_from_file_location("gguf_file", SCRIPT.with_name("gguf_file.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def command(cache, *arguments):
    """The bench with no peer: an interpreter without site packages has none, so that our reference judges."""
    bare = cache / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    pythons = ["--llama-cpp-python", str(bare), "--transformers-python", str(bare)]
    return [
        sys.executable,
        str(SCRIPT),
        "--shape",
        "tiny",
        "--threads",
        "1",
        "--cache",
        str(cache),
        *pythons,
        *arguments,
    ]


def environment():
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def test_smoke_prints_the_bound_first_and_json_last(cache, tmp_path):
    out, profile = tmp_path / "result.json", tmp_path / "profile.txt"
    arguments = ["--programs", "llama_fast", "llama.cpp", "--out", str(out), "--profile", str(profile)]
    done = subprocess.run(
        command(cache, *SIZES, *arguments), capture_output=True, text=True, env=environment(), timeout=300
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("peer absent: pip install llama-cpp-python gguf (llama.cpp: ModuleNotFoundError: No mod")
    assert lines[2].startswith("check    llama_fast       passed: off by ")
    assert [line.split()[0] for line in lines[3:6]] == ["bound"] * 3
    assert lines[7].startswith("decode batch 1   llama_fast ")
    result = json.loads(lines[-1])
    assert result == json.loads(out.read_text())
    assert result["checks"]["llama_fast"].endswith("llama_fast's reference in float32")
    assert result["left_out"].keys() == {"llama.cpp"}
    assert {"device", "cores", "isa", "num_threads", "commit", "versions", "read_bytes_per_s"} <= result.keys()
    assert [row["work"] for row in result["speed"]] == ["decode batch 1", "decode batch 3", "prefill"]
    for row in result["speed"]:
        share = row["tokens_per_s"]["median"] / row["bound"]["median"]  # of one round
        assert row["share_of_bound"]["median"] == pytest.approx(share)
    (start,) = result["start"]
    assert start["bound_s"]["median"] == pytest.approx(start["read_s"]["median"] + start["prefill_s"]["median"])
    if Path("/proc/self/status").exists():
        assert start["peak_bytes"] > result["weight_bytes"]
    assert [row["model"] for row in result["overhead"]] == ["tiny", "demo"]
    for row in result["overhead"]:
        assert 0 < row["overhead_share"]["median"] < 1
    assert "Ordered by: internal time" in profile.read_text()


def test_int4_is_beside_llama_cpps_file_of_four_bits(cache, tmp_path):
    out = tmp_path / "result.json"
    arguments = [*SIZES, "--weights", "int4", "--group-size", "32", "--out", str(out)]
    done = subprocess.run(command(cache, *arguments), capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    lines, result = done.stdout.splitlines(), json.loads(out.read_text())
    assert lines[1].startswith("tiny, int4 in groups of 32, 1 threads")
    assert result["checks"].keys() == {"llama_fast"}
    assert result["checks"]["llama_fast"].startswith("passed")
    assert result["left_out"].keys() == {"llama.cpp q4_0"}
    assert (result["weights"], result["group_size"]) == ("int4", 32)
    # The projections a quarter and a scale for each group, embedding and head whole.
    folder = cache / "tiny-seed0" / "checkpoint"
    whole = {name: tensor.nbytes for name, tensor in load_file(folder / "model.safetensors").items()}
    rounded = sum(size for name, size in whole.items() if "_proj" in name)
    expected = sum(whole.values()) - rounded + rounded // 4 + rounded // 32
    size = result["weight_file_bytes"]["llama_fast"]
    assert expected < size < expected + 20_000
    assert any(line.split() == ["weights", "llama_fast", f"{size / 1e6:,.1f}", "MB", "on", "disk"] for line in lines)
    assert result["weight_bytes"] <= size


def test_programs_of_int4(part):
    args = types.SimpleNamespace(programs=["llama_fast", "llama.cpp", "transformers"], quantized=False, weights="int4")
    compared = part("compare_programs").Programs(args, Path(), ExitStack())
    assert compared.models == {"llama_fast": ("llama_fast", ""), "llama.cpp q4_0": ("llama.cpp", "q4_0")}


def test_ctrl_c_ends_every_process(cache):
    driver = subprocess.Popen(
        command(cache, "--programs", "llama_fast"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    children = Path(f"/proc/{driver.pid}/task/{driver.pid}/children")
    try:
        if not children.exists():
            pytest.skip("children are read from Linux' /proc")
        assert driver.stderr.readline() == "checking llama_fast\n"
        pids = children.read_text().split()
        assert len(pids) >= 1
        driver.send_signal(signal.SIGINT)
        assert driver.wait(timeout=60) == 130
        assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    finally:
        driver.kill()
        driver.communicate()


def test_checkpoint_is_made_once_and_anew_when_it_is_another(part, tmp_path, monkeypatch):
    programs, written = part("compare_programs"), []

    def write(folder, shape, seed):
        written.append((shape, seed))
        (folder / "file").touch()

    monkeypatch.setattr(programs, "write_checkpoint", write)
    folder = programs.checkpoint(tmp_path, "tiny", 0)
    (folder.parent / "bf16.gguf").touch()
    assert programs.checkpoint(tmp_path, "tiny", 0) == folder
    assert written == [("tiny", 0)]
    # Another shape under that name, then a write that was cut off: all is made anew, the peers' files too.
    monkeypatch.setitem(programs.SHAPES, "tiny", {**programs.SHAPES["tiny"], "rms_norm_eps": 0.5})
    programs.checkpoint(tmp_path, "tiny", 0)
    assert len(written) == 2
    assert not (folder.parent / "bf16.gguf").exists()
    (folder.parent / "made.json").unlink()
    programs.checkpoint(tmp_path, "tiny", 0)
    assert len(written) == 3


def test_interleaved_rows_rotate_as_llama_cpp_does(gguf_file):
    num_heads, head_dim, width = 3, 8, 5
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((num_heads * head_dim, width))
    x = generator.standard_normal(width)
    angles = generator.standard_normal(head_dim // 2)
    cos, sin = np.cos(angles), np.sin(angles)

    first, second = np.split((weight @ x).reshape(num_heads, head_dim), 2, axis=1)  # Hugging Face: halves of a head
    halves = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=1)
    pairs = (gguf_file.interleaved(weight, num_heads) @ x).reshape(num_heads, head_dim // 2, 2)  # llama.cpp: neighbours
    even, odd = pairs[..., 0], pairs[..., 1]
    rotated = np.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    # In another order, which q . k does not see.
    assert np.allclose(rotated, halves.reshape(num_heads, 2, head_dim // 2).swapaxes(1, 2))


def test_bf16_is_read_without_torch(gguf_file, cache):
    path = cache / "tiny-seed0" / "checkpoint" / "model.safetensors"
    expected = load_file(path)
    found = dict(gguf_file.bf16_tensors(path))
    assert found.keys() == expected.keys()
    for name, bits in found.items():
        assert torch.equal(torch.from_numpy(gguf_file.widened(bits)), expected[name].float())


def test_gguf_file_has_every_tensor(gguf_file, cache, tmp_path):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "bf16.gguf"
    gguf_file.convert(cache / "tiny-seed0" / "checkpoint", path)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert len(tensors) == 2 + 2 * 9
    assert tensors["blk.1.ffn_down.weight"].tensor_type == gguf.GGMLQuantizationType.BF16
    assert tensors["output_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32


def test_what_cannot_be_converted_is_refused(gguf_file, tmp_path):
    header = json.dumps({"w": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(ValueError, match="w is F16; only BF16 is converted"):
        list(gguf_file.bf16_tensors(tmp_path / "model.safetensors"))
    with pytest.raises(ValueError, match="RoPE with scaling is not converted"):
        gguf_file._write_config(None, {"rope_theta": 1e4, "rope_scaling": {"rope_type": "llama3"}})


class Pretended:
    """A process whose tokens have the log probabilities that a test gives them."""

    def __init__(self, logprob):
        self.logprob, self.closed = logprob, False

    def ask(self, do, **arguments):
        if do == "score":
            return {"behind": [0.0], "logprobs": [-1.0], "std": 1.0}
        count = len(arguments["prompts"])
        return {"token_ids": [[7]] * count, "logprobs": [[self.logprob]] * count}

    def close(self):
        self.closed = True


def test_another_model_is_refused_and_left_out(bench, part, monkeypatch, capsys):
    programs = part("compare_programs")
    args = types.SimpleNamespace(programs=["llama_fast", "llama.cpp", "transformers"], quantized=True, weights="bf16")
    compared = programs.Programs(args, Path(), ExitStack())
    assert list(compared.models) == ["llama_fast", "llama.cpp", "llama.cpp q8_0", "llama.cpp q4_0", "transformers"]
    # Allowed at one layer: 4 * sqrt(12) / 512 = 0.027.
    logprobs = [-1.01, -1.1, -9.0, -9.0, math.nan]
    processes = [Pretended(logprob) for logprob in logprobs]
    compared.running = dict(zip(compared.models, processes, strict=True))

    @contextmanager
    def judge(of):
        yield "a judge", Pretended(0.0)

    monkeypatch.setattr(programs, "judge", judge)
    results = programs.check(compared, [bench.Work("decode batch 2", [[1], [2]], 5)], num_layers=1)
    assert results["llama_fast"] == "passed: off by 0.0100 of the logits' spread, allowed 0.0271, judged by a judge"
    assert results["llama.cpp"].startswith("refused: off by 0.1000")
    assert results["llama.cpp q8_0"] == "not checked: other weights"
    assert results["transformers"].startswith("refused: off by nan")
    assert list(compared.running) == ["llama_fast", "llama.cpp q8_0", "llama.cpp q4_0"]
    assert [process.closed for process in processes] == [False, True, False, False, True]
    assert compared.any_failed
    assert "not timed: llama.cpp: computes another model" in capsys.readouterr().err


def test_a_token_behind_the_best_is_off(part):
    score = {"behind": [0.0, 3.0], "logprobs": [-1.0, -2.0], "std": 2.0}
    assert part("compare_programs").how_far_off([-1.0, -2.0], score) == 1.5


def test_every_program_is_first_in_turn(part):
    args = types.SimpleNamespace(programs=["llama_fast", "transformers"], quantized=False, weights="bf16")
    compared = part("compare_programs").Programs(args, Path(), ExitStack())
    compared.running = {"llama_fast": Pretended(0), "transformers": Pretended(0)}
    assert [next(compared.turns(turn))[0] for turn in range(3)] == [
        "llama_fast",
        "transformers",
        "llama_fast",
    ]


WORKER = """
import json, sys, threading
def spin():
    while True:
        pass
for line in sys.stdin:
    request = json.loads(line)
    if request["do"] == "die":
        sys.exit("no more memory")
    if request["do"] == "spin":
        threading.Thread(target=spin, daemon=True).start()
    print(json.dumps({"error": "ValueError: no"} if request["do"] == "fail" else {"answer": request}), flush=True)
"""


@pytest.fixture
def process(part, tmp_path, monkeypatch):
    """A process of the worker above."""
    module = part("compare_process")
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    monkeypatch.setattr(module, "_WORKER", worker)
    with module.Process(sys.executable, "llama_fast", tmp_path, 1) as process:
        yield process


def test_a_process_answers_until_it_dies(part, process):
    failed = part("compare_process").Failed
    assert process.ask("load", prompts=[[1]]) == {"do": "load", "prompts": [[1]]}
    with pytest.raises(failed, match="ValueError: no"):
        process.ask("fail")
    with pytest.raises(failed, match="ended with status 1: no more memory"):
        process.ask("die")


def test_what_spins_while_others_work_is_seen(process):
    if not Path("/proc/self/stat").exists():
        pytest.skip("CPU time is read from Linux' /proc")
    process.ask("load")
    time.sleep(0.2)
    process.ask("load")
    assert process.idle.share < 0.1
    process.ask("spin")
    time.sleep(1)
    process.ask("load")
    assert process.idle.share > 0.1


def test_rates(bench):
    decode = bench.Work("decode batch 2", [[1, 2, 3], [4, 5, 6]], 3)
    assert decode.rate({"prefill_s": 9.0, "step_s": [0.5, 1.5]}) == 2.0  # two sequences, two steps, two seconds
    prefill = bench.Work("prefill", [[1, 2, 3]], 1)
    assert prefill.rate({"prefill_s": 1.5, "step_s": []}) == 2.0


def test_ratios_are_taken_within_a_round(part):
    report = part("compare_report")
    samples = {"decode batch 1": {"llama_fast": [10.0, 1.0, 4.0], "llama.cpp": [5.0, 1.0, 2.0]}}
    ours, theirs = report.speed_rows(samples, {"decode batch 1": [10.0, 2.0, 5.0]})
    assert "ours_to_it" not in ours
    assert theirs["ours_to_it"].median == 2.0
    assert ours["share_of_bound"].median == 0.8
    table = report.speed_table([ours, theirs])
    assert " ".join(table[1].split()) == "decode batch 1 llama_fast 4.00 1.60 8.80 80.0% >= 80% of bound"
    assert table[2].split()[-3:] == ["2.00x", ">=", "1.00x"]


def test_targets(part):
    report = part("compare_report")
    works = {"decode batch 1": 0.95, "decode batch 8": 0.5, "prefill": 0.5}
    samples = {
        work: {"llama_fast": [share], "llama.cpp": [0.45], "transformers": [0.1]} for work, share in works.items()
    }
    speed = report.speed_rows(samples, {work: [1.0] for work in works})
    starts = [{"first_token_s": 1.5, "read_s": 0.5, "prefill_s": 0.5, "peak_bytes": 300e6}]
    start = report.start_rows({"llama_fast": starts, "llama.cpp": starts})
    steps, native = {"step_s": [0.01], "inside_s": [0.0099]}, {"step_s": [0.01], "inside_s": [0.0096]}
    overheads = [report.overhead_row("1b", steps, None), report.overhead_row("demo", steps, native)]
    assert overheads[0]["overhead_us"].median == pytest.approx(100)
    assert overheads[1]["overhead_us"].median == pytest.approx(400)
    assert overheads[1]["outside_ops_us"].median == pytest.approx(100)
    found = report.targets(speed, start, overheads, held_bytes=250_000_000)
    assert {target.name: target.met for target in found} == {
        "decode batch 1: share of the bound": True,
        "decode batch 1: ours / llama.cpp": True,
        "decode batch 8: ours / llama.cpp": False,
        "prefill: ours / llama.cpp": False,
        "prefill: ours / transformers": True,
        "load to first token / bound": False,
        "peak memory": True,
        "engine overhead, 1b": True,
        "engine overhead, demo": found[-1].value <= 400,
    }
    assert " ".join(str(found[2]).split()) == "target decode batch 8: ours / llama.cpp 1.11x >= 1.25x MISSED"
    assert "outside compiled functions, 100 us outside the ops" in report.overhead_lines(overheads)[1]


def test_read_bandwidth_leaves_the_threads_as_they_were(part):
    before = torch.get_num_threads()
    assert part("timing").read_bandwidth(2**20, repeats=1) > 0
    assert torch.get_num_threads() == before


def test_the_shape_has_the_parameters_that_its_name_says(part):
    shape = part("shapes").SHAPES["llama-1b-32k"]
    width, inner, head_dim = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    heads = 2 * shape["num_attention_heads"] + 2 * shape["num_key_value_heads"]
    layer = heads * head_dim * width + 3 * width * inner + 2 * width
    assert shape["vocab_size"] * width + shape["num_hidden_layers"] * layer + width == 1_038_682_112


def test_help_has_examples(bench, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(["--help"])
    assert stopped.value.code == 0
    assert "python bench/compare_cpu.py --shape tiny" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds 0: give at least 1"),
        (["--batch-sizes", "1", "0"], "--batch-sizes 0: give at least 1"),
        (["--output-len", "0"], "--output-len 0: give at least 1"),
        (["--llama-cpp-python", "/no/python"], "--llama-cpp-python /no/python: no such program"),
        (["--programs", "vllm"], "invalid choice: 'vllm'"),
        (["--weights", "int8"], "invalid choice: 'int8'"),
        (["--group-size", "16"], "invalid choice: 16"),
    ],
)
def test_wrong_usage(bench, capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        bench.main(arguments)
    assert message in capsys.readouterr().err
