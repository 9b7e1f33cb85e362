"""A float checkpoint turned into one of int4 weights, by plain rounding or knowing a text, and checked."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from llama_fast.engine.generation_config import GenerationDefaults
from llama_fast.engine.plan import check_weights
from llama_fast.errors import (
    CheckpointIOError,
    CheckpointPathError,
    ConfigError,
    OutOfMemoryError,
    RequestError,
    listed,
)
from llama_fast.model.calibration import calibrate
from llama_fast.model.canary import make_canary
from llama_fast.model.divergence import Divergence, divergences, windows_of
from llama_fast.model.llama import LlamaLM
from llama_fast.model.loading import Checkpoint, open_checkpoint, read_model
from llama_fast.model.quantization import Int4Config
from llama_fast.model.saving import save_model, spread_ids
from llama_fast.model.verify import VerifyReport, verify_checkpoint
from llama_fast.ops import select_backend
from llama_fast.tokenizer import LlamaTokenizer

WINDOW = 512
CALIBRATION_TOKENS = 32_768
# Of the text's tokens, from its end, when no other text is given: to compare on, not to calibrate with.
HELD_OUT_SHARE = 0.2
HELD_OUT_TOKENS = 8_192
# What a tokenizer and a chat need beside the weights.
_COPIED = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "*.jinja",
    "additional_chat_templates",
    "LICENSE*",
    "USE_POLICY*",
)
_CANARY_TOKENS = 32


@dataclass(frozen=True)
class QuantizeReport:
    """What became of a model.

    Attributes:
        original, plain, calibrated: predictions on the held-out text, of the model as it was, rounded plainly and
            rounded with the text; None without a text.
        stored_bytes, bytes: of the tensors before and after.
        verified: the written files, loaded anew.
    """

    original: Divergence | None
    plain: Divergence | None
    calibrated: Divergence | None
    stored_bytes: int
    bytes: int
    verified: VerifyReport

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def quantize(
    folder: Path,
    out: Path,
    config: Int4Config,
    *,
    text: str | None = None,
    held_out: str | None = None,
    calibration_tokens: int = CALIBRATION_TOKENS,
    dtype: str | None = "auto",
    device: str | None = None,
    backend: str = "auto",
    show_progress: bool | None = None,
) -> QuantizeReport:
    """Write `folder`'s model with int4 weights to `out`, in compressed-tensors' format, with a canary.

    Args:
        folder: a float checkpoint, as from `find_folder`.
        out: an empty or a new folder.
        text: to calibrate with; None rounds plainly.
        held_out: to compare on; None takes the end of `text`, which is not calibrated with then.
        calibration_tokens: most tokens of `text` to calibrate with.
        dtype, device, backend: as for `LLM`.
        show_progress: bars on stderr; None shows them on a terminal.

    Raises:
        CheckpointPathError: `out` is not empty or cannot be made.
        RequestError: a text is too short.
        ConfigError, CheckpointError, UnsupportedError, BackendError, OutOfMemoryError: as for `LLM`.
    """
    checkpoint = open_checkpoint(folder, dtype=dtype, device=device)
    if checkpoint.int4 is not None:
        raise ConfigError(f"{checkpoint.int4.where} says that the weights are quantized already; give the float model")
    check_weights(checkpoint)
    rounding = replace(checkpoint, int4=config.scheme())
    rounding.empty_model(LlamaLM)  # refuses what does not fit before any work
    ops = select_backend(backend, checkpoint.device, checkpoint.dtype)
    tokenizer = LlamaTokenizer.from_pretrained(folder)
    defaults = GenerationDefaults.from_folder(folder)
    calibrates, compares = _windows(tokenizer, text, held_out, calibration_tokens, checkpoint.config)
    _check_out(out)
    try:
        return _quantize(rounding, config, out, ops, defaults, calibrates, compares, show_progress)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        reason = str(error).partition("\n")[0]
        raise OutOfMemoryError(f"memory ran out: {reason}; use --tokens with less, or device='cpu'") from error


def _quantize(
    rounding: Checkpoint,
    config: Int4Config,
    out: Path,
    ops: ModuleType,
    defaults: GenerationDefaults,
    calibrates: list[list[int]],
    compares: list[list[int]],
    show_progress: bool | None,
) -> QuantizeReport:
    checkpoint = replace(rounding, int4=None)
    folder = checkpoint.folder

    original = read_model(LlamaLM, checkpoint)
    original.prepare(ops)
    model = read_model(LlamaLM, rounding)
    model.prepare(ops)
    before = plain = after = None
    if compares:
        before, plain = divergences(
            (original, ops), [(original, ops), (model, ops)], compares, show_progress=show_progress
        )
    if calibrates:
        del model  # before there is another
        model = read_model(LlamaLM, checkpoint)
        calibrate(model, config.scheme(), ops, calibrates, show_progress=show_progress)
        model.prepare(ops)
        (after,) = divergences((original, ops), [(model, ops)], compares, show_progress=show_progress)
    prompt = (compares[0] if compares else spread_ids(model.config.vocab_size))[:_CANARY_TOKENS]
    canary = make_canary(model, ops, prompt, original)
    # The weights last: a folder without them is no model.
    _copy_side_files(folder, out)
    defaults.save(out)
    save_model(model, out, canary=canary)
    verified = verify_checkpoint(out, show_progress=show_progress)
    return QuantizeReport(before, plain, after, checkpoint.files.total_bytes, verified.num_bytes, verified)


def _check_out(out: Path) -> None:
    """`out` must be an empty folder, or one that can be made now; it is."""
    if out.exists() and not out.is_dir():
        raise CheckpointPathError(f"{out} is a file; give a folder for the quantized model")
    try:
        out.mkdir(parents=True, exist_ok=True)
        held = sorted(path.name for path in out.iterdir())
    except OSError as error:
        raise CheckpointPathError(f"{out}: no folder can be made there: {error.strerror or error}") from error
    if held:
        raise CheckpointPathError(f"{out} is not empty ({listed(held)}); give an empty or a new folder")


def _windows(
    tokenizer: LlamaTokenizer, text: str | None, held_out: str | None, calibration_tokens: int, config: Any
) -> tuple[list[list[int]], list[list[int]]]:
    """Windows to calibrate with, and others to compare on."""

    def encode(part: str) -> list[int]:
        return tokenizer.encode(part, add_special_tokens=False, verbose=False)

    length = min(WINDOW, config.max_position_embeddings)
    if length < 8:
        raise RequestError(f"max_position_embeddings={length} leaves no windows of text; quantize without one")
    if text is None and held_out is not None:
        raise RequestError("a held-out text is there to compare on what --calibrate makes; give that too")
    bos = tokenizer.encode("")[:1]
    calibrated = [] if text is None else encode(text)
    if held_out is not None:
        compared = encode(held_out)
    else:
        split = len(calibrated) - min(int(HELD_OUT_SHARE * len(calibrated)), HELD_OUT_TOKENS)
        calibrated, compared = calibrated[:split], calibrated[split:]
    if text is not None and (len(calibrated) < length or len(compared) < 2):
        raise RequestError(
            f"the text leaves {len(calibrated)} tokens to calibrate with and {len(compared)} to compare on; at least "
            f"{length} and 2 are needed: give a longer text"
        )
    return (
        _spread(windows_of(calibrated, length, bos), max(1, calibration_tokens // length)),
        windows_of(compared[:HELD_OUT_TOKENS], length, bos),
    )


def _spread(windows: Sequence[list[int]], most: int) -> list[list[int]]:
    """At most `most` of the windows, from everywhere in the text."""
    if len(windows) <= most:
        return list(windows)
    return [windows[index * len(windows) // most] for index in range(most)]


def _copy_side_files(folder: Path, out: Path) -> None:
    for pattern in _COPIED:
        for path in folder.glob(pattern):
            copy: Callable[..., Any] = shutil.copytree if path.is_dir() else shutil.copyfile
            try:
                copy(path, out / path.name)
            except (OSError, shutil.Error) as error:
                raise CheckpointIOError(f"{path} cannot be copied to {out}: {error}") from error
