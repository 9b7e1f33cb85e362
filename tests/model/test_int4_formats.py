"""Checkpoints of 4-bit integers, from int4_checkpoints.py's packers and the formats' own tools, loaded."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from llama_fast import LlamaForCausalLM, demo
from llama_fast.errors import (
    CheckpointFormatError,
    CheckpointMismatchError,
    ConfigError,
    UnsupportedError,
)
from llama_fast.ops.int4 import Int4Linear
from tests.model.checkpoint_samples import same_bits
from tests.model.int4_checkpoints import Awq, CompressedTensors, Gptq, Options, Torchao, pack, random_source

MLP_1 = (r"layers\.1\.mlp",)
IN_ORDER = [
    *[Gptq(group_size=size, symmetric=symmetric) for size in (128, 64, 32) for symmetric in (True, False)],
    Gptq(checkpoint_format=None),
    Gptq(symmetric=False, checkpoint_format=None, g_idx=False, config={"sym": False}),
    *[Gptq(checkpoint_format="gptq_v2", symmetric=symmetric) for symmetric in (True, False)],
    Gptq(checkpoint_format="GPTQ_V2", symmetric=False, group_size=32),
    Gptq(symmetric=False, wide_zeros=True),
    Gptq(g_idx=False),
    Gptq(zero_biases=True),
    Gptq(tool="gptqmodel", dtype=torch.bfloat16),
    Gptq(tool="optimum"),
    Gptq(tool="optimum", dense=(r"mlp\.down_proj", r"self_attn\.o_proj")),
    Gptq(side_file=True),
    Gptq(side_file=True, symmetric=False, group_size=64, checkpoint_format=None),
    *[Awq(group_size=size) for size in (128, 64, 32)],
    Awq(dtype=torch.bfloat16),
    Awq(dense=MLP_1),
    Awq(config={"version": "GEMM"}),
    Awq(side_file=True),
    *[CompressedTensors(group_size=size, symmetric=symmetric) for size in (128, 64, 32) for symmetric in (True, False)],
    CompressedTensors(dtype=torch.float16, symmetric=False),
    *[CompressedTensors(packed_zeros=False, symmetric=False, group_size=size) for size in (128, 32)],
    *[CompressedTensors(actorder=order) for order in ("weight", "static")],
    CompressedTensors(targets=(r"re:.*self_attn\..*", r"re:.*mlp\..*"), ignore=None),
    CompressedTensors(targets=(r"re:.*self_attn\..*",), ignore=(), dense=("mlp",)),
    CompressedTensors(dense=MLP_1, ignore=("lm_head", r"re:.*layers\.1\.mlp\..*")),
    CompressedTensors(dense=(r"0\.mlp\.down_proj",), ignore=("lm_head", "model.layers.0.mlp.down_proj")),
]
PERMUTED = [
    *[Gptq(desc_act=True, group_size=size, symmetric=symmetric) for size in (128, 32) for symmetric in (True, False)],
    Gptq(desc_act=True, checkpoint_format="gptq_v2", symmetric=False, tool="gptqmodel", group_size=64),
    *[CompressedTensors(actorder="group", symmetric=symmetric) for symmetric in (True, False)],
    CompressedTensors(actorder="group", group_size=32, dtype=torch.float16),
]


def load(folder, **options):
    return LlamaForCausalLM.from_pretrained(folder, device="cpu", **options)


def weight_of(model, name):
    module = model.get_submodule(name)
    assert isinstance(module, Int4Linear), name
    return module.unpacked().dequantized(dtype=torch.float64)


def quantized_modules(model):
    return {name for name, module in model.named_modules() if isinstance(module, Int4Linear)}


def assert_kept(model, checkpoint):
    state = dict(model.named_parameters())
    assert [name for name, tensor in checkpoint.kept.items() if not same_bits(state[name], tensor)] == []
    assert quantized_modules(model) == checkpoint.weights.keys()


def assert_right(model, checkpoint):
    wrong = [name for name, weight in checkpoint.weights.items() if not torch.equal(weight_of(model, name), weight)]
    assert wrong == []


@pytest.mark.parametrize("options", IN_ORDER, ids=str)
def test_weights_are_those_of_the_format(tmp_path, options):
    checkpoint = pack(demo.PATH, options)
    model = load(checkpoint.write(tmp_path), dtype="auto")
    assert model.dtype == options.dtype
    assert_kept(model, checkpoint)
    assert_right(model, checkpoint)


def logits(folder, **options):
    input_ids = torch.randint(0, 2048, (1, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return load(folder, backend="reference", **options)(input_ids).logits.double()


def assert_computes(folder, checkpoint, dtype, dense_folder):
    """At most twice the error that the dense model of these weights has in the same dtype."""
    checkpoint.write_dense(dense_folder)
    exact = logits(dense_folder, dtype=torch.float32)
    rounded = (logits(dense_folder, dtype=dtype) - exact).norm()
    error = (logits(folder, dtype="auto") - exact).norm()
    assert error <= 2 * rounded, f"{error / exact.norm():.2e} is more than twice {rounded / exact.norm():.2e}"


@pytest.mark.parametrize(
    "options",
    [
        Gptq(symmetric=False, group_size=32),
        Gptq(zero_biases=True),
        Awq(dense=MLP_1),
        CompressedTensors(),
        CompressedTensors(symmetric=False, group_size=64),
    ],
    ids=str,
)
def test_logits_are_those_of_the_dense_weights(tmp_path, options):
    checkpoint = pack(demo.PATH, options)
    folder = checkpoint.write(tmp_path / "int4")
    assert_computes(folder, checkpoint, options.dtype, tmp_path / "dense")


def test_logits_of_columns_in_another_order_differ(tmp_path):
    """The control of the tests above: that the order of the columns shows in them."""
    checkpoint = pack(demo.PATH, Gptq())
    folder = checkpoint.write(tmp_path / "int4")
    name = "model.layers.2.self_attn.q_proj"
    checkpoint.weights[name] = checkpoint.weights[name].roll(1, dims=1)
    with pytest.raises(AssertionError, match="more than twice"):
        assert_computes(folder, checkpoint, torch.float16, tmp_path / "dense")


@pytest.mark.parametrize("options", [Gptq(group_size=64), Awq(), CompressedTensors(symmetric=False)], ids=str)
def test_both_ways_of_reading_give_the_same(tmp_path, options):
    folder = pack(demo.PATH, options).write(tmp_path)
    mapped, copied = (load(folder, load=how) for how in ("mmap", "copy"))
    assert quantized_modules(mapped) == quantized_modules(copied) != set()
    state = copied.state_dict()
    assert [name for name, tensor in mapped.state_dict().items() if not same_bits(tensor, state[name])] == []


@pytest.mark.parametrize("options", [Gptq(symmetric=False), Awq(), CompressedTensors()], ids=str)
def test_weights_in_fp32_are_the_same(tmp_path, options):
    checkpoint = pack(demo.PATH, options)
    assert_right(load(checkpoint.write(tmp_path), dtype=torch.float32), checkpoint)


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32])
def test_scales_of_another_dtype_are_rounded_to_the_models(tmp_path, scale_dtype):
    checkpoint = pack(demo.PATH, CompressedTensors(scale_dtype=scale_dtype, symmetric=False))
    model = load(checkpoint.write(tmp_path), dtype="auto")
    for name, weight in checkpoint.weights.items():
        scales = checkpoint.tensors[f"{name}.weight_scale"].double()
        rounded = scales.to(torch.bfloat16).double()
        integers = (weight.unflatten(1, (-1, 128)) / scales[..., None]).round()
        assert torch.equal(weight_of(model, name), (integers * rounded[..., None]).flatten(1)), name


@pytest.mark.parametrize("scale", [1e-6, 1e-9, 1e6])
def test_I02_scales_outside_of_the_dtype_they_are_loaded_in(tmp_path, scale):
    checkpoint = pack(demo.PATH, CompressedTensors())
    name = "model.layers.3.mlp.up_proj.weight_scale"
    checkpoint.tensors[name] = checkpoint.tensors[name].clone()
    checkpoint.tensors[name][3, 1] = scale
    folder = checkpoint.write(tmp_path)
    load(folder, dtype="auto")
    with pytest.raises(CheckpointFormatError, match=name):
        load(folder, dtype=torch.float16)


def test_an_order_of_activation_that_is_the_files(tmp_path):
    """desc_act with static groups: g_idx is what its absence says."""
    checkpoint = pack(demo.PATH, Gptq(config={"desc_act": True, "static_groups": True}))
    assert_right(load(checkpoint.write(tmp_path)), checkpoint)


@pytest.mark.parametrize("options", PERMUTED, ids=str)
def test_other_orders_of_columns_are_refused_by_name(tmp_path, options):
    checkpoint = pack(demo.PATH, options)
    with pytest.raises(UnsupportedError, match=r"g_idx.*desc_act"):
        load(checkpoint.write(tmp_path))


@pytest.mark.parametrize(
    "options", [Gptq(head=True, tool="gptqmodel"), CompressedTensors(head=True, ignore=())], ids=str
)
def test_I07_quantized_head(tmp_path, options):
    checkpoint = pack(demo.PATH, options)
    folder = checkpoint.write(tmp_path / "int4")
    model = load(folder)
    assert_kept(model, checkpoint)
    assert_right(model, checkpoint)
    assert_computes(folder, checkpoint, options.dtype, tmp_path / "dense")


def test_config_groups_with_sizes_of_their_own(tmp_path):
    """The attention's and the MLP's; a regular expression is narrower than a class."""
    wide = pack(demo.PATH, CompressedTensors(dense=("mlp",)))
    narrow = pack(demo.PATH, CompressedTensors(group_size=32, dense=("self_attn",), targets=("re:.*mlp.*",)))
    wide.tensors = {name: tensor for name, tensor in wide.tensors.items() if ".mlp." not in name}
    wide.tensors |= {name: tensor for name, tensor in narrow.tensors.items() if ".mlp." in name}
    wide.weights |= narrow.weights
    wide.quantization["config_groups"]["group_1"] = narrow.quantization["config_groups"]["group_0"]
    assert_right(load(wide.write(tmp_path)), wide)


def test_biases_of_projections(tmp_path):
    checkpoint = pack(demo.PATH, Gptq(zero_biases=True))
    checkpoint.config |= {"attention_bias": True, "mlp_bias": True}
    for name, weight in checkpoint.weights.items():
        checkpoint.biases[name] = torch.linspace(-1, 1, weight.shape[0], dtype=torch.float16)
        checkpoint.tensors[f"{name}.bias"] = checkpoint.biases[name]
    folder = checkpoint.write(tmp_path / "int4")
    model = load(folder)
    assert all(same_bits(model.get_submodule(name).bias.data, bias) for name, bias in checkpoint.biases.items())
    assert_computes(folder, checkpoint, torch.float16, tmp_path / "dense")


def test_one_group_of_all_features(tmp_path):
    """group_size=-1 is a group of 128 where there are 128 input features, and not one of ours where there are more."""
    with pytest.raises((UnsupportedError, ConfigError, CheckpointFormatError), match="group_size"):
        load(pack(demo.PATH, Gptq(group_size=-1)).write(tmp_path / "wide"))
    source = random_source(tmp_path / "source", hidden_size=128, intermediate_size=128)
    checkpoint = pack(source, Gptq(group_size=-1))
    model = load(checkpoint.write(tmp_path / "narrow"))
    assert_right(model, checkpoint)


@pytest.mark.parametrize("version", ["gemv", "gemv_fast", "marlin", "exllama", "llm-awq", "no_such_version"])
def test_other_versions_of_awq_are_refused_by_name(tmp_path, version):
    folder = pack(demo.PATH, Awq(config={"version": version})).write(tmp_path)
    with pytest.raises((UnsupportedError, ConfigError), match=f"version.*{version}"):
        load(folder)


@pytest.mark.parametrize("name", ["marlin", "bitblas", "gptq_v3"])
def test_other_formats_of_gptq_are_refused_by_name(tmp_path, name):
    folder = pack(demo.PATH, Gptq(config={"checkpoint_format": name})).write(tmp_path)
    with pytest.raises((UnsupportedError, ConfigError), match=f"checkpoint_format.*{name}"):
        load(folder)


def test_is_marlin_format_is_refused(tmp_path):
    folder = pack(demo.PATH, Gptq(config={"is_marlin_format": True})).write(tmp_path)
    with pytest.raises((UnsupportedError, ConfigError), match="is_marlin_format"):
        load(folder)


def test_dynamic_of_gptqmodel_is_refused_by_name(tmp_path):
    folder = pack(demo.PATH, Gptq(tool="gptqmodel", dense=MLP_1)).write(tmp_path)
    with pytest.raises((UnsupportedError, ConfigError), match="dynamic"):
        load(folder)


def test_a_matrix_of_quantized_and_dense_parts_is_refused_by_name(tmp_path):
    folder = pack(demo.PATH, Gptq(tool="optimum", dense=(r"mlp\.up_proj",))).write(tmp_path)
    with pytest.raises((UnsupportedError, CheckpointMismatchError), match="up_proj"):
        load(folder)


ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def _change(config, **fields):
    config["config_groups"]["group_0"] |= fields


def _change_weights(config, **fields):
    config["config_groups"]["group_0"]["weights"] |= fields


@pytest.mark.parametrize(
    ("change", "needle"),
    [
        (lambda config: config.update(format="int-quantized"), "int-quantized"),
        (lambda config: config.update(format="marlin-24"), "marlin-24"),
        (lambda config: config.update(kv_cache_scheme=ACTIVATIONS), "kv_cache_scheme"),
        (lambda config: config.update(transform_config={"config_groups": {"u": {"type": "hadamard"}}}), "transform"),
        (lambda config: config.update(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config"),
        (lambda config: _change(config, input_activations=ACTIVATIONS), "input_activations"),
        (lambda config: _change(config, output_activations=ACTIVATIONS), "output_activations"),
        (lambda config: _change_weights(config, type="float"), "type"),
        (lambda config: _change_weights(config, strategy="channel", group_size=None), "strategy|group_size"),
        (lambda config: _change_weights(config, num_bits=8), "num_bits"),
        (lambda config: _change_weights(config, dynamic=True), "dynamic"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_kinds_of_compressed_tensors_are_refused_by_name(tmp_path, change, needle):
    checkpoint = pack(demo.PATH, CompressedTensors())
    change(checkpoint.quantization)
    with pytest.raises((UnsupportedError, ConfigError), match=needle):
        load(checkpoint.write(tmp_path))


def test_torchao_is_refused_by_name(tmp_path):
    """Its zeros are real numbers, which (value - zero) * scale with an integer zero does not hold."""
    with pytest.raises(UnsupportedError, match="torchao"):
        load(pack(demo.PATH, Torchao()).write(tmp_path))


# Negative controls: what a wrong reading would look like


def test_first_format_called_the_second_has_other_weights(tmp_path):
    checkpoint = pack(demo.PATH, Gptq(symmetric=False))
    checkpoint.quantization["checkpoint_format"] = "gptq_v2"
    model = load(checkpoint.write(tmp_path))
    for name, weight in checkpoint.weights.items():
        scales = checkpoint.tensors[f"{name}.scales"].T.double().repeat_interleave(128, dim=1)
        assert torch.equal(weight_of(model, name), weight + scales)


@pytest.mark.parametrize(("stored", "called"), [("gptq", "gptq_v2"), ("gptq_v2", "gptq")])
def test_I04_symmetric_zeros_of_the_other_format_are_refused(tmp_path, stored, called):
    checkpoint = pack(demo.PATH, Gptq(checkpoint_format=stored))
    checkpoint.quantization["checkpoint_format"] = called
    with pytest.raises((ConfigError, CheckpointFormatError, CheckpointMismatchError), match="sym"):
        load(checkpoint.write(tmp_path))


@pytest.mark.parametrize(
    ("options", "config"),
    [
        (Awq(), {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": False}),
        (
            Gptq(),
            {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
        ),
        (CompressedTensors(), {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}),
    ],
    ids=["awq as gptq", "gptq as awq", "compressed-tensors as gptq"],
)
def test_I06_a_format_called_another_is_refused(tmp_path, options, config):
    checkpoint = pack(demo.PATH, options)
    checkpoint.config["quantization_config"] = config
    with pytest.raises((CheckpointMismatchError, CheckpointFormatError)):
        load(checkpoint.write(tmp_path))


def test_awq_in_the_plain_order_has_other_weights(tmp_path, monkeypatch):
    from tests.model import int4_checkpoints

    monkeypatch.setattr(int4_checkpoints, "AWQ_ORDER", tuple(range(8)))
    checkpoint = pack(demo.PATH, Awq())
    model = load(checkpoint.write(tmp_path))
    assert not any(torch.equal(weight_of(model, name), weight) for name, weight in checkpoint.weights.items())


# What the tools themselves write


def written_by_compressed_tensors(folder, checkpoint, options: Options):
    """The checkpoint's weights quantized by the library, in the folder that it and transformers write."""
    compressors = pytest.importorskip("compressed_tensors.compressors", reason="compressed-tensors is not installed")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    transformers = pytest.importorskip("transformers")

    arguments = quantization.QuantizationArgs(
        num_bits=4, group_size=options.group_size, symmetric=options.symmetric, strategy="group"
    )
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=arguments)
    config = quantization.QuantizationConfig(
        config_groups={"group_0": scheme}, ignore=["lm_head"], format="pack-quantized"
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(demo.PATH, dtype=options.dtype)
    quantization.apply_quantization_config(theirs, config)
    for name, weight in checkpoint.weights.items():
        module = theirs.get_submodule(name)
        module.weight.data.copy_(weight)
        module.weight_scale.data.copy_(checkpoint.tensors[f"{name}.weight_scale"])
        if not options.symmetric:
            zeros = pack(demo.PATH, replace(options, packed_zeros=False)).tensors[f"{name}.weight_zero_point"]
            module.weight_zero_point.data.copy_(zeros)
    compressor = compressors.ModelCompressor(quantization_config=config)
    compressor.compress_model(theirs)
    theirs.save_pretrained(folder)
    compressor.update_config(folder)
    return folder


@pytest.mark.parametrize("options", [CompressedTensors(), CompressedTensors(symmetric=False)], ids=str)
def test_what_compressed_tensors_writes(tmp_path, options):
    checkpoint = pack(demo.PATH, options)
    folder = written_by_compressed_tensors(tmp_path, checkpoint, options)
    stored = load_file(folder / "model.safetensors")
    assert stored.keys() == checkpoint.tensors.keys()
    assert [name for name, tensor in stored.items() if not same_bits(tensor, checkpoint.tensors[name])] == []
    model = load(folder, dtype="auto")
    assert_kept(model, checkpoint)
    assert_right(model, checkpoint)


@pytest.mark.parametrize(
    ("options", "their_class"),
    [(Gptq(), "GPTQConfig"), (Gptq(checkpoint_format="gptq_v2", symmetric=False), "GPTQConfig"), (Awq(), "AwqConfig")],
    ids=str,
)
def test_configs_as_transformers_writes_them(tmp_path, options, their_class):
    transformers = pytest.importorskip("transformers")
    arguments = {"bits": 4, "group_size": 128}
    if their_class == "GPTQConfig":
        arguments |= {"sym": options.symmetric, "format": options.checkpoint_format}
    theirs = getattr(transformers, their_class)(**arguments)
    checkpoint = pack(demo.PATH, options)
    content = json.loads(json.dumps(theirs.to_dict(), default=lambda value: value.value))
    checkpoint.config["quantization_config"] = content
    model = load(checkpoint.write(tmp_path), dtype="auto")
    assert_right(model, checkpoint)
