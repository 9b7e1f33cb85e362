"""LlamaConfig: the page's fields, v4 and v5 files, and what is refused."""

import copy
import inspect
import json
import pickle

import pytest
import torch
from transformers import LlamaConfig as HFConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llama_fast.config import ACTIVATIONS, LlamaConfig
from llama_fast.errors import CheckpointIOError, ConfigError, brief
from llama_fast.model.rope import RotaryEmbedding
from llama_fast.ops import activations

# The page's list: order and defaults are the contract.
PAGE = {
    "C1": ("vocab_size", 32000),
    "C2": ("hidden_size", 4096),
    "C3": ("intermediate_size", 11008),
    "C4": ("num_hidden_layers", 32),
    "C5": ("num_attention_heads", 32),
    "C6": ("num_key_value_heads", None),
    "C7": ("hidden_act", "silu"),
    "C8": ("max_position_embeddings", 2048),
    "C9": ("initializer_range", 0.02),
    "C10": ("rms_norm_eps", 1e-6),
    "C11": ("use_cache", True),
    "C12": ("pad_token_id", None),
    "C13": ("bos_token_id", 1),
    "C14": ("eos_token_id", 2),
    "C15": ("pretraining_tp", 1),
    "C16": ("tie_word_embeddings", False),
    "C17": ("rope_theta", 10000.0),
    "C18": ("rope_scaling", None),
    "C19": ("attention_bias", False),
    "C20": ("attention_dropout", 0.0),
    "C21": ("mlp_bias", False),
    "C22": ("head_dim", None),
}
SHAPE = {"vocab_size": 32, "intermediate_size": 16, "num_hidden_layers": 1}  # what a file must have beside TINY
TINY = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}
SCALINGS = {
    "default": {},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    "yarn": {"rope_scaling": YARN},
    "longrope_factor": {"rope_scaling": {**LONGROPE, "factor": 4.0}},
    "longrope_original_in_dict": {"rope_scaling": {**LONGROPE, "original_max_position_embeddings": 8}},
    "longrope_original_at_top": {"rope_scaling": LONGROPE, "original_max_position_embeddings": 8},
    "longrope_both": {"rope_scaling": {**LONGROPE, "factor": 2.0}, "original_max_position_embeddings": 8},
    "llama3": {"rope_scaling": LLAMA3},
}


def write(folder, content):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


def their_inv_freq(config):
    """transformers' short and long inverse frequencies and attention scaling."""
    params = config.rope_parameters
    if params["rope_type"] == "default":
        return [params]
    compute = ROPE_INIT_FUNCTIONS[params["rope_type"]]
    return [[x.tolist() if isinstance(x, torch.Tensor) else x for x in compute(config, None, n)] for n in (1, 1000)]


# --- fields ----------------------------------------------------------------------------------------------------------


def test_C1_to_C22_order_and_defaults():
    parameters = list(inspect.signature(LlamaConfig).parameters.values())
    assert [(p.name, p.default) for p in parameters[:-1]] == list(PAGE.values())
    assert parameters[-1].kind is inspect.Parameter.VAR_KEYWORD


@pytest.mark.parametrize(("name", "default"), PAGE.values(), ids=PAGE)
def test_default_attribute(name, default):
    expected = {"num_key_value_heads": 32, "head_dim": 128}.get(name, default)
    assert getattr(LlamaConfig(), name) == expected


def test_C6_C22_resolved():
    config = LlamaConfig(hidden_size=96, num_attention_heads=6, num_key_value_heads=2)
    assert (config.num_key_value_heads, config.head_dim) == (2, 16)
    assert LlamaConfig(hidden_size=100, num_attention_heads=6, head_dim=32).head_dim == 32


def test_C7_activation_names_are_those_that_ops_has():
    assert set(ACTIVATIONS) == set(activations.ACTIVATIONS)
    for name in ACTIVATIONS:
        assert LlamaConfig(hidden_act=name).hidden_act == name
    assert LlamaConfig(hidden_act=torch.tanh).hidden_act is torch.tanh


