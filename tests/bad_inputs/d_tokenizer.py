"""D: tokenizer files, text and ids."""

import base64
import json
import os
import re
import struct
from functools import partial
from pathlib import Path

from llama_fast.errors import CheckpointPathError, RequestError, TokenizerFileError
from llama_fast.tokenizer import LlamaTokenizer
from llama_fast.tokenizer.text_checks import MAX_TEXT_BYTES
from tests.bad_inputs.engine_checks import BOS, Serving, build, engine_entry, legal
from tests.bad_inputs.harness import accepted, check, refused
from tests.byte_model import save_byte_model
from tests.regex_samples import HOSTILE, PUBLISHED
from tests.sentencepiece_samples import CONTROL, NORMAL, PIECES, REFUSED, WHOLE, field, model_file
from tests.tokenizer_samples import BUILT, NAMES, SPECIALS

SPECS = {name: json.loads(BUILT[name].to_str()) for name in ("llama2", "llama3")}
NO_BOS = build(lambda folder: save_byte_model(folder, adds_bos=False))  # its tokenizer puts nothing before a text
SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def load(folder: Path, **arguments: object) -> LlamaTokenizer:
    return LlamaTokenizer.from_pretrained(folder, **arguments)


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


def refused_files(folder: Path, *needles: str, header_bytes: int = 0) -> None:
    refused(TokenizerFileError, lambda: load(folder), *needles, header_bytes=header_bytes)


def D01_missing(folder: Path) -> None:
    refused_files(folder, "neither tokenizer.json nor tokenizer.model")
    refused(CheckpointPathError, lambda: load(folder / "nowhere"), str(folder / "nowhere"), "hub id")
    write_json(folder / "tokenizer.json", SPECS["llama3"])
    refused(TokenizerFileError, lambda: load(folder, from_slow=True), "has no tokenizer.model")
    accepted(lambda: load(folder))


def D01_truncated(folder: Path) -> None:
    whole = json.dumps(SPECS["llama3"]).encode()
    for length in range(0, len(whole), 499):
        (folder / "tokenizer.json").write_bytes(whole[:length])
        refused_files(folder, "tokenizer.json: is not strict JSON")
    (folder / "tokenizer.json").unlink()
    for length in range(0, len(WHOLE), 499):
        (folder / "tokenizer.model").write_bytes(WHOLE[:length])
        refused_files(folder, "tokenizer.model: ")


