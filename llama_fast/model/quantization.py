"""Int4 weights: how they are asked for, and what a checkpoint's files say of theirs.

Where a format writes it   config.json's `quantization_config`, or `compression_config` of old compressed-tensors;
                           AutoGPTQ, AutoAWQ and ModelOpt once wrote a file of their own beside a plain config.json.
Where that is silent       tensors that only quantized formats store are a mismatch (checkpoint.py).
What is read               GPTQ, AWQ ("gemm") and compressed-tensors ("pack-quantized") of 4 bits in groups of 32, 64 or
                           128. All else is refused by the name of its field.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llama_fast.config import LlamaConfig
from llama_fast.errors import CheckpointIOError, ConfigError, UnsupportedError, brief, listed
from llama_fast.files import read_json_object
from llama_fast.model.int4_formats import Awq, CompressedTensors, Gptq, Int4Format, Rounded
from llama_fast.model.int4_rounding import RoundingError
from llama_fast.model.quantization_names import bits_of, first_of, method_of
from llama_fast.ops.int4 import GROUP_SIZES

SIDE_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
_HEAD = "lm_head"
# Of compressed-tensors' patterns.
_MOST_PATTERNS, _MOST_REPETITIONS, _MOST_BRANCHES = 64, 3, 8


class Layout(NamedTuple):
    """Groups of one projection's weight."""

    group_size: int
    symmetric: bool


@dataclass(frozen=True)
class Int4Scheme:
    """Which projections are int4 and how files hold them.

    Attributes:
        where: what says so, for messages.
        layout_of: a projection's name ("model.layers.0.self_attn.q_proj", "lm_head") and in_features -> its layout;
            None if it is not int4.
        format_of: its layout -> how files hold it.
        names: those that a user gave, each of which must name something.
        rounds: whether the files hold floats, which are rounded while they are read.
    """

    where: str
    layout_of: Callable[[str, int], Layout | None]
    format_of: Callable[[Layout], Int4Format]
    names: Sequence[str] = ()
    rounds: bool = False


@dataclass(frozen=True)
class Int4Config:
    """Asks for int4 weights: every projection of the layers is rounded while it is loaded.

    Args:
        group_size: input features that share a scale: 128, 64 or 32.
        symmetric: False adds a zero to each group: better by some 6% in the squared error, a little slower.
        skip: projections that stay as they are, by name or part of a name: "down_proj", "layers.0".
        lm_head: "int4" rounds the head too, whatever `skip` says; "keep" leaves it alone.

    Raises:
        ConfigError: a value that is none of these.
    """

    group_size: int = 128
    symmetric: bool = True
    skip: Sequence[str] = (_HEAD,)
    lm_head: str = "keep"

    def __post_init__(self) -> None:
        if type(self.group_size) is not int or self.group_size not in GROUP_SIZES:
            raise ConfigError(f"group_size={brief(self.group_size)}; use {_listed(GROUP_SIZES)}")
        if type(self.symmetric) is not bool:
            raise ConfigError(f"symmetric={brief(self.symmetric)}; use True or False")
        given = [] if isinstance(self.skip, str) or not isinstance(self.skip, Iterable) else list(self.skip)
        if isinstance(self.skip, str) or not isinstance(self.skip, Iterable) or not all(map(_is_name, given)):
            raise ConfigError(f"skip={brief(self.skip)}; use a list of names such as ['lm_head', 'down_proj']")
        object.__setattr__(self, "skip", tuple(given))
        if self.lm_head not in ("keep", "int4"):
            raise ConfigError(f"lm_head={brief(self.lm_head)}; use 'keep' or 'int4'")

    def scheme(self) -> Int4Scheme:
        """What it means for each projection."""
        skip = [name for name in self.skip if name != _HEAD]
        total = RoundingError()

        def layout_of(name: str, in_features: int) -> Layout | None:
            if self.lm_head == "keep" if name == _HEAD else any(names_part(name, part) for part in skip):
                return None
            return layout("quantization", name, in_features, self.group_size, self.symmetric)

        return Int4Scheme("quantization", layout_of, lambda _: Rounded(self.symmetric, total), skip, rounds=True)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def requested(quantization: str | Int4Config | None) -> Int4Scheme | None:
    """What an argument `quantization` asks for.

    Raises:
        ConfigError: it is neither "int4" nor an Int4Config nor None.
    """
    if quantization is None:
        return None
    if quantization == "int4":
        return Int4Config().scheme()
    if isinstance(quantization, Int4Config):
        return quantization.scheme()
    raise ConfigError(f"quantization={brief(quantization)}; use 'int4', an Int4Config or None")


