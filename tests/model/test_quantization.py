"""What a checkpoint's files and a user's arguments say of int4 weights, and the refusal of all else by name."""

import json

import pytest
from transformers import AwqConfig, BitsAndBytesConfig, FineGrainedFP8Config, GPTQConfig

from llama_fast import Int4Config, LlamaForCausalLM, TorchAoConfig
from llama_fast.config import LlamaConfig
from llama_fast.errors import CheckpointIOError, ConfigError, UnsupportedError
from llama_fast.model.int4_formats import Awq, CompressedTensors, Gptq
from llama_fast.model.quantization import Layout, requested, stored_scheme

Q, HEAD = "model.layers.0.self_attn.q_proj", "lm_head"
WEIGHTS = {"num_bits": 4, "group_size": 128, "type": "int", "symmetric": True, "strategy": "group", "dynamic": False}
GROUPS = {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}}
CT = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": GROUPS, "ignore": [HEAD]}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}


def scheme_of(tmp_path, content):
    return stored_scheme(LlamaConfig(quantization_config=content), tmp_path)


@pytest.mark.parametrize(
    ("content", "layout", "form"),
    [
        (GPTQ, Layout(128, True), Gptq(1, True)),
        (GPTQ | {"sym": False, "checkpoint_format": "gptq_v2"}, Layout(128, False), Gptq(2, False)),
        (GPTQ | {"format": "GPTQ", "group_size": 32, "dynamic": {}, "meta": {"x": 1}}, Layout(32, True), Gptq(1, True)),
        (GPTQ | {"group_size": -1}, None, None),
        (AWQ, Layout(64, False), Awq()),
        (AWQ | {"version": "GEMM", "modules_to_not_convert": ["mlp"]}, Layout(64, False), Awq()),
        (AWQ | {"modules_to_not_convert": ["self_attn"]}, None, Awq()),
        (CT, Layout(128, True), CompressedTensors(True)),
        (CT | {"ignore": ["re:.*q_proj"]}, None, CompressedTensors(True)),
    ],
)
def test_what_is_read(tmp_path, content, layout, form):
    scheme = scheme_of(tmp_path, content)
    if form is None:
        with pytest.raises(UnsupportedError, match=r"one group .*group_size=-1.* of the 256 inputs of model\.layers"):
            scheme.layout_of(Q, 256)
        assert scheme.layout_of(Q, 64) == Layout(64, True)
        return
    assert scheme.layout_of(Q, 256) == layout
    ignores_head = HEAD in content.get("ignore", [HEAD])
    assert (scheme.layout_of(HEAD, 256) is None) == ignores_head
    assert layout is None or scheme.format_of(layout) == form
    assert not scheme.rounds


def test_targets_of_compressed_tensors(tmp_path):
    small = {"targets": ["re:.*down_proj$", "model.layers.1.mlp.up_proj"], "weights": WEIGHTS | {"group_size": 32}}
    scheme = scheme_of(tmp_path, CT | {"config_groups": GROUPS | {"group_1": small}})
    assert scheme.layout_of("model.layers.3.mlp.down_proj", 256) == Layout(32, True)
    assert scheme.layout_of("model.layers.1.mlp.up_proj", 256) == Layout(32, True)
    assert scheme.layout_of("model.layers.0.mlp.up_proj", 256) == Layout(128, True)
    only = CT | {"config_groups": {"g": {"targets": ["re:model.layers.0.*"], "weights": WEIGHTS}}, "ignore": None}
    scheme = scheme_of(tmp_path, only)
    assert scheme.layout_of(Q, 256) and scheme.layout_of("model.layers.1.self_attn.q_proj", 256) is None
    assert scheme.layout_of(HEAD, 256) is None


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+$", "(a|aa)+b", "a*a*a*a*b", "x{1,9}", "a" * 201, ".?" * 26 + "!", "(.|.)" * 20 + "!", r"(a)\1", "(?=a)"],
)
def test_a_pattern_that_may_take_forever_is_refused(tmp_path, pattern):
    with pytest.raises(UnsupportedError, match="write the projections' names instead"):
        scheme_of(tmp_path, CT | {"ignore": [f"re:{pattern}"]}).layout_of(Q, 256)


