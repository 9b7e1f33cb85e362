"""The RoPE settings of a LlamaConfig: merged from all places where a file may speak of them, viewed, checked."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from llama_fast.config_checks import check_bool, check_number, check_size
from llama_fast.errors import ConfigError, brief, listed

logger = logging.getLogger(__name__)

# The object itself marks "not given": a file's own 10000.0 that contradicts its rope_parameters must not pass.
DEFAULT_ROPE_THETA = 10000.0
_ORIGINAL = "original_max_position_embeddings"
# rope_type -> (required keys, optional keys) beside the keys that every type may have.
_ROPE_KEYS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor"}, set()),
    "yarn": (
        {"factor"},
        {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", _ORIGINAL},
    ),
    "longrope": ({"short_factor", "long_factor"}, {"attention_factor", "factor", _ORIGINAL}),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", _ORIGINAL}, set()),
}
_ROPE_COMMON_KEYS = {"rope_type", "rope_theta", "partial_rotary_factor"}
_ROPE_TYPES = ", ".join(_ROPE_KEYS)
# Limits that keep every angle finite in fp32.
_FACTOR: tuple[str, Callable[[float], bool]] = ("from 1e-9 to 1e9", lambda x: 1e-9 <= x <= 1e9)


class _ReadOnlyDict(dict[str, Any]):
    """A dict for reading: a write would be lost, so it raises instead."""

    def _refuse(self, *args: object, **kwargs: object) -> NoReturn:
        raise ConfigError(
            "config.rope_scaling is a view and cannot be changed in place; assign a whole dict to it, "
            "or change config.rope_parameters"
        )

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[type, tuple[dict[str, Any]]]:
        return dict, (dict(self),)  # copies and pickles are plain dicts


class RopeViews:
    """The RoPE part of a LlamaConfig: v5's `rope_parameters` is what is stored, the rest are views of it."""

    head_dim: int
    max_position_embeddings: int
    _rope_parameters: dict[str, Any]

    @property
    def rope_parameters(self) -> dict[str, Any]:
        """v5's view, and what is stored: `rope_theta`, `rope_type` and the type's keys. Changes in place count."""
        return self._rope_parameters

    @rope_parameters.setter
    def rope_parameters(self, value: Mapping[str, Any] | None) -> None:
        new = {"rope_type": "default", "rope_theta": self.rope_theta, **as_rope_dict("rope_parameters", value)}
        check_rope(new, self)
        self._rope_parameters = new

    @property
    def rope_theta(self) -> float:
        """RoPE base."""
        return self._rope_parameters["rope_theta"]

    @rope_theta.setter
    def rope_theta(self, value: float) -> None:
        self.rope_parameters = {**self._rope_parameters, "rope_theta": value}

    @property
    def rope_scaling(self) -> dict[str, Any] | None:
        """v4's view: `rope_parameters` without `rope_theta` and `partial_rotary_factor`; None for plain RoPE."""
        scaling = {k: v for k, v in self._rope_parameters.items() if k not in ("rope_theta", "partial_rotary_factor")}
        return None if scaling == {"rope_type": "default"} else _ReadOnlyDict(scaling)

    @rope_scaling.setter
    def rope_scaling(self, value: Mapping[str, Any] | None) -> None:
        kept = {k: v for k, v in self._rope_parameters.items() if k in ("rope_theta", "partial_rotary_factor")}
        self.rope_parameters = {**kept, **as_rope_dict("rope_scaling", value)}

    @property
    def partial_rotary_factor(self) -> float:
        """Share of head_dim that is rotated."""
        return self._rope_parameters.get("partial_rotary_factor", 1.0)

    @partial_rotary_factor.setter
    def partial_rotary_factor(self, value: float) -> None:
        self.rope_parameters = {**self._rope_parameters, "partial_rotary_factor": value}

    @property
    def original_max_position_embeddings(self) -> int | None:
        """Context length before RoPE was scaled, if the file says; wherever in the file it stood."""
        return self._rope_parameters.get("original_max_position_embeddings")

    @original_max_position_embeddings.setter
    def original_max_position_embeddings(self, value: int | None) -> None:
        self.rope_parameters = {**self._rope_parameters, "original_max_position_embeddings": value}


