"""I: checkpoints of 4-bit integers, each a good one with one thing wrong.

Every refusal is tried with load="mmap" and load="copy", like those of B.
"""

import json
import math
from pathlib import Path

import torch

from llama_fast import LlamaForCausalLM
from llama_fast.errors import (
    CheckpointFormatError,
    CheckpointMismatchError,
    ConfigError,
    LlamaFastError,
    OutOfMemoryError,
    UnsupportedError,
)
from llama_fast.ops.int4 import Int4Linear
from tests.bad_inputs.checkpoints import LOADS
from tests.bad_inputs.harness import accepted, check, refused
from tests.model.int4_checkpoints import (
    HEAD,
    Awq,
    Checkpoint,
    CompressedTensors,
    Gptq,
    Options,
    pack,
    random_source,
)

QUERY = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"
FORMATS = (
    Gptq(group_size=32, symmetric=False),
    Awq(group_size=32),
    CompressedTensors(group_size=32, symmetric=False),
)
SCALES = {Gptq: "scales", Awq: "scales", CompressedTensors: "weight_scale"}
WRONG_CONFIG = (ConfigError, UnsupportedError)


def made(folder: Path, options: Options) -> Checkpoint:
    source = folder.parent / "source"
    return pack(source if source.exists() else random_source(source), options)


def load(folder: Path, how: str = "mmap") -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, device="cpu", backend="reference", load=how)


def refused_load(
    error: type[LlamaFastError] | tuple[type[LlamaFastError], ...], checkpoint: Checkpoint, folder: Path, *needles: str
) -> None:
    checkpoint.write(folder)
    for how in LOADS:
        refused(error, lambda how=how: load(folder, how), *needles)


def is_right(model: LlamaForCausalLM, checkpoint: Checkpoint) -> bool:
    return all(
        torch.equal(model.get_submodule(name).unpacked().dequantized(dtype=torch.float64), weight)
        for name, weight in checkpoint.weights.items()
    )


def right_or_refused(checkpoint: Checkpoint, folder: Path) -> None:
    """Where a loader may do either: what it may not is to give other weights."""
    checkpoint.write(folder)
    try:
        model = load(folder)
    except LlamaFastError:
        refused(LlamaFastError, lambda: load(folder))
    else:
        check(is_right(model, checkpoint), "other weights")


def I00_negative_control(folder: Path) -> None:
    for options in FORMATS:
        checkpoint = made(folder, options)
        checkpoint.write(folder)
        for how in LOADS:
            check(is_right(accepted(lambda how=how: load(folder, how)), checkpoint), f"other weights: {options}")


def I01_missing_tensors(folder: Path) -> None:
    for options, names in (
        (FORMATS[0], ("qweight", "qzeros", "scales")),
        (FORMATS[1], ("qweight", "qzeros", "scales")),
        (FORMATS[2], ("weight_packed", "weight_scale", "weight_zero_point")),
    ):
        for name in names:
            for module in (QUERY, DOWN):
                checkpoint = made(folder, options)
                del checkpoint.tensors[f"{module}.{name}"]
                refused_load(CheckpointMismatchError, checkpoint, folder, f"{module}.{name}")


def I01_missing_order_of_columns(folder: Path) -> None:
    """Where the config says that columns are out of order, the lack of their order is no order."""
    for options, name in ((Gptq(group_size=32, desc_act=True), "g_idx"), (_by_activation(), "weight_g_idx")):
        checkpoint = made(folder, options)
        for module in checkpoint.weights:
            del checkpoint.tensors[f"{module}.{name}"]
        refused_load((CheckpointMismatchError, UnsupportedError), checkpoint, folder, "_idx")
    said = Gptq(group_size=32, config={"desc_act": True, "static_groups": True})
    for options, name in ((said, "g_idx"), (_by_activation(), "weight_g_idx")):
        checkpoint = _in_order(made(folder, options), name)
        del checkpoint.tensors[f"{DOWN}.{name}"]
        refused_load((CheckpointMismatchError, UnsupportedError), checkpoint, folder, f"{DOWN}.{name}")


def _by_activation() -> CompressedTensors:
    return CompressedTensors(group_size=32, actorder="group")


def _in_order(checkpoint: Checkpoint, name: str) -> Checkpoint:
    """The same with groups of consecutive columns; the weights are others then."""
    for module, weight in checkpoint.weights.items():
        checkpoint.tensors[f"{module}.{name}"] = torch.arange(weight.shape[1], dtype=torch.int32) // 32
    return checkpoint


