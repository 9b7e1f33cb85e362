"""Regular expressions of published tokenizer.json files, and of hostile ones."""

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_ENDINGS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_SPLIT_BY_DEEPSEEK = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""

PUBLISHED = {
    "Llama 3": rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_ENDINGS}",
    "Qwen 2": rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_ENDINGS}",
    "Qwen 3.5": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_ENDINGS}",
    "MiniCPM 5": rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_ENDINGS}",
    "LLaDA": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+",
    "GPT-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "GPT-4o": "|".join(f"{word}{_CONTRACTIONS}?" for word in _CASED)
    + rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_ENDINGS}",
    "Tekken": "|".join(_CASED) + rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_ENDINGS}",
    # Line ends stand in these files as themselves.
    "DeepSeek 3": f"{_SPLIT_BY_DEEPSEEK}|[^\r\n\\p{{L}}\\p{{P}}\\p{{S}}]?[\\p{{L}}\\p{{M}}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
    "DeepSeek 3, numbers": r"\p{N}{1,3}",
    "DeepSeek 3, ideographs": "[一-龥぀-ゟ゠-ヿ]+",
    "DeepSeek, line ends": "[\r\n]",
    "DeepSeek, letters": r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓ]+",
    "DeepSeek, punctuation": r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
    "DeepSeek, last spaces": r"\s+$",
    "DeepSeek Coder, letters": r"\s?\p{L}+",
    "DeepSeek Coder, punctuation": r"\s?\p{P}+",
    "Falcon": "[0-9][0-9][0-9]",
    "Zeta": f"{_CONTRACTIONS}|[^\r\n\\p{{L}}\\p{{N}}]?\\p{{L}}+|\\p{{N}}{{1}}| ?[^\\s\\p{{L}}\\p{{N}}\r\n]+"
    "|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
    "BLOOM, Viking": r" ?[^(\s|[.,!?…。，、।۔،])]+",
    "Sarvam": " ",
    "SentencePiece, both ends": "^ +| +$",
    "SentencePiece, inside": " {2,}",
}

HOSTILE = [
    "(a+)+$",
    "(a|a)*b",
    r"(?:\w+\s?)*$",
    "a*a*a*a*b",
    ".*.*=.*",
    r"(.*)\1\1x",
    r"\s*x",
    r"\s*[\r\n]+",
    r"\s*[\r\n]+|\s|\s+",
    r"\s+(?!\S)",
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"(?=a*b)c",
    "a?" * 50 + "a" * 50,
    "[[a-z]&&[aeiou]]+$",
    "a+" * 10**5,
    "x" * 2001,
    "a?b?c",
    "a{1,9}b{1,9}",
    "a{100}",
    "a{1,3}+b",
    "a+?",
    "a++b",
    "a+$",
    r"\X",
    "(?:a)",
    "^a*b",
    r"\d{1,3}(?=(?:\d{3})*\b)",  # Cohere's
]
