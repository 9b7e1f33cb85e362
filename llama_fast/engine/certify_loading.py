"""The model of a certificate, without an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llama_fast.engine.plan import check_weights
from llama_fast.model.llama import LlamaLM
from llama_fast.model.loading import check_tokenizer, open_checkpoint, read_model
from llama_fast.tokenizer import LlamaTokenizer

_TOKENIZERS = ("tokenizer.json", "tokenizer.model")


def load(folder: Path, *, load: str = "mmap", **options: Any) -> tuple[LlamaLM, LlamaTokenizer | None]:
    """The model of a folder, and its tokenizer if it has one.

    Args:
        load, options: as of `read_model` and `open_checkpoint`.

    Raises:
        ConfigError, CheckpointError, TokenizerFileError: a file of the folder is wrong.
        UnsupportedError, BackendError, OutOfMemoryError: an argument is, or there is no memory for the weights.
    """
    checkpoint = open_checkpoint(folder, **options)
    tokenizer = None
    if any((folder / name).is_file() for name in _TOKENIZERS):
        tokenizer = LlamaTokenizer.from_pretrained(folder)
        check_tokenizer(tokenizer, checkpoint.config, folder)
    check_weights(checkpoint)
    return read_model(LlamaLM, checkpoint, load=load), tokenizer
