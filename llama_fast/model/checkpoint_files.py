"""Checkpoint folders: find or download one, check its safetensors headers, map its tensors.

Nothing is copied: `safe_open(framework="pt")` maps each file privately and copy-on-write
(`torch.UntypedStorage.from_file(shared=False)`), and every tensor is a view of that mapping, which lives as long as
one of them does. Pages stay shared with the page cache until written, and a write never reaches the file. A mapped
file may be deleted or replaced by rename; rewriting or truncating one in place changes or faults the pages that were
not read yet, as with any mapped file.

Files are `model.safetensors`, else `model.safetensors.index.json` and the shards it lists. Pickles are never opened.
"""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llama_fast.errors import (
    CheckpointFormatError,
    CheckpointIOError,
    CheckpointMismatchError,
    CheckpointPathError,
    listed,
    shown,
)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_MAX_INDEX_BYTES = 10 * 2**20  # a 405B model's index is 0.1 MB; a file this large is not an index

# What the bytes of the safetensors format's dtype codes are; codes not listed (sub-byte, complex) hold no Llama weight.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

_LOOKS_LIKE = (
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself: run `git lfs pull`"),
    (b"PK\x03\x04", "a zip or torch.save archive; pickles are refused, convert it to safetensors"),
    (b"\x80", "a Python pickle; pickles are refused, convert it to safetensors"),
    (b"GGUF", "a GGUF file; only safetensors are read"),
    (b"<", "an HTML or XML page: the download returned an error page"),
)

_log = logging.getLogger(__name__)


def find_folder(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """The local folder of a checkpoint; downloads it when `name_or_path` is a hub id.

    Args:
        name_or_path: a folder, or `owner/name` on the Hugging Face hub. An existing folder wins.
        revision, cache_dir, token, local_files_only: as in `huggingface_hub.snapshot_download`; unused for a folder.

    Returns:
        The folder. Of a hub repository only configuration, tokenizer, chat template and safetensors are downloaded.

    Raises:
        CheckpointPathError: no such folder and not a hub id, or the hub has no such repository, revision or connection.
    """
    repo_id = os.fspath(name_or_path)
    path = Path(repo_id).expanduser()
    if repo_id and path.is_dir():
        return path
    if path.is_file():
        raise CheckpointPathError(f"{path} is a file; give the folder that holds config.json and {SINGLE_FILE}")
    accepted = "give an existing folder, or a hub id such as meta-llama/Llama-3.2-1B"
    if repo_id.count("/") != 1:
        raise CheckpointPathError(f"no folder {shown(repo_id)!r}; {accepted}")

    # Imported here: a local folder does not need the HTTP client that comes with it.
    # HTTPError is its HTTP client's, whichever that is; it covers connections lost during a download.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
    )

    try:
        folder = snapshot_download(
            repo_id,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            allow_patterns=["*.json", "*.safetensors", "*.jinja", "tokenizer.model"],
            # Subfolders and consolidated files hold the same weights in other formats.
            ignore_patterns=["*/*", "consolidated*"],
        )
    except HFValidationError as error:
        raise CheckpointPathError(f"no folder {shown(repo_id)!r} and not a hub id ({error}); {accepted}") from error
    except GatedRepoError as error:
        raise CheckpointPathError(
            f"hub repository {repo_id} is gated: accept its licence at https://huggingface.co/{repo_id}, "
            "then pass token= or run `hf auth login`"
        ) from error
    except LocalEntryNotFoundError as error:
        raise CheckpointPathError(
            f"no folder {shown(repo_id)!r}, no cached copy of that hub id, and the hub was not asked or not "
            f"reachable; {accepted}, or {'pass local_files_only=False' if local_files_only else 'connect'}"
        ) from error
    except (HTTPError, OSError) as error:
        raise CheckpointPathError(
            f"no folder {shown(repo_id)!r}, and downloading hub repository {repo_id} "
            f"(revision {revision or 'main'}) failed: {error}; {accepted}, or pass token= if it is private"
        ) from error
    return Path(folder)


