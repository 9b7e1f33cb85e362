"""tokenizer.json and its side files. What loads encodes as the tokenizers library does, and streams as it decodes."""

import json
import random
from pathlib import Path

from tokenizers import Tokenizer

from llama_fast.errors import LlamaFastError, RequestError, TemplateError, TokenizerFileError
from llama_fast.tokenizer import LlamaTokenizer
from tests.bad_inputs.harness import check, check_message
from tests.fuzz.mutate import mutate_document, to_json
from tests.fuzz.target import Files, FileTarget
from tests.tokenizer_samples import BUILT, NAMES

TEXTS = ("Hello, wörld!  the 123 <s>a</s>", " 你好 \U0001f917\n\0é", "", "aaaa" * 20, "<tool call>▁ l\u202e")
_IDS = (
    (0, 1, 2, 3, 4, 5, 100, 200, 255, 256, 257, 258),
    (230, 191, 192, 193, 100, 260, 261, 262, 300, 10**6),
    (7, 7, 7),
)

_REGEXES = ("(a+)+$", "(?=(a+))*b", "\\p{L}+|\\p{N}{1,3}", "[", "(?P<x>a)(?P=x)", "x*", "", ".{1,1000}{1,1000}")
_PATTERNS = (*({"Regex": regex} for regex in _REGEXES), *({"String": string} for string in ("", " ", "▁")))
_ROBERTA = {"sep": ["</s>", 2], "cls": ["<s>", 1], "trim_offsets": True, "add_prefix_space": True}
_NAMED = """NFC NFKD Lowercase Nmt ByteFallback Fuse WhitespaceSplit Digits Punctuation BertPreTokenizer UnicodeScripts
CTC StripAccents Wat"""
_TOKEN, _A, _B = {"SpecialToken": {"id": "[X]"}}, {"Sequence": {"id": "A"}}, {"Sequence": {"id": "B", "type_id": 2**32}}
_STAGES = (
    *({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False} for pattern in _PATTERNS),
    *({"type": "Replace", "pattern": pattern, "content": "aa" * 50} for pattern in _PATTERNS),
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    {"type": "Precompiled", "precompiled_charsmap": ""},
    {"type": "FixedLength", "length": 0},
    {"type": "Strip", "content": " ", "start": 2**40, "stop": 3},
    {"type": "Strip", "strip_left": True, "strip_right": True},
    {"type": "Prepend", "prepend": ""},
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True},
    {"type": "Metaspace", "replacement": "▁▁", "add_prefix_space": True},
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
    *({"type": name} for name in _NAMED.split()),
    {"type": "BPEDecoder", "suffix": "</w>"},
    {"type": "WordPiece", "prefix": "##", "cleanup": True},
    {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
    {
        "type": "TemplateProcessing",
        "single": [_TOKEN, _A],
        "pair": [_A, _B],
        "special_tokens": {"[X]": {"id": "[X]", "ids": [2**32 - 1], "tokens": ["[X]"]}},
    },
    {"type": "RobertaProcessing", **_ROBERTA},
    {"type": "Sequence", "normalizers": []},
    {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "Strip", "content": "", "start": 1, "stop": 1}]},
    {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"String": ""}, "behavior": "Removed"}]},
)
_MODELS = (
    {"type": "Unigram", "unk_id": 9, "vocab": [["a", -1.0], ["b", 1e308]], "byte_fallback": True},
    {"type": "Unigram", "unk_id": None, "vocab": [], "byte_fallback": False},
    {"type": "WordPiece", "unk_token": "[U]", "max_input_chars_per_word": 0, "vocab": {}},
    {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "x"},
    {"type": "BPE", "vocab": {}, "merges": []},
)
_ADDED = {"special": True, "single_word": False, "lstrip": True, "rstrip": True, "normalized": True}
_KEYS = {
    **dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder"), _STAGES),
    "model": _MODELS,
    "truncation": ({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 2},),
    "padding": ({"strategy": {"Fixed": 10**6}, "direction": "Left", "pad_id": 0, "pad_type_id": 0, "pad_token": ""},),
    "added_tokens": tuple([{"id": i, "content": text, **_ADDED}] for i in (0, 5, 2**31) for text in ("a", "", " ")),
    "dropout": (0.5, 0, 0.0, 1.0),
    "unk_token": ("absent", None),
    "continuing_subword_prefix": ("##", ""),
    "end_of_word_suffix": ("</w>", ""),
    **dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), (True, False)),
    "vocab": ({"a": 2**32}, {}),
    "merges": ([["a", "b", "c"]], ["a"], [["h", "e"]] * 5, [["", ""]]),
    **dict.fromkeys(("<s>", "zz"), (5, 10**9, 2**32 - 1, -1)),
    "version": ("2.0", "1.0"),
}
_CONFIG = {**NAMES, "model_max_length": 2048, "clean_up_tokenization_spaces": False}
_CONFIG_KEYS = {
    "chat_template": ("{{ messages }}", [{"name": "a", "template": "b"}], "{%"),
    "added_tokens_decoder": ({"5": {"content": "zz", "special": True}}, {"x": {}}, []),
    **dict.fromkeys(("add_bos_token", "add_eos_token"), (True, False)),
    "pad_token": ({"content": "</s>", "lstrip": False}, {}),
    "tokenizer_class": ("GPT2Tokenizer",),
    "auto_map": ({},),
    "model_max_length": (1e30, 10**400, 0),
    "extra_special_tokens": ({"x": "y"}, ["a"]),
    "additional_special_tokens": (["<s>"], [7], [{"content": "</s>"}]),
}


