"""The header of a safetensors file, checked before anything maps the file or reads a weight.

Layout  8 bytes, the header's size, little-endian; the header, a JSON object that may end in spaces; the tensors' bytes.
Why     the safetensors library checks offsets as well, but it takes the last of two tensors of one name, allocates
        whatever a header of 100 MB asks for, and does not say which tensor is wrong or how many bytes are missing.
Limits  a header in Python objects takes about 20 times its bytes, so one file may hold MAX_TENSORS tensors; the shards
        of a quantized 405B model hold 6,000 together.
Source  https://github.com/huggingface/safetensors#format
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llama_fast.errors import CheckpointFormatError, CheckpointIOError, UnsupportedError, brief, shown
from llama_fast.files import parse_json_object

MAX_TENSORS = 20_000
MAX_HEADER_BYTES = 125 * MAX_TENSORS

# Codes that are not here (complex, sub-byte) hold no weight of a Llama.
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
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
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

Stamp = tuple[int, int, int, int]


@dataclass(frozen=True)
class StoredTensor:
    """What a file says of a tensor; `start` and `end` count bytes from the beginning of the file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def stamp(status: os.stat_result) -> Stamp:
    """What changes when a file is replaced, cut or written to."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def read_header(path: Path) -> tuple[dict[str, StoredTensor], Stamp]:
    """The tensors of a safetensors file by name, in the order of their bytes, and the file's stamp.

    The tensors cover every byte after the header exactly once. `__metadata__` must be a map of strings to strings and
    is not used otherwise.

    Raises:
        CheckpointFormatError: not a safetensors file, or not a whole one; names file, tensor and numbers.
        CheckpointIOError: the file cannot be read, or is not a regular file.
        UnsupportedError: this machine is big-endian; safetensors are little-endian and would have to be swapped.
    """
    if sys.byteorder != "little":
        raise UnsupportedError(f"{path}: safetensors are little-endian and this machine is {sys.byteorder}-endian")
    if not os.path.isfile(path):  # opening a FIFO would wait for a writer
        raise CheckpointIOError(f"{path} is not a regular file")
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            head = file.read(64)
            header_bytes = int.from_bytes(head[:8], "little")
            _check_size(path, head, header_bytes, status.st_size)
            file.seek(8)
            header = file.read(header_bytes)
    except CheckpointFormatError:
        raise
    except OSError as error:
        raise CheckpointIOError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(header) < header_bytes:
        raise CheckpointIOError(f"{path} became shorter while it was read; load it again when it is complete")
    entries = parse_tensor_list(header, f"{path}: its header")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointFormatError(f"{path}: __metadata__ must map strings to strings; got {brief(metadata)}")
    if len(entries) > MAX_TENSORS:
        raise CheckpointFormatError(
            f"{path}: its header has {len(entries):,} tensors, more than max_tensors={MAX_TENSORS:,}"
        )
    tensors = {name: _stored(path, name, entry, 8 + header_bytes) for name, entry in entries.items()}
    return _check_cover(path, tensors, 8 + header_bytes, status.st_size), stamp(status)


def parse_tensor_list(content: bytes, name: str) -> dict[str, Any]:
    """`parse_json_object` for a JSON object with an entry for each tensor.

    Brackets are counted first, since nested lists take 50 times their bytes and a second per MB: an entry has at most
    one brace and two brackets.

    Raises:
        CheckpointFormatError: not strict JSON, or more brackets than MAX_TENSORS entries have.
    """
    if content.count(b"{") + content.count(b"[") > 3 * MAX_TENSORS + 2:
        raise CheckpointFormatError(f"{name} has more than max_tensors={MAX_TENSORS:,} tensors")
    return parse_json_object(content, name, CheckpointFormatError)


def _check_size(path: Path, head: bytes, header_bytes: int, file_bytes: int) -> None:
    """Raise CheckpointFormatError unless the file begins with a size and a "{", and the header fits file and limits."""
    if len(head) < 8:
        reason = f"it has {file_bytes:,} bytes and no whole header size, which takes 8"
    elif head[8:9] != b"{":
        reason = f"its header of {header_bytes:,} bytes does not begin with '{{'"
    elif header_bytes > file_bytes - 8:
        reason = (
            f"the file is {file_bytes:,} bytes, its header needs {8 + header_bytes:,}: truncated, download it again"
        )
    elif header_bytes > MAX_HEADER_BYTES:
        reason = (
            f"its header has {header_bytes:,} bytes, more than the {MAX_HEADER_BYTES:,} that max_tensors="
            f"{MAX_TENSORS:,} tensors need"
        )
    else:
        return
    if head[8:9] != b"{":
        looks_like = [text for magic, text in _LOOKS_LIKE if head.lstrip().startswith(magic)]
        reason += f"; it looks like {looks_like[0]}" if looks_like else "; download it again"
    raise CheckpointFormatError(f"{path} is not a whole safetensors file: {reason}")


def _stored(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    """One entry of the header, `{"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}`."""

    def malformed(reason: str) -> CheckpointFormatError:
        return CheckpointFormatError(f"{path}: tensor '{shown(name)}' {reason}")

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise malformed(f"needs exactly dtype, shape and data_offsets; got {brief(entry)}")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in _DTYPES:
        raise malformed(f"has dtype {brief(code)}; accepted are {', '.join(_DTYPES)}")
    if not _are_sizes(shape):
        raise malformed(f"has shape {brief(shape)}; it must be a list of integers from 0 to 2**63-1")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise malformed(f"has data_offsets {brief(offsets)}; they must be integers 0 <= begin <= end < 2**63")
    dtype, num_bytes = _DTYPES[code], _DTYPES[code].itemsize
    for size in shape:
        num_bytes *= size
        if num_bytes >= 2**63:
            raise malformed(f"of shape {brief(shape)} and {code} has 2**63 bytes or more")
    begin, end = offsets
    if end - begin != num_bytes:
        raise malformed(
            f"of shape {brief(shape)} and {code} has {num_bytes:,} bytes, but its data_offsets "
            f"[{begin}, {end}] hold {end - begin:,}"
        )
    return StoredTensor(path, dtype, tuple(shape), data_start + begin, data_start + end)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def _check_cover(
    path: Path, tensors: Mapping[str, StoredTensor], data_start: int, file_bytes: int
) -> dict[str, StoredTensor]:
    """`tensors` in the order of their bytes, which must be all those after the header, none of them twice."""
    ordered = sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end))
    covered = data_start
    for name, tensor in ordered:
        if tensor.start != covered:
            what = "overlaps the tensor before it" if tensor.start < covered else "leaves a hole before it"
            raise CheckpointFormatError(
                f"{path}: tensor '{shown(name)}' {what}: it begins at byte {tensor.start - data_start:,} of the data, "
                f"not at {covered - data_start:,}"
            )
        covered = tensor.end
    if covered > file_bytes:
        cut = next(name for name, tensor in ordered if tensor.end > file_bytes)
        raise CheckpointFormatError(
            f"{path}: the file is {file_bytes:,} bytes, its header needs {covered:,}; it ends within or before tensor "
            f"'{shown(cut)}': truncated, download it again"
        )
    if covered < file_bytes:
        raise CheckpointFormatError(
            f"{path}: {file_bytes - covered:,} bytes follow the last tensor, which no tensor covers; download it again"
        )
    return dict(ordered)