def test_C14_list_of_eos_ids():
    assert LlamaConfig(eos_token_id=[3, 4]).eos_token_id == [3, 4]


def test_C15_pretraining_tp_warns(caplog):
    config = LlamaConfig(pretraining_tp=2)
    assert config.pretraining_tp == 2
    assert "pretraining_tp=2 has no effect" in caplog.text


def test_C23_unknown_keys_round_trip(tmp_path):
    extra = {"is_llama_config": True, "transformers.js_config": {"dtypes": {"q4f16": "float16"}}, "temperature": 0.6}
    config = LlamaConfig(**TINY, **extra)
    config.save_pretrained(tmp_path)
    loaded = LlamaConfig.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in extra} == extra
    assert loaded == config


def test_C30_identity():
    assert LlamaConfig.model_type == "llama"
    assert LlamaConfig.keys_to_ignore_at_inference == ["past_key_values"]
    config = LlamaConfig(architectures=["LlamaForCausalLM"], transformers_version="4.56.2", _name_or_path="x")
    assert config.to_diff_dict()["architectures"] == ["LlamaForCausalLM"]
    assert config.to_diff_dict()["transformers_version"] == "4.56.2"
    assert config.to_dict()["_name_or_path"] == "x"
    assert "_name_or_path" not in config.to_diff_dict()


def test_C31_labels(tmp_path, caplog):
    assert LlamaConfig().num_labels == 2
    assert LlamaConfig(num_labels=3).id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert LlamaConfig(num_labels=3).label2id == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    named = LlamaConfig(id2label={"0": "no", "1": "yes", "2": "maybe"}, label2id={"no": 0, "yes": 1, "maybe": 2})
    assert (named.num_labels, named.id2label[2]) == (3, "maybe")
    named.save_pretrained(tmp_path)
    assert LlamaConfig.from_pretrained(tmp_path).id2label == named.id2label
    assert HFConfig.from_pretrained(tmp_path).id2label == named.id2label
    assert not caplog.records
    assert LlamaConfig(num_labels=5, id2label={"0": "a", "1": "b"}).num_labels == 2
    assert "num_labels=5 disagrees" in caplog.text
    named.num_labels = 4
    assert named.id2label[3] == "LABEL_3"


def test_C32_problem_type():
    assert LlamaConfig(problem_type="regression").problem_type == "regression"
    with pytest.raises(ConfigError, match=r"problem_type='ranking'.*single_label_classification"):
        LlamaConfig(problem_type="ranking")


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["bfloat16", "torch.bfloat16", torch.bfloat16])
def test_C33_dtype_and_its_alias(field, value):
    config = LlamaConfig(**{field: value})
    assert config.dtype is config.torch_dtype is torch.bfloat16
    config.torch_dtype = "float16"
    assert config.dtype is torch.float16
    assert config.to_dict()["torch_dtype"] == "float16"


def test_C33_dtype_wins_over_torch_dtype():
    assert LlamaConfig(dtype="float16", torch_dtype="float32").dtype is torch.float16
    assert LlamaConfig().dtype is None


def test_C34_output_attentions():
    config = LlamaConfig()
    assert (config.return_dict, config.output_hidden_states, config.output_attentions) == (True, False, False)
    config.output_attentions = True
    assert config._attn_implementation == "eager"
    with pytest.raises(ConfigError, match=r"attn_implementation='eager', not 'sdpa'"):
        LlamaConfig(attn_implementation="sdpa").output_attentions = True


def test_C37_equality_and_copies():
    a, b = LlamaConfig(**TINY, rope_scaling=LLAMA3), LlamaConfig(**TINY, rope_scaling=LLAMA3)
    assert a == b == copy.deepcopy(a) == pickle.loads(pickle.dumps(a))
    b.rope_parameters["factor"] = 4.0
    assert a != b
    assert a != "a configuration"