class Target(FileTarget):
    refusals = (TokenizerFileError, TemplateError)

    def __init__(self) -> None:
        self._specs = [BUILT[name].to_str() for name in ("llama2", "metaspace", "llama3", "no_decoder", "strip_three")]
        self.files = {"tokenizer.json": self._specs[0].encode(), "tokenizer_config.json": json.dumps(_CONFIG).encode()}

    def make(self, rng: random.Random) -> Files:
        files: Files = {}
        if rng.random() < 0.8:
            document = mutate_document(rng, json.loads(rng.choice(self._specs)), also=_STAGES, keys=_KEYS)
            files["tokenizer.json"] = to_json(rng, document)
        if not files or rng.random() < 0.1:
            name = rng.choice(("tokenizer_config.json", "special_tokens_map.json"))
            files[name] = to_json(rng, mutate_document(rng, json.loads(json.dumps(_CONFIG)), keys=_CONFIG_KEYS))
        return files

    def load(self, folder: Path, files: Files) -> None:
        tokenizer = LlamaTokenizer.from_pretrained(folder)
        reference = self._reference(files)
        for text in TEXTS:
            try:
                ids = tokenizer.encode(text)
            except RequestError as error:
                check_message(error)
                continue
            check(all(0 <= token_id < 2**32 for token_id in ids), f"{text!r} has the ids {ids}")
            if reference is not None:
                check(ids == reference.encode(text).ids, f"{text!r} becomes other ids than the tokenizers library's")
            stream_as_decoded(tokenizer, ids)
            _quietly(lambda text=text: tokenizer.encode(text, parse_special_tokens=True))
        for ids in _IDS:
            stream_as_decoded(tokenizer, ids)

    def _reference(self, files: Files) -> Tokenizer | None:
        """The library alone, where tokenizer.json is all that counts."""
        if files.keys() != {"tokenizer.json"}:
            return None
        backend = Tokenizer.from_buffer(files["tokenizer.json"])
        added = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        if not added.issuperset(NAMES.values()) or backend.post_processor is None:
            return None  # ours makes them special, and adds bos
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        return backend


def stream_as_decoded(tokenizer: LlamaTokenizer, ids: object) -> None:
    """The ids one by one give the text of all together, or both are refused."""
    for skip in (True, False):
        text = _quietly(lambda skip=skip: tokenizer.decode(ids, skip_special_tokens=skip))
        joined = _quietly(lambda skip=skip: _streamed(tokenizer, ids, skip))
        check(joined == text, f"{ids!r:.200}, skip_special_tokens={skip}: {text!r:.200} streams as {joined!r:.200}")


def _streamed(tokenizer: LlamaTokenizer, ids: object, skip: bool) -> str:
    stream = tokenizer.stream(skip_special_tokens=skip)
    return "".join([stream.push(token_id) for token_id in ids]) + stream.finish()


def _quietly(call: object) -> object:
    """The result of `call`, or None where it is refused as it should be."""
    try:
        return call()
    except LlamaFastError as error:
        check(isinstance(error, RequestError), f"{type(error).__name__} from loaded files: {error}")
        check_message(error)
        return None
