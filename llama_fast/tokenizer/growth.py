"""How much longer a tokenizer.json may make a text.

A few hundred bytes of a hostile one turn a single character into gigabytes: ten replacements, one after the other, of
"a" by "aaaaaaaaaa", or a template of a thousand special tokens that stand for a thousand ids each.
"""

import json
import math
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer

from llama_fast.errors import TokenizerFileError

# Of each part: DeepSeek's longest has 8 stages, and Llama's templates put one token before each of two texts.
_MAX_STAGES = 64
_MAX_GROWTH = 64


def check_growth(tokenizer: Tokenizer, name: str) -> None:
    """Checks what one character of a text, or one token of a decoded one, may become.

    Raises:
        TokenizerFileError: a part of the file, which messages call `name`, has too many stages or adds too much.
    """
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if getattr(tokenizer, part) is None:
            continue
        # The library shows a part's content only in its serialised form.
        stages = list(_stages(json.loads(getattr(tokenizer, part).__getstate__())))
        growth = math.prod(map(_growth, stages[:_MAX_STAGES]))
        if len(stages) > _MAX_STAGES or growth > _MAX_GROWTH:
            raise TokenizerFileError(
                f"{name}: {part} has {len(stages):,} stages, which make a text up to {min(growth, 10**9):,} times as "
                f"long; supported are {_MAX_STAGES} stages, and {_MAX_GROWTH} times"
            )


def _stages(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if spec["type"] != "Sequence":
        yield spec
        return
    for inner in next(value for value in spec.values() if isinstance(value, list)):
        yield from _stages(inner)


def _growth(stage: dict[str, Any]) -> int:
    match stage["type"]:
        case "Replace":
            return max(1, len(stage["content"]))
        case "Prepend":
            return max(1, len(stage["prepend"]))
        case "ByteLevel":
            return 2  # a character for each byte, and most of these are two bytes again
        case "TemplateProcessing":
            ids = {name: len(token["ids"]) for name, token in stage["special_tokens"].items()}
            return max(
                sum(ids[piece["SpecialToken"]["id"]] if "SpecialToken" in piece else 1 for piece in stage[kind])
                for kind in ("single", "pair")
            )
    return 1