def test_C37_diff_dict_writes_what_transformers_writes():
    ours, theirs = LlamaConfig(**TINY).to_diff_dict(), HFConfig(**TINY).to_diff_dict()
    assert set(ours) - {"rope_theta", "rope_scaling"} == set(theirs) - {"rope_parameters", "transformers_version"}
    assert all(theirs[name] == value for name, value in ours.items() if name in theirs)


def test_constructor_keeps_no_hold_of_its_arguments():
    scaling = dict(LLAMA3)
    config = LlamaConfig(**TINY, rope_scaling=scaling)
    scaling["factor"] = 1.0
    assert config.rope_parameters["factor"] == 8.0


# --- v4 and v5 files -------------------------------------------------------------------------------------------------


def test_C38_v4_and_v5_files_are_read_alike(tmp_path):
    common = {**TINY, **SHAPE, "model_type": "llama"}
    v4 = {**common, "rope_theta": 5e5, "rope_scaling": LLAMA3, "torch_dtype": "bfloat16"}
    v5 = {**common, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}, "dtype": "bfloat16"}
    a, b = (LlamaConfig.from_pretrained(write(tmp_path / name, content)) for name, content in (("4", v4), ("5", v5)))
    assert a == b
    for config in (a, b):
        assert config.rope_theta == 5e5
        assert config.rope_scaling == LLAMA3
        assert config.rope_parameters == {**LLAMA3, "rope_theta": 5e5}


def test_C38_v5_file_written_by_transformers(tmp_path):
    theirs = HFConfig(**TINY, rope_parameters={**YARN, "rope_theta": 5e5}, dtype="float16", eos_token_id=[2, 5])
    theirs.save_pretrained(tmp_path)
    assert "rope_parameters" in json.loads((tmp_path / "config.json").read_text())
    ours = LlamaConfig.from_pretrained(tmp_path)
    assert ours.rope_parameters == theirs.rope_parameters
    for name, _ in PAGE.values():
        if not name.startswith("rope"):
            assert getattr(ours, name) == getattr(theirs, name)
    assert ours.dtype is torch.float16


@pytest.mark.parametrize("fields", SCALINGS.values(), ids=SCALINGS)
def test_C37_saved_file_is_read_right_by_transformers(tmp_path, fields):
    config = LlamaConfig(**TINY, **fields, rope_theta=5e5, dtype="bfloat16", num_key_value_heads=2)
    config.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" not in content  # v4 would not understand it
    assert "dtype" not in content
    read = HFConfig.from_pretrained(tmp_path)
    direct = HFConfig(**copy.deepcopy({**TINY, **fields}), rope_theta=5e5, dtype="bfloat16", num_key_value_heads=2)
    assert their_inv_freq(read) == their_inv_freq(direct)
    for name, _ in PAGE.values():
        if not name.startswith("rope"):
            assert getattr(read, name) == getattr(config, name)
    assert read.dtype is torch.bfloat16


@pytest.mark.parametrize("fields", SCALINGS.values(), ids=SCALINGS)
def test_C37_saved_longrope_needs_nothing_that_v4_misreads(tmp_path, fields):
    """v4 takes the original length from the top level only and the factor from the ratio, if one is there."""
    LlamaConfig(**TINY, **fields).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    scaling = content["rope_scaling"]
    if scaling is None or scaling["rope_type"] != "longrope":
        return
    original = content["original_max_position_embeddings"]
    assert original == scaling.get("original_max_position_embeddings", original)
    ratio = content["max_position_embeddings"] / original
    assert scaling.get("factor", ratio) == ratio or "attention_factor" in scaling


