"""SentencePiece models built here: written field by field, or trained on the demo's text."""

import functools
import io
import struct
from pathlib import Path

import llama_fast.demo

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

SPECIALS = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
BYTES = [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
WORDS = [
    (piece, -float(rank), NORMAL) for rank, piece in enumerate(["he", "ll", "▁a", "▁he", "llo", "▁", *"abehlo.n"], 1)
]
PIECES = [*SPECIALS, *BYTES, *WORDS]
# Of TrainerSpec and NormalizerSpec, by field number: model_type BPE, byte_fallback; remove_extra_whitespaces off.
TRAINER = {3: 2, 35: True}
NORMALIZER = {4: False}


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def field(number: int, value: object) -> bytes:
    """One field of a protocol buffer message."""
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    content = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(content)) + content


def message(fields: dict[int, object]) -> bytes:
    return b"".join(field(number, value) for number, value in fields.items())


def model_file(pieces=PIECES, trainer=TRAINER, normalizer=NORMALIZER) -> bytes:
    """A tokenizer.model; `pieces` are (text, score, type)."""
    entries = b"".join(field(1, message(dict(enumerate(piece, 1)))) for piece in pieces)
    return entries + field(2, message(trainer)) + field(3, message(normalizer))


def replaced(index, piece):
    return [*PIECES[:index], piece, *PIECES[index + 1 :]]


