"""Tokenizers built here, so that tests prove something without the shared data, and genuine ones."""

import functools
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from llama_fast.tokenizer import LlamaTokenizer

SPECIALS = ["<unk>", "<s>", "</s>"]


def sentence_piece_like(stages: list[decoders.Decoder]) -> Tokenizer:
    """BPE with byte fallback, in the shape of Llama 2's: specials 0-2, bytes 3-258, then pieces."""
    pieces = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁▁", *"abcdehlnorst.,'?!é你", "▁a", "he", "ll", "▁n", "▁'", "▁,", "�"]
    merges = [("▁", "▁"), ("▁", "a"), ("h", "e"), ("l", "l"), ("▁", "n"), ("▁", "'"), ("▁", ",")]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(stages)
    return with_bos(backend)


def byte_level() -> Tokenizer:
    """Byte-level BPE in the shape of Llama 3's: every byte, one merge across a character's border, then specials."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "a"), ("h", "e"), ("ä", "½"), ("Ġ", "ä")]
    vocab = {piece: index for index, piece in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    backend = Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return with_bos(backend)


def with_bos(backend: Tokenizer) -> Tokenizer:
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIALS])
    backend.add_tokens([AddedToken("<tool call>", normalized=False)])
    backend.post_processor = processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return backend


LLAMA_2_DECODER = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
BUILT = {
    "llama2": sentence_piece_like(LLAMA_2_DECODER),
    "no_strip": sentence_piece_like(LLAMA_2_DECODER[:3]),
    "metaspace": sentence_piece_like([decoders.ByteFallback(), decoders.Metaspace()]),
    "strip_three": sentence_piece_like([*LLAMA_2_DECODER[:3], decoders.Strip(" ", 3, 0)]),
    "llama3": byte_level(),
    "ctc": sentence_piece_like([decoders.CTC()]),  # not known to the stream
    "replace": sentence_piece_like([decoders.Replace("a", "<0x41>"), decoders.ByteFallback()]),  # neither
    "replace_space": sentence_piece_like([decoders.Replace("▁", "<0x41>"), decoders.ByteFallback()]),  # nor this
}
BUILT["no_decoder"] = Tokenizer.from_str(json.dumps({**json.loads(BUILT["llama2"].to_str()), "decoder": None}))
GENUINE = ["tokenizers/llama3", "tokenizers/tinyllama", "stories260K"]


def built(name: str, **config: object) -> LlamaTokenizer:
    return LlamaTokenizer.from_backend(Tokenizer.from_str(BUILT[name].to_str()), {**NAMES, **config})


TOKENIZERS = {name: built(name) for name in BUILT}


@functools.cache
def load(folder: Path) -> LlamaTokenizer:
    return LlamaTokenizer.from_pretrained(folder)


def genuine(shared_data: Path, name: str) -> LlamaTokenizer:
    return load(shared_data / name)


def save_folder(path: Path, backend: Tokenizer, config: object = None, special_tokens_map: object = None) -> Path:
    path.mkdir(exist_ok=True)
    backend.save(str(path / "tokenizer.json"))
    for name, content in (("tokenizer_config", config), ("special_tokens_map", special_tokens_map)):
        if content is not None:
            (path / f"{name}.json").write_text(json.dumps(content))
    return path