@dataclass(frozen=True)
class CheckpointFiles:
    """The tensors of a checkpoint folder: headers read and checked, files mapped, no weight read yet.

    `shapes` and `dtypes` are keyed by tensor name, in the order of the files; `total_bytes` counts the tensors alone.
    """

    paths: tuple[Path, ...]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]
    total_bytes: int
    _handles: Mapping[str, Any] = field(repr=False)  # tensor name -> the safe_open that maps its file

    @classmethod
    def open(cls, folder: Path) -> "CheckpointFiles":
        """Open `model.safetensors`, else the shards of `model.safetensors.index.json`.

        Raises:
            CheckpointPathError: neither file is there, or the index names a file outside `folder`.
            CheckpointIOError: a file is missing or cannot be read or mapped.
            CheckpointFormatError: a file is not a safetensors file or not an index.
            CheckpointMismatchError: index and shards disagree about where a tensor is.
        """
        single, index = folder / SINGLE_FILE, folder / INDEX_FILE
        if single.exists():
            if index.exists():
                _log.warning("%s holds %s and %s; the first is loaded", folder, SINGLE_FILE, INDEX_FILE)
            return cls._of_shards({single: _open(single)})
        if not index.exists():
            raise CheckpointPathError(_nothing_to_load(folder))
        weight_map = _read_index(index)
        paths = {name: _shard_path(folder, name) for name in sorted(set(weight_map.values()))}
        absent = [name for name, path in paths.items() if not path.is_file()]
        if absent:
            raise CheckpointIOError(
                f"{len(absent)} of the {len(paths)} shards in {index} are missing or not files: {listed(absent)}; "
                "download the checkpoint again"
            )
        handles = {path: _open(path) for path in paths.values()}
        _check_index(weight_map, {path.name: set(handle.keys()) for path, handle in handles.items()})
        return cls._of_shards(handles)

    @classmethod
    def _of_shards(cls, shards: Mapping[Path, Any]) -> "CheckpointFiles":
        shapes: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, torch.dtype] = {}
        handles: dict[str, Any] = {}
        total_bytes = 0
        for path, handle in shards.items():
            for name in handle.offset_keys():
                header = handle.get_slice(name)
                code = header.get_dtype()
                if code not in _DTYPES:
                    raise CheckpointFormatError(
                        f"{path}: tensor {shown(name)!r} has dtype {code}; accepted are {', '.join(_DTYPES)}"
                    )
                shapes[name], dtypes[name], handles[name] = tuple(header.get_shape()), _DTYPES[code], handle
                total_bytes += torch.Size(shapes[name]).numel() * dtypes[name].itemsize
        return cls(tuple(shards), shapes, dtypes, total_bytes, handles)

    def tensor(self, name: str) -> Tensor:
        """One tensor on the CPU: a view of the file's private copy-on-write mapping, nothing copied.

        A tensor that the file stores off its dtype's alignment is copied, since CPU kernels may assume alignment;
        files written by safetensors have none.

        Raises:
            CheckpointIOError: the file cannot be mapped.
        """
        try:
            tensor: Tensor = self._handles[name].get_tensor(name)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise CheckpointIOError(f"tensor {shown(name)!r} cannot be mapped: {error}") from error
        return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor


def _open(path: Path) -> Any:
    """Map a safetensors file and check its header against its size."""
    if not path.is_file():  # opening a FIFO would wait for a writer
        raise CheckpointIOError(f"{path} is not a regular file")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        with path.open("rb") as file:
            head = file.read(64).lstrip()
        looks_like = [text for magic, text in _LOOKS_LIKE if head.startswith(magic)]
        fix = f"it looks like {looks_like[0]}" if looks_like else "truncated or corrupt; download it again"
        raise CheckpointFormatError(
            f"{path} is not a whole safetensors file: {shown(str(error))} ({path.stat().st_size:,} bytes): {fix}"
        ) from error
    except (OSError, RuntimeError) as error:  # RuntimeError: torch, when the system refuses the mapping
        raise CheckpointIOError(f"{path} cannot be mapped: {error}") from error


def _nothing_to_load(folder: Path) -> str:
    """Why `folder` has no checkpoint, and the fix."""
    accepted = f"{SINGLE_FILE}, or {INDEX_FILE} with its shards"
    if not folder.is_dir():
        return f"no folder {folder}; give a folder with {accepted}"
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        return (
            f"{folder} holds weights only as pickles ({listed(pickles)}), which can run code and are refused; convert "
            "them where you trust them: transformers' AutoModelForCausalLM.from_pretrained(folder)"
            ".save_pretrained(new_folder) writes safetensors"
        )
    return f"{folder} has no weights; it needs {accepted}"


def _read_index(path: Path) -> dict[str, str]:
    """`weight_map` of a sharded checkpoint's index: tensor name -> shard name."""
    try:
        content = path.read_bytes() if path.stat().st_size <= _MAX_INDEX_BYTES else None
    except OSError as error:
        raise CheckpointIOError(f"{path} cannot be read: {error}") from error
    if content is None:
        raise CheckpointFormatError(f"{path} is larger than {_MAX_INDEX_BYTES:,} bytes, so not an index of tensors")
    try:
        index = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointFormatError(f"{path} is not JSON: {error}; download it again") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointFormatError(
            f'{path} needs a "weight_map" of tensor names to shard names, as in {{"weight_map": '
            '{"lm_head.weight": "model-00001-of-00002.safetensors"}}'
        )
    if not weight_map:
        raise CheckpointFormatError(f"{path} has an empty weight_map; download it again")
    return weight_map


def _shard_path(folder: Path, name: str) -> Path:
    """The shard's path, checked to be a plain name whose file, symlinks followed, is in `folder`.

    In the hub's cache (`snapshots/<revision>/<name>` -> `blobs/<hash>`) it may be in that repository's blobs instead.
    """
    if not name or name == ".." or "\0" in name or PureWindowsPath(name).name != name:
        raise CheckpointPathError(
            f"{folder / INDEX_FILE}: shard {shown(name)!r} is not a plain file name in that folder"
        )
    path, home = folder / name, folder.resolve()
    allowed = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if path.resolve().parent not in allowed:
        raise CheckpointPathError(f"shard {path} is a symlink out of its folder; put the file itself there")
    return path


def _check_index(weight_map: Mapping[str, str], names_in: Mapping[str, set[str]]) -> None:
    """Raise CheckpointMismatchError unless each shard holds the tensors that the index puts there, and no others."""
    for shard, names in names_in.items():
        expected = {name for name, home in weight_map.items() if home == shard}
        if names != expected:
            lacks, extra = sorted(expected - names), sorted(names - expected)
            raise CheckpointMismatchError(
                f"shard {shard} is not the one its index describes: it lacks {len(lacks)} tensors ({listed(lacks)}) "
                f"and has {len(extra)} that the index does not put there ({listed(extra)}); download both again"
            )