def I01_all_scales_missing(folder: Path) -> None:
    for options in FORMATS:
        checkpoint = made(folder, options)
        for name in [name for name in checkpoint.tensors if name.endswith(SCALES[type(options)])]:
            del checkpoint.tensors[name]
        refused_load(CheckpointMismatchError, checkpoint, folder, SCALES[type(options)])


def I01_extra_tensors(folder: Path) -> None:
    ones, order = torch.ones(64, dtype=torch.float16), torch.zeros(64, dtype=torch.int32)
    symmetric = CompressedTensors(group_size=32)
    for options, name, tensor in (
        (FORMATS[0], f"{QUERY}.weight", torch.ones(64, 64, dtype=torch.float16)),
        (FORMATS[0], f"{QUERY}.weight_scale", ones),
        (FORMATS[0], f"{QUERY}.bias", ones),  # the config has no biases, and it is not zeros
        (FORMATS[0], "model.norm.scales", ones),
        (FORMATS[1], f"{QUERY}.g_idx", order),
        (FORMATS[1], "model.layers.1.self_attn.q_proj.qweight", order),
        (FORMATS[2], f"{QUERY}.weight", torch.ones(64, 64, dtype=torch.bfloat16)),
        (FORMATS[2], f"{QUERY}.weight_global_scale", ones),
        (symmetric, f"{QUERY}.weight_zero_point", torch.zeros(8, 2, dtype=torch.int32)),
    ):
        checkpoint = made(folder, options)
        checkpoint.tensors[name] = tensor
        refused_load(CheckpointMismatchError, checkpoint, folder, name)
    checkpoint = made(folder, FORMATS[2])
    checkpoint.tensors[f"{QUERY}.weight_g_idx"] = order  # whose groups are not whole, besides
    refused_load((CheckpointMismatchError, CheckpointFormatError), checkpoint, folder, f"{QUERY}.weight_g_idx")


def I01_other_shapes_and_dtypes(folder: Path) -> None:
    for options, name, change in (
        (FORMATS[0], "qweight", lambda t: t[:-1]),
        (FORMATS[0], "qweight", lambda t: t.T),
        (FORMATS[0], "qweight", lambda t: t.long()),
        (FORMATS[0], "qweight", lambda t: t.float()),
        (FORMATS[0], "qzeros", lambda t: t[:1]),
        (FORMATS[0], "qzeros", lambda t: t.to(torch.int16)),
        (FORMATS[0], "scales", lambda t: t[:1]),
        (FORMATS[0], "scales", lambda t: t.T),
        (FORMATS[0], "scales", lambda t: t.to(torch.int32)),
        (FORMATS[0], "g_idx", lambda t: t[:-1]),
        (FORMATS[0], "g_idx", lambda t: t.half()),
        (FORMATS[1], "qzeros", lambda t: t[:, :-1]),
        (FORMATS[1], "scales", lambda t: t[None]),
        (FORMATS[2], "weight_packed", lambda t: t[:, :-1]),
        (FORMATS[2], "weight_packed", lambda t: t.view(torch.uint8)),
        (FORMATS[2], "weight_scale", lambda t: t[:, :1]),
        (FORMATS[2], "weight_zero_point", lambda t: t[:, :1]),
        (FORMATS[2], "weight_zero_point", lambda t: t.T),
        (FORMATS[2], "weight_zero_point", lambda t: t.to(torch.int8)),
        (FORMATS[2], "weight_shape", lambda t: t.flip(0) + 1),
        (FORMATS[2], "weight_shape", lambda t: t - 64),
    ):
        checkpoint = made(folder, options)
        checkpoint.tensors[f"{QUERY}.{name}"] = change(checkpoint.tensors[f"{QUERY}.{name}"])
        refused_load((CheckpointMismatchError, CheckpointFormatError), checkpoint, folder, f"{QUERY}.{name}")


def I02_scales(folder: Path) -> None:
    for options in FORMATS:
        for value in (0.0, -0.0, -0.01, math.nan, math.inf, -math.inf, torch.finfo(options.dtype).tiny / 2):
            for at in ((0, 0), (-1, -1)):
                checkpoint, name = made(folder, options), f"{DOWN}.{SCALES[type(options)]}"
                scales = checkpoint.tensors[name].clone()
                scales[at] = value
                check(scales[at] != 0 or value == 0, "the value is not what it should be")
                checkpoint.tensors[name] = scales
                refused_load(CheckpointFormatError, checkpoint, folder, name)