@pytest.mark.parametrize("fields", SCALINGS.values(), ids=SCALINGS)
def test_C37_round_trips(tmp_path, fields):
    config = LlamaConfig(**TINY, **fields)
    config.save_pretrained(tmp_path / "a")
    loaded = LlamaConfig.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    assert (tmp_path / "a/config.json").read_bytes() == (tmp_path / "b/config.json").read_bytes()
    assert LlamaConfig.from_dict(loaded.to_dict()) == loaded
    if config.rope_scaling is None or config.rope_scaling["rope_type"] != "longrope":
        assert loaded == config


def test_real_configs(shared_data, tmp_path):
    files = sorted((shared_data / "configs").glob("*.config.json"))
    assert len(files) > 5
    for file in files:
        content = json.loads(file.read_text())
        if content["model_type"] != "llama":
            with pytest.raises(ConfigError, match=r"model_type='phi3'.*'llama'"):
                LlamaConfig.from_json_file(file)
            continue
        ours, theirs = LlamaConfig.from_json_file(file), HFConfig.from_json_file(file)
        assert ours.rope_parameters == theirs.rope_parameters
        assert (ours.dtype, ours.head_dim) == (theirs.dtype, theirs.head_dim)
        ours.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())
        for name, value in content.items():
            if name != "_name_or_path":
                assert saved[name] == value
        assert hasattr(ours, "quantization_config") == ("quantization_config" in content)


# --- the RoPE views --------------------------------------------------------------------------------------------------


def test_C18_views_stay_consistent():
    config = LlamaConfig(**TINY)
    assert config.rope_scaling is None
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    config.rope_theta = 5e5
    config.rope_scaling = {"type": "linear", "factor": 2.0}
    assert config.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    config.rope_parameters["factor"] = 4.0
    assert config.rope_scaling == {"rope_type": "linear", "factor": 4.0}
    config.rope_parameters = {"rope_type": "dynamic", "factor": 3.0}
    assert (config.rope_theta, config.rope_scaling) == (5e5, {"rope_type": "dynamic", "factor": 3.0})
    config.partial_rotary_factor = 0.5
    config.rope_scaling = None
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5}


def test_C18_change_in_place_is_refused_not_lost():
    config = LlamaConfig(**TINY, rope_scaling=LLAMA3)
    for change in (
        lambda view: view.update(factor=2.0),
        lambda view: view.__setitem__("factor", 2.0),
        lambda view: view.pop("factor"),
        lambda view: view.__ior__({"factor": 2.0}),
    ):
        with pytest.raises(ConfigError, match="assign a whole dict"):
            change(config.rope_scaling)
    assert type(copy.deepcopy(config.rope_scaling)) is dict


def test_C38_agreeing_spellings_are_accepted():
    both = {"rope_theta": 5e5, "rope_scaling": LLAMA3, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}}
    assert LlamaConfig(**TINY, **both) == LlamaConfig(**TINY, rope_theta=5e5, rope_scaling=LLAMA3)
    only_parameters = LlamaConfig(**TINY, rope_parameters={"rope_theta": 5e5, "rope_type": "default"})
    assert only_parameters.rope_theta == 5e5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e6}}, "rope_theta.*500000.0, 1000000.0"),
        ({"rope_theta": float("1e4"), "rope_parameters": {"rope_theta": 1e6}}, "rope_theta.*10000.0, 1000000.0"),
        ({"rope_scaling": LLAMA3, "rope_parameters": {**LLAMA3, "factor": 4.0}}, "factor.*8.0, 4.0"),
        ({"rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}}, "rope_type.*'yarn', 'default'"),
        ({"rope_scaling": {**LLAMA3, "type": "linear"}}, "rope_type.*'llama3', 'linear'"),
        ({"rope_scaling": YARN, "original_max_position_embeddings": 8}, "original_max_position_embeddings.*8, 16"),
    ],
)
def test_A10_disagreeing_spellings_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        LlamaConfig(**TINY, **fields)


# --- what is refused -------------------------------------------------------------------------------------------------