WHOLE = model_file()
# Content of a tokenizer.model that is refused, and a pattern that the message matches.
REFUSED = {
    "empty": (b"", "has no pieces"),
    "no pieces": (model_file([]), "has no pieces"),
    "no trainer_spec": (field(1, b""), "has no trainer_spec"),
    "no normalizer_spec": (field(1, b"") + field(2, b""), "has no normalizer_spec"),
    "null character": (model_file([*PIECES, ("\0", -50.0, NORMAL)]), "is the null character"),
    "unigram": (model_file(trainer={3: 1, 35: True}), "model_type is unigram; .* BPE"),
    "model type by default": (model_file(trainer={35: True}), "model_type is unigram"),
    "model of words": (model_file(trainer={3: 3}), "model_type is word"),
    "model of characters": (model_file(trainer={3: 4}), "model_type is char"),
    "unknown model type": (model_file(trainer={3: 77}), "model_type is unknown"),
    "space as suffix": (model_file(trainer={**TRAINER, 24: True}), "treat_whitespace_as_suffix is True"),
    "spaces not escaped": (model_file(normalizer={**NORMALIZER, 5: False}), "escape_whitespaces is False"),
    "text is normalized": (model_file(normalizer={**NORMALIZER, 2: b"map"}), "precompiled_charsmap is 3 bytes"),
    "piece not UTF-8": (model_file(replaced(300 - 38, (b"\xff", 0.0, NORMAL))), r"pieces\[262\].piece is not UTF-8"),
    "empty piece": (model_file(replaced(5, ("", 0.0, NORMAL))), r"pieces\[5\].piece has 0 characters"),
    "no piece": (field(1, field(2, 0.0)) + WHOLE, r"pieces\[0\].piece has 0 characters"),
    "long piece": (model_file([*PIECES, ("a" * 129, 0.0, NORMAL)]), "piece has 129 characters"),
    "piece twice": (model_file([*PIECES, ("he", -99.0, NORMAL)]), r"pieces\[273\] 'he' is pieces\[259\] too"),
    "score not a number": (model_file([*PIECES, ("hel", float("nan"), NORMAL)]), r"pieces\[273\].score is nan"),
    "score infinite": (model_file([*PIECES, ("hel", float("-inf"), NORMAL)]), r"pieces\[273\].score is -inf"),
    "unused piece": (model_file([*PIECES, ("hel", 0.0, 5)]), r"pieces\[273\].type is 5; supported .* 3 \(CONTROL\)"),
    "unknown type": (model_file([*PIECES, ("hel", 0.0, 2**63)]), rf"pieces\[273\].type is {2**63}"),
    "unk not first": (model_file([SPECIALS[1], SPECIALS[0], *PIECES[2:]]), r"pieces\[0\] '<s>' has type CONTROL"),
    "two unk": (model_file([*PIECES, ("<unk2>", 0.0, UNKNOWN)]), r"pieces\[273\] '<unk2>' has type UNKNOWN"),
    "byte missing": (model_file([*SPECIALS, *BYTES[:-1], *WORDS]), "256 BYTE pieces; missing or too many: <0xFF>"),
    "bytes not declared": (model_file(trainer={3: 2}), "byte_fallback is False, so there must be 0 BYTE pieces"),
    "byte of another form": (model_file([*PIECES, ("<0xfg>", 0.0, 6)]), "too many: <0xfg>"),
    "like a byte": (model_file([*PIECES, ("<0xab>", 0.0, NORMAL)]), r"pieces\[273\] '<0xab>' has type NORMAL"),
    "user-defined with space": (model_file([*PIECES, ("▁b", 0.0, USER_DEFINED)]), r"'\\u2581b' is USER_DEFINED"),
    "character that is no piece": (model_file([*PIECES, ("hz", -99.0, NORMAL)]), "the characters z stand in pieces"),
    "too many merges": (
        model_file([*PIECES, *(("b" * length, -99.0 - length, NORMAL) for length in range(2, 42))]),
        "can be merged of two others in more than 8 ways",
    ),
    "wire type of pieces": (field(1, 5) + WHOLE, "pieces has wire type 0; it must be 2"),
    "wire type of score": (field(1, field(1, "a") + field(2, b"abcd")) + WHOLE, r"pieces\[0\]: score has wire type 2"),
    "wire type of type": (field(1, field(1, "a") + field(3, 1.0)) + WHOLE, r"pieces\[0\]: type has wire type 5"),
    "wire type of a setting": (WHOLE + field(3, field(3, 1.0)), "normalizer_spec: add_dummy_prefix has wire type 5"),
    "group": (varint(9 << 3 | 3) + WHOLE, "field 9 has wire type 3"),
    "wire type 7": (varint(9 << 3 | 7), "field 9 has wire type 7"),
    "field 0": (varint(0 << 3 | 2) + varint(0), "field 0 has wire type 2"),
    "field 0 of a number": (WHOLE + field(3, field(0, 0)), "normalizer_spec: field 0 has wire type 0"),
    "field number of 30 bits": (varint(1 << 32) + b"\0" + WHOLE, "field 536870912 has wire type 0"),
    "huge size": (varint(1 << 3 | 2) + varint(2**63), "pieces has 9,223,372,036,854,775,808 bytes, but 0 are left"),
    "number without end": (varint(9 << 3) + b"\xff" * 20, "number of more than 64 bits"),
    "tag without end": (b"\xff" * 20, "number of more than 64 bits"),
    "tag cut": (WHOLE + b"\x8a", "ends inside a number"),
    "too many fields": (field(9, 0) * ((1 << 18) + 1), "has more than 262,144 fields"),
    "too many fields of a piece": (field(1, field(3, 1) * 99) + WHOLE, r"pieces\[0\]: has more than 6 fields"),
    "HTML": (b"<!DOCTYPE html><html>404</html>", "tokenizer.model"),
}


def heldout_text() -> str:
    return (Path(llama_fast.demo.__file__).parent / "heldout.txt").read_text()


@functools.cache
def trained(**settings: object) -> bytes:
    """A tokenizer.model that sentencepiece trains, as Llama's was, unless `settings` say otherwise."""
    import sentencepiece

    model = io.BytesIO()
    llama = {
        "model_type": "bpe",
        "vocab_size": 700,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "character_coverage": 0.999,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(heldout_text().splitlines()), model_writer=model, **{**llama, **settings}
    )
    return model.getvalue()
