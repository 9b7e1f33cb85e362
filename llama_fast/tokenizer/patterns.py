"""Regular expressions of a tokenizer.json: only those are accepted that take time linear in the text.

`tokenizers` runs them with a backtracking engine. It gives up after ten million steps from one place in the text (0.1
s), but there may be a million places, so a hostile pattern, or a hostile text for a careless one, could keep a server
busy for days. A pattern is accepted if each of its alternatives is one of two kinds:
    A few characters or classes, one of which may repeat, followed by optional ones only. Once the repeat has begun the
    alternative cannot fail, so what it looked at is consumed.
    Alternatives of Llama's family that stand together: where the first has looked at a run and fails, the next one
    consumes it.
Published patterns that take quadratic time are replaced by one that matches the same.

The published patterns that were looked at are in tests/regex_samples.py.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer

from llama_fast.errors import TokenizerFileError, shown

_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"

# Alternatives that are linear together.
_TOGETHER = (
    _CONTRACTIONS,
    "'(?i:[sdmt]|ll|ve|re)",
    # A run of spaces: up to its last line end; all but the last; all.
    r"\s*[\r\n]+|\s+(?!\S)|\s+",
    r"\s*[\r\n]|\s+(?!\S)|\s+",
    r"\s+(?!\S)|\s+",
    # A word of capital letters, then small ones: a run of capitals alone is for the second.
    *(
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{ending}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{ending}"
        for ending in ("", f"{_CONTRACTIONS}?")
    ),
    r" ?[^(\s|[.,!?…。，、।۔،])]+",  # BLOOM's and Viking's: a class in a class
    # What REPLACED puts in, and sentencepiece_conversion.py. Only the first character of a run begins a match.
    r"\A +",
    r"^\s+",
    "^ +",
    r"(?<!\s)\s+$",
    "(?<! ) +$",
    r"(?<![ ▁])[ ▁]+\z",
)

# From each character of a run of spaces these look for the end of the line, to find nothing. A match always starts at
# the run's first character.
REPLACED = {
    r"\s+$": r"(?<!\s)\s+$",
    r"^\s+|\s+$": r"^\s+|(?<!\s)\s+$",
    "^ +| +$": "^ +|(?<! ) +$",
}

_MAX_PATTERN = 2000
_SHORT_REPEAT = r"\?|\{[0-9](?:,[0-9])?\}"
_PART = re.compile(
    rf"""(?: \\p\{{\^?\w+\}} | \\[^\w\d] | \\[sSdDwWrnt] | [^\\\[\](){{}}|*+?^$] |
              \[ (?: [^\[\]\\&] | &(?!&) | \\[^\w\d] | \\[sSdDwWrnt] | \\p\{{\^?\w+\}} )+ \] )
         (?: (?P<short> {_SHORT_REPEAT} ) | (?P<long> [*+] | \{{[0-9],\}} ) )? (?: (?<=[?*+])\+ )? (?![*+?{{])""",
    re.VERBOSE,
)


def bound_patterns(tokenizer: Tokenizer) -> None:
    """Checks the patterns of `tokenizer`, and replaces those of `REPLACED`.

    Raises:
        TokenizerFileError: a pattern is not known to take linear time.
    """
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        if getattr(tokenizer, part) is None:
            continue
        # The library shows a part's content only in its serialised form, and makes one of it only in a whole tokenizer.
        spec = json.loads(getattr(tokenizer, part).__getstate__())
        replaced = False
        for node in _regex_nodes(spec):
            pattern = node["Regex"]
            if pattern in REPLACED:
                node["Regex"], replaced = REPLACED[pattern], True
            elif not _is_linear(pattern):
                raise TokenizerFileError(
                    f"tokenizer.json: {part} has the regular expression '{shown(pattern)}', which is not known to take "
                    "time linear in the text; use one of Llama's family, or one that repeats nothing but the last part "
                    "of an alternative"
                )
        if replaced:
            whole = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
            setattr(tokenizer, part, getattr(Tokenizer.from_str(json.dumps({**whole, part: spec})), part))


def _regex_nodes(spec: Any) -> Iterator[dict[str, Any]]:
    if isinstance(spec, dict):
        if isinstance(spec.get("Regex"), str):
            yield spec
        spec = list(spec.values())
    if isinstance(spec, list):
        for inner in spec:
            yield from _regex_nodes(inner)


def _is_linear(pattern: str) -> bool:
    pattern = pattern.replace("\r", r"\r").replace("\n", r"\n")  # some files have the characters themselves
    at = 0
    while len(pattern) <= _MAX_PATTERN:
        together = [len(known) for known in _TOGETHER if pattern.startswith(known, at)]
        ends = [at + length for length in together if pattern[at + length :][:1] in ("", "|")]
        at = max(ends) if ends else _end_of_simple(pattern, at)
        if at == len(pattern):
            return True
        if at < 0 or pattern[at] != "|":
            return False
        at += 1
    return False


def _end_of_simple(pattern: str, at: int) -> int:
    """Where an alternative that starts at `at` ends; -1 if it is not of the first kind.

    It may have one short repeat, then one of any length, and after that only optional parts.
    """
    num_short = 0
    repeated = False
    while at < len(pattern) and pattern[at] != "|":
        part = _PART.match(pattern, at)
        if part is None:
            return -1
        num_short += part["short"] is not None
        optional = part["short"] == "?" or part["long"] == "*"
        if num_short > 1 or (repeated and not optional):
            return -1
        repeated = repeated or part["long"] is not None
        at = part.end()
    return at
