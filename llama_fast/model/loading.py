"""A model from a checkpoint folder."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from llama_fast.config import LlamaConfig
from llama_fast.errors import BackendError, CheckpointMismatchError, ConfigError, UnsupportedError, listed, shown
from llama_fast.model.checkpoint import CheckpointFiles, load_weights
from llama_fast.model.int4_modules import use_int4
from llama_fast.model.llama import LlamaLM
from llama_fast.model.quantization import Int4Config, Int4Scheme, requested, stored_scheme
from llama_fast.tokenizer import LlamaTokenizer

ModelT = TypeVar("ModelT", bound=LlamaLM)

logger = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder says before a weight is read, and where and in which dtype the model will run.

    Attributes:
        dtype: of activations, and of weights that are not int4.
        int4: which projections are, or will be; None if none.
    """

    folder: Path
    config: LlamaConfig
    files: CheckpointFiles
    dtype: torch.dtype
    device: torch.device
    int4: Int4Scheme | None = None

    def empty_model(self, model_class: type[ModelT]) -> ModelT:
        """`model_class` on the meta device, its int4 projections in place.

        Raises:
            ConfigError, CheckpointMismatchError: see `use_int4`.
        """
        with torch.device("meta"):
            model = model_class(self.config)
        if self.int4 is not None:
            use_int4(model, self.int4)
        return model


def open_checkpoint(
    folder: Path,
    *,
    dtype: str | torch.dtype | None,
    device: str | int | torch.device | None,
    quantization: str | Int4Config | None = None,
) -> Checkpoint:
    """Read config.json and the headers of the weights.

    Args:
        quantization: "int4" or an Int4Config rounds float weights while they are loaded.

    Raises:
        ConfigError, CheckpointError: the folder's files are wrong.
        UnsupportedError: quantized weights or a dtype that is not supported.
        BackendError: the device is not there.
    """
    config = LlamaConfig.from_pretrained(folder)
    wanted, int4 = requested(quantization), stored_scheme(config, folder)
    if wanted is not None and int4 is not None:
        raise ConfigError(f"{int4.where} says that the weights are quantized already; leave quantization out")
    target = pick_device(device)
    files = CheckpointFiles.open(folder)
    picked = pick_dtype(dtype, config)
    if picked is None:  # as load_weights: the embedding's, which a tied head may stand for
        names = ("embed_tokens.weight", "lm_head.weight")
        stored = {name.removeprefix("model."): dtype for name, dtype in files.dtypes.items()}
        picked = next((stored[name] for name in names if name in stored), torch.float32)
    return Checkpoint(folder, config, files, picked, target, wanted or int4)


def read_model(model_class: type[ModelT], checkpoint: Checkpoint, *, load: str = "mmap") -> ModelT:
    """Build `model_class` and give it the weights; on the CPU in their own dtype they stay mapped.

    Args:
        load: "mmap" or "copy" (see checkpoint.py).

    Raises:
        ConfigError, CheckpointError: the files do not fit the model, or `load` is neither.
        OutOfMemoryError: the device ran out of memory.
    """
    model = checkpoint.empty_model(model_class)
    load_weights(
        model, checkpoint.files, dtype=checkpoint.dtype, device=checkpoint.device, load=load, int4=checkpoint.int4
    )
    return model.eval()


def load_model(
    model_class: type[ModelT],
    folder: Path,
    *,
    dtype: str | torch.dtype | None,
    device: str | int | torch.device | None,
    load: str = "mmap",
    quantization: str | Int4Config | None = None,
) -> ModelT:
    """`open_checkpoint`, then `read_model`."""
    checkpoint = open_checkpoint(folder, dtype=dtype, device=device, quantization=quantization)
    return read_model(model_class, checkpoint, load=load)


def check_tokenizer(tokenizer: LlamaTokenizer, config: LlamaConfig, folder: Path) -> None:
    """Raise CheckpointMismatchError if a token's id has no row in the embedding.

    Fewer tokens than rows are legal: many models round their vocabulary up. The further ids decode to no text. A
    padding token without a row is too, as in Llama 2's first release: no row is ever read for padding.
    """
    beyond = {token: token_id for token, token_id in tokenizer.get_vocab().items() if token_id >= config.vocab_size}
    if beyond.keys() == {tokenizer.pad_token}:
        logger.warning("%s: the pad token '%s' has no row in the embedding", folder, shown(*beyond))
    elif beyond:
        tokens = listed(f"{token} ({token_id})" for token, token_id in sorted(beyond.items(), key=lambda item: item[1]))
        raise CheckpointMismatchError(
            f"{folder}: {len(beyond)} tokens of the tokenizer have ids that are not below vocab_size="
            f"{config.vocab_size} of config.json: {tokens}; remove them from tokenizer.json, added_tokens.json and "
            "tokenizer_config.json, or use the tokenizer that the model was trained with"
        )