def names_part(name: str, part: str) -> bool:
    """Whether `part` is `name` or some whole components of it: "layers.0" of "model.layers.0.mlp.up_proj"."""
    return f".{part}." in f".{name}."


def stored_scheme(config: LlamaConfig, folder: Path) -> Int4Scheme | None:
    """What the files of `folder` say of quantized weights, None if nothing; `config` is that of its config.json.

    Raises:
        UnsupportedError: a method or option that is not supported; naming the file, the field and what is.
        ConfigError: the file's quantization settings are malformed.
        CheckpointIOError: a side file cannot be read.
    """
    path = Path(folder) / "config.json"
    for name in ("quantization_config", "compression_config"):
        if (content := getattr(config, name, None)) is not None:
            if hasattr(content, "to_dict"):
                content = content.to_dict()
            if not isinstance(content, Mapping):
                raise ConfigError(f"{path}: {name}={brief(content)}; use an object with quant_method, or null")
            if name == "compression_config" and isinstance(content.get("quantization_config"), Mapping):
                content = {"quant_method": "compressed-tensors", **content, **content["quantization_config"]}
            return _scheme_of(f"{path}: {name}", content)
    for name, method in SIDE_FILES.items():
        path = Path(folder) / name
        if path.exists():
            content = read_json_object(path, ConfigError, io_error=CheckpointIOError)
            return _scheme_of(f"{path}", {"quant_method": method, **content})
    return None


