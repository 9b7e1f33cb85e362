"""The backends. Each is a module that exports the same ops with the same signatures; callers pick one by device.

Graph ops: embed, norm_qkv_rope_cache, attention, linear_residual, norm_gate_up_act, norm_lm_head, sample, log_probs,
copy_pages, prepare_linear. Primitives they are composed of: rms_norm, linear, rope_and_cache, silu_mul.
"""

from types import ModuleType

import torch

from llama_fast.errors import BackendError, UnsupportedError
from llama_fast.ops import reference

BACKENDS = ("auto", "reference", "cpu", "gpu")


def select_backend(name: str, device: torch.device) -> ModuleType:
    """The module that serves `device`.

    Args:
        name: "auto" (the fastest that serves the device), "reference", "cpu" or "gpu".

    Raises:
        BackendError: the name is unknown.
        UnsupportedError: the backend is not part of this version.
    """
    if name not in BACKENDS:
        raise BackendError(f"backend={name!r} is unknown; use one of {', '.join(BACKENDS)}")
    if name in ("auto", "reference"):
        return reference
    raise UnsupportedError(f"backend={name!r} is not part of this version; use 'auto' or 'reference' for {device}")
