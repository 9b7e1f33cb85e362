"""llama-fast quantize: what it writes loads again bit for bit, here and in transformers, and it tells what it cost."""

import importlib.util
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from llama_fast import LLM, Int4Config, LlamaForCausalLM, SamplingParams, demo
from llama_fast.cli import main
from llama_fast.errors import CheckpointPathError, ConfigError, RequestError
from llama_fast.model.int4_modules import int4_linears
from llama_fast.ops import reference
from llama_fast.ops.int4 import Int4Linear

DEMO = Path(demo.__path__[0])
WIDE = Path("../shared/data/stories260K-wide128")
CONFIGS = [Int4Config(), Int4Config(32, symmetric=False, lm_head="int4"), Int4Config(64, skip=["lm_head", "down_proj"])]


def same_bits(got, expected):
    return got.dtype == expected.dtype and torch.equal(got, expected)


def compressed_tensors():
    if importlib.util.find_spec("compressed_tensors") is None:
        pytest.skip("compressed-tensors is not installed")


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("shard", ["5GB", "400KB"])
def test_a_saved_model_is_the_same_bit_for_bit(tmp_path, config, shard):
    model = LlamaForCausalLM.from_pretrained(DEMO, quantization=config, backend="reference")
    model.save_pretrained(tmp_path, max_shard_size=shard)
    again = LlamaForCausalLM.from_pretrained(tmp_path, backend="reference")
    expected, got = model.state_dict(), again.state_dict()
    assert got.keys() == expected.keys()
    assert all(same_bits(got[name], expected[name]) for name in expected)
    assert again.config.tie_word_embeddings == (config.lm_head == "keep")
    assert again.lm_head.in_features == 256 and isinstance(again.lm_head, Int4Linear) == (config.lm_head == "int4")
    ids = torch.arange(40)[None]
    assert same_bits(again(ids).logits, model(ids).logits)
    # And once more, over itself.
    again.save_pretrained(tmp_path)
    third = LlamaForCausalLM.from_pretrained(tmp_path, backend="reference").state_dict()
    assert all(same_bits(third[name], expected[name]) for name in expected)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_F8_compressed_tensors_reads_the_same_weights(tmp_path, config):
    compressed_tensors()
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    model = LlamaForCausalLM.from_pretrained(DEMO, quantization=config, backend="reference")
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    (scheme,) = QuantizationConfig(**content).config_groups.values()
    tensors = load_file(tmp_path / "model.safetensors")
    for name, linear in int4_linears(model):
        stored = {key.rpartition(".")[2]: value for key, value in tensors.items() if key.startswith(f"{name}.")}
        theirs = PackedQuantizationCompressor.decompress(stored, scheme)["weight"]
        assert same_bits(theirs, linear.unpacked().dequantized())


# With compressed-tensors 0.20 transformers makes room for unpacked zeros and reads no asymmetric file, its own neither.
@pytest.mark.parametrize("config", [config for config in CONFIGS if config.symmetric], ids=str)
def test_F8_transformers_reads_what_is_written(tmp_path, config):
    compressed_tensors()
    from transformers import AutoModelForCausalLM

    model = LlamaForCausalLM.from_pretrained(DEMO, quantization=config, backend="reference")
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    ids = torch.arange(1, 60)[None] * 17 % 2048
    with torch.no_grad():
        expected = theirs(ids).logits.double()
    # Theirs rounds the dequantized weight to bf16, ours does not: a distance as between two roundings of one model.
    got = model(ids).logits.double()
    assert (got - expected).norm() / expected.norm() < 0.02
    dense = LlamaForCausalLM.from_pretrained(DEMO, backend="reference")(ids).logits.double()
    assert (dense - expected).norm() / expected.norm() > 0.03, "negative control: the original is further"