BAD_FIELDS = [
    *((name, value) for name in ("vocab_size", "num_hidden_layers", "head_dim") for value in (0, -1, True, 8.5, "8")),
    *((name, 2**63) for name in ("hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings")),
    ("num_key_value_heads", 0),
    ("hidden_act", "swiglu"),
    ("hidden_act", ["silu"]),
    ("initializer_range", -1.0),
    *(("rms_norm_eps", value) for value in (0.0, -1e-6, float("nan"), 1.0, "1e-6", None)),
    *((name, "yes") for name in ("use_cache", "tie_word_embeddings", "attention_bias", "mlp_bias")),
    ("pad_token_id", [0]),
    ("bos_token_id", 1.0),
    ("eos_token_id", ["</s>"]),
    ("pretraining_tp", 0),
    ("attention_dropout", 1.5),
    *(("rope_theta", value) for value in (0, -1.0, float("nan"), float("inf"), 1e300, 1e-300, 10**400, "10000", None)),
    ("rope_scaling", "linear"),
    ("partial_rotary_factor", 0.0),
    ("dtype", "float8_e4m3fn"),
    ("torch_dtype", 16),
    ("num_labels", 0),
    ("attn_implementation", ["eager"]),
    ("id2label", ["no", "yes"]),
    ("model_type", "mistral"),
    ("to_dict", 1),
    ("_dtype", 1),
]


@pytest.mark.parametrize(("name", "value"), BAD_FIELDS, ids=[f"{n}={v!r}" for n, v in BAD_FIELDS])
def test_A07_wrong_field_is_named_with_its_value(name, value):
    with pytest.raises(ConfigError) as caught:
        LlamaConfig(**{**TINY, name: value})
    assert f"{name.removeprefix('torch_')}={brief(value)}" in str(caught.value)


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, v in BAD_FIELDS if hasattr(LlamaConfig(), n) and n in TINY])
def test_wrong_field_set_later_is_found_by_validate(name, value):
    config = LlamaConfig(**TINY)
    setattr(config, name, value)
    with pytest.raises(ConfigError, match=name):
        config.validate()


def test_A08_heads_that_do_not_divide():
    with pytest.raises(ConfigError, match=r"hidden_size=64 .* num_attention_heads=5"):
        LlamaConfig(hidden_size=64, num_attention_heads=5)
    for kv_heads in (3, 8):
        with pytest.raises(ConfigError, match=rf"num_key_value_heads={kv_heads} .*num_attention_heads=4"):
            LlamaConfig(**TINY, num_key_value_heads=kv_heads)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "su"}, "rope_type='su'.*longrope"),
        ({"rope_type": ["linear"]}, r"rope_type=\['linear'\]"),
        ({"factor": 2.0}, "lacks rope_type"),
        ({"rope_type": "linear"}, "'linear' lacks factor"),
        ({"rope_type": "linear", "factor": None}, "'linear' lacks factor"),
        ({"rope_type": "dynamic"}, "'dynamic' lacks factor"),
        ({"rope_type": "yarn"}, "'yarn' lacks factor"),
        ({"rope_type": "longrope", "long_factor": [1.0] * 8}, "'longrope' lacks short_factor"),
        ({"rope_type": "llama3", "factor": 8.0}, "lacks high_freq_factor, low_freq_factor, original_max"),
        ({"rope_type": "linear", "factor": 0}, r"\['factor'\]=0"),
        ({"rope_type": "linear", "factor": float("nan")}, r"\['factor'\]=nan"),
        ({"rope_type": "linear", "factor": 10**300}, r"\['factor'\]=1000.*use a number from 1e-9 to 1e9"),
        ({"rope_type": "linear", "factor": "4"}, r"\['factor'\]='4'"),
        ({**YARN, "beta_fast": 0}, r"\['beta_fast'\]=0"),
        ({**YARN, "mscale": -1.0}, r"\['mscale'\]=-1.0"),
        ({**YARN, "truncate": "no"}, r"\['truncate'\]='no'"),
        ({**YARN, "original_max_position_embeddings": 0}, "original_max_position_embeddings=0"),
        ({**LLAMA3, "low_freq_factor": 4.0}, "low_freq_factor and high_freq_factor are both 4.0"),
        ({**LONGROPE, "short_factor": [1.0] * 7}, "short_factor has 7 values; use a list of 8"),
        ({**LONGROPE, "long_factor": 2.0}, "long_factor has 2.0; use a list of 8"),
        ({**LONGROPE, "long_factor": [0.0] * 8}, "long_factor=0.0"),
        ({**LONGROPE, "original_max_position_embeddings": 1}, "original_max_position_embeddings=1"),
        ({"full_attention": {"rope_type": "default"}}, "nested by full_attention"),
    ],
)
def test_A10_wrong_rope_scaling(scaling, message):
    with pytest.raises(ConfigError, match=message):
        LlamaConfig(**TINY, rope_scaling=scaling)
    with pytest.raises(ConfigError, match=message):
        LlamaConfig(**TINY, rope_parameters={**scaling, "rope_theta": 1e4})