def test_no_more_patterns_than_a_few(tmp_path):
    with pytest.raises(UnsupportedError, match="supported are 64 patterns"):
        scheme_of(tmp_path, CT | {"ignore": [f"re:.*x{index}" for index in range(100)]}).layout_of(Q, 256)
    usual = CT | {"ignore": [r"re:.*\.(q|k|v|o)_proj$", "re:.*lm_head", r"re:model\.layers\.\d+\.mlp\..*"]}
    assert scheme_of(tmp_path, usual).layout_of(Q, 256) is None


def test_I04_a_pattern_that_is_none(tmp_path):
    with pytest.raises(ConfigError, match=r"the pattern '\(' *, which is none"):
        scheme_of(tmp_path, CT | {"ignore": ["re:("]}).layout_of(Q, 256)


ELSE = "supported are 4 bits of gptq, awq and compressed-tensors"
INT4 = {"default": {"_type": "Int4WeightOnlyConfig", "_data": {"group_size": 64}}}


def changed(group):
    return CT | {"config_groups": {"group_0": GROUPS["group_0"] | group}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GPTQ | {"bits": 8}, f"'gptq', bits=8, group_size=128: {ELSE}"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, f"'bitsandbytes', bits=4: {ELSE}"),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, f"'fp8': {ELSE}"),
        ({"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4}}}, f"'hqq', bits=4: {ELSE}"),
        (
            {"quant_method": "torchao", "quant_type": INT4},
            "'torchao': its int4 weights have zeros that are",
        ),
        ({"quant_method": "torchao", "quant_type": "int8_weight_only"}, f"'torchao': {ELSE}"),
        ({"quant_method": "exl2", "bits": 4.65, "head_bits": 6}, rf"'exl2', bits=4\.65: {ELSE}"),
        ({"bits": 4, "group_size": 64}, f"'mlx', bits=4, group_size=64: {ELSE}"),
        ({"quant_method": "no_such_method"}, f"'no_such_method': {ELSE}"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format='marlin': supported is 'gptq' or 'gptq_v2'"),
        (GPTQ | {"is_marlin_format": True}, "is_marlin_format=True: supported is null"),
        (GPTQ | {"dynamic": {"-:.*": {}}}, "dynamic=.*: supported is null"),
        (GPTQ | {"pack_dtype": "int64"}, "pack_dtype='int64': supported is 'int32'"),
        (GPTQ | {"group_size": 1024}, "group_size=1024: supported are 32, 64, 128"),
        (AWQ | {"version": "gemv"}, "version='gemv': supported is 'gemm'"),
        (AWQ | {"zero_point": False}, "zero_point=False: supported is true"),
        (CT | {"format": "marlin-24"}, "format='marlin-24': supported is 'pack-quantized'"),
        (CT | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme=.*: supported is null"),
        (CT | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config=.*: supported is null"),
        (CT | {"transform_config": {"config_groups": {}}}, "transform_config=.*: supported is null"),
        (CT | {"quantization_status": "frozen"}, "quantization_status='frozen': supported is 'compressed'"),
        (changed({"input_activations": {"num_bits": 8}}), "input_activations=.*: supported is null"),
        (changed({"weights": WEIGHTS | {"num_bits": 8}}), "num_bits=8: supported is 4"),
        (changed({"weights": WEIGHTS | {"type": "float"}}), "type='float': supported is 'int'"),
        (changed({"weights": WEIGHTS | {"strategy": "tensor"}}), "strategy='tensor': supported is 'group'"),
        (changed({"weights": WEIGHTS | {"dynamic": True}}), "dynamic=True: supported is null"),
    ],
)
def test_what_is_not_read_is_refused_by_name(tmp_path, content, message):
    with pytest.raises(UnsupportedError, match=rf"config\.json: quantization_config.*{message}"):
        scheme_of(tmp_path, content)


@pytest.mark.parametrize(
    ("theirs", "supported"),
    [
        (GPTQConfig(bits=4, group_size=128, dataset="c4", tokenizer="x"), True),
        (GPTQConfig(bits=4, group_size=128, dataset="c4", tokenizer="x", desc_act=True, sym=False), True),
        (AwqConfig(bits=4, group_size=128), True),
        (BitsAndBytesConfig(load_in_8bit=True), False),
        (FineGrainedFP8Config(), False),
    ],
    ids=lambda value: getattr(value, "quant_method", ""),
)
def test_what_transformers_writes(tmp_path, theirs, supported):
    content = json.loads(json.dumps(theirs.to_dict(), default=str))
    content["quant_method"] = theirs.quant_method.value
    if supported:
        assert scheme_of(tmp_path, content).layout_of(Q, 256).group_size == 128
    else:
        with pytest.raises(UnsupportedError, match=ELSE):
            scheme_of(tmp_path, content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"bits": 4}, "quant_method=None"),
        ({}, "quant_method=None"),
        ({"quant_method": 5}, "quant_method=5"),
        ({"quant_method": "gptq", "bits": "four"}, "bits='four'"),
        (GPTQ | {"group_size": 0}, "group_size=0; use 32, 64, 128"),
        (GPTQ | {"group_size": "128"}, "group_size='128'"),
        (GPTQ | {"group_size": -7}, "group_size=-7"),
        ({"quant_method": "gptq", "bits": 4}, "has no group_size"),
        (GPTQ | {"sym": "yes"}, "sym='yes'; use true or false"),
        (GPTQ | {"format": "gptq", "checkpoint_format": "gptq_v2"}, "that differ: gptq, gptq_v2"),
        (GPTQ | {"modules_in_block_to_quantize": ["q_proj"]}, "use a list of lists of names"),
        (AWQ | {"modules_to_not_convert": "lm_head"}, "use a list of names"),
        (CT | {"config_groups": {}}, r"config_groups=\{\}; use an object of at least one group"),
        (CT | {"config_groups": {"g": 1}}, "use an object with targets and weights"),
        ([1], r"quantization_config=\[1\]; use an object"),
        ("gptq", "quantization_config='gptq'; use an object"),
    ],
)
def test_I04_malformed(tmp_path, content, message):
    with pytest.raises(ConfigError, match=message):
        scheme_of(tmp_path, content)


