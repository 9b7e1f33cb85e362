"""A model from a checkpoint folder."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch

from llama_fast.config import LlamaConfig
from llama_fast.errors import BackendError, UnsupportedError
from llama_fast.model.checkpoint import load_weights
from llama_fast.model.llama import LlamaLM

ModelT = TypeVar("ModelT", bound=LlamaLM)


def pick_device(device: str | int | torch.device | None) -> torch.device:
    """None and "auto" mean the first CUDA device, else the CPU.

    Raises:
        BackendError: the device is unknown or not there.
    """
    if device in (None, "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device("cuda", device) if type(device) is int else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise BackendError(f"device={device!r} is not a device; use 'auto', 'cpu', 'cuda' or 'cuda:N'") from error
    if picked.type == "meta":
        raise BackendError("device='meta' holds no weights; use 'auto', 'cpu', 'cuda' or 'cuda:N'")
    try:
        torch.empty(1, device=picked)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise BackendError(f"device={device!r} cannot be used on this machine ({reason}); use device='cpu'") from error
    return picked


def pick_dtype(dtype: str | torch.dtype | None, config: LlamaConfig) -> torch.dtype | None:
    """None and "auto" mean the checkpoint's: the config's dtype, else None for what its tensors have.

    Raises:
        UnsupportedError: not one of the floating-point types the graph runs in.
    """
    if dtype in (None, "auto"):
        return config.dtype
    picked = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if picked not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise UnsupportedError(f"dtype={dtype!r}; use 'auto', 'bfloat16', 'float16', 'float32' or 'float64'")
    return picked


def load_model(
    model_class: type[ModelT], folder: Path, *, dtype: str | torch.dtype | None, device: str | int | torch.device | None
) -> ModelT:
    """Build `model_class` and give it the folder's weights; on the CPU in their own dtype they stay mapped.

    Raises:
        ConfigError, CheckpointError: the folder's files are wrong.
        UnsupportedError: quantized weights or a dtype that is not supported.
    """
    config = LlamaConfig.from_pretrained(folder)
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise UnsupportedError(
            f"{folder}/config.json: quantization_config.quant_method={method!r} is not supported yet"
        )
    target = pick_device(device)
    with torch.device("meta"):
        model = model_class(config)
    load_weights(model, folder, dtype=pick_dtype(dtype, config), device=target)
    return model.eval()
