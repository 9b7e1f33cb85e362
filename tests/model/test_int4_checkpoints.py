"""The packers of int4_checkpoints.py against the formats' definitions, an element at a time, and their own tools."""

import json
import random
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from llama_fast import demo
from tests.model.int4_checkpoints import HEAD, Awq, CompressedTensors, Gptq, Torchao, pack

ALL = [
    Gptq(),
    Gptq(group_size=64, symmetric=False, wide_zeros=True),
    Gptq(group_size=32, checkpoint_format="gptq_v2", symmetric=False, tool="gptqmodel"),
    Gptq(checkpoint_format=None, g_idx=False, zero_biases=True),
    Gptq(group_size=-1, tool="optimum"),
    Gptq(desc_act=True, symmetric=False, dtype=torch.bfloat16),
    Awq(),
    Awq(group_size=32, dense=("layers.1.mlp",)),
    CompressedTensors(),
    CompressedTensors(group_size=64, symmetric=False),
    CompressedTensors(group_size=32, symmetric=False, packed_zeros=False),
    CompressedTensors(actorder="group", symmetric=False, dtype=torch.float16),
    Torchao(group_size=64),
]


def nibble(word, i):
    return int(word) >> 4 * i & 15


def scalar_weight(checkpoint, options, module, n, k):
    """One weight, from the stored bits by the format's definition."""
    tensors = checkpoint.tensors
    if isinstance(options, Gptq):
        g = int(tensors[f"{module}.g_idx"][k]) if options.g_idx else k // options.group_size
        value = nibble(tensors[f"{module}.qweight"][k // 8, n], k % 8)
        zero = nibble(tensors[f"{module}.qzeros"][g, n // 8], n % 8) + (options.checkpoint_format != "gptq_v2")
        return (value - zero) * float(tensors[f"{module}.scales"][g, n])
    if isinstance(options, Awq):
        # Where each of eight outputs lies in a word: the inverse of the order in which AutoAWQ fills it.
        place, g = [0, 4, 1, 5, 2, 6, 3, 7][n % 8], k // options.group_size
        value = nibble(tensors[f"{module}.qweight"][k, n // 8], place)
        zero = nibble(tensors[f"{module}.qzeros"][g, n // 8], place)
        return (value - zero) * float(tensors[f"{module}.scales"][g, n])
    if isinstance(options, CompressedTensors):
        g = int(tensors[f"{module}.weight_g_idx"][k]) if options.actorder == "group" else k // options.group_size
        value = nibble(tensors[f"{module}.weight_packed"][n, k // 8], k % 8) - 8
        zero = 0
        if not options.symmetric and options.packed_zeros:
            zero = nibble(tensors[f"{module}.weight_zero_point"][n // 8, g], n % 8) - 8
        elif not options.symmetric:
            zero = int(tensors[f"{module}.weight_zero_point"][n, g])
        return (value - zero) * float(tensors[f"{module}.weight_scale"][n, g])
    g = k // options.group_size
    value = nibble(tensors[f"{module}._weight_qdata"][n, k // 2], k % 2)
    value -= 16 if value > 7 else 0
    scale, zero = tensors[f"{module}._weight_scale"][g, n], tensors[f"{module}._weight_zero_point"][g, n]
    return value * float(scale) + float(zero)


@pytest.mark.parametrize("options", ALL, ids=str)
def test_stored_bits_are_the_weights(options):
    checkpoint = pack(demo.PATH, options)
    assert len(checkpoint.weights) == 4 * 7 - 3 * len(options.dense)
    draw = random.Random(0)
    for module, weight in checkpoint.weights.items():
        out_features, in_features = weight.shape
        for _ in range(100):
            n, k = draw.randrange(out_features), draw.randrange(in_features)
            assert scalar_weight(checkpoint, options, module, n, k) == weight[n, k].item(), (module, n, k)


@pytest.mark.parametrize("options", ALL, ids=str)
def test_weights_are_near_the_source(options):
    checkpoint = pack(demo.PATH, replace(options, head=True))
    with safe_open(demo.PATH / "model.safetensors", "pt") as source:
        for module, weight in checkpoint.weights.items():
            dense = source.get_tensor(f"{module}.weight" if module != HEAD else "model.embed_tokens.weight").double()
            # A zero of 16 moves one group; it stands there for what a file may hold.
            error = (weight - dense)[getattr(options, "wide_zeros", 0) :].norm() / dense.norm()
            assert error < 0.2, (module, error)


@pytest.mark.parametrize("options", ALL, ids=str)
def test_stored_shapes_and_dtypes(tmp_path, options):
    folder = pack(demo.PATH, options).write(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    with safe_open(folder / "model.safetensors", "pt") as stored:
        shapes = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 it is no mapping
        metadata = stored.metadata()
    module = "model.layers.0.mlp.down_proj"  # [256, 640]
    found = {
        name.removeprefix(f"{module}."): (str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
        for name, tensor in shapes.items()
        if name.startswith(module)
    }
    groups = 1 if options.group_size == -1 else 640 // options.group_size
    scale = str(options.dtype).removeprefix("torch.")
    if isinstance(options, Gptq):
        expected = {
            "qweight": ("int32", [80, 256]),
            "qzeros": ("int32", [groups, 32]),
            "scales": (scale, [groups, 256]),
        }
        expected |= {"g_idx": ("int32", [640])} if options.g_idx else {}
        expected |= {"bias": (scale, [256])} if options.zero_biases else {}
    elif isinstance(options, Awq):
        expected = {
            "qweight": ("int32", [640, 32]),
            "qzeros": ("int32", [groups, 32]),
            "scales": (scale, [groups, 256]),
        }
    elif isinstance(options, CompressedTensors):
        expected = {
            "weight_packed": ("int32", [256, 80]),
            "weight_scale": (scale, [256, groups]),
            "weight_shape": ("int64", [2]),
        }
        if not options.symmetric:
            expected["weight_zero_point"] = ("int32", [32, groups]) if options.packed_zeros else ("int8", [256, groups])
        expected |= {"weight_g_idx": ("int32", [640])} if options.actorder == "group" else {}
    else:
        expected = {
            "_weight_qdata": ("int8", [256, 320]),
            "_weight_scale": (scale, [groups, 256]),
            "_weight_zero_point": (scale, [groups, 256]),
        }
        assert json.loads(metadata[f"{module}.weight"])["_type"] == "Int4Tensor"
    assert found == expected
    assert config["torch_dtype"] == scale
    assert config["quantization_config"]["quant_method"] in ("gptq", "awq", "compressed-tensors", "torchao")


def test_groups_by_activation_are_whole_and_mixed():
    group_of = pack(demo.PATH, Gptq(desc_act=True)).tensors["model.layers.0.mlp.down_proj.g_idx"]
    assert group_of.bincount().tolist() == [128] * 5
    assert (group_of.diff() < 0).any()


def test_first_format_stores_zeros_minus_one():
    first, second = (pack(demo.PATH, Gptq(checkpoint_format=name)) for name in ("gptq", "gptq_v2"))
    name = "model.layers.0.self_attn.q_proj.qzeros"
    assert set(first.tensors[name].flatten().tolist()) == {0x77777777}
    assert set(second.tensors[name].flatten().tolist()) == {0x88888888 - 2**32}


def test_side_files(tmp_path):
    for options, name in ((Gptq(side_file=True), "quantize_config.json"), (Awq(side_file=True), "quant_config.json")):
        folder = pack(demo.PATH, options).write(tmp_path / name)
        assert "quantization_config" not in json.loads((folder / "config.json").read_text())
        assert (folder / name).is_file()
        assert (folder / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    "options", [o for o in ALL if isinstance(o, CompressedTensors) and o.packed_zeros and not o.actorder], ids=str
)
def test_compressed_tensors_own_library_stores_the_same(options):
    compressors = pytest.importorskip("compressed_tensors.compressors", reason="compressed-tensors is not installed")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    arguments = quantization.QuantizationArgs(
        num_bits=4, group_size=options.group_size, symmetric=options.symmetric, strategy="group"
    )
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=arguments)
    checkpoint = pack(demo.PATH, options)
    for module, weight in checkpoint.weights.items():
        prefix = f"{module}."
        ours = {n.removeprefix(prefix): t for n, t in checkpoint.tensors.items() if n.startswith(prefix)}
        theirs = compressors.PackedQuantizationCompressor.decompress(dict(ours), scheme)
        assert torch.equal(theirs["weight"], weight.to(options.dtype)), module
        # Unpacked zeros come back with the weight; packed again, all is as it was.
        again = compressors.PackedQuantizationCompressor.compress(theirs, scheme)
        assert again.keys() == ours.keys()
        for name, tensor in ours.items():
            assert torch.equal(again[name], tensor) and again[name].dtype == tensor.dtype, (module, name)


def test_torchao_own_library_reads_the_same():
    support = pytest.importorskip("torchao.prototype.safetensors.safetensors_support", reason="torchao is absent")
    checkpoint = pack(demo.PATH, Torchao())
    metadata = {name: text for name, text in checkpoint.metadata.items() if name != "format"}
    state, rest = support.unflatten_tensor_state_dict(checkpoint.tensors, metadata)
    assert not rest
    tensor = state["model.layers.0.mlp.down_proj.weight"]
    assert type(tensor).__name__ == "Int4Tensor" and tensor.shape == (256, 640) and tensor.block_size == [1, 128]
    again, _ = support.flatten_tensor_state_dict(state)
    assert again.keys() == checkpoint.tensors.keys()
