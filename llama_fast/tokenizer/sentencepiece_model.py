"""Reads SentencePiece's tokenizer.model: a protocol buffer, of which few fields matter.

What differs from Llama's files in a way that the conversion could not express is refused by name: other models than
BPE, text normalization beyond spaces, unused pieces. (`tokenizers` can normalize by a `precompiled_charsmap`, but not
as SentencePiece does: of a "\\r\\n" it makes one space instead of two.)

Sources: sentencepiece_model.proto and model_interface.cc of google/sentencepiece; the wire format of protocol buffers.
"""

import enum
import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llama_fast.errors import TokenizerFileError, listed, shown

SPACE = "▁"  # stands for a space in pieces

# Llama 2 has 32,000 pieces of at most 16 characters.
_MAX_FIELDS = 1 << 18  # of a message, thus the most pieces
_MAX_PIECE_CHARS = 128

# Wire types, and sizes where they are fixed.
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_SIZES = {_FIXED64: 8, _FIXED32: 4}
_WIRE_TYPES: dict[type, int] = {int: _VARINT, bool: _VARINT, float: _FIXED32, bytes: _BYTES}

_MODEL_TYPES = {1: "unigram", 2: "BPE", 3: "word", 4: "char"}


class PieceType(enum.IntEnum):
    """UNUSED, 5, is not supported."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    BYTE = 6


# The fields that matter, by number: name and default, whose type is the field's.
_Fields = Mapping[int, tuple[str, Any]]
_MODEL: _Fields = {1: ("pieces", b""), 2: ("trainer_spec", b""), 3: ("normalizer_spec", b"")}
_PIECE: _Fields = {1: ("piece", b""), 2: ("score", 0.0), 3: ("type", int(PieceType.NORMAL))}
_TRAINER: _Fields = {3: ("model_type", 1), 24: ("treat_whitespace_as_suffix", False), 35: ("byte_fallback", False)}
_NORMALIZER: _Fields = {
    2: ("precompiled_charsmap", b""),
    3: ("add_dummy_prefix", True),
    4: ("remove_extra_whitespaces", True),
    5: ("escape_whitespaces", True),
}


@dataclass(frozen=True, slots=True)
class Piece:
    """An entry of the vocabulary; its id is its place in the file."""

    text: str
    score: float
    type: PieceType


@dataclass(frozen=True)
class SentencePieceModel:
    """What is used of a tokenizer.model."""

    pieces: list[Piece]
    byte_fallback: bool  # characters that are no pieces become byte pieces; 256 of them exist then
    add_dummy_prefix: bool  # a space is put in front of each text
    remove_extra_whitespaces: bool  # spaces at both ends of a text, and all but one of a run


def parse_sentencepiece(content: bytes, name: str) -> SentencePieceModel:
    """The model in `content`, the bytes of a tokenizer.model that messages call `name`.

    Raises:
        TokenizerFileError: it is malformed, contradicts itself, or is not supported.
    """
    parts: dict[str, list[bytes]] = {field: [] for field, _ in _MODEL.values()}
    for field, value in _fields(content, name, _MODEL, _MAX_FIELDS):
        parts[field].append(value)
    for field, values in parts.items():
        if not values:
            raise TokenizerFileError(f"{name}: has no {field}: it is cut short or no SentencePiece model")
    # A message that comes in parts is their concatenation.
    trainer = _message(b"".join(parts["trainer_spec"]), f"{name}: trainer_spec", _TRAINER, _MAX_FIELDS)
    normalizer = _message(b"".join(parts["normalizer_spec"]), f"{name}: normalizer_spec", _NORMALIZER, _MAX_FIELDS)
    for field, value, supported in (
        ("trainer_spec.model_type", _MODEL_TYPES.get(trainer["model_type"], "unknown"), "BPE"),
        ("trainer_spec.treat_whitespace_as_suffix", trainer["treat_whitespace_as_suffix"], False),
        ("normalizer_spec.escape_whitespaces", normalizer["escape_whitespaces"], True),
        ("normalizer_spec.precompiled_charsmap", f"{len(normalizer['precompiled_charsmap'])} bytes", "0 bytes"),
    ):
        if value != supported:
            raise TokenizerFileError(
                f"{name}: {field} is {value}; supported is Llama's, {supported}; use a tokenizer.json instead"
            )
    pieces = [_piece(data, f"{name}: pieces[{index}]") for index, data in enumerate(parts["pieces"])]
    _check_pieces(pieces, trainer["byte_fallback"], name)
    return SentencePieceModel(
        pieces, trainer["byte_fallback"], normalizer["add_dummy_prefix"], normalizer["remove_extra_whitespaces"]
    )


def _piece(data: bytes, where: str) -> Piece:
    values = _message(data, where, _PIECE, 2 * len(_PIECE))
    try:
        text = values["piece"].decode("utf-8")
    except UnicodeDecodeError as cause:
        raise TokenizerFileError(f"{where}.piece is not UTF-8: {cause.reason} at byte {cause.start}") from cause
    if not 1 <= len(text) <= _MAX_PIECE_CHARS:
        raise TokenizerFileError(f"{where}.piece has {len(text):,} characters; it must have 1 to {_MAX_PIECE_CHARS}")
    if not math.isfinite(values["score"]):
        raise TokenizerFileError(f"{where}.score is {values['score']}; it must be finite")
    try:
        return Piece(text, values["score"], PieceType(values["type"]))
    except ValueError as cause:
        accepted = ", ".join(f"{kind.value} ({kind.name})" for kind in PieceType)
        raise TokenizerFileError(f"{where}.type is {values['type']}; supported are {accepted}") from cause


def _check_pieces(pieces: list[Piece], byte_fallback: bool, name: str) -> None:
    """What one piece cannot show: together they are a vocabulary like Llama's."""
    index_of: dict[str, int] = {}
    for index, piece in enumerate(pieces):
        where = f"{name}: pieces[{index}] '{shown(piece.text)}'"
        first = index_of.setdefault(piece.text, index)
        if first != index:
            raise TokenizerFileError(f"{where} is pieces[{first}] too; each must be there once")
        if (piece.type == PieceType.UNKNOWN) != (index == 0):
            raise TokenizerFileError(
                f"{where} has type {piece.type.name}; in a Llama tokenizer the first piece is UNKNOWN and no other is"
            )
        if piece.type == PieceType.USER_DEFINED and {SPACE, " "} & {*piece.text}:
            raise TokenizerFileError(
                f"{where} is USER_DEFINED and holds a space, which is not supported; use a tokenizer.json instead"
            )
        if piece.text == "\0":
            raise TokenizerFileError(f"{where} is the null character, a piece that SentencePiece never makes of a text")
        # Decoding takes every text of this form for a byte.
        if piece.type != PieceType.BYTE and re.fullmatch("<0x..>", piece.text):
            raise TokenizerFileError(f"{where} has type {piece.type.name}; of this form only BYTE pieces are supported")
    found = {piece.text for piece in pieces if piece.type == PieceType.BYTE}
    expected = {f"<0x{byte:02X}>" for byte in range(256)} if byte_fallback else set()
    if found != expected:
        raise TokenizerFileError(
            f"{name}: trainer_spec.byte_fallback is {byte_fallback}, so there must be {len(expected)} BYTE pieces; "
            f"missing or too many: {listed(sorted(found ^ expected))}"
        )