def _set(checkpoint: Checkpoint, field: str, value: object) -> None:
    """A field of the config, by GPTQ's name."""
    where = checkpoint.quantization
    if "config_groups" in where:
        where = where["config_groups"]["group_0"]["weights"]
        field = {"bits": "num_bits", "sym": "symmetric"}.get(field, field)
    where[field] = value


def I03_group_size(folder: Path) -> None:
    for options in FORMATS:
        for value in (0, -7, 48, 7, 2**70, True, "32", 32.5, [32], {}):
            checkpoint = made(folder, options)
            _set(checkpoint, "group_size", value)
            refused_load((ConfigError, CheckpointFormatError, UnsupportedError), checkpoint, folder, "group_size")
        for value in (64, 128, 16, 256, -1, None):  # legal elsewhere, not what the tensors have
            checkpoint = made(folder, options)
            _set(checkpoint, "group_size", value)
            refused_load(LlamaFastError, checkpoint, folder)


def I03_order_of_columns(folder: Path) -> None:
    for options, name in ((Gptq(group_size=32), "g_idx"), (_by_activation(), "weight_g_idx")):
        _in_order(made(folder, options), name).write(folder)
        for how in LOADS:
            accepted(lambda how=how: load(folder, how))
        for at, value in (  # there are two groups
            (0, 2),
            (63, -1),
            (5, 2**31 - 1),
            (5, -(2**31)),
            (0, 1),  # 31 columns and 33
            (slice(None), 0),
        ):
            checkpoint = _in_order(made(folder, options), name)
            checkpoint.tensors[f"{QUERY}.{name}"][at] = value
            refused_load(CheckpointFormatError, checkpoint, folder, f"{QUERY}.{name}")
    # Out of range where the other modules' columns are out of order.
    for options, name in ((Gptq(group_size=32, desc_act=True), "g_idx"), (_by_activation(), "weight_g_idx")):
        checkpoint = made(folder, options)
        checkpoint.tensors[f"{QUERY}.{name}"] = torch.full((64,), 2**31 - 1, dtype=torch.int32)
        refused_load((CheckpointFormatError, UnsupportedError), checkpoint, folder, name)


def I04_bits(folder: Path) -> None:
    for options in FORMATS:
        for value in (0, 1, 2, 3, 5, 8, 16, -4, 2**70, True, "4", 4.5, None, [4], {}):
            checkpoint = made(folder, options)
            _set(checkpoint, "bits", value)
            refused_load(WRONG_CONFIG, checkpoint, folder, "bits")


def I04_symmetric_or_not(folder: Path) -> None:
    """Zeros are stored either way in GPTQ: they decide, or the contradiction is refused."""
    for symmetric in (True, False):
        checkpoint = made(folder, Gptq(group_size=32, symmetric=symmetric))
        _set(checkpoint, "sym", not symmetric)
        right_or_refused(checkpoint, folder)
        checkpoint = made(folder, CompressedTensors(group_size=32, symmetric=symmetric))
        _set(checkpoint, "sym", not symmetric)
        refused_load(CheckpointMismatchError, checkpoint, folder, "weight_zero_point")
    checkpoint = made(folder, FORMATS[1])
    checkpoint.quantization["zero_point"] = False
    right_or_refused(checkpoint, folder)


def I04_zeros_off_by_one(folder: Path) -> None:
    """The format field alone tells; symmetric zeros that are not 8 under it are refused."""
    for stored, called in (("gptq", "gptq_v2"), ("gptq_v2", "gptq"), ("gptq_v2", None)):
        checkpoint = made(folder, Gptq(group_size=32, checkpoint_format=stored))
        checkpoint.quantization["checkpoint_format"] = called
        if called is None:
            del checkpoint.quantization["checkpoint_format"]
        refused_load((ConfigError, CheckpointFormatError, CheckpointMismatchError), checkpoint, folder, "sym")


def I05_methods(folder: Path) -> None:
    for value in ("gptq2", "AWQ ", "", None, 5, ["gptq"], {}, "\x1b[2J", "x" * 100_000):
        checkpoint = made(folder, FORMATS[0])
        checkpoint.quantization["quant_method"] = value
        refused_load(WRONG_CONFIG, checkpoint, folder, "quant_method")
    for value in (5, "gptq", [1], True, 0):
        checkpoint = made(folder, FORMATS[0])
        checkpoint.config["quantization_config"] = value
        refused_load(ConfigError, checkpoint, folder, "quantization_config")


