"""tokenizer.model, SentencePiece's protocol buffer. What loads has the ids and the text that SentencePiece has."""

import json
import random
import struct
from pathlib import Path
from typing import Any

import sentencepiece

from llama_fast.errors import RequestError, TemplateError, TokenizerFileError
from llama_fast.tokenizer import LlamaTokenizer
from tests.bad_inputs.harness import CheckFailedError, check
from tests.fuzz.mutate import STRINGS, mutate_bytes, mutate_document, to_json
from tests.fuzz.target import Files, FileTarget
from tests.fuzz.targets.tokenizer_json import TEXTS, stream_as_decoded

# A message is a list of fields: number, wire type and an int, bytes or another message.
_Message = list[list[Any]]
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
_LETTERS = "▁abcdehlnorstuw.,!1230Hö"
_MERGED = ("▁a", "he", "ll", "▁n", "hel", "lo", "▁the", "▁t", "▁▁", "aa", "aaaa", "st", "or", "wor")
_CONFIG_KEYS = {
    "add_prefix_space": (True, False),
    "legacy": (True, False, None),
    "added_tokens_decoder": ({"0": {"content": "zz"}}, {"300": {"content": "zz", "special": True}}, {}, []),
    "additional_special_tokens": (["<s>"], [{"content": "</s>"}], [[]], "x"),
}
_NUMBERS = (0, 1, 2, 3, 4, 5, 6, 7, 256, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
_FLOATS = (0.0, -0.0, -1.0, -5.0, 1e30, 3e38, 1e-45, float("nan"), float("inf"), float("-inf"))


class Target(FileTarget):
    refusals = (TokenizerFileError, TemplateError)

    def __init__(self) -> None:
        config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": True, "add_bos_token": True}
        self._config = json.dumps(config)
        self.files = {"tokenizer.model": _written(_model()), "tokenizer_config.json": self._config.encode()}

    def make(self, rng: random.Random) -> Files:
        files: Files = {}
        if rng.random() < 0.9:
            model = _model()
            if rng.random() < 0.85:
                for _ in range(rng.choice((1, 1, 2, 4))):
                    _mutate(rng, model)
            content = _written(model)
            files["tokenizer.model"] = mutate_bytes(rng, content) if rng.random() < 0.3 else content
        if not files or rng.random() < 0.05:
            document = mutate_document(rng, json.loads(self._config), keys=_CONFIG_KEYS)
            files["tokenizer_config.json"] = to_json(rng, document)
        return files

    def load(self, folder: Path, files: Files) -> None:
        tokenizer = LlamaTokenizer.from_pretrained(folder)
        content = files.get("tokenizer.model", self.files["tokenizer.model"]) or b""
        try:
            reference = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise CheckFailedError(f"loaded, but SentencePiece refuses it: {error}") from error
        # The two treat user-defined pieces differently, as documented; the other file decides much else.
        comparable = files.keys() == {"tokenizer.model"} and not _has_user_defined(content)
        for text in TEXTS:
            try:
                ids = tokenizer.encode(text, add_special_tokens=False)
            except RequestError:
                ids = None
            if comparable:
                expected = reference.encode(text)
                check(ids == expected, f"{text!r} becomes {ids}, of SentencePiece {expected}")
                decoded = reference.decode(expected)
                check(tokenizer.decode(ids) == decoded, f"{ids} becomes {tokenizer.decode(ids)!r}, not {decoded!r}")
            if ids is not None:
                stream_as_decoded(tokenizer, ids)


def _model() -> _Message:
    special = [("<unk>", 0.0, _UNKNOWN), ("<s>", 0.0, _CONTROL), ("</s>", 0.0, _CONTROL)]
    special += [(f"<0x{byte:02X}>", 0.0, _BYTE) for byte in range(256)]
    texts = [*_MERGED, *_LETTERS]
    pieces = special + [(text, -float(rank), None) for rank, text in enumerate(texts)]
    model: _Message = []
    for text, score, kind in pieces:
        fields: _Message = [[1, _BYTES, text.encode()], [2, _FIXED32, struct.pack("<f", score)]]
        model.append([1, _BYTES, fields if kind is None else [*fields, [3, _VARINT, kind]]])
    model.append([2, _BYTES, [[3, _VARINT, 2], [35, _VARINT, 1]]])
    model.append([3, _BYTES, [[1, _BYTES, b"identity"], [3, _VARINT, 1], [4, _VARINT, 0], [5, _VARINT, 1]]])
    return model


def _mutate(rng: random.Random, model: _Message) -> None:
    """One change to a piece, a specification or the order."""
    messages = [value for _, _, value in model if isinstance(value, list)]
    message = rng.choice((rng.choice(messages), rng.choice(messages), *messages[-2:]))
    field = rng.choice(message) if message else [1, _VARINT, 0]
    match rng.randrange(11):
        case 0 | 1 | 2:
            field[2] = _other_value(rng, field[1])
        case 3:
            message.append([rng.choice((1, 2, 3, 4, 5, 24, 35, 2**28)), wire := rng.choice((0, 0, 1, 2, 5)), 0])
            message[-1][2] = _other_value(rng, wire)
        case 4:
            field[1] = rng.randrange(8)
        case 5:
            field[0] = rng.choice((0, 1, 2, 3, 4, 5, 19, 2**29 - 1))
        case 6:
            message.remove(field) if field in message else None
        case 7:
            message.append(list(field))
        case 8:
            at = rng.randrange(len(model))
            model.insert(at, [1, _BYTES, [list(one) for one in rng.choice(messages)]])
        case 9:
            del model[rng.randrange(len(model))]
        case 10:
            one, other = rng.randrange(len(model)), rng.randrange(len(model))
            model[one], model[other] = model[other], model[one]


def _other_value(rng: random.Random, wire_type: int) -> Any:
    if wire_type == _VARINT:
        return rng.choice(_NUMBERS)
    if wire_type == _FIXED32:
        return struct.pack("<f", rng.choice((*_FLOATS, -float(rng.randrange(len(_MERGED))))))
    if wire_type == _FIXED64:
        return rng.randbytes(8)
    text = rng.choice(rng.choice((STRINGS, _MERGED, ("▁hello", "zz", "<0x41>", "<0xZZ>", "▁", "l" * 300, "a b"))))
    return rng.choice((text.encode("utf-8", "surrogatepass"), rng.randbytes(3), b"\xff"))


def _written(message: _Message) -> bytes:
    out = bytearray()
    for number, wire_type, value in message:
        out += _varint(number << 3 | wire_type)
        content = _written(value) if isinstance(value, list) else value
        if isinstance(content, int):
            out += _varint(content)
        else:
            out += (_varint(len(content)) if wire_type == _BYTES else b"") + content
    return bytes(out)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _has_user_defined(content: bytes) -> bool:
    """Whether a piece may have that type; wrong only for texts and scores that look like it."""
    return bytes([3 << 3 | _VARINT, _USER_DEFINED]) in content