def _message(data: bytes, where: str, known: _Fields, max_fields: int) -> dict[str, Any]:
    """Values of the known fields; of one that comes twice the last, as the standard says."""
    return {**dict(known.values()), **dict(_fields(data, where, known, max_fields))}


def _fields(data: bytes, where: str, known: _Fields, max_fields: int) -> Iterator[tuple[str, Any]]:
    """Name and value of the known fields of a message in wire format, in their order."""
    at = num_fields = 0
    value: Any
    while at < len(data):
        tag, at = _varint(data, at, where)
        number, wire_type = tag >> 3, tag & 7
        name, default = known.get(number, (f"field {number}", None))
        num_fields += 1
        if num_fields > max_fields:
            raise TokenizerFileError(f"{where}: has more than {max_fields:,} fields")
        if number in known and wire_type != _WIRE_TYPES[type(default)]:
            raise TokenizerFileError(
                f"{where}: {name} has wire type {wire_type}; it must be {_WIRE_TYPES[type(default)]}; download it again"
            )
        if not 0 < number < 1 << 29 or wire_type not in (_VARINT, _BYTES, *_SIZES):
            raise TokenizerFileError(f"{where}: {name} has wire type {wire_type}: this is no SentencePiece model")
        if wire_type == _VARINT:
            value, at = _varint(data, at, where)
        else:
            size, at = _varint(data, at, where) if wire_type == _BYTES else (_SIZES[wire_type], at)
            if size > len(data) - at:
                raise TokenizerFileError(
                    f"{where}: {name} has {size:,} bytes, but {len(data) - at:,} are left: the file is cut short or "
                    "damaged; download it again"
                )
            value, at = data[at : at + size], at + size
        if number not in known:
            continue
        if isinstance(default, float):
            (value,) = struct.unpack("<f", value)
        yield name, bool(value) if isinstance(default, bool) else value


def _varint(data: bytes, at: int, where: str) -> tuple[int, int]:
    """An integer of 7 bits a byte, lowest first, and the place behind it."""
    value = 0
    for shift in range(0, 64, 7):
        if at == len(data):
            raise TokenizerFileError(f"{where}: ends inside a number: the file is cut short; download it again")
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise TokenizerFileError(f"{where}: has a number of more than 64 bits: the file is damaged; download it again")