def I05_fields_of_other_types(folder: Path) -> None:
    for options, fields in (
        (FORMATS[0], ("desc_act", "sym", "checkpoint_format")),
        (FORMATS[1], ("version", "modules_to_not_convert", "zero_point")),
        (FORMATS[2], ("config_groups", "format", "ignore", "quantization_status")),
    ):
        for field in fields:
            for value in (5, {"a": 1}, [[1]], "no such value"):
                checkpoint = made(folder, options)
                checkpoint.quantization[field] = value
                refused_load(WRONG_CONFIG, checkpoint, folder, field)


def I05_patterns(folder: Path) -> None:
    """Patterns come from a file: malformed ones are refused, and none takes for ever."""
    for field in ("targets", "ignore"):
        for pattern in ("re:(", "re:" + "(m|o|.)+" * 20 + "$", "re:" + "(.*)*" * 8 + "!", "re:" + ".*" * 50 + "!"):
            checkpoint = made(folder, FORMATS[2])
            if field == "targets":
                checkpoint.quantization["config_groups"]["group_0"]["targets"] = [pattern]
            else:
                checkpoint.quantization["ignore"] = [pattern]
            refused_load(WRONG_CONFIG, checkpoint, folder, "pattern")


def I05_config_without_tensors(folder: Path) -> None:
    for options in FORMATS:
        checkpoint = made(folder, options)
        dense = {f"{name}.weight": weight.to(options.dtype) for name, weight in checkpoint.weights.items()}
        checkpoint.tensors = checkpoint.kept | dense
        refused_load((CheckpointMismatchError, ConfigError), checkpoint, folder, QUERY)


def I05_tensors_without_config(folder: Path) -> None:
    for options in FORMATS:
        checkpoint = made(folder, options)
        del checkpoint.config["quantization_config"]
        refused_load(CheckpointMismatchError, checkpoint, folder, "quantization_config")


def I05_side_files(folder: Path) -> None:
    """The side files are parsed as strictly as config.json."""
    for options, name in (
        (Gptq(group_size=32, side_file=True), "quantize_config.json"),
        (Awq(group_size=32, side_file=True), "quant_config.json"),
    ):
        checkpoint = made(folder, options)
        checkpoint.write(folder)
        good = json.dumps(checkpoint.others[name])
        for text in ("", "[", "[1]", "null", good[:-1] + ', "bits": 4}' if "bits" in good else good[:-1], "[" * 10**5):
            (folder / name).write_text(text)
            refused(ConfigError, lambda: load(folder), name)
        (folder / name).unlink()


def I06_another_format(folder: Path) -> None:
    configs = [made(folder, options).quantization for options in FORMATS]
    for i, options in enumerate(FORMATS):
        for j, config in enumerate(configs):
            if i != j:
                checkpoint = made(folder, options)
                checkpoint.config["quantization_config"] = config
                refused_load((CheckpointMismatchError, CheckpointFormatError), checkpoint, folder)
    # The shapes of one format under the names of the other.
    for options, name in ((FORMATS[0], "qweight"), (FORMATS[1], "qweight")):
        other = FORMATS[1] if options is FORMATS[0] else FORMATS[0]
        checkpoint = made(folder, options)
        checkpoint.tensors[f"{QUERY}.{name}"] = made(folder, other).tensors[f"{QUERY}.{name}"]
        refused_load((CheckpointMismatchError, CheckpointFormatError), checkpoint, folder, f"{QUERY}.{name}")


def I06_versions(folder: Path) -> None:
    for options, field, values in (
        (FORMATS[0], "checkpoint_format", ("marlin", "bitblas", "gptq_v3", "gemm", "")),
        (FORMATS[1], "version", ("gemv", "gemv_fast", "marlin", "llm-awq", "")),
        (FORMATS[2], "format", ("int-quantized", "marlin-24", "dense", "nvfp4-pack-quantized", "")),
    ):
        for value in values:
            checkpoint = made(folder, options)
            checkpoint.quantization[field] = value
            refused_load(WRONG_CONFIG, checkpoint, folder, field)


def I07_modules_left_out(folder: Path) -> None:
    """A module is quantized in the config and not in the file, or the other way round."""
    for options, field, entry in (
        (FORMATS[1], "modules_to_not_convert", "down_proj"),
        (FORMATS[2], "ignore", "re:.*down_proj"),
        (FORMATS[2], "ignore", DOWN),
    ):
        checkpoint = made(folder, options)
        checkpoint.quantization[field] = ["lm_head", entry]
        refused_load(CheckpointMismatchError, checkpoint, folder, DOWN)
    for options in FORMATS:
        checkpoint = made(folder, options)
        for name in [name for name in checkpoint.tensors if name.startswith(DOWN)]:
            del checkpoint.tensors[name]
        checkpoint.tensors[f"{DOWN}.weight"] = checkpoint.weights[DOWN].to(options.dtype)
        refused_load(CheckpointMismatchError, checkpoint, folder, DOWN)