SIDE_FILES = {
    "quantize_config.json": ({"bits": 4, "group_size": 128, "desc_act": False}, Gptq(1, True)),
    "quant_config.json": ({"w_bit": 4, "q_group_size": 128, "zero_point": True, "version": "GEMM"}, Awq()),
    "hf_quant_config.json": ({"quantization": {"quant_algo": "FP8"}}, None),
}


@pytest.mark.parametrize(("name", "case"), SIDE_FILES.items(), ids=SIDE_FILES)
def test_files_that_older_tools_wrote_beside_config_json(tmp_path, name, case):
    content, form = case
    (tmp_path / name).write_text(json.dumps(content))
    if form is None:
        with pytest.raises(UnsupportedError, match=rf"/{name} has quant_method='modelopt': {ELSE}"):
            stored_scheme(LlamaConfig(), tmp_path)
    else:
        scheme = stored_scheme(LlamaConfig(), tmp_path)
        assert scheme.format_of(scheme.layout_of(Q, 256)) == form
    (tmp_path / name).write_text("[")
    with pytest.raises(ConfigError, match=rf"/{name}: is not strict JSON"):
        stored_scheme(LlamaConfig(), tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(CheckpointIOError, match=rf"/{name}: is a folder"):
        stored_scheme(LlamaConfig(), tmp_path)


def test_a_plain_checkpoint_says_nothing(tmp_path):
    assert stored_scheme(LlamaConfig(), tmp_path) is None
    assert stored_scheme(LlamaConfig(quantization_config=None), tmp_path) is None
    (tmp_path / "quantization.md").touch()
    assert stored_scheme(LlamaConfig(), tmp_path) is None


def test_compression_config_is_the_older_name(tmp_path):
    nested = {"quantization_config": {n: v for n, v in CT.items() if n != "quant_method"}, "sparsity_config": {}}
    for content in (CT, nested):
        scheme = stored_scheme(LlamaConfig(compression_config=content), tmp_path)
        assert scheme.layout_of(Q, 256) == Layout(128, True)


# --- what a user asks for -------------------------------------------------------------------------------------------


def test_int4_config():
    scheme = requested("int4")
    assert scheme.rounds and scheme.layout_of(Q, 256) == Layout(128, True) and scheme.layout_of(HEAD, 256) is None
    scheme = requested(Int4Config(32, symmetric=False, skip=["down_proj", "layers.1"]))
    assert scheme.layout_of(HEAD, 256) is None, "the head has an argument of its own"
    assert scheme.layout_of("model.layers.0.mlp.down_proj", 256) is None
    assert scheme.layout_of("model.layers.1.mlp.up_proj", 256) is None
    assert scheme.layout_of("model.layers.11.mlp.up_proj", 256) == Layout(32, False)
    assert requested(Int4Config(lm_head="int4")).layout_of(HEAD, 256) == Layout(128, True)
    once = Int4Config(skip=(name for name in ["down_proj"]))
    assert once.skip == ("down_proj",) and once.scheme().layout_of("model.layers.0.mlp.down_proj", 256) is None
    assert requested(None) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"group_size": 100}, "group_size=100; use 32, 64, 128"),
        ({"group_size": True}, "group_size=True"),
        ({"symmetric": 1}, "symmetric=1; use True or False"),
        ({"skip": "lm_head"}, "skip='lm_head'; use a list"),
        ({"skip": [""]}, "use a list of names"),
        ({"skip": 5}, "skip=5; use a list of names"),
        ({"skip": None}, "skip=None; use a list of names"),
        ({"lm_head": "bf16"}, "lm_head='bf16'; use 'keep' or 'int4'"),
    ],
)
def test_a_wrong_int4_config(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Int4Config(**arguments)


@pytest.mark.parametrize("value", ["int8", 4, True, {"bits": 4}])
def test_another_quantization(value):
    with pytest.raises(ConfigError, match="use 'int4', an Int4Config or None"):
        requested(value)


def demo_model(**arguments):
    from llama_fast import demo

    return LlamaForCausalLM.from_pretrained(demo.__path__[0], backend="reference", **arguments)


def test_P4_E4_F9_torchao_config_of_the_page():
    from transformers import TorchAoConfig as Theirs

    model = demo_model(quantization_config=TorchAoConfig("int4_weight_only", group_size=128))
    down = model.model.layers[0].mlp.down_proj
    assert (down.group_size, down.weight_zero_point is None) == (128, False)
    assert type(model.lm_head).__name__ == "Linear" and model.lm_head.weight is model.model.embed_tokens.weight
    skipped = TorchAoConfig("int4_weight_only", ["o_proj"], include_input_output_embeddings=True, group_size=32)
    model = demo_model(quantization_config=skipped)
    assert type(model.model.layers[0].self_attn.o_proj).__name__ == "Linear" and model.lm_head.group_size == 32

    class Config(Theirs):  # without torchao installed transformers makes none
        def __init__(self, content):
            self.content = content

        def to_dict(self):
            return self.content

    content = {"quant_method": "torchao", "quant_type": "int4_weight_only", "quant_type_kwargs": {"group_size": 64}}
    assert demo_model(quantization_config=Config(content)).model.layers[0].mlp.up_proj.group_size == 64
    content = {"quant_method": "torchao", "quant_type": INT4}
    assert demo_model(quantization_config=content).model.layers[0].mlp.up_proj.group_size == 64
    with pytest.raises(UnsupportedError, match="int8_weight_only.*supported .* is torchao's int4_weight_only"):
        demo_model(quantization_config=content | {"quant_type": "int8_weight_only"})
    with pytest.raises(UnsupportedError, match="quant_type='int8_weight_only'"):
        TorchAoConfig("int8_weight_only")
    with pytest.raises(UnsupportedError, match=r"TorchAoConfig\(bits=\.\.\.\)"):
        TorchAoConfig(bits=4)
    with pytest.raises(ConfigError, match="give one of them"):
        demo_model(quantization="int4", quantization_config=content)
    with pytest.raises(ConfigError, match="quantization_config=7; use an Int4Config"):
        demo_model(quantization_config=7)


def test_a_group_must_divide_and_a_name_must_name_something():
    with pytest.raises(ConfigError, match=r"no projection is named dwon_proj; there are model\.layers\.0\.self_attn"):
        demo_model(quantization=Int4Config(skip=["lm_head", "dwon_proj"]))
    with pytest.raises(ConfigError, match="no projection is int4"):
        demo_model(quantization=Int4Config(skip=["layers", "lm_head"]))


def test_projections_that_run_together_are_int4_together():
    from llama_fast.errors import CheckpointMismatchError

    with pytest.raises(CheckpointMismatchError, match="q_proj float, k_proj 128, v_proj 128; they run as one matrix"):
        demo_model(quantization=Int4Config(skip=["q_proj", "lm_head"]))