@pytest.mark.parametrize("head_dim", [1, 7])
def test_odd_rotary_dim_is_refused(head_dim):
    with pytest.raises(ConfigError, match=f"head_dim={head_dim} .* even"):
        LlamaConfig(head_dim=head_dim)


@pytest.mark.parametrize("rope_theta", [1e-9, 1, 2**64, 10**30, 1e30])
@pytest.mark.parametrize("fields", SCALINGS.values(), ids=SCALINGS)
def test_A11_what_is_accepted_can_be_computed(fields, rope_theta):
    if rope_theta <= 1 and fields.get("rope_scaling", {}).get("rope_type") == "yarn":
        return
    cos, sin = RotaryEmbedding(LlamaConfig(**TINY, **fields, rope_theta=rope_theta))(
        torch.tensor([0, 1, 31, 2**31 - 1]), torch.tensor([32, 32, 32, 2**31])
    )
    assert cos.isfinite().all()
    assert sin.isfinite().all()


def test_types_that_cannot_rotate_so_little():
    with pytest.raises(ConfigError, match="more than 2 rotated dimensions"):
        LlamaConfig(head_dim=2, rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    with pytest.raises(ConfigError, match="rope_theta=1; rope_type='yarn' needs more than 1"):
        LlamaConfig(**TINY, rope_theta=1, rope_scaling=YARN)


WARNINGS = {
    "R1_partial": ({"partial_rotary_factor": 0.5}, "transformers v5 rotates all"),
    "R1_unused": ({"rope_scaling": {"rope_type": "default", "factor": "2"}}, "'default' does not use factor"),
    "R2_short": ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "shortens"),
    "R2_unused": ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta": 1}}, "does not use beta"),
    "R3_original": (
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 16}},
        "'dynamic' does not use original_max_position_embeddings",
    ),
    "R4b_unset": ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "is not set; yarn takes max_position_emb"),
    "R4b_factor": ({"rope_scaling": {**YARN, "factor": 3.0}}, "=3.0 is not max_position_embeddings=32"),
    "R5_original_in_dict": (
        {"rope_scaling": {**LONGROPE, "factor": 2.0, "original_max_position_embeddings": 16}},
        "v4 ignores it",
    ),
    "R5_factor": (
        {"rope_scaling": {**LONGROPE, "factor": 4.0}, "original_max_position_embeddings": 16},
        "v4's longrope would use the ratio",
    ),
    "R6_order": ({"rope_scaling": {**LLAMA3, "high_freq_factor": 0.5}}, "high_freq_factor=0.5 is below"),
    "R6_original": ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 32}}, "=32 is not below max"),
}