def test_the_command(tmp_path, capsys):
    llm = LLM(DEMO, max_seq_len=512, max_batch=8)
    (output,) = llm.generate("Once upon a time", SamplingParams(temperature=1.0, max_tokens=450, seed=1, n=8))
    text = "\n".join(sample.text for sample in output.outputs)
    (tmp_path / "text.txt").write_text(text)
    out = tmp_path / "out"
    arguments = ["quantize", str(DEMO), str(out), "--calibrate", str(tmp_path / "text.txt"), "--quiet"]
    assert main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["original"]["kl"] == 0 and told["calibrated"]["kl"] < told["plain"]["kl"]
    assert math.isclose(told["original"]["perplexity"], told["plain"]["perplexity"], rel_tol=0.2)
    assert told["bytes"] < 0.4 * told["stored_bytes"] and told["verified"]["problems"] == []
    names = {path.name for path in out.iterdir()}
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert names == expected
    assert LLM(out).generate("Once upon a time", SamplingParams(max_tokens=5))[0].outputs[0].token_ids
    assert main(["info", str(out), "--verify", "--quiet"]) == 0
    assert "canary: replayed, off by" in capsys.readouterr().out

    assert main(arguments) == 1, "the folder holds a model"
    assert "out is not empty (config.json, generation_config.json, model.safetensors" in capsys.readouterr().err
    plain = tmp_path / "plain"
    assert main(["quantize", str(DEMO), str(plain), "--group-size", "32", "--asymmetric", "--quiet"]) == 0
    assert "loaded again: canary agrees" in capsys.readouterr().out
    assert main(["quantize", str(plain), str(tmp_path / "twice"), "--quiet"]) == 1
    assert "quantized already" in capsys.readouterr().err


def test_a_canary_that_disagrees_is_an_error(tmp_path, capsys, monkeypatch):
    from llama_fast.model import int4_formats

    right = int4_formats.CompressedTensors.read

    def wrong(self, where, stored, linear, dtype):
        tensors = right(self, where, stored, linear, dtype)
        return tensors._replace(words=tensors.words.flip(0)) if ".layers.2." in where else tensors

    monkeypatch.setattr(int4_formats.CompressedTensors, "read", wrong)
    assert main(["quantize", str(DEMO), str(tmp_path / "out"), "--quiet"]) == 1
    assert "canary: layer 2 disagrees" in capsys.readouterr().out


def quantize(*args, **kwargs):
    from llama_fast.engine.quantize import quantize as function

    return function(*args, show_progress=False, **kwargs)


def test_what_is_wrong_is_refused_before_any_work(tmp_path, monkeypatch):
    from llama_fast.engine import quantize as module

    def never(*args, **kwargs):
        raise AssertionError("work began")

    monkeypatch.setattr(module, "read_model", never)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointPathError, match="file is a file; give a folder"):
        quantize(DEMO, tmp_path / "file", Int4Config())
    copy = tmp_path / "copy"
    shutil.copytree(DEMO, copy)
    with pytest.raises(CheckpointPathError, match="is not empty"):
        quantize(copy, copy, Int4Config())
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "else")
    for bad in (tmp_path / "link", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointPathError, match="no folder can be made there|is a file"):
            quantize(DEMO, bad, Int4Config())
    with pytest.raises(RequestError, match="give that too"):
        quantize(DEMO, tmp_path / "out", Int4Config(), held_out="text")
    for text, held_out in (("short", None), ("word " * 2000, "")):
        with pytest.raises(RequestError, match="tokens to calibrate with and .* to compare on"):
            quantize(DEMO, tmp_path / "out", Int4Config(), text=text, held_out=held_out)
    with pytest.raises(ConfigError, match="no projection is named x_proj"):
        quantize(DEMO, tmp_path / "out", Int4Config(skip=["lm_head", "x_proj"]))
    assert not (tmp_path / "out").exists()


def test_int4_kernels_are_on_the_path(monkeypatch):
    """An int4 model runs its int4 projections on the fastest backend here, and no dense weight of them exists."""
    model = LlamaForCausalLM.from_pretrained(DEMO, quantization="int4")
    assert len(list(int4_linears(model))) == 28
    assert sum(p.numel() for p in model.parameters() if p.is_floating_point()) < 1.2 * 2048 * 256
    calls = []
    from llama_fast.ops import reference_int4

    right = reference_int4.int4_linear
    monkeypatch.setattr(reference_int4, "int4_linear", lambda *args: calls.append(1) or right(*args))
    ids = torch.arange(20)[None]
    expected = LlamaForCausalLM.from_pretrained(DEMO, quantization="int4", backend="reference")(ids).logits
    assert len(calls) == 4 * (5 + 2 * 2), "one a projection, but gate and up have 640 outputs and go in two"
    calls.clear()
    got = model(ids).logits
    assert model.prepared[0] == reference.__name__ or not calls
    assert (got - expected).norm() / expected.norm() < 0.02


