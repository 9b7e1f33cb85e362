"""Checkpoints: from a folder of safetensors to a module's parameters, and back.

Nothing is copied on the CPU: parameters are views of the mapped files (see checkpoint_files.py), so an optimizer step
or any in-place write changes the parameter and never the file.

Names   those of transformers, with or without the base model's prefix `model.`, whichever the module has.
Dtypes  F64, F32, F16 and BF16 weights. Quantized checkpoints are refused.
Ties    names that are one parameter in the module may be stored under any of them; stored twice they must be equal.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from llama_fast.errors import (
    CheckpointIOError,
    CheckpointMismatchError,
    ConfigError,
    OutOfMemoryError,
    listed,
    shown,
)
from llama_fast.files import written_whole
from llama_fast.model.checkpoint_files import INDEX_FILE, CheckpointFiles, find_folder

__all__ = ["CheckpointFiles", "LoadReport", "find_folder", "load_weights", "save_weights"]

_FILE_PATTERN = "model{suffix}.safetensors"
_OWN_FILES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_HEAD = "lm_head.weight"

# Tensors that only the quantized formats (GPTQ, AWQ, compressed-tensors, fp8, bitsandbytes) store.
_QUANTIZED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|input_scale|SCB"
    r"|weight[._](packed|scale|scale_inv|shape|zero_point|g_idx|absmax|quant_map|quant_state.*))$"
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` did: the files read, and every tensor that was not taken exactly as stored."""

    paths: tuple[Path, ...]
    weight_bytes: int  # bytes of the checkpoint's tensors, as stored
    dtype: torch.dtype  # of every loaded parameter
    cast: tuple[str, ...]  # names, as stored, whose dtype differed
    ignored: tuple[str, ...]  # names, as stored, that the module has no use for


def load_weights(
    module: nn.Module, folder: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> LoadReport:
    """Replace every parameter of `module`, usually on the meta device, by the checkpoint's.

    On the CPU and without a cast parameters are views of the mapped files. They get requires_grad=False; parameters
    that were one object (a tied head) are one object again. The module is unchanged when an error is raised.

    Args:
        module: has transformers' parameter names, with or without the prefix `model.`.
        folder: as from `find_folder`.
        dtype: of the parameters; None keeps the files' dtype. If that is mixed, all are cast to the dtype of the
            module's first parameter (the embedding), as transformers does for "auto" without a dtype in the config.
        device: tensors are uploaded to it one by one.

    Ignored are stored `rotary_emb.inv_freq` (old checkpoints; it follows from the config) and, when the module has no
    head, `lm_head.weight`.

    Raises:
        CheckpointMismatchError: a tensor is missing, unexpected, misshapen or not a float, or tied ones differ.
        CheckpointPathError, CheckpointIOError, CheckpointFormatError: see `CheckpointFiles.open`.
        OutOfMemoryError: the parameters do not fit on `device`.
    """
    device = torch.device(device)
    files = CheckpointFiles.open(folder)
    targets: dict[str, Tensor] = module.state_dict(keep_vars=True)
    sources, ignored = _match(targets, files)

    stored = [files.dtypes[name] for name in sources.values()]
    dtype = dtype or stored[0]
    cast = tuple(dict.fromkeys(name for name in sources.values() if files.dtypes[name] != dtype))
    if cast and len(set(stored)) > 1:
        _log.warning("%s: mixed dtypes; %d tensors are cast to %s: %s", folder, len(cast), dtype, listed(cast))

    loaded: dict[int, Tensor] = {}
    work = tqdm(
        targets.items(), "loading weights", unit="tensor", disable=None if cast or device.type != "cpu" else True
    )
    for name, target in work:
        if id(target) not in loaded:
            try:
                tensor = files.tensor(sources[name]).to(device=device, dtype=dtype)
            except torch.OutOfMemoryError as error:
                needed = sum(parameter.numel() for parameter in module.parameters()) * dtype.itemsize
                raise OutOfMemoryError(
                    f"the weights need {needed:,} bytes on {device}, which ran out at {name}: {error}; "
                    "free memory there, or use a smaller dtype or model"
                ) from error
            loaded[id(target)] = nn.Parameter(tensor, requires_grad=False)
    module.requires_grad_(False)  # load_state_dict copies the flag from the parameter it replaces
    module.load_state_dict({name: loaded[id(target)] for name, target in targets.items()}, strict=True, assign=True)
    return LoadReport(files.paths, files.total_bytes, dtype, cast, ignored)


def _match(targets: Mapping[str, Tensor], files: CheckpointFiles) -> tuple[dict[str, str], tuple[str, ...]]:
    """Which stored tensor each parameter of `targets` takes, and the stored names that are ignored.

    Names are compared without the prefix `model.`. Names of one parameter object (ties) share one stored tensor.
    """
    stored: dict[str, str] = {}
    ignored: list[str] = []
    twice: list[str] = []
    for name in files.shapes:
        if name.endswith("rotary_emb.inv_freq") or (name == _HEAD and _HEAD not in targets):
            ignored.append(name)
        elif stored.setdefault(_base_name(name), name) != name:
            twice.append(name)

    names_of: dict[int, list[str]] = {}  # parameter object -> its names in the module; more than one where tied
    for name, target in targets.items():
        names_of.setdefault(id(target), []).append(name)

    sources: dict[str, str] = {}
    missing: list[str] = []
    misshapen: list[str] = []
    tied: list[tuple[str, str]] = []
    for names in names_of.values():
        found = [stored.pop(_base_name(name)) for name in names if _base_name(name) in stored]
        if not found:
            missing.append(names[0])
            continue
        expected = tuple(targets[names[0]].shape)
        for name in found:
            if files.shapes[name] != expected:
                misshapen.append(f"{name} {list(files.shapes[name])}, expected {list(expected)}")
            elif files.dtypes[name] not in _WEIGHT_DTYPES:
                misshapen.append(f"{name} has dtype {files.dtypes[name]}, expected a float of 16 bits or more")
        sources.update(dict.fromkeys(names, found[0]))
        tied += [(found[0], other) for other in found[1:]]

    unexpected = twice + list(stored.values())
    problems = [
        f"{len(names)} {kind}: {listed(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape or dtype", misshapen))
        if names
    ]
    if problems:
        hints = _hints(missing, unexpected + misshapen)
        raise CheckpointMismatchError(
            f"{files.paths[0].parent} does not fit the model: {'; '.join([*problems, *hints])}"
        )
    for name, other in tied:
        if not _bitwise_equal(files.tensor(name), files.tensor(other)):
            raise CheckpointMismatchError(
                f"{files.paths[0].parent}: the model ties {shown(other)} to {shown(name)}, but the checkpoint stores "
                "different values for them; set tie_word_embeddings to false in config.json if both are wanted"
            )
    return sources, tuple(ignored)


