"""bench/bench_throughput.py, and with it transformers as a peer, energy, and models made on the device."""

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
SCRIPT = ROOT / "bench" / "bench_throughput.py"


@pytest.fixture
def part(bench):
    """Function: a module beside the bench."""
    return lambda name: sys.modules[name]


@pytest.fixture
def tiny(part):
    """A model of the shape tiny in bf16."""
    shapes = part("shapes")
    config = LlamaConfig(**shapes.SHAPES["tiny"])
    return shapes.build_model(config, torch.device("cpu"), torch.bfloat16, seed=0)


def test_smoke_beside_transformers_prints_the_bound_first_and_json_last(tmp_path):
    picture = tmp_path / "roofline.png"
    plot = ["--plot", str(picture)] if importlib.util.find_spec("matplotlib") else []
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--smoke", "--device", "cpu", "--threads", "1", "--peers", "transformers", *plot],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:10]] == ["peer", *["bound"] * 8, "throughput:"]
    assert not plot or picture.read_bytes().startswith(b"\x89PNG")
    result = json.loads(lines[-1])
    assert (result["bench"], result["model"], result["lengths"]) == ("throughput", "tiny", [[24, 8], [8, 16]])
    assert result["checks"]["batch_equals_alone"] == "passed"
    assert result["peer_checks"]["transformers"].startswith("passed")
    assert result["peers"]["transformers"]["mode"] == "generate with a static cache, not compiled: --no-compile"
    assert [(row["batch_size"], row["program"]) for row in result["rows"]] == [
        (size, program) for size in (1, 1, 3, 3) for program in ("llama_fast", "transformers")
    ]
    for row in result["rows"]:
        seconds, generated = row["seconds"]["median"], row["num_requests"] * row["output_len"]
        assert row["share_of_bound"] == pytest.approx(row["bound_s"] / seconds)
        assert row["flops_per_s"] == pytest.approx(row["flops"] / seconds)
        ratio = row["total_tokens_per_s"]["median"] / row["output_tokens_per_s"]["median"]
        assert ratio == pytest.approx(1 + row["prompt_len"] / row["output_len"])
        assert row["output_tokens_per_s"]["p10"] <= generated / seconds * 1.01


def test_refuses_to_time_batches_that_change_the_answer(bench, part, monkeypatch, capsys):
    rates = part("serving_bounds").Rates(1e9, 1e12)
    monkeypatch.setattr(part("serving_session"), "measure_rates", lambda *_: rates)
    logits = LlamaLM.logits
    monkeypatch.setattr(LlamaLM, "logits", lambda model, x, ops: logits(model, x, ops) * (1 + 1e-4 * (len(x) > 1)))
    assert bench.main(["--smoke", "--device", "cpu"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "refusing to time: prompt 0 alone and in a batch of 3" in err


def test_phases_by_hand(bench, part, tiny):
    bounds, common = part("serving_bounds"), part("serving_common")
    session = types.SimpleNamespace(model=tiny)
    prefill, decode = bench.phases(session, common.Setting(batch_size=3, prompt_len=10, output_len=5, num_requests=7))
    # Seven prompts in three groups; each of 7 * 4 tokens takes a third of a step, at half of the output.
    together = bounds.prefill_work(tiny, 7, 10)
    assert prefill.flops == together.flops
    assert prefill.num_bytes == together.num_bytes + 2 * bounds.decode_weight_bytes(tiny)
    step = bounds.decode_work(tiny, 3, 12.5)
    assert (decode.num_bytes, decode.flops) == pytest.approx((step.num_bytes * 28 / 3, step.flops * 28 / 3))
    # With fewer requests than places a step is as wide as there are requests.
    _, decode = bench.phases(session, common.Setting(8, 10, 5, 2))
    assert decode.num_bytes == bounds.decode_work(tiny, 2, 12.5).num_bytes * 4


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--lengths", "128"], "'128' is not prompt/output like 1024/128"),
        (["--lengths", "128/1"], "'128/1' is not prompt/output like 1024/128"),
        (["--lengths", "500/64"], "--lengths 500/64: takes up to 564 tokens and the model is made for 512"),
        (["--requests", "0"], "--requests 0: give at least 1"),
        (["--shape", "llama-9b"], "invalid choice: 'llama-9b'"),
    ],
)
def test_wrong_usage(bench, capsys, args, message):
    with pytest.raises(SystemExit, match="2"):
        bench.main(args)
    assert message in capsys.readouterr().err