def as_rope_dict(field: str, value: Mapping[str, Any] | None) -> dict[str, Any]:
    """A copy of `value` without nulls, and with `type`, the old name of `rope_type`, renamed.

    Raises:
        ConfigError: not an object, nested by layer type, or `type` contradicts `rope_type`.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{field}={brief(value)}; use an object with rope_type and that type's keys, or null")
    if nested := [name for name, entry in value.items() if isinstance(entry, Mapping)]:
        raise ConfigError(f"{field} is nested by {listed(nested)}; every layer of a Llama has the same RoPE")
    out = {name: copy.deepcopy(entry) for name, entry in value.items() if entry is not None}
    if "type" in out:
        out["rope_type"] = _agreed("rope_type", out.get("rope_type"), out.pop("type"))
    return out


def _agreed(name: str, *values: Any) -> Any:
    """The one value among those that are not None; None where all are."""
    given = [value for value in values if value is not None]
    if any(value != given[0] for value in given[1:]):
        raise ConfigError(
            f"{name} is given more than once with different values: {', '.join(map(brief, given))}; keep one "
            "(rope_theta, rope_scaling and type are the older names of what rope_parameters holds)"
        )
    return given[0] if given else None


def merge_rope(
    theta: float, scaling: dict[str, Any], parameters: dict[str, Any], partial: float | None, original: int | None
) -> dict[str, Any]:
    """One dict from all places where a file may speak of RoPE; what is said twice must agree.

    Args:
        theta, partial, original: top-level rope_theta, partial_rotary_factor and original_max_position_embeddings.
        scaling, parameters: rope_scaling and rope_parameters from `as_rope_dict`.

    Raises:
        ConfigError: two places disagree, or keys of a scaled type stand without their rope_type.
    """
    top = {
        "rope_theta": None if theta is DEFAULT_ROPE_THETA else theta,
        "partial_rotary_factor": partial,
        _ORIGINAL: original,
    }
    names = dict.fromkeys((*parameters, *scaling, *top))  # a set in order of appearance
    merged = {name: _agreed(name, top.get(name), scaling.get(name), parameters.get(name)) for name in names}
    merged = {name: value for name, value in merged.items() if value is not None}
    typed_keys = set().union(*(required | optional for required, optional in _ROPE_KEYS.values())) - {_ORIGINAL}
    if "rope_type" not in merged and typed_keys & set(merged):
        raise ConfigError(f"rope_scaling={brief(scaling or parameters)} lacks rope_type; use one of {_ROPE_TYPES}")
    return {"rope_type": "default", "rope_theta": theta, **merged}


def check_rope(params: Mapping[str, Any], config: RopeViews) -> None:
    """Raise ConfigError unless `params` describes a rotation that can be computed."""
    rope_type = params.get("rope_type")
    if not isinstance(rope_type, str) or rope_type not in _ROPE_KEYS:
        raise ConfigError(f"rope_type={brief(rope_type)} is not supported; use one of {_ROPE_TYPES}")
    if missing := sorted(name for name in _ROPE_KEYS[rope_type][0] if params.get(name) is None):
        raise ConfigError(f"rope_type={rope_type!r} lacks {', '.join(missing)}; add it to rope_scaling")
    check_number("rope_theta", params.get("rope_theta"), "from 1e-9 to 1e30", lambda x: 1e-9 <= x <= 1e30)
    partial = params.get("partial_rotary_factor", 1.0)
    check_number("partial_rotary_factor", partial, "above 0 and at most 1", lambda x: 0 < x <= 1)
    rotary_dim = int(config.head_dim * partial)
    if rotary_dim < 2 or rotary_dim % 2:
        raise ConfigError(
            f"head_dim={config.head_dim} with partial_rotary_factor={partial} rotates {rotary_dim} dimensions; "
            "RoPE needs an even number of them"
        )
    if rope_type == "default":
        return
    for name in ("factor", "attention_factor", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor"):
        if params.get(name) is not None:
            check_number(f"rope_scaling[{name!r}]", params[name], *_FACTOR)
    for name in ("mscale", "mscale_all_dim"):
        if params.get(name) is not None:
            check_number(f"rope_scaling[{name!r}]", params[name], "from 0 to 1e9", lambda x: 0 <= x <= 1e9)
    check_bool("rope_scaling['truncate']", params.get("truncate", True))
    if (original := params.get(_ORIGINAL)) is not None:
        check_size(_ORIGINAL, original)
    if rope_type == "llama3" and params["low_freq_factor"] == params["high_freq_factor"]:
        raise ConfigError(
            f"low_freq_factor and high_freq_factor are both {params['low_freq_factor']}; they must differ, "
            "the blend between them divides by the difference"
        )
    if rope_type == "dynamic" and rotary_dim == 2:
        raise ConfigError("rope_type='dynamic' needs more than 2 rotated dimensions; use another type or head_dim")
    if rope_type == "yarn" and params["rope_theta"] <= 1:
        raise ConfigError(f"rope_theta={params['rope_theta']}; rope_type='yarn' needs more than 1")
    if rope_type == "longrope":
        for name in ("short_factor", "long_factor"):
            _check_factor_list(name, params[name], rotary_dim // 2)
        if (original or config.max_position_embeddings) == 1:
            raise ConfigError(f"{_ORIGINAL}=1; rope_type='longrope' needs more than 1")


def _check_factor_list(name: str, values: object, length: int) -> None:
    if not isinstance(values, list | tuple) or len(values) != length:
        got = f"{len(values)} values" if isinstance(values, list | tuple) else brief(values)
        raise ConfigError(f"{name} has {got}; use a list of {length}, one per pair of rotated dimensions")
    for value in values:
        check_number(name, value, *_FACTOR)


def longrope_attention_factor(params: Mapping[str, Any], max_position_embeddings: int) -> float:
    """LongRoPE's scale of cos and sin: given, else from the factor, else from the ratio of the two lengths.

    Source: arXiv:2402.13753; transformers v5 for which of the three wins.
    """
    if params.get("attention_factor") is not None:
        return params["attention_factor"]
    original = params.get(_ORIGINAL) or max_position_embeddings
    factor = params.get("factor") or max_position_embeddings / original
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def warn_rope(config: RopeViews, *, original_in_scaling_only: bool) -> None:
    """Log what is legal but likely a mistake, and where transformers v4 and v5 read a file differently."""
    params, longest = config.rope_parameters, config.max_position_embeddings
    rope_type, factor, original = params["rope_type"], params.get("factor"), params.get(_ORIGINAL)
    required, optional = _ROPE_KEYS[rope_type]
    if unused := sorted(set(params) - required - optional - _ROPE_COMMON_KEYS):
        logger.warning("rope_type=%r does not use %s", rope_type, listed(unused))
    if rope_type == "default" and config.partial_rotary_factor != 1:
        logger.warning(
            "partial_rotary_factor=%r rotates a part of each head, as documented; transformers v5 rotates all of it",
            config.partial_rotary_factor,
        )
    if rope_type != "default" and factor is not None and factor < 1:
        logger.warning("rope_scaling['factor']=%r is below 1, which shortens the context", factor)
    if rope_type == "llama3" and params["high_freq_factor"] < params["low_freq_factor"]:
        logger.warning("high_freq_factor=%(high_freq_factor)r is below low_freq_factor=%(low_freq_factor)r", params)
    if rope_type == "llama3" and original is not None and original >= longest:
        logger.warning("%s=%d is not below max_position_embeddings=%d", _ORIGINAL, original, longest)
    if rope_type == "yarn" and original is None:
        logger.warning("%s is not set; yarn takes max_position_embeddings=%d for it", _ORIGINAL, longest)
    factor_counts = rope_type == "yarn" or (rope_type == "longrope" and params.get("attention_factor") is None)
    if factor_counts and original is not None and factor not in (None, longest / original):
        logger.warning(
            "rope_scaling['factor']=%r is not max_position_embeddings=%d / %s=%d; the factor is used, as in "
            "transformers v5 (v4's longrope would use the ratio)",
            *(factor, longest, _ORIGINAL, original),
        )
    if rope_type == "longrope" and original_in_scaling_only and original != longest:
        logger.warning(
            "rope_scaling[%r]=%d is used, as documented and as in transformers v5; v4 ignores it there and uses "
            "max_position_embeddings=%d",
            *(_ORIGINAL, original, longest),
        )