@pytest.mark.parametrize(("fields", "message"), WARNINGS.values(), ids=WARNINGS)
def test_likely_mistake_warns_once(caplog, fields, message):
    LlamaConfig(**TINY, **fields)
    assert len(caplog.records) == 1
    assert message in caplog.text


@pytest.mark.parametrize("fields", SCALINGS.values(), ids=SCALINGS)
def test_saved_file_loads_without_warnings(tmp_path, fields, caplog):
    LlamaConfig(**TINY, **fields).save_pretrained(tmp_path)
    caplog.clear()
    LlamaConfig.from_pretrained(tmp_path)
    assert not caplog.records


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "null", "3", '{"a": ' * 100000])
def test_A02_not_a_json_object(tmp_path, content):
    with pytest.raises(ConfigError, match=r"config\.json: "):
        LlamaConfig.from_pretrained(write(tmp_path, content))


def test_A01_no_such_file(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read: No such file"):
        LlamaConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ConfigError, match=r"config\.json: is a folder"):
        LlamaConfig.from_pretrained(tmp_path)


def test_A01_not_utf8(tmp_path):
    (tmp_path / "config.json").write_bytes(b'{"vocab_size": "\xff"}')
    with pytest.raises(ConfigError, match="UTF-8"):
        LlamaConfig.from_pretrained(tmp_path)


def test_A05_other_model_type_names_file_and_supported(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json: model_type='phi3' is not supported.*'llama'"):
        LlamaConfig.from_pretrained(write(tmp_path, {"model_type": "phi3"}))


def test_from_pretrained_overrides(tmp_path):
    LlamaConfig(**TINY, rope_scaling=LLAMA3, dtype="float32").save_pretrained(tmp_path)
    config = LlamaConfig.from_pretrained(tmp_path, num_hidden_layers=2, rope_theta=7e4, dtype="bfloat16")
    assert (config.num_hidden_layers, config.rope_theta, config.dtype) == (2, 7e4, torch.bfloat16)
    assert config.rope_scaling == LLAMA3
    with pytest.raises(ConfigError, match="num_hidden_layers=0"):
        LlamaConfig.from_pretrained(tmp_path, num_hidden_layers=0)


def test_from_pretrained_overrides_come_before_the_checks(tmp_path):
    """They replace a field as if the file had said it, so that what follows from it follows the argument."""
    write(tmp_path, {**TINY, **SHAPE, "hidden_size": 63, "num_attention_heads": 4, "eos_token_id": 40})
    with pytest.raises(ConfigError, match="hidden_size=63"):
        LlamaConfig.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="eos_token_id=40"):
        LlamaConfig.from_pretrained(tmp_path, hidden_size=64)
    config = LlamaConfig.from_pretrained(tmp_path, hidden_size=64, num_attention_heads=8, vocab_size=41)
    assert (config.hidden_size, config.head_dim, config.num_key_value_heads, config.vocab_size) == (64, 8, 8, 41)


def test_override_replaces_every_spelling_of_the_file(tmp_path):
    write(tmp_path, {**TINY, **SHAPE, "dtype": "float16", "rope_parameters": {"rope_theta": 5e5}, "num_labels": 3})
    overrides = {"torch_dtype": "bfloat16", "rope_theta": 7e4, "rope_scaling": YARN, "num_labels": 5}
    config = LlamaConfig.from_pretrained(tmp_path, **overrides)
    assert (config.dtype, config.num_labels) == (torch.bfloat16, 5)
    assert config.rope_parameters == {**YARN, "rope_theta": 7e4}
    longrope = {"original_max_position_embeddings": 8, "rope_scaling": LONGROPE}
    assert LlamaConfig.from_pretrained(tmp_path, **longrope).original_max_position_embeddings == 8
    with pytest.raises(ConfigError, match="to_dict=1: this name is taken"):
        LlamaConfig.from_pretrained(tmp_path, to_dict=1)