def test_a_shape_that_does_not_fit_is_refused_before_it_is_made(bench, part, monkeypatch, capsys):
    monkeypatch.setattr(part("serving_session"), "free_bytes", lambda *_: 10**9)
    assert bench.main(["--shape", "llama-3.1-70b", "--peers", "none", "--device", "cpu"]) == 1
    assert "--shape llama-3.1-70b in torch.bfloat16 takes 141.1 GB; 1.0 GB are free" in capsys.readouterr().err


@pytest.mark.parametrize(("shape", "count"), [("llama-3.1-8b", 8_030_261_248), ("llama-3.1-70b", 70_553_706_496)])
def test_shapes_have_the_parameters_of_the_models(part, shape, count):
    config = LlamaConfig(**part("shapes").SHAPES[shape])
    with torch.device("meta"):
        model = LlamaLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert config.rope_scaling["rope_type"] == "llama3"


def test_a_model_is_made_on_its_device_as_init_weights_makes_it(part, tiny):
    again = part("shapes").build_model(tiny.config, torch.device("cpu"), torch.bfloat16, seed=0)
    for (name, ours), other in zip(tiny.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, other), name
        assert ours.dtype == torch.bfloat16 and not ours.requires_grad
        if ours.ndim == 1:
            assert (ours == 1).all()
        else:
            assert ours.float().std().item() == pytest.approx(tiny.config.initializer_range, rel=0.05)
    assert tiny.lm_head.weight is tiny.model.embed_tokens.weight


def test_a_peer_that_computes_another_model_is_seen(part):
    peers, config = part("serving_peers"), LlamaConfig(**part("shapes").SHAPES["tiny"])
    model = part("shapes").build_model(
        config, torch.device("cpu"), torch.bfloat16, 0, part("serving_session").LlamaForCausalLM
    )
    prompt = [1, 2, 3]
    best = model(torch.tensor([prompt])).logits[0, -1]
    assert peers.how_far_behind(model, prompt, [int(best.argmax())]) == 0
    assert peers.how_far_behind(model, prompt, [int(best.argmin())]) > peers.allowed_behind(model)


def test_waves_and_their_times(part, monkeypatch):
    path = SCRIPT.with_name("serving_workers.py")
    spec = importlib.util.spec_from_file_location("serving_workers", path)
    workers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(workers)
    clock = iter([100.0, 110.0])
    monkeypatch.setattr(workers.time, "perf_counter", lambda: next(clock))
    sizes = []

    def wave(some):
        sizes.append(len(some))
        return [[prompt[0] + step for prompt in some] for step in (0, 1)], [100.0 + len(sizes), 101.0 + len(sizes)]

    answer = workers.in_waves([[10], [20], [30]], 2, wave)
    assert sizes == [2, 1]
    assert [list(ids) for ids in answer["token_ids"]] == [[10, 11], [20, 21], [30, 31]]
    assert answer["times"] == [[1.0, 2.0], [1.0, 2.0], [2.0, 3.0]]
    assert answer["seconds"] == 10.0


def test_joules_come_from_the_gpu_that_is_used(part, monkeypatch):
    energy, read = part("energy"), iter([5000, 7000, 9500])
    assert energy.EnergyMeter(torch.device("cpu")).since(None) is None
    nvml = types.ModuleType("pynvml")
    nvml.NVMLError = RuntimeError
    nvml.nvmlInit = lambda: None
    nvml.nvmlDeviceGetHandleByUUID = lambda identifier: identifier
    nvml.nvmlDeviceGetTotalEnergyConsumption = lambda handle: {"GPU-1-2": read}[handle].__next__()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="1-2"))
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    meter = energy.EnergyMeter(torch.device("cuda"))
    assert meter.problem is None
    assert meter.since(meter.joules()) == 2.5
    nvml.nvmlDeviceGetHandleByUUID = lambda identifier: (_ for _ in ()).throw(RuntimeError("Not Supported"))
    meter = energy.EnergyMeter(torch.device("cuda"))
    assert (meter.joules(), meter.problem) == (None, "NVML has no energy counter here: Not Supported")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "pip install nvidia-ml-py" in energy.EnergyMeter(torch.device("cuda")).problem