def _scheme_of(where: str, content: Mapping[str, Any]) -> Int4Scheme:
    method = method_of(where, content)
    readers = {"gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed_tensors}
    bits = bits_of(where, content)
    if method == "torchao" and bits == 4:
        raise UnsupportedError(
            f"{where} has quant_method='torchao': its int4 weights have zeros that are no integers, which int4 kernels "
            "with integer zeros do not hold; load the unquantized model with quantization='int4', or convert it with "
            "`llama-fast quantize`"
        )
    # compressed-tensors has bits for each group.
    if method not in readers or (bits != 4 and method != "compressed-tensors"):
        group_size = first_of(content, "group_size", "q_group_size")
        said = f"quant_method={brief(method)}"
        said += "" if bits is None else f", bits={brief(bits)}"
        said += "" if group_size is None else f", group_size={brief(group_size)}"
        raise UnsupportedError(
            f"{where} has {said}: supported are 4 bits of gptq, awq and compressed-tensors; use such a checkpoint, or "
            "the model's float16, bfloat16 or float32 weights, with quantization='int4' if memory is short"
        )
    return readers[method](where, content)


class _Fields:
    """A format's settings, each taken once and checked.

    Args:
        where: the file and object they stand in.
    """

    def __init__(self, where: str, content: Mapping[str, Any]) -> None:
        self.where, self.content = where, content

    def refuse(self, name: str, accepted: str) -> UnsupportedError:
        """The error for a value that is well-formed and not supported."""
        return UnsupportedError(f"{self.where} has {name}={brief(self.content.get(name))}: supported is {accepted}")

    def flag(self, name: str, default: bool) -> bool:
        """true or false; `default` where it is absent or null."""
        value = self.content.get(name)
        if value is None:
            return default
        if type(value) is not bool:
            raise ConfigError(f"{self.where} has {name}={brief(value)}; use true or false")
        return value

    def words(self, name: str) -> list[str]:
        """A list of texts; empty where it is absent or null."""
        value = self.content.get(name)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ConfigError(f"{self.where} has {name}={brief(value)}; use a list of names")
        return value

    def nothing(self, *names: str) -> None:
        """Refuse what must be absent, null, false or empty."""
        for name in names:
            if self.content.get(name) not in (None, False, {}, []):
                raise self.refuse(name, "null")

    def group_size(self, *names: str) -> int:
        """32, 64, 128 or -1."""
        value = first_of({name: self.content.get(name) for name in names}, *names)
        if value is None:
            raise ConfigError(f"{self.where} has no {names[0]}; use {_listed(GROUP_SIZES)}")
        if type(value) is not int or value == 0 or value < -1:
            raise ConfigError(f"{self.where} has {names[0]}={brief(value)}; use {_listed(GROUP_SIZES)}")
        if value != -1 and value not in GROUP_SIZES:
            raise UnsupportedError(f"{self.where} has {names[0]}={value}: supported are {_listed(GROUP_SIZES)}")
        return value


def layout(where: str, name: str, in_features: int, group_size: int, symmetric: bool) -> Layout:
    """The layout of a projection; a group size of -1 is one group.

    Raises:
        ConfigError: the group size does not divide in_features.
        UnsupportedError: one group that is none of 32, 64 or 128 inputs.
    """
    if group_size == -1:
        if in_features not in GROUP_SIZES:
            raise UnsupportedError(
                f"{where} has one group (group_size=-1, or strategy 'channel') of the {in_features} inputs of {name}: "
                f"supported are groups of {_listed(GROUP_SIZES)}"
            )
        group_size = in_features
    if in_features % group_size:
        raise ConfigError(
            f"{where}: {name} has {in_features} inputs, no multiple of group_size={group_size}; use a smaller group, "
            f"or leave it out (skip=['{name.rpartition('.')[2]}'])"
        )
    return Layout(group_size, symmetric)


def _gptq(where: str, content: Mapping[str, Any]) -> Int4Scheme:
    fields = _Fields(where, content)
    fields.nothing("dynamic", "adapter", "is_marlin_format")
    for name in ("checkpoint_format", "format"):
        kind = content.get(name)
        if kind is not None and (not isinstance(kind, str) or kind.lower() not in ("gptq", "gptq_v2")):
            raise fields.refuse(name, "'gptq' or 'gptq_v2'")
    kinds = {str(content[name]).lower() for name in ("checkpoint_format", "format") if content.get(name) is not None}
    if len(kinds) > 1:
        raise ConfigError(f"{where} has checkpoint_format and format that differ: {_listed(sorted(kinds))}")
    if content.get("pack_dtype") not in (None, "int32", "torch.int32"):
        raise fields.refuse("pack_dtype", "'int32'")
    group_size, symmetric = fields.group_size("group_size", "q_group_size"), fields.flag("sym", True)
    ordered = fields.flag("desc_act", False)
    head = fields.flag(_HEAD, False)
    inside = content.get("modules_in_block_to_quantize")
    only: list[str] | None = None
    if inside is not None:
        if not _is_lists_of_names(inside):
            raise ConfigError(f"{where} has modules_in_block_to_quantize={brief(inside)}; use a list of lists of names")
        only = [name for names in inside for name in names]

    def layout_of(name: str, in_features: int) -> Layout | None:
        wanted = head if name == _HEAD else only is None or any(names_part(name, part) for part in only)
        return layout(where, name, in_features, group_size, symmetric) if wanted else None

    # What the order is, only g_idx tells.
    optional = ("bias",) if ordered else ("g_idx", "bias")
    form = Gptq(2 if kinds == {"gptq_v2"} else 1, symmetric, optional)
    return Int4Scheme(where, layout_of, lambda _: form)


def _is_lists_of_names(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(names, list) and all(isinstance(name, str) for name in names) for names in value
    )


def _awq(where: str, content: Mapping[str, Any]) -> Int4Scheme:
    fields = _Fields(where, content)
    for name in ("version", "format", "checkpoint_format"):
        kind = content.get(name)
        if kind is not None and (not isinstance(kind, str) or kind.lower() != "gemm"):
            raise fields.refuse(name, "'gemm'")
    if not fields.flag("zero_point", True):
        raise fields.refuse("zero_point", "true")
    group_size, skip = fields.group_size("group_size", "q_group_size"), fields.words("modules_to_not_convert")
    form = Awq()

    def layout_of(name: str, in_features: int) -> Layout | None:
        # AutoAWQ looks for the text anywhere in the name; it never converts the head.
        if name == _HEAD or any(part in name for part in skip):
            return None
        return layout(where, name, in_features, group_size, symmetric=False)

    return Int4Scheme(where, layout_of, lambda _: form)


@dataclass(frozen=True)
class _Group:
    """One of compressed-tensors' config_groups."""

    targets: list[str]
    group_size: int
    symmetric: bool
    ordered: bool  # inputs may be in another order than that of the groups


def _compressed_tensors(where: str, content: Mapping[str, Any]) -> Int4Scheme:
    fields = _Fields(where, content)
    fields.nothing("kv_cache_scheme", "transform_config", "moe_sparsity_config")
    sparsity = content.get("sparsity_config")
    if sparsity not in (None, {}) and not (isinstance(sparsity, Mapping) and sparsity.get("format") == "dense"):
        raise fields.refuse("sparsity_config", "null")
    if content.get("format") != "pack-quantized":
        raise fields.refuse("format", "'pack-quantized'")
    if content.get("quantization_status") not in (None, "compressed"):
        raise fields.refuse("quantization_status", "'compressed'")
    given = content.get("config_groups")
    if not isinstance(given, Mapping) or not given:
        raise ConfigError(f"{where} has config_groups={brief(given)}; use an object of at least one group")
    groups = [_group(f"{where}.config_groups.{brief(name)}", value) for name, value in given.items()]
    ignore = fields.words("ignore")
    matches = _Matcher(where)

    def layout_of(name: str, in_features: int) -> Layout | None:
        if any(matches(name, entry) for entry in ignore):
            return None
        # A name beats a pattern, and that the class.
        for kind in ("name", "pattern", "class"):
            for group in groups:
                if any(matches(name, entry) == kind for entry in group.targets):
                    return layout(where, name, in_features, group.group_size, group.symmetric)
        return None

    optional = () if any(group.ordered for group in groups) else ("weight_g_idx",)
    return Int4Scheme(where, layout_of, lambda layout: CompressedTensors(layout.symmetric, optional))


def _group(where: str, value: Any) -> _Group:
    if not isinstance(value, Mapping) or not isinstance(value.get("weights"), Mapping):
        raise ConfigError(f"{where}={brief(value)}; use an object with targets and weights")
    outer, fields = _Fields(where, value), _Fields(f"{where}.weights", value["weights"])
    outer.nothing("input_activations", "output_activations")
    if value.get("format") not in (None, "pack-quantized"):
        raise outer.refuse("format", "'pack-quantized'")
    accepted = {"num_bits": (4,), "type": ("int", None), "strategy": ("group", "channel", None)}
    for name, values in accepted.items():
        if fields.content.get(name) not in values:
            raise fields.refuse(name, repr(values[0]))
    fields.nothing("dynamic", "block_structure")
    size = -1 if fields.content.get("strategy") == "channel" else fields.group_size("group_size")
    order = fields.content.get("actorder")
    if order not in (None, False, True, "group", "dynamic", "weight", "static"):
        raise fields.refuse("actorder", "null, 'weight' or 'static'")
    ordered = order in (True, "group", "dynamic")
    return _Group(outer.words("targets"), size, fields.flag("symmetric", True), ordered)


class _Matcher:
    """Entries of compressed-tensors' `targets` and `ignore`: a name, a class or "re:" and a pattern for the start.

    A stranger's patterns must not take forever. Time grows with the power of a pattern's choices (repetitions, "or",
    "maybe"), so those are few, and no group is repeated.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self.patterns: dict[str, re.Pattern[str]] = {}

    def __call__(self, name: str, entry: str) -> str | None:
        """Which of "name", "pattern" and "class" makes `entry` mean the projection `name`; None if it does not."""
        if entry == name:
            return "name"
        if entry.startswith("re:"):
            return "pattern" if self._pattern(entry[3:]).match(name) else None
        return "class" if entry == "Linear" else None

    def _pattern(self, text: str) -> re.Pattern[str]:
        if text not in self.patterns:
            plain = re.sub(r"\\.", "", text)
            refused = re.search(r"\)[*+?{]|[{}]|\(\?|\\[1-9]", text) is not None
            refused |= len(re.findall(r"[*+?]", plain)) > _MOST_REPETITIONS or plain.count("|") > _MOST_BRANCHES
            if refused or len(text) > 200 or len(self.patterns) >= _MOST_PATTERNS:
                raise UnsupportedError(
                    f"{self.where} has the pattern {brief(text)}: supported are {_MOST_PATTERNS} patterns of up to 200 "
                    f"characters with {_MOST_REPETITIONS} of * + ? and {_MOST_BRANCHES} of |, no group repeated; write "
                    "the projections' names instead"
                )
            try:
                self.patterns[text] = re.compile(text)
            except re.error as error:
                raise ConfigError(f"{self.where} has the pattern {brief(text)}, which is none: {error}") from error
        return self.patterns[text]


def _listed(values: Sequence[Any]) -> str:
    return listed([str(value) for value in values])