def test_A12_a_file_must_have_its_shape_and_a_call_need_not(tmp_path):
    content = {**TINY, **SHAPE}
    for name in ("vocab_size", "intermediate_size", "max_position_embeddings"):
        without = {key: value for key, value in content.items() if key != name}
        with pytest.raises(
            ConfigError, match=rf"config\.json: lacks {name}; add it to the file, or pass it as a keyword"
        ):
            LlamaConfig.from_pretrained(write(tmp_path, without))
        assert LlamaConfig.from_pretrained(tmp_path, **{name: content[name]}) == LlamaConfig(**content)
        assert getattr(LlamaConfig.from_dict(without), name) == getattr(LlamaConfig(), name)


def test_A12_context_length_under_its_first_name(tmp_path):
    content = {key: value for key, value in {**TINY, **SHAPE}.items() if key != "max_position_embeddings"}
    config = LlamaConfig.from_pretrained(write(tmp_path, {**content, "max_sequence_length": 77}))
    assert config.max_position_embeddings == 77


def test_A16_ids_outside_the_vocabulary():
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        with pytest.raises(ConfigError, match=rf"{name}=32 is outside the vocabulary: vocab_size=32; .* 0 to 31"):
            LlamaConfig(vocab_size=32, **{name: 32})
    with pytest.raises(ConfigError, match=r"eos_token_id=\[1, 32\]"):
        LlamaConfig(vocab_size=32, eos_token_id=[1, 32])


def test_A16_pad_of_old_files(caplog):
    assert LlamaConfig(pad_token_id=-1).pad_token_id is None
    assert [record.getMessage() for record in caplog.records] == [
        "pad_token_id=-1, which old files write for none, is read as null"
    ]


def test_messages_are_bounded_and_printable():
    wide = ["x" * 15]
    for _ in range(6):
        wide = [wide] * 6
    for value in (
        *("\x1b" * 10**6, ["x" * 10**6] * 1000, {"k" * 10**6: 1}, 10**5000, object(), torch.tanh, torch.eye(3)),
        *(wide, {"a": wide, "b": {"c": wide}}),
    ):
        assert len(brief(value)) < 700
        assert brief(value).isprintable()
        assert " at 0x" not in brief(value)
    with pytest.raises(ConfigError) as caught:
        LlamaConfig(**{"_dtype": "\n" * 10**6})
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()


def test_labels():
    with pytest.raises(ConfigError, match=r"id2label=\{'0': \[1\]\}; use an object from label number to label name"):
        LlamaConfig(id2label={"0": [1]})
    assert LlamaConfig(id2label={}).num_labels == 2
    with pytest.raises(ConfigError, match="label2id=5; use an object"):
        LlamaConfig(id2label={"0": "a"}, label2id=5)
    with pytest.raises(ConfigError, match="num_labels=65537; use an integer from 1 to 65536"):
        LlamaConfig(num_labels=65537)


def test_save_leaves_the_old_file_whole(tmp_path, monkeypatch):
    LlamaConfig(**TINY).save_pretrained(tmp_path)

    def disk_full(path, text, **kwargs):
        path.write_bytes(text.encode()[:50])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", disk_full)
    with pytest.raises(CheckpointIOError, match=r"config\.json: cannot be written: No space left"):
        LlamaConfig(**TINY, num_hidden_layers=3).save_pretrained(tmp_path)
    assert LlamaConfig.from_pretrained(tmp_path) == LlamaConfig(**TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_what_json_cannot_hold_is_refused_on_save(tmp_path):
    with pytest.raises(ConfigError, match="hidden_act"):
        LlamaConfig(hidden_act=torch.tanh).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"note=nan"):
        LlamaConfig(note=float("nan")).save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointIOError, match="cannot be written"):
        LlamaConfig().save_pretrained(tmp_path / "file")


def test_repr_is_readable_even_with_a_function():
    assert '"hidden_act": "<built-in method tanh' in repr(LlamaConfig(hidden_act=torch.tanh))
