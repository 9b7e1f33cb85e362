"""The index of a sharded checkpoint, `model.safetensors.index.json`: which shard holds which tensor.

An index comes from wherever the checkpoint came from, so a shard's name is only ever a name: it must be plain, and the
file of that name must be in the same folder.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from llama_fast.errors import (
    CheckpointFormatError,
    CheckpointIOError,
    CheckpointMismatchError,
    CheckpointPathError,
    listed,
    shown,
)
from llama_fast.files import read_file
from llama_fast.model.safetensors_header import MAX_TENSORS, parse_tensor_list

INDEX_FILE = "model.safetensors.index.json"
_MAX_INDEX_BYTES = 1_250_000  # 12,000 tensors; a 405B model's has 0.1 MB


def read_index(folder: Path) -> tuple[dict[str, Path], dict[str, set[str]], Any]:
    """The shards by name, in order, the tensors the index puts in each, and its `metadata.total_size` if it has one.

    Raises:
        CheckpointFormatError: the index is not strict JSON or has no usable weight_map.
        CheckpointPathError: a shard's name is not plain, or its file is not in `folder`.
        CheckpointIOError: index or shards are missing, or not regular files.
    """
    path = folder / INDEX_FILE
    content = read_file(path, CheckpointFormatError, max_bytes=_MAX_INDEX_BYTES, io_error=CheckpointIOError)
    index = parse_tensor_list(content, str(path))
    weight_map = index.get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise CheckpointFormatError(
            f'{path} needs a "weight_map" of tensor names to shard names, as in {{"weight_map": '
            '{"lm_head.weight": "model-00001-of-00002.safetensors"}}; download it again'
        )
    if len(weight_map) > MAX_TENSORS:
        raise CheckpointFormatError(
            f"{path}: its weight_map has {len(weight_map):,} tensors, more than max_tensors={MAX_TENSORS:,}"
        )
    names_in: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        names_in.setdefault(shard, set()).add(name)
    paths = {name: plain_path(folder, name, INDEX_FILE) for name in sorted(names_in)}
    absent = [name for name, path in paths.items() if not os.path.isfile(path)]
    if absent:
        raise CheckpointIOError(
            f"{len(absent)} of the {len(paths)} shards in {path} are missing or not files: {listed(absent)}; "
            "download the checkpoint again"
        )
    metadata = index.get("metadata")
    return paths, names_in, metadata.get("total_size") if isinstance(metadata, dict) else None


def plain_path(folder: Path, name: str, source: str) -> Path:
    """The path of the file `name`, which the file `source` in `folder` lists; no file is opened.

    Symlinks followed, it is in `folder`. In the hub's cache (`snapshots/<revision>/<name>` -> `blobs/<hash>`) it may be
    in that repository's blobs instead.

    Raises:
        CheckpointPathError: it is not, it is a device or a FIFO, or the name is no plain, printable file name.
    """
    if not name.isprintable() or name in ("", ".", "..") or PureWindowsPath(name).name != name:
        raise CheckpointPathError(f"{folder / source}: '{shown(name)}' is not a plain file name in that folder")
    path = folder / name
    if os.path.islink(path):
        home = Path(os.path.realpath(folder))
        allowed = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
        if Path(os.path.realpath(path)).parent not in allowed:
            raise CheckpointPathError(f"{path} is a symlink out of its folder; put the file itself there")
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise CheckpointPathError(f"{path} is a device, pipe or socket, not a file")
    return path


def check_shards(names_in: Mapping[str, set[str]], stored_in: Mapping[str, Iterable[str]]) -> None:
    """Raise CheckpointMismatchError unless each shard holds the tensors that the index puts there, and no others."""
    for shard, expected in names_in.items():
        stored = set(stored_in[shard])
        differences = []
        if lacks := sorted(expected - stored):
            differences.append(f"it lacks {len(lacks)} of its tensors ({listed(lacks)})")
        if extra := sorted(stored - expected):
            differences.append(f"it has {len(extra)} that the index does not put there ({listed(extra)})")
        if differences:
            raise CheckpointMismatchError(
                f"shard '{shown(shard)}' is not the one its index describes: {'; '.join(differences)}; "
                "download both again"
            )