def D01_not_json(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(WHOLE)
    contents = {
        b"<!DOCTYPE html><html>404</html>": "is not strict JSON",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n": "is not strict JSON",
        b"\xef\xbb\xbf{}": "byte order mark",
        '{"version": "1.0"}'.encode("utf-16"): "is not UTF-8",
        b"[]": "must hold a JSON object",
        b"null": "must hold a JSON object",
        b'{"a": NaN}': "NaN",
        b'{"a": 1, "a": 2}': "appears twice",
        b'{"a": ' + b"[" * 10**6: "nested",
        b"PK\x03\x04\xff": "is not UTF-8",
    }
    for name in ("tokenizer.json", *SIDE_FILES):
        for content, needle in contents.items():
            (folder / name).write_bytes(content)
            refused_files(folder, name, needle, header_bytes=len(content))
        (folder / name).unlink()
    accepted(lambda: load(folder))


def D01_json_that_is_no_tokenizer(folder: Path) -> None:
    spec = SPECS["llama3"]
    for content in (
        {},
        {**spec, "version": "9.9"},
        {**spec, "model": None},
        {**spec, "model": {"type": "Bogus" * 10**5}},
        {**spec, "model": {"type": "BPE", "vocab": [], "merges": []}},
        {**spec, "added_tokens": {}},
        {**spec, "added_tokens": [{"id": 0}]},
        {**spec, "decoder": "\x1b[2J"},
        {**spec, "normalizer": {"type": "Sequence"}},
        {**spec, "truncation": 5},
    ):
        write_json(folder / "tokenizer.json", content)
        refused_files(folder, "tokenizer.json: cannot be used", header_bytes=10**6)


def D01_one_gigabyte(folder: Path) -> None:
    """Sparse: the file takes no disk. Its size is seen before it is read."""
    (folder / "tokenizer.model").write_bytes(WHOLE)
    for name in ("tokenizer.json", "tokenizer.model", *SIDE_FILES):
        with (folder / name).open("r+b" if name == "tokenizer.model" else "wb") as file:
            file.truncate(1 << 30)
        refused_files(folder, name, "bytes")
        (folder / name).unlink()
        (folder / "tokenizer.model").write_bytes(WHOLE)


def D01_not_a_regular_file(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer.model"):
        path = folder / name
        path.mkdir()
        refused_files(folder, name, "not a regular file")
        path.rmdir()
        os.mkfifo(path)
        refused_files(folder, name, "not a regular file")
        path.unlink()
        path.symlink_to("/dev/zero")
        refused_files(folder, name, "not a regular file")
        path.unlink()
        path.symlink_to(path)
        refused_files(folder, "neither")
        path.unlink()


def D01_malformed_sentencepiece(folder: Path) -> None:
    for content, pattern in REFUSED.values():
        (folder / "tokenizer.model").write_bytes(content)
        error = refused(TokenizerFileError, lambda: load(folder), "tokenizer.model", header_bytes=len(content))
        check(re.search(pattern, str(error)), f"{error} does not match {pattern}")


def D01_sentencepiece_bombs(folder: Path) -> None:
    """As much work as 4 MiB, the most that is read, can ask for."""
    # Each run of one character is two shorter ones, in as many ways as it is long.
    runs = [
        (chr(0x4E00 + at) * length, -99.0 - 128 * at - length, NORMAL) for at in range(80) for length in range(1, 129)
    ]
    size = (4 << 20) - len(WHOLE) - 100
    for content, needle in (
        (WHOLE + field(9, 0) * (size // 2), "more than 262,144 fields"),
        (WHOLE + field(2, field(9, 0) * 9) * (size // 20), "more than 262,144 fields"),
        (WHOLE + field(1, field(1, "a" * size)), "characters"),
        (WHOLE + field(1, b"") * 200_000, "pieces[273].piece has 0 characters"),
        (WHOLE + field(1, field(3, 1) * (size // 2)), "more than 6 fields"),
        (b"\xff" * size, "more than 64 bits"),
        (model_file([*PIECES, *runs]), "in more than 8 ways"),
    ):
        (folder / "tokenizer.model").write_bytes(content)
        refused_files(folder, needle, header_bytes=len(content))


def panicking(**parts: object) -> dict:
    """Llama-3-like, with other parts; those of the model by their own names."""
    spec = SPECS["llama3"]
    model = {key: parts.pop(key) for key in list(parts) if key in spec["model"]}
    return {**spec, **parts, "model": {**spec["model"], **model}}


def charsmap(units: int) -> dict:
    """A map whose trie ends after `units` nodes: a byte beyond them is looked for outside."""
    content = struct.pack("<I", 4 * units) + bytes(4 * units) + b"x"
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(content).decode()}


def template(single: list, **special_tokens: object) -> dict:
    pair = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special_tokens}


def D02_panics_at_load(folder: Path) -> None:
    bos, text = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    known = {"<s>": {"id": "<s>", "ids": [7777], "tokens": ["<s>"]}}
    for spec in (
        panicking(continuing_subword_prefix="#" * 9),  # merges are shorter
        panicking(merges=[["he", "he"]]),
        panicking(merges=[["h", "not there"]]),
        panicking(merges=["h"]),
        panicking(pre_tokenizer={"type": "FixedLength", "length": 0}),
        panicking(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}),
        panicking(pre_tokenizer={"type": "Metaspace", "replacement": "", "prepend_scheme": "always", "split": True}),
        panicking(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        panicking(normalizer={"type": "Precompiled", "precompiled_charsmap": "not base64"}),
        panicking(normalizer=charsmap(4)),
        panicking(decoder={"type": "Strip", "content": "A", "start": 1, "stop": 1}),
        panicking(decoder={"type": "Strip", "content": "A", "start": 2**63, "stop": 2**63}),
        panicking(post_processor=template([bos, text])),
        panicking(post_processor=template([bos, text], **known)),
        panicking(post_processor=template([{"Sequence": {"id": "B", "type_id": 0}}])),
        {**SPECS["llama3"], "model": {"type": "Unigram", "unk_id": 5, "vocab": [["a", 0.0]]}},
        {**SPECS["llama3"], "model": {"type": "Unigram", "unk_id": 0, "vocab": []}},
    ):
        write_json(folder / "tokenizer.json", spec)
        refused_files(folder, "tokenizer.json: ")


def D02_panics_at_special_tokens(folder: Path) -> None:
    """The normalizer fails on characters that only added tokens have."""
    for normalized in (False, True):
        token = {"content": "<世>", "special": True, "normalized": normalized}
        write_json(folder / "tokenizer.json", panicking(normalizer=charsmap(0xD0)))
        write_json(folder / SIDE_FILES[0], {"added_tokens_decoder": {"264": token}})
        refused_files(folder, "special tokens" if not normalized else "tokenizer.json: cannot be used")


def D02_panics_only_at_the_first_text(folder: Path) -> None:
    """What loading cannot find by encoding and decoding a line of its own."""
    write_json(folder / "tokenizer.json", panicking(normalizer=charsmap(0xD0)))
    tokenizer = accepted(lambda: load(folder))
    refused(RequestError, lambda: tokenizer.encode("🤗"), "could not be encoded")
    check(accepted(lambda: tokenizer.encode("a", add_special_tokens=False)), "one bad text spoilt the tokenizer")

    write_json(folder / "tokenizer.json", panicking(decoder={"type": "Strip", "content": "h", "start": 1, "stop": 1}))
    tokenizer = accepted(lambda: load(folder))
    ids = tokenizer.encode("h", add_special_tokens=False)
    refused(RequestError, lambda: tokenizer.decode(ids), "could not be decoded")
    stream = tokenizer.stream()
    refused(RequestError, lambda: [stream.push(ids[0]), stream.finish()], "could not be decoded")


def D02_texts_that_grow_without_end(folder: Path) -> None:
    """One character would become 10**12; "~" is none that loading tries."""
    replace = {"type": "Replace", "pattern": {"String": "~"}, "content": "~" * 10}
    untyped = {key: value for key, value in replace.items() if key != "type"}  # the library takes it for the same
    bytes_again = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    bos, text = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    known = {"<s>": {"id": "<s>", "ids": [SPECS["llama3"]["added_tokens"][1]["id"]] * 1000, "tokens": ["<s>"] * 1000}}
    for part, value in (
        ("normalizer", {"type": "Sequence", "normalizers": [replace] * 12}),
        ("normalizer", {"type": "Sequence", "normalizers": [untyped] * 12}),
        ("normalizer", {"type": "Replace", "pattern": {"String": "~"}, "content": "~" * 10**6}),
        ("normalizer", {"type": "Sequence", "normalizers": [{"type": "ByteLevel"}] * 40}),
        ("normalizer", {"type": "Sequence", "normalizers": [{"type": "Lowercase"}] * 10**4}),
        ("normalizer", {"type": "Prepend", "prepend": "~" * 10**6}),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [bytes_again] * 40}),
        ("decoder", {"type": "Sequence", "decoders": [replace] * 12}),
        ("post_processor", template([bos] * 1000 + [text], **known)),
        ("post_processor", template([text] * 10**4)),
    ):
        write_json(folder / "tokenizer.json", panicking(**{part: value}))
        size = (folder / "tokenizer.json").stat().st_size
        refused_files(folder, f"tokenizer.json: {part} has", "times as long; supported", header_bytes=8 * size)


def D02_stored_truncation_and_padding_are_off(folder: Path) -> None:
    """So a stride beyond max_length, a length of 2**40 or a multiple of 0 do nothing."""
    padding = {"direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
    for part in (
        {"truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 4}},
        {"truncation": {"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 9}},
        {"padding": {**padding, "strategy": {"Fixed": 2**40}, "pad_to_multiple_of": None}},
        {"padding": {**padding, "strategy": {"Fixed": 10}, "pad_to_multiple_of": 0}},
    ):
        write_json(folder / "tokenizer.json", {**SPECS["llama3"], **part})
        ids = accepted(lambda: load(folder).encode("abcdefgh"))
        check(len(ids) == 9, f"{part}: {len(ids)} ids of bos and eight letters")


def D04_ids_of_tokenizer_json(folder: Path) -> None:
    spec = SPECS["llama3"]
    vocab = spec["model"]["vocab"]
    for value, needle in ((4, "have the same id, 4"), (-1, "-1"), (2**32, "4294967296"), (0.5, "0.5"), ("1", "1")):
        write_json(folder / "tokenizer.json", panicking(vocab={**vocab, "!": value}))
        refused_files(folder, "tokenizer.json", needle)
    for value in (0, 255, 9999, -1, 2**32):
        added = [{**spec["added_tokens"][0], "id": value}, *spec["added_tokens"][1:]]
        write_json(folder / "tokenizer.json", {**spec, "added_tokens": added})
        refused_files(folder, "tokenizer.json")


def D04_holes_are_legal(folder: Path) -> None:
    """An id that no token has decodes to nothing. Ids beyond config.json's vocab_size are refused with the model.

    The library writes all ids that are not there into a list, so they have a limit.
    """
    vocab = {token: 10 * token_id for token, token_id in SPECS["llama3"]["model"]["vocab"].items()}
    biggest = {**vocab, "h": 2**20 - 1}
    for ids in (vocab, biggest):
        write_json(folder / "tokenizer.json", {**panicking(vocab=ids), "added_tokens": [], "post_processor": None})
        tokenizer = accepted(lambda: load(folder))
        encoded = tokenizer.encode("h")
        check(encoded == [ids["h"]], f"{encoded} in place of {ids['h']}")
        check(tokenizer.decode([*encoded, 1, 2**32 - 2]) == "h", "an id without a token gives text")
    for too_big in (2**20, 2**31, 2**32 - 1):
        ids = {**vocab, "h": too_big}
        write_json(folder / "tokenizer.json", {**panicking(vocab=ids), "added_tokens": [], "post_processor": None})
        refused_files(folder, "'h'", str(too_big))


def D04_ids_of_side_files(folder: Path) -> None:
    """The same for tokenizer.json and tokenizer.model, whose next free ids are 264 and 273."""
    for name, first in (("tokenizer.json", len(SPECS["llama3"]["model"]["vocab"]) + 4), ("tokenizer.model", 273)):
        (folder / "tokenizer.json").unlink(missing_ok=True)
        if name == "tokenizer.json":
            write_json(folder / name, SPECS["llama3"])
        else:
            (folder / name).write_bytes(WHOLE)
        for token_id in (str(first + 1), "4294967295", "4294967296", "-1", "1.5", "x", "", "9" * 5000):
            write_json(folder / SIDE_FILES[0], {"added_tokens_decoder": {token_id: {"content": "[PAD]"}}})
            refused_files(folder, "id")
        write_json(folder / SIDE_FILES[0], {"added_tokens_decoder": {str(first): {"content": "[PAD]"}}})
        check(accepted(lambda: load(folder)).convert_tokens_to_ids("[PAD]") == first, f"{name}: another id")
        write_json(folder / SIDE_FILES[0], {})
        for token_id in (first + 1, -1, 2**32, 1.5, True, None, "5"):
            write_json(folder / SIDE_FILES[2], {"[PAD]": token_id})
            refused_files(folder, "id")
        write_json(folder / SIDE_FILES[2], {"[PAD]": first, "[OTHER]": first})
        refused_files(folder, "two tokens have the id")
        (folder / SIDE_FILES[2]).unlink()


def D05_special_tokens_in_user_text(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer.model"):
        if name == "tokenizer.json":
            write_json(folder / name, SPECS["llama2"])
        else:
            (folder / "tokenizer.json").unlink()
            (folder / name).write_bytes(WHOLE)
        write_json(folder / SIDE_FILES[0], NAMES)
        tokenizer = accepted(lambda: load(folder))
        for special in SPECIALS:
            ids = tokenizer.encode(f"he{special}llo")
            check(not tokenizer.special_token_ids & set(ids[1:]), f"{name}: {special} in a text became {ids}")
            text = tokenizer.decode(ids, skip_special_tokens=True)
            check(text == f"he{special}llo", f"{name}: {text!r}")
            asked = tokenizer.encode(f"he{special}llo", parse_special_tokens=True)
            check(SPECIALS.index(special) in asked[1:], f"{name}: {special} is not parsed where that is asked for")


def D05_text_that_merges_into_a_special_token(folder: Path) -> None:
    vocab = SPECS["llama3"]["model"]["vocab"]
    first = len(vocab)
    merges = [*SPECS["llama3"]["model"]["merges"], ["<", "s"], ["<s", ">"]]
    spec = panicking(vocab={**vocab, "<s": first, "<s>": first + 1}, merges=merges, post_processor=None)
    token = {**SPECS["llama3"]["added_tokens"][0], "content": "<s>", "id": first + 1}
    write_json(folder / "tokenizer.json", {**spec, "added_tokens": [token]})
    refused_files(folder, "the text '<s>' becomes the special token")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(model_file([*PIECES, ("@", 0.0, CONTROL)]))
    refused_files(folder, "the text '@' becomes the special token")


def D05_added_token_equal_to_ordinary_text(folder: Path) -> None:
    """An added token that is not special is text: it is found in a text, and what it decodes to is that text."""
    (folder / "tokenizer.model").write_bytes(model_file())
    write_json(
        folder / SIDE_FILES[0],
        {"added_tokens_decoder": {"273": {"content": "hello"}, "274": {"content": "a", "special": True}}},
    )
    refused_files(folder, "'a' should have id 274")
    (folder / SIDE_FILES[0]).unlink()
    write_json(folder / SIDE_FILES[0], {"added_tokens_decoder": {"273": {"content": "lo", "special": True}}})
    tokenizer = accepted(lambda: load(folder))
    ids = tokenizer.encode("hello lo", add_special_tokens=False)
    check(273 not in ids, "a special token that looks like a word was found in user text")
    check(tokenizer.decode(ids) == "hello lo", "the text is not given back")
    check(273 in tokenizer.encode("hello", parse_special_tokens=True), "nor where it was asked for")


def D08_precedence(folder: Path) -> None:
    """tokenizer.json over tokenizer.model; its tokens over those of side files; names from tokenizer_config.json,
    unless it has no added_tokens_decoder and there is a special_tokens_map.json."""
    write_json(folder / "tokenizer.json", SPECS["llama3"])
    (folder / "tokenizer.model").write_bytes(WHOLE)
    size = len(accepted(lambda: load(folder)))
    check(size == len(SPECS["llama3"]["model"]["vocab"]) + 4, f"{size} tokens")
    check(len(accepted(lambda: load(folder, from_slow=True))) == len(PIECES), "from_slow does not convert")

    write_json(folder / SIDE_FILES[0], {**NAMES, "added_tokens_decoder": {"5": {"content": "[PAD]"}}})
    write_json(folder / SIDE_FILES[1], {"eos_token": "<unk>"})
    tokenizer = accepted(lambda: load(folder))
    check(tokenizer.eos_token == "</s>", "special_tokens_map.json won")
    check(len(tokenizer) == size and "[PAD]" not in tokenizer.get_vocab(), "a side file changed tokenizer.json's ids")
    write_json(folder / SIDE_FILES[0], NAMES)
    check(accepted(lambda: load(folder)).eos_token == "<unk>", "special_tokens_map.json of an old folder is not read")


def D08_without_side_files(folder: Path) -> None:
    """No tokenizer_config.json, no chat template: the tokenizer works, and only a chat is refused."""
    write_json(folder / "tokenizer.json", SPECS["llama3"])
    tokenizer = accepted(lambda: load(folder))
    check(tokenizer.chat_template is None, "a chat template from nowhere")
    check(tokenizer.decode(tokenizer.encode("hello"), skip_special_tokens=True) == "hello", "no round trip")


def D08_wrong_types(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(WHOLE)
    for config in (
        {"bos_token": 5},
        {"bos_token": {"content": 5}},
        {"legacy": "yes"},
        {"add_prefix_space": 1},
        {"add_bos_token": "false"},
        {"add_eos_token": 0},
        {"clean_up_tokenization_spaces": "no"},
        {"added_tokens_decoder": []},
        {"added_tokens_decoder": None},
        {"added_tokens_decoder": {"273": "x"}},
        {"added_tokens_decoder": {"273": {"content": ""}}},
        {"added_tokens_decoder": {"273": {"content": "x", "special": "yes"}}},
    ):
        write_json(folder / SIDE_FILES[0], config)
        refused_files(folder, next(iter(config)))


def D08_as_many_named_tokens_as_fit(folder: Path) -> None:
    """Time in proportion: the library goes through all added tokens whenever one more is made special."""
    first = max(token["id"] for token in SPECS["llama3"]["added_tokens"]) + 1
    named = [f"<{at}>" for at in range(10_000)]
    plain = {**SPECS["llama3"]["added_tokens"][0], "special": False}
    added = [{**plain, "id": first + at, "content": name} for at, name in enumerate(named)]
    spec = {**SPECS["llama3"], "added_tokens": [*SPECS["llama3"]["added_tokens"], *added]}
    write_json(folder / "tokenizer.json", spec)
    for names in (named, [f"<not there {at}>" for at in range(10_000)]):
        write_json(folder / SIDE_FILES[0], {"extra_special_tokens": names})
        accepted(lambda: load(folder), seconds=6)


def split(pattern: str) -> dict:
    """Llama-3-like, with this regular expression to cut texts."""
    by_pattern = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    parts = [by_pattern, SPECS["llama3"]["pre_tokenizer"]]
    return {**SPECS["llama3"], "pre_tokenizer": {"type": "Sequence", "pretokenizers": parts}}


def D03_catastrophic_regex(folder: Path) -> None:
    """Refused with the file, since how long they take is up to the text."""
    for pattern in (*HOSTILE, r"(?<x>a\g<x>?b?)+c", "(" * 5000 + "a" + ")" * 5000):
        write_json(folder / "tokenizer.json", split(pattern))
        refused_files(folder, "tokenizer.json: ")
    replace = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}
    for part in ({"normalizer": {"type": "Sequence", "normalizers": [replace]}}, {"decoder": replace}):
        write_json(folder / "tokenizer.json", {**SPECS["llama3"], **part})
        refused_files(folder, f"{next(iter(part))} has the regular expression '(a+)+$'")


def D03_hostile_text_for_published_patterns(folder: Path) -> None:
    """20,000 spaces in a row take more than a second with those that are replaced."""
    for pattern in PUBLISHED.values():
        write_json(folder / "tokenizer.json", split(pattern))
        tokenizer = accepted(lambda: load(folder))
        for pump in (" ", "\n", "a", "A", "!", "\u0301", "'", " \n"):
            text = f"x{pump * 20_000}x"
            ids = accepted(partial(tokenizer.encode, text), seconds=2)
            check(tokenizer.decode(ids, skip_special_tokens=True) == text, f"{pattern}: {pump!r} is not given back")


def sample_tokenizers(folder: Path) -> list[LlamaTokenizer]:
    """Byte-level; byte fallback from tokenizer.json and from tokenizer.model."""
    tokenizers = []
    for name in ("llama3", "llama2"):
        write_json(folder / "tokenizer.json", SPECS[name])
        tokenizers.append(load(folder))
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(WHOLE)
    return [*tokenizers, load(folder)]


def D06_ten_megabytes_of_one_character(folder: Path) -> None:
    """Refused: encoding takes time and memory in proportion, up to 10 s and 2 GB."""
    for tokenizer in sample_tokenizers(folder):
        for text in ("a" * 10**7, " " * 10**7, "\0" * 10**7, "🤗" * (10**7 // 4), "é" * (MAX_TEXT_BYTES // 2 + 1)):
            for call in (
                partial(tokenizer.encode, text),
                partial(tokenizer, ["a", text]),
                partial(tokenizer, "a", text),
            ):
                refused(RequestError, call, "bytes or more, a text at most 8,388,608; split it")


def D06_a_hundred_kilobytes_of_one_character(folder: Path) -> None:
    for tokenizer in sample_tokenizers(folder):
        for char in ("a", " ", "\n", "\0", "\u200d", "\u05d0", "🤗", "<", "\u0301"):
            text = "x" + char * (100_000 // len(char.encode()))
            ids = accepted(partial(tokenizer.encode, text))
            check(tokenizer.decode(ids, skip_special_tokens=True) == text, f"{char!r} is not given back")


def D06_not_text(folder: Path) -> None:
    """`str` holds lone surrogates where invalid UTF-8 was read with `surrogateescape`; bytes are no text at all."""
    invalid = b"ab\xff\xc3".decode("utf-8", "surrogateescape")
    for tokenizer in sample_tokenizers(folder):
        for text, needle in (("ab\ud800", "[2] is the lone surrogate U+D800"), (invalid, "[2] is the lone surrogate")):
            refused(RequestError, partial(tokenizer.encode, text), f"text{needle}")
            refused(RequestError, partial(tokenizer, ["a", text]), f"text[1]{needle}")
            refused(RequestError, partial(tokenizer, "a", text), f"text_pair{needle}")
        for text in (b"ab", bytearray(b"ab"), 5, None, {"a": 1}, [5], [b"a"], [["a"]], 1.5, object()):
            refused(RequestError, partial(tokenizer, text), "must be a string; got")
        check(tokenizer.encode("ab"), "a bad text spoilt the tokenizer")


def D06_every_kind_of_character_round_trips(folder: Path) -> None:
    """Two things are not given back by SentencePiece's: "▁", which stands for a space, and, as in transformers without
    `legacy`, one space at the very start."""
    samples = [
        "NUL \0 and \x1b[2J and \x7f\x80",
        "👩\u200d👩\u200d👧 \u200b\u2060\ufeff",
        "\u202eשלום עולם\u202c مرحبا",
        "e\u0301\u0301\u0301 \u1100\u1161\u11a8",
        "\ufffd\uffff\ue000\U0010ffff\U000f0000",
        "".join(map(chr, range(0x20))),
        "".join(chr(code) for code in range(0, 0x110000, 251) if not 0xD800 <= code < 0xE000 and code != 0x2581),
        "two  \r\n\ttabs \u00a0\u3000 ",
    ]
    for tokenizer in sample_tokenizers(folder):
        for text in samples:
            ids = accepted(partial(tokenizer.encode, text))
            check(tokenizer.decode(ids, skip_special_tokens=True) == text, f"{text!r:.60} is not given back")


def D07_characters_split_over_tokens(folder: Path) -> None:
    """Whatever the ids: what is given out is never taken back, and joined it is the whole text. Bytes that make a
    character come out together; U+FFFD only where the whole text has it."""
    for tokenizer in sample_tokenizers(folder):
        for text in ("a🤗b", "🤗🤗", "ä你🤗", "\U0010ffff"):
            ids = tokenizer.encode(text, add_special_tokens=False)
            stream = tokenizer.stream()
            given = [stream.push(token_id) for token_id in ids]
            check("\ufffd" not in "".join(given), f"{text!r}: U+FFFD in {given}")
            check("".join(given) + stream.finish() == text, f"{text!r} came as {given}")
            check(len(ids) >= len(text.encode()) // 2, f"{text!r} is not split, which shows nothing")
            for end in range(len(ids)):
                stream, whole, shown = tokenizer.stream(), tokenizer.decode(ids[:end] + ids), ""
                for token_id in ids[:end] + ids:
                    shown += stream.push(token_id)
                    check(whole.startswith(shown), f"{shown!r} was shown of {whole!r}")
                check(shown + stream.finish() == whole, f"{shown!r} and the rest are not {whole!r}")


def D07_bytes_that_are_no_character(folder: Path) -> None:
    for tokenizer in sample_tokenizers(folder):
        ids = tokenizer.encode("🤗é", add_special_tokens=False)
        for order in (ids[::-1], ids[:3], ids[1:], ids[:3] + ids, [*ids[:2], 0, 1, *ids[2:]], ids * 3 + ids[:1]):
            for skip in (False, True):
                whole, stream = tokenizer.decode(order, skip_special_tokens=skip), tokenizer.stream(skip)
                shown = "".join(map(stream.push, order)) + stream.finish()
                check(shown == whole, f"{order}: {shown!r} is not {whole!r}")


@engine_entry
def D09_empty_prompt(engine: Serving) -> None:
    """The bos token alone where the tokenizer adds one, else refused; an empty list of ids is always refused."""
    check(engine.llm.tokenizer.encode("") == [BOS], "the tokenizer adds no bos token")
    (sample,) = legal("", max_tokens=2, ignore_eos=True)
    check(len(sample.token_ids) == 2, f"{sample.token_ids} for an empty prompt")
    check(
        sample.token_ids == legal([BOS], max_tokens=2, ignore_eos=True)[0].token_ids, "not what follows the bos token"
    )
    engine.refused(RequestError, "no tokens", prompt=[[]])
    no_bos = Serving(NO_BOS)
    check(NO_BOS.tokenizer.encode("") == [], "this tokenizer adds something")
    for prompt in ("", [[]], [""], ["abc", ""]):
        no_bos.refused(RequestError, "no tokens", prompt=prompt)
    legal("a", llm=NO_BOS, max_tokens=2)


def D09_texts_without_tokens(folder: Path) -> None:
    """The tokenizer itself gives no ids for nothing, and a batch of nothing is refused."""
    for tokenizer in sample_tokenizers(folder):
        check(accepted(partial(tokenizer.encode, "", add_special_tokens=False)) == [], "ids of nothing")
        check(accepted(partial(tokenizer.decode, [])) == "", "text of nothing")
        refused(RequestError, partial(tokenizer, []), "empty list")
        refused(RequestError, partial(tokenizer, "a", max_length=0), "max_length must be an integer above 0; got 0")
        refused(RequestError, partial(tokenizer.pad, []), "at least one text")