def test_reading_keeps_the_words_mapped(tmp_path):
    model = LlamaForCausalLM.from_pretrained(DEMO, quantization="int4")
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    copied = LlamaForCausalLM.from_pretrained(tmp_path, load="copy")

    def is_mapped(model):
        address = model.model.layers[0].mlp.down_proj.weight_packed.data_ptr()
        lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
        ranges = [line[0].split("-") for line in lines if line[-1] == str(tmp_path / "model.safetensors")]
        return any(int(start, 16) <= address < int(end, 16) for start, end in ranges)

    assert is_mapped(again) and not is_mapped(copied)
    for (_, linear), (_, other) in zip(int4_linears(again), int4_linears(copied), strict=True):
        assert torch.equal(linear.weight_packed, other.weight_packed)


@pytest.mark.skipif(not WIDE.exists(), reason="../shared/data is not here")
def test_the_wide_stories_model(tmp_path):
    text = Path("../shared/data/text/tinystories_2MB.txt").read_text()[:12000]
    report = quantize(WIDE, tmp_path / "out", Int4Config(), text=text, calibration_tokens=1024)
    assert report.calibrated.kl < report.plain.kl and not report.verified.problems


def test_an_int4_file_is_read_once_and_without_alarm(tmp_path, monkeypatch, caplog):
    """Words are no numbers: as fp16 many would be infinite."""
    from llama_fast.model.checkpoint_files import CheckpointFiles

    LlamaForCausalLM.from_pretrained(DEMO, quantization="int4", dtype="float16").save_pretrained(tmp_path)
    for load, method in (("mmap", "tensor"), ("copy", "copy")):
        right, read = getattr(CheckpointFiles, method), []
        with monkeypatch.context() as patch:
            patch.setattr(
                CheckpointFiles,
                method,
                lambda self, name, right=right, read=read: read.append(name) or right(self, name),
            )
            LlamaForCausalLM.from_pretrained(tmp_path, load=load)
        assert len(read) == len(set(read)) == 28 * 3 + 10
    assert not caplog.records


def test_int4_weights_are_not_trained():
    from llama_fast.errors import UnsupportedError

    model = LlamaForCausalLM.from_pretrained(DEMO, quantization="int4")
    with pytest.raises(UnsupportedError, match="int4 weights cannot be trained"):
        model.requires_grad_(True)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    # What is not int4 may be, also behind int4 weights.
    model.model.norm.weight.requires_grad_(True)
    model.model.layers[0].input_layernorm.weight.requires_grad_(True)
    ids = torch.arange(12)[None]
    model(ids, labels=ids).loss.backward()
    assert model.model.norm.weight.grad.abs().sum() > 0
    assert model.model.layers[0].input_layernorm.weight.grad.abs().sum() > 0


def test_scales_that_a_cast_would_lose_are_refused():
    from llama_fast.errors import UnsupportedError

    model = LlamaForCausalLM.from_pretrained(DEMO, quantization="int4")
    model.model.layers[0].mlp.down_proj.weight_scale.data *= 1e-6
    with pytest.raises(UnsupportedError, match="no normal numbers in torch.float16; load the model again with dtype="):
        model.half()


def test_one_projection_at_a_time_is_in_memory(monkeypatch):
    """Beside the int4 model a load holds one float projection, whatever the model's size."""
    import weakref

    from llama_fast.model.checkpoint_files import CheckpointFiles

    right, alive, most = CheckpointFiles.copy, [], []

    def counted(self, name):
        tensor = right(self, name)
        alive.append(weakref.ref(tensor))
        most.append(sum(reference() is not None for reference in alive))
        return tensor

    monkeypatch.setattr(CheckpointFiles, "copy", counted)
    model = LlamaForCausalLM.from_pretrained(DEMO, quantization="int4")
    assert len(most) == len(list(int4_linears(model))) == 28
    # The next one is read before the last one's name is taken by it.
    assert max(most) <= 2
