"""The tensors of a checkpoint folder: headers checked first, then each tensor mapped or copied as it is asked for.

Mapped  `safe_open(framework="pt")` maps each file privately and copy-on-write
        (`torch.UntypedStorage.from_file(shared=False)`), and every tensor is a view of that mapping, which lives as
        long as one of them does. Nothing is copied: pages stay shared with the page cache until written, and a write
        never reaches the file. A mapped file may be deleted or replaced by rename; rewriting or truncating one in place
        changes or faults the pages that were not read yet, as with any mapped file.
Copied  read() into memory. A file that is cut, rewritten or replaced meanwhile is an error, never a fault.

Files are `model.safetensors`, else the shards that `model.safetensors.index.json` lists. Pickles are never opened.
"""

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llama_fast.errors import CheckpointIOError, CheckpointPathError, listed, shown
from llama_fast.model.checkpoint_index import INDEX_FILE, check_shards, read_index
from llama_fast.model.safetensors_header import Stamp, StoredTensor, read_header, stamp

SINGLE_FILE = "model.safetensors"
SHARD_NAME = re.compile(r"model(-\d+)?-\d{5}-of-\d{5}\.safetensors")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointFiles:
    """The tensors of a checkpoint folder: headers read and checked, nothing mapped and no weight read yet.

    `shapes` and `dtypes` are keyed by tensor name, in the order of the files; `total_bytes` counts the tensors alone.
    No file stays open.
    """

    paths: tuple[Path, ...]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]
    total_bytes: int
    _stored: Mapping[str, StoredTensor] = field(repr=False)
    _stamps: Mapping[Path, Stamp] = field(repr=False)
    _mapped: dict[Path, Any] = field(default_factory=dict, repr=False)  # the safe_open of each file mapped so far

    @classmethod
    def open(cls, folder: Path) -> "CheckpointFiles":
        """Read the headers of `model.safetensors`, else of the shards of `model.safetensors.index.json`.

        Logs a warning where both are there, where shards are left over that no index lists, and where the index's
        `total_size` is wrong.

        Raises:
            CheckpointPathError: neither file is there, or the index names a file outside `folder`.
            CheckpointIOError: a file is missing or cannot be read.
            CheckpointFormatError: a file is not a safetensors file or not an index.
            CheckpointMismatchError: index and shards disagree about where a tensor is.
            UnsupportedError: this machine is big-endian.
        """
        single, index = folder / SINGLE_FILE, folder / INDEX_FILE
        if os.path.lexists(single):
            if os.path.lexists(index):
                _log.warning("%s holds %s and %s; the first is loaded", folder, SINGLE_FILE, INDEX_FILE)
            else:
                _warn_of_leftovers(folder, ())
            return cls._of_headers({single: read_header(single)})
        if not os.path.lexists(index):
            raise CheckpointPathError(_nothing_to_load(folder))
        shards, names_in, total_size = read_index(folder)
        headers = {path: read_header(path) for path in shards.values()}
        check_shards(names_in, {path.name: tensors for path, (tensors, _) in headers.items()})
        _warn_of_leftovers(folder, shards)
        files = cls._of_headers(headers)
        if total_size is not None and total_size != files.total_bytes:
            _log.warning("%s: metadata.total_size is wrong: the shards hold %d bytes", index, files.total_bytes)
        return files

    @classmethod
    def _of_headers(cls, headers: Mapping[Path, tuple[dict[str, StoredTensor], Stamp]]) -> "CheckpointFiles":
        stored = {name: tensor for tensors, _ in headers.values() for name, tensor in tensors.items()}
        return cls(
            tuple(headers),
            {name: tensor.shape for name, tensor in stored.items()},
            {name: tensor.dtype for name, tensor in stored.items()},
            sum(tensor.end - tensor.start for tensor in stored.values()),
            stored,
            {path: stamp for path, (_, stamp) in headers.items()},
        )

    @property
    def folder(self) -> Path:
        return self.paths[0].parent

    def tensor(self, name: str) -> Tensor:
        """One tensor on the CPU: a view of the file's private copy-on-write mapping, nothing copied.

        A tensor that the file stores off its dtype's alignment is copied, since CPU kernels may assume alignment;
        files written by safetensors have none.

        Raises:
            CheckpointIOError: the file cannot be mapped, or has changed.
        """
        path = self._stored[name].path
        try:
            if path not in self._mapped:
                self._mapped[path] = safe_open(path, framework="pt")
                self.check_unchanged([path])
            tensor: Tensor = self._mapped[path].get_tensor(name)
        except CheckpointIOError:
            raise
        except (OSError, RuntimeError, MemoryError, SafetensorError) as error:  # each is what a refused mapping may be
            self.check_unchanged([path])
            raise CheckpointIOError(f"{path}: tensor '{shown(name)}' cannot be mapped: {error}") from error
        return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor

    def copy(self, name: str) -> Tensor:
        """One tensor on the CPU in memory of its own, with the bits of `tensor(name)`.

        Raises:
            CheckpointIOError: the file cannot be read, or has changed.
        """
        stored = self._stored[name]
        return self._read(stored, stored.start, stored.end).view(stored.shape)

    def chunks(self, name: str, max_bytes: int) -> Iterator[Tensor]:
        """The elements of one tensor, 1-D, in copies of at most `max_bytes`, a multiple of 8.

        Raises:
            CheckpointIOError: the file cannot be read, or has changed.
        """
        stored = self._stored[name]
        for start in range(stored.start, stored.end, max_bytes):
            yield self._read(stored, start, min(start + max_bytes, stored.end))

    def _read(self, stored: StoredTensor, start: int, end: int) -> Tensor:
        content = torch.empty(end - start, dtype=torch.uint8)
        try:
            with stored.path.open("rb") as file:
                file.seek(start)
                num_read = file.readinto(content.numpy().data)
                unchanged = stamp(os.fstat(file.fileno())) == self._stamps[stored.path]
        except OSError as error:
            raise CheckpointIOError(f"{stored.path} cannot be read: {error.strerror or error}") from error
        if num_read < end - start or not unchanged:
            raise _changed(stored.path)
        return content.view(stored.dtype)

    def check_unchanged(self, paths: Iterable[Path] | None = None) -> None:
        """Raise CheckpointIOError if a file, of all or of `paths`, is no longer the one whose header was read."""
        for path in self.paths if paths is None else paths:
            try:
                unchanged = stamp(path.stat()) == self._stamps[path]
            except OSError:
                unchanged = False
            if not unchanged:
                raise _changed(path)


def _changed(path: Path) -> CheckpointIOError:
    return CheckpointIOError(
        f"{path} was cut, written to or replaced while it was loaded; load it again when that is done"
    )


def _warn_of_leftovers(folder: Path, shards: Iterable[str]) -> None:
    known = set(shards)
    left = sorted(path.name for path in folder.glob("*") if SHARD_NAME.fullmatch(path.name) and path.name not in known)
    if left:
        _log.warning("%s: not loaded are %d shards that no index lists: %s", folder, len(left), listed(left))


def _nothing_to_load(folder: Path) -> str:
    """Why `folder` has no checkpoint, and the fix."""
    accepted = f"{SINGLE_FILE}, or {INDEX_FILE} with its shards"
    if not os.path.isdir(folder):
        return f"no folder {folder}; give a folder with {accepted}"
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        return f"{folder} has no {SINGLE_FILE} and no {INDEX_FILE} for {listed(others)}; download the missing one"
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        return (
            f"{folder} holds weights only as pickles ({listed(pickles)}), which can run code and are refused; convert "
            "them where you trust them: transformers' AutoModelForCausalLM.from_pretrained(folder)"
            ".save_pretrained(new_folder) writes safetensors"
        )
    return f"{folder} has no weights; it needs {accepted}"
