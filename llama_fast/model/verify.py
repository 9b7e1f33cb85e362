"""Every tensor of a checkpoint read, its files compared with the sha256 known of them, and a canary replayed.

Loading sees headers and names; this sees a flipped bit, a shard of another model with the same shapes, NaN. Files of
int4 weights that this library wrote carry a canary (canary.py), which shows whether they mean here what they meant.
Known are the digests in a file SHA256SUMS in the folder, as `sha256sum *.safetensors > SHA256SUMS` writes it, and those
by which the hub's cache names its files.
"""

import hashlib
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from llama_fast.errors import CheckpointFormatError, CheckpointIOError, LlamaFastError, shown
from llama_fast.files import read_file
from llama_fast.model.canary import KEY, Canary, CanaryResult, replay
from llama_fast.model.checkpoint_files import CheckpointFiles
from llama_fast.model.checkpoint_index import plain_path
from llama_fast.model.llama import LlamaLM
from llama_fast.model.loading import load_model
from llama_fast.model.progress import ProgressBar
from llama_fast.ops import select_backend

MANIFEST = "SHA256SUMS"
_MAX_MANIFEST_BYTES = 1 << 20
_MANIFEST_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class VerifyReport:
    """What `verify_checkpoint` found: `problems` is empty when all is well."""

    problems: list[str]
    num_tensors: int
    num_bytes: int  # of the tensors
    checked_sha256: int  # files whose digest was compared; 0 where none is known
    canary_deviation: float | None = None  # the largest of a layer from what the file's canary says; None without one


def verify_checkpoint(folder: Path, *, show_progress: bool | None = None) -> VerifyReport:
    """Search every float tensor for NaN, infinity and nothing but subnormals, and compare every known sha256.

    Files and tensors are read in chunks; only where a file carries a canary the model is loaded.

    Args:
        folder: as from `find_folder`.
        show_progress: None shows a bar on a terminal.

    Raises:
        CheckpointError: the folder cannot be loaded either, see `CheckpointFiles.open`; or SHA256SUMS is malformed, or
            lists what is no file of the folder.
    """
    files = CheckpointFiles.open(folder)
    digests = [*_listed_digests(folder), *_hub_digests(files.paths)]
    hashed = {path for path, _, _ in digests if os.path.isfile(path)}
    total = files.total_bytes + sum(path.stat().st_size for path in hashed)
    disable = None if show_progress is None else not show_progress
    listed = {path for path, _, source in digests if source == MANIFEST}
    with ProgressBar(total=total, desc="verifying", unit="B", unit_scale=True, disable=disable) as bar:
        problems = [f"{path.name}: not in {MANIFEST}" for path in files.paths if listed and path not in listed]
        actual = {path: _sha256(path, bar) for path in sorted(hashed)}
        for path, digest, source in digests:
            if path not in actual:
                problems.append(f"{path.name}: listed in {source}, but missing")
            elif actual[path] != digest:
                problems.append(
                    f"{path.name}: its sha256 is {actual[path]}, but {source} says {digest}; download it again"
                )
        for name in files.shapes:
            problems += _values(files, name, bar)
    files.check_unchanged()
    deviation = None
    # Wrong numbers need no proof by a canary, and might not load.
    if not problems:
        try:
            if (found := _canary(files)) is not None:
                result = _replay(folder, *found)
                largest = max(result.deviations, key=lambda value: (not math.isfinite(value), value))
                deviation = largest if math.isfinite(largest) else None
                problems += [f"canary: {result.problem}"] if result.problem else []
        except LlamaFastError as error:
            problems.append(str(error))
    return VerifyReport(problems, len(files.shapes), files.total_bytes, len(actual), deviation)


def _canary(files: CheckpointFiles) -> tuple[Canary, str] | None:
    """The first one that a file carries, and its name."""
    for path in files.paths:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(KEY)
        if text is not None:
            return Canary.from_json(text, str(path)), str(path)
    return None


def _replay(folder: Path, canary: Canary, where: str) -> CanaryResult:
    model = load_model(LlamaLM, folder, dtype=None, device=None)
    ops = select_backend("auto", model.device, model.dtype)
    model.prepare(ops)
    return replay(canary, model, ops, where)


def _listed_digests(folder: Path) -> Iterator[tuple[Path, str, str]]:
    """(file, sha256, source) of every line of SHA256SUMS, if it is there."""
    manifest = folder / MANIFEST
    if not os.path.lexists(manifest):
        return
    content = read_file(manifest, CheckpointFormatError, max_bytes=_MAX_MANIFEST_BYTES, io_error=CheckpointIOError)
    for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            match = _MANIFEST_LINE.fullmatch(line)
            if match is None:
                raise CheckpointFormatError(
                    f"{manifest}: line {number}, '{shown(line)}', is not as sha256sum writes it: 64 hexadecimal "
                    "digits, two spaces and a file's name"
                )
            yield plain_path(folder, match[2], MANIFEST), match[1], MANIFEST


def _hub_digests(paths: tuple[Path, ...]) -> Iterator[tuple[Path, str, str]]:
    """(file, sha256, source) of those of `paths` that link to a file of the hub's cache named by its sha256."""
    for path in paths:
        blob = Path(os.path.realpath(path))
        if path.is_symlink() and blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name):
            yield path, blob.name, "the hub"


def _sha256(path: Path, bar: ProgressBar) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                bar.update(len(chunk))
    except OSError as error:
        raise CheckpointIOError(f"{path} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def _values(files: CheckpointFiles, name: str, bar: ProgressBar) -> Iterator[str]:
    """What is wrong with the values of one tensor."""
    dtype, num_wrong, largest = files.dtypes[name], 0, 0.0
    for chunk in files.chunks(name, _CHUNK_BYTES):
        bar.update(chunk.nbytes)
        if dtype.is_floating_point:
            values = chunk.float() if dtype.itemsize == 1 else chunk  # float8 has no aminmax
            low, high = values.aminmax()
            largest = max(largest, -low.item(), high.item())
            if not (low.isfinite() and high.isfinite()):
                num_wrong += int((~values.isfinite()).sum())
    if num_wrong:
        yield f"{shown(name)}: {num_wrong:,} of {files.shapes[name]} values are NaN or infinite"
    elif dtype.is_floating_point and 0 < largest < torch.finfo(dtype).tiny:
        yield f"{shown(name)}: all values are subnormal, at most {largest:.3g}"
