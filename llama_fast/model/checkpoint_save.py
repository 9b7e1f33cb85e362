"""A module's parameters written to a folder as safetensors, as transformers names and splits them."""

import itertools
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from llama_fast.errors import CheckpointIOError, ConfigError
from llama_fast.files import written_whole
from llama_fast.model.checkpoint_files import SHARD_NAME, SINGLE_FILE
from llama_fast.model.checkpoint_index import INDEX_FILE
from llama_fast.model.int4_formats import CompressedTensors
from llama_fast.model.int4_modules import int4_linears
from llama_fast.ops.int4 import INT4_SUFFIXES

_OWN_FILES = re.compile(rf"({SHARD_NAME.pattern}|{re.escape(SINGLE_FILE)}|{re.escape(INDEX_FILE)})(\.tmp)?")


def save_weights(
    module: nn.Module,
    folder: Path,
    *,
    max_shard_size: int | str = "5GB",
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> list[Path]:
    """Write the parameters of `module` as transformers does: `model.safetensors`, or shards and their index.

    Tied parameters are stored once, under their first name; int4 projections as compressed-tensors does. A module may
    be saved over the checkpoint it is mapped from: the mapping keeps the old file's bytes.

    At every moment the folder holds the old checkpoint or the new one, whole, whatever ends the save: an error, Ctrl-C
    or a kill, though not a power cut, since nothing is flushed to the disk. Shards get names that no file of the folder
    has (`model-2-00001-of-00003.safetensors` if need be), so none is written over; one rename, of the index or of
    `model.safetensors`, or the removal of an old `model.safetensors`, makes the new checkpoint the one that is loaded;
    the files of the old one are removed after it. An error or Ctrl-C while shards are written removes them; what a kill
    leaves behind no load reads, and the next save removes it. A reader that opened the old checkpoint just before may
    miss a shard, which is an error. One save at a time: two into one folder are not kept apart.

    Args:
        max_shard_size: most bytes of tensors in one file, as an int or "5GB", "200MB"; a larger tensor gets a file
            of its own.
        metadata: further texts for the header of the first file.

    Returns:
        The files written, the index last.

    Raises:
        ConfigError: `max_shard_size` is not a positive size.
        UnsupportedError: zeros of 16 in an int4 projection, see `CompressedTensors.write`.
        CheckpointIOError: a file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}
    for name, parameter in module.state_dict(keep_vars=True).items():
        if names.setdefault(id(parameter), name) == name:
            tensors[name] = parameter.detach()
    for name, linear in int4_linears(module):
        for suffix in INT4_SUFFIXES:
            tensors.pop(f"{name}.{suffix}", None)
        symmetric = linear.weight_zero_point is None
        for suffix, tensor in CompressedTensors(symmetric).write(name, linear).items():
            tensors[f"{name}.{suffix}"] = tensor
    shards, index = _split(tensors, folder, max_shard_size)

    written: list[Path] = []
    unlisted: list[Path] = []  # what an error removes: shards that no index lists yet
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file_name, in_file in shards.items():
            path = folder / file_name
            shard = {name: tensors[name].contiguous() for name in in_file}
            if index is not None:
                unlisted.append(path)
            with written_whole(path) as temporary:
                save_file(shard, temporary, metadata={"format": "pt", **({} if written else metadata)})
            written.append(path)
        if index is not None:
            with written_whole(folder / INDEX_FILE) as temporary:
                temporary.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
                unlisted.clear()  # before the rename: an interrupt after it must find none
            written.append(folder / INDEX_FILE)
            (folder / SINGLE_FILE).unlink(missing_ok=True)
        for path in sorted(folder.iterdir()):
            if _OWN_FILES.fullmatch(path.name) and path not in written:
                path.unlink()
    except (OSError, SafetensorError) as error:
        raise CheckpointIOError(f"saving weights to {folder} failed: {error}") from error
    finally:
        for path in unlisted:
            path.unlink(missing_ok=True)
    return written


def _split(
    tensors: dict[str, Tensor], folder: Path, max_shard_size: int | str
) -> tuple[dict[str, list[str]], dict[str, Any] | None]:
    """The names of the tensors in each file, and the index where there are several, under names not yet in `folder`."""
    # Imported here: loading does not need the HTTP client that comes with it.
    from huggingface_hub import split_state_dict_into_shards_factory

    try:
        if not isinstance(max_shard_size, str) and (type(max_shard_size) is not int or max_shard_size <= 0):
            raise ValueError("must be a positive number of bytes")
        for number in itertools.count(1):
            split = split_state_dict_into_shards_factory(
                tensors,
                get_storage_size=lambda tensor: tensor.numel() * tensor.element_size(),
                filename_pattern=f"model{'' if number == 1 else f'-{number}'}{{suffix}}.safetensors",
                max_shard_size=max_shard_size,
            )
            if not split.is_sharded:
                return split.filename_to_tensors, None
            if not any(os.path.lexists(folder / file_name) for file_name in split.filename_to_tensors):
                break
    except ValueError as error:
        raise ConfigError(
            f"max_shard_size={max_shard_size!r}: {error}; give bytes as an int, or a string such as '5GB' or '200MB'"
        ) from error
    return split.filename_to_tensors, {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