def _base_name(name: str) -> str:
    return name.removeprefix("model.")


def _bitwise_equal(a: Tensor, b: Tensor) -> bool:
    # As bytes, so that NaN equals NaN and 0.0 differs from -0.0.
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _hints(missing: Sequence[str], others: Sequence[str]) -> list[str]:
    hints = []
    if missing == [_HEAD]:
        hints.append("set tie_word_embeddings to true in config.json if the head is the embedding")
    if any(_QUANTIZED.search(name) for name in others):
        hints.append("this is a quantized checkpoint, which is not supported; use the unquantized one")
    return hints


def save_weights(module: nn.Module, folder: Path, *, max_shard_size: int | str = "5GB") -> list[Path]:
    """Write the parameters of `module` as transformers does: `model.safetensors`, or shards and their index.

    Tied parameters are stored once, under their first name. Each file is written under a temporary name and renamed,
    the index last; then weight files of an earlier save are removed. A module may be saved over the checkpoint it is
    mapped from: the mapping keeps the old file's bytes. What is atomic is a file, not the folder: a reader that opens
    the folder during a save over an equally sharded checkpoint can see shards of both.

    Args:
        max_shard_size: most bytes of tensors in one file, as an int or "5GB", "200MB"; a larger tensor gets a file
            of its own.

    Returns:
        The files written, the index last.

    Raises:
        ConfigError: `max_shard_size` is not a positive size.
        CheckpointIOError: a file cannot be written; the temporary file is removed.
    """
    # Imported here: loading does not need the HTTP client that comes with it.
    from huggingface_hub import split_state_dict_into_shards_factory

    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}
    for name, parameter in module.state_dict(keep_vars=True).items():
        if names.setdefault(id(parameter), name) == name:
            tensors[name] = parameter.detach()
    try:
        if not isinstance(max_shard_size, str) and (type(max_shard_size) is not int or max_shard_size <= 0):
            raise ValueError("must be a positive number of bytes")
        split = split_state_dict_into_shards_factory(
            tensors,
            get_storage_size=lambda tensor: tensor.numel() * tensor.element_size(),
            filename_pattern=_FILE_PATTERN,
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        raise ConfigError(
            f"max_shard_size={max_shard_size!r}: {error}; give bytes as an int, or a string such as '5GB' or '200MB'"
        ) from error

    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file_name, in_file in split.filename_to_tensors.items():
            shard = {name: tensors[name].contiguous() for name in in_file}
            path = folder / file_name
            with written_whole(path) as temporary:
                save_file(shard, temporary, metadata={"format": "pt"})
            written.append(path)
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            with written_whole(folder / INDEX_FILE) as temporary:
                temporary.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
            written.append(folder / INDEX_FILE)
        for path in sorted(folder.iterdir()):
            if _OWN_FILES.fullmatch(path.name) and path not in written:
                path.unlink()
    except (OSError, SafetensorError) as error:
        raise CheckpointIOError(f"saving weights to {folder} failed: {error}") from error
    return written
