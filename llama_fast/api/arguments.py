"""Checks of the arguments that the page's classes share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llama_fast.errors import RequestError, UnsupportedError

# Arguments of the page that are not supported yet, with the values that ask for nothing (None never does).
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "output_logits": (False,),
    "output_scores": (False,),
    "return_dict": (True,),
    "return_dict_in_generate": (False,),
    # The result is the same with a cache and without one.
    "use_cache": (False, True),
}


def refuse_unsupported(function: str, arguments: Mapping[str, Any]) -> None:
    """Refuse by name what `function` does not support.

    Raises:
        UnsupportedError: an argument has a value that asks for something.
    """
    for name, value in arguments.items():
        if value is not None and not (isinstance(value, bool | int) and value in _NEUTRAL.get(name, ())):
            raise UnsupportedError(f"{function}({name}=...) is not supported yet")


def check_input_ids(input_ids: Tensor) -> None:
    """Accept integers [batch_size, seq_len], at least one.

    Raises:
        RequestError: anything else.
    """
    if not isinstance(input_ids, Tensor):
        raise RequestError(f"input_ids must be a tensor [batch_size, seq_len]; got {type(input_ids).__name__}")
    if input_ids.ndim != 2 or input_ids.dtype not in (torch.int64, torch.int32) or not input_ids.numel():
        raise RequestError(
            "input_ids must be integers [batch_size, seq_len], not empty; "
            f"got {input_ids.dtype} {tuple(input_ids.shape)}"
        )


def kept_tokens(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The mask as bool [batch_size, seq_len]; without one every token counts.

    Raises:
        RequestError: it has another shape, or other values than 1 (a token) and 0 (padding).
    """
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    mask = torch.as_tensor(attention_mask, device=input_ids.device)
    if mask.shape != input_ids.shape:
        raise RequestError(f"attention_mask has shape {tuple(mask.shape)}; input_ids has {tuple(input_ids.shape)}")
    if not ((mask == 0) | (mask == 1)).all():
        raise RequestError("attention_mask must hold 1 (token) and 0 (padding); additive masks are not supported yet")
    return mask.bool()
