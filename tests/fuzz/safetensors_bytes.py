"""Safetensors files taken apart and put together wrongly, and what the safetensors library says of the result."""

import json
import random
import struct
from typing import Any

import safetensors
import torch

from tests.fuzz.mutate import mutate_bytes, mutate_document, nasty_u64, to_json

_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F4", "F6_E2M3", "I64", "I8", "U8", "BOOL", "C64", "f32", "")
_NAMES = ("../../etc/passwd", "a\0b", "\x1b[31m", "x" * 100_000, "lm_head.weight", "module.lm_head.weight", "")
_ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
_EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
_KEYS = {
    "dtype": _DTYPES,
    "shape": ([], [0], [2**63, 2], [2**32, 2**32], [1] * 8, [-1, -1], [1] * 100_000),
    "data_offsets": ([0, 0], [0, 4], [4, 0], [0, 2**64 - 1], [0.0, 4.0], [-4, 0], [0]),
    "__metadata__": ({"format": "tf"}, {"a": 1}, {"a": "x" * 100_000}, [], None),
    **dict.fromkeys(_NAMES, (_ONE, _EMPTY)),
}
_ENDS = (b"", b"\0", b"\0" * 8, b"PK\x03\x04", b"x" * 5000)


def parse(content: bytes) -> dict[str, tuple[tuple[int, ...], bytes]]:
    """Name -> shape and bytes, by the safetensors library.

    Raises:
        safetensors.SafetensorError: it refuses the file.
    """
    return {name: (tuple(one["shape"]), bytes(one["data"])) for name, one in safetensors.deserialize(content)}


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def mutate_safetensors(rng: random.Random, content: bytes) -> bytes:
    """A file with a header that lies, a wrong length, or damaged bytes."""
    (length,) = struct.unpack_from("<Q", content)
    header, data = content[8 : 8 + length], content[8 + length :]
    match rng.choice(("json", "json", "json", "offsets", "offsets", "length", "data", "bytes", "whole")):
        case "json":
            document = mutate_document(rng, json.loads(header), also=_DTYPES, keys=_KEYS)
            header = to_json(rng, document)
        case "offsets":
            header = json.dumps(_other_offsets(rng, json.loads(header), len(data))).encode()
        case "length":
            length = nasty_u64(rng, rng.choice((len(content), length)))
            return struct.pack("<Q", length) + header + data
        case "data":
            data = rng.choice((data[: rng.randrange(len(data) + 1)], data[:-1], data + rng.choice(_ENDS), data[4:]))
        case "bytes":
            return mutate_bytes(rng, content)
        case "whole":
            heads = (
                b"version https://git-lfs.github.com/spec/v1\n",
                b"<!DOCTYPE html>",
                b"GGUF\3\0\0\0",
                b"PK\x03\x04",
            )
            return rng.choice((*heads, b"\x80\x04\x95", b"", bytes(rng.randrange(8)))) + content[: rng.choice((0, 99))]
    if rng.random() < 0.1:
        header = rng.choice((b" " + header, header + b" " * rng.randrange(9), b"\n" + header, header + b"\0"))
    return struct.pack("<Q", len(header)) + header + data


def _other_offsets(rng: random.Random, header: dict[str, Any], size: int) -> dict[str, Any]:
    """One or two tensors that overlap, leave holes, change places, type or shape; often not by much."""
    names = [name for name in header if name != "__metadata__"]
    for _ in range(rng.choice((1, 1, 2))):
        one, other = header[rng.choice(names)], header[rng.choice(names)]
        match rng.randrange(8):
            case 0:
                one["data_offsets"], other["data_offsets"] = other["data_offsets"], one["data_offsets"]
            case 1:
                one["data_offsets"] = list(other["data_offsets"])
            case 2:
                index = rng.randrange(2)
                one["data_offsets"][index] += rng.choice((-8, -4, -2, -1, 1, 2, 4, 8))
            case 3:
                one["data_offsets"][rng.randrange(2)] = nasty_u64(rng, size)
            case 4:
                one["shape"] = rng.choice((one["shape"][::-1], [*one["shape"], 1], one["shape"][1:], other["shape"]))
            case 5:
                shape = one["shape"] = list(one["shape"])
                if shape:
                    shape[rng.randrange(len(shape))] = rng.choice((0, 1, -1, 2**31, nasty_u64(rng, size)))
            case 6:
                one["dtype"] = rng.choice(_DTYPES)
            case 7:  # the same bytes under another description
                one["dtype"], other["dtype"] = other["dtype"], one["dtype"]
                one["shape"], other["shape"] = other["shape"], one["shape"]
    return header