def I07_quantized_head(folder: Path) -> None:
    """Where the config says so, the head is quantized or refused; where it does not, it is refused."""
    for options in (Gptq(group_size=32, head=True, tool="gptqmodel"), _with_head(ignore=())):
        right_or_refused(made(folder, options), folder)
    for options in (Gptq(group_size=32, head=True), Awq(group_size=32, head=True), _with_head(ignore=("lm_head",))):
        refused_load((CheckpointMismatchError, UnsupportedError), made(folder, options), folder, HEAD)
    for options in (Gptq(group_size=32, tool="gptqmodel", config={"lm_head": True}), FORMATS[2]):
        checkpoint = made(folder, options)
        checkpoint.config["tie_word_embeddings"] = False
        checkpoint.tensors["lm_head.weight"] = checkpoint.kept["model.embed_tokens.weight"].clone()
        if "ignore" in checkpoint.quantization:
            checkpoint.quantization["ignore"] = []
        refused_load((CheckpointMismatchError, UnsupportedError), checkpoint, folder, HEAD)


def _with_head(ignore: tuple[str, ...]) -> CompressedTensors:
    return CompressedTensors(group_size=32, head=True, ignore=ignore)


def I08_fp8(folder: Path) -> None:
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    number = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
    groups = {"group_0": {"targets": ["Linear"], "weights": number, "input_activations": number | {"dynamic": True}}}
    packed = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}
    modelopt = {"quant_method": "modelopt", "quant_algo": "FP8"}
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz):
        for config in (fp8, packed, fp8 | {"fmt": "e5m2"}, modelopt, {"quant_method": "fbgemm_fp8"}, None):
            checkpoint = made(folder, FORMATS[0])
            weights = {f"{name}.weight": weight.to(dtype) for name, weight in checkpoint.weights.items()}
            scales = {f"{name}.weight_scale": torch.ones(1) for name in checkpoint.weights}
            checkpoint.tensors = checkpoint.kept | weights | scales
            checkpoint.config["quantization_config"] = config
            try:
                checkpoint.write(folder)
            except (KeyError, ValueError, TypeError):  # a safetensors that does not know the dtype
                continue
            if config is None:
                refused((CheckpointMismatchError, CheckpointFormatError, *WRONG_CONFIG), lambda: load(folder))
            else:
                refused(WRONG_CONFIG, lambda: load(folder), "quant")


def I09_more_than_two_to_the_31_weights(folder: Path) -> None:
    """A projection whose weights a 32-bit integer cannot number, without the memory for it."""
    out_features, in_features, group_size = 2**17 + 8, 2**15, 128
    with torch.device("meta"):
        module = Int4Linear(in_features, out_features, group_size=group_size, symmetric=False)
    check(out_features * in_features > 2**31, "the numbers are too small for what is tried")
    # The last outputs, where a 32-bit index has wrapped; all rows share the memory of two.
    words = torch.tensor([0x76543210, 0x0FEDCBA9]).to(torch.int32)
    row = words.repeat(in_features // 16)
    module.weight_packed = torch.nn.Parameter(row.expand(out_features, -1), requires_grad=False)
    scales = torch.ones(1, in_features // group_size).expand(out_features, -1)
    module.weight_scale = torch.nn.Parameter(scales, requires_grad=False)
    zeros = torch.zeros(1, in_features // group_size, dtype=torch.uint8).expand(out_features, -1)
    module.weight_zero_point = torch.nn.Parameter(zeros, requires_grad=False)
    last = module.unpacked(slice(out_features - 2, None)).dequantized()
    expected = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 0]).repeat(in_features // 16)
    check(torch.equal(last, expected.float().expand(2, -1)), "other weights")


def I09_sizes_of_a_huge_model(folder: Path) -> None:
    """A config that asks for more than the tensors are is refused before anything is allocated."""
    for options in FORMATS:
        checkpoint = made(folder, options)
        checkpoint.config |= {"intermediate_size": 2**21, "hidden_size": 2**16}
        refused_load((CheckpointMismatchError, OutOfMemoryError), checkpoint, folder)
