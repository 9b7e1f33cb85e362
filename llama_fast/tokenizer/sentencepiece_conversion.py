"""SentencePiece's tokenizer.model (Llama 1 and 2), converted on load to a tokenizer of the `tokenizers` library.

Two ways to treat spaces, both as in transformers:
    legacy      each text between special tokens gets a leading "▁", as SentencePiece gives to a whole text. The ids of
                a text without special tokens are exactly SentencePiece's.
    not legacy  only text at the very start gets it, and not if it starts with a space or "▁" itself: " a" has the ids
                of "a", where SentencePiece has one "▁" more. All other texts have SentencePiece's ids.
Two more differences to SentencePiece, which transformers has too: user-defined pieces are cut out of the text before
the "▁" is put in front, and a run of byte tokens of which a part is not UTF-8 decodes to U+FFFD as a whole.

Differences to transformers: spaces are removed where the file says remove_extra_whitespaces, add_dummy_prefix of the
file counts; and merges are ordered by score, as in published tokenizer.json files. Version 5 orders them by id, which
splits "a  b" into "▁a", "▁▁", "b" with Llama 2's file, where SentencePiece has "▁a", "▁", "▁b".

Sources: normalizer.cc and bpe_model.cc of google/sentencepiece; LlamaConverter and generate_merges of transformers.
"""

import itertools
from collections.abc import Mapping

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from llama_fast.errors import TokenizerFileError, listed, shown
from llama_fast.tokenizer.sentencepiece_model import SPACE, Piece, PieceType, parse_sentencepiece

# On average. Llama 2 has 1.9; a hostile vocabulary could have one for each character of each piece.
_MAX_MERGES_PER_PIECE = 8


def convert_sentencepiece(
    content: bytes,
    name: str,
    *,
    legacy: bool,
    add_prefix_space: bool | None = None,
    added_tokens: Mapping[int, AddedToken] | None = None,
) -> Tokenizer:
    """The tokenizer that a tokenizer.model describes, without a post-processor.

    Args:
        content: of the file, which messages call `name`.
        legacy: how spaces are treated; see the module's docstring.
        add_prefix_space: put "▁" in front of texts. None: what the file says.
        added_tokens: by id: further tokens, or the text and the flags of those that the file has.

    Raises:
        TokenizerFileError: the file is malformed or not supported, or an added token does not fit it.
    """
    model = parse_sentencepiece(content, name)
    own = {
        index: AddedToken(piece.text, special=piece.type != PieceType.USER_DEFINED, normalized=False)
        for index, piece in enumerate(model.pieces)
        if piece.type in (PieceType.UNKNOWN, PieceType.CONTROL, PieceType.USER_DEFINED)
    }
    added = {**own, **(added_tokens or {})}
    # T34: the first three are unk, bos and eos under whatever names, and files beside this one may rename them.
    texts = [added[index].content if index in own else piece.text for index, piece in enumerate(model.pieces)]
    tokenizer = Tokenizer(
        BPE(
            {text: index for index, text in enumerate(texts)},
            _merges(model.pieces, name),
            unk_token=texts[0],
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
        )
    )
    prefix = model.add_dummy_prefix if add_prefix_space is None else add_prefix_space
    _treat_spaces(tokenizer, legacy, prefix, model.remove_extra_whitespaces)

    add_tokens(tokenizer, added, name)
    return tokenizer


def add_tokens(tokenizer: Tokenizer, tokens: Mapping[int, AddedToken], name: str) -> None:
    """Adds tokens, each with its id.

    Raises:
        TokenizerFileError: a token has another id, or gets one: the library takes the next that is free.
    """
    tokenizer.add_tokens([token for _, token in sorted(tokens.items())])
    for token_id, token in sorted(tokens.items()):
        received = tokenizer.token_to_id(token.content)
        if received != token_id:
            raise TokenizerFileError(
                f"{name}: the added token '{shown(token.content)}' should have id {token_id}, but has {received}: ids "
                "of added tokens follow those of the vocabulary without a hole; correct added_tokens_decoder of "
                "tokenizer_config.json, or added_tokens.json"
            )


def _treat_spaces(tokenizer: Tokenizer, legacy: bool, prefix: bool, remove_extra: bool) -> None:
    normalize: list[normalizers.Normalizer] = []
    if remove_extra:
        # At the end SentencePiece removes "▁" too.
        normalize += [normalizers.Replace(Regex(r"(?<![ ▁])[ ▁]+\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if remove_extra and (legacy or not prefix):  # else one space at the start is the prefix
        normalize += [normalizers.Replace(Regex(r"\A +"), "")]
    if legacy:
        normalize += [normalizers.Prepend(SPACE)] if prefix else []
        normalize += [normalizers.Replace(" ", SPACE)]
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            SPACE, prepend_scheme="first" if prefix else "never", split=False
        )
    if normalize:
        tokenizer.normalizer = normalizers.Sequence(normalize)
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )


def _merges(pieces: list[Piece], name: str) -> list[tuple[str, str]]:
    """Pairs of pieces that make up a piece, in the order of merging: best score first, then longest left half,
    as transformers 4 orders them.

    SentencePiece merges the neighbours whose union has the best score, the leftmost of equals, and looks at the union
    alone. `tokenizers` merges the pair that comes first in its list, and knows only pairs of pieces. Both do the same
    where every character is a piece and no two unions have the same score, except runs of one character: Llama 2's runs
    of spaces share a score, and with the longest left half first they grow from the left as in SentencePiece.
    """
    scores = {piece.text: piece.score for piece in pieces if piece.type == PieceType.NORMAL}
    missing = {char for text in scores for char in text} - scores.keys()
    if missing:
        raise TokenizerFileError(
            f"{name}: the characters {listed(sorted(missing))} stand in pieces but are no pieces themselves, which is "
            "not supported; use a tokenizer.json instead"
        )
    merges = []
    for text, score in scores.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in scores and right in scores:
                merges.append((-score, -len(left), -len(right), left, right))
        if len(merges) > _MAX_MERGES_PER_PIECE * len(scores):
            raise TokenizerFileError(
                f"{name}: on average a piece can be merged of two others in more than {_MAX_MERGES_PER_PIECE} ways"
            )
    merges.sort()
    for (score, _, _, left, right), (next_score, _, _, next_left, next_right) in itertools.pairwise(merges):
        text, next_text = left + right, next_left + next_right
        if score == next_score and text != next_text and len({*text, *next_text}) > 1:
            raise TokenizerFileError(
                f"{name}: the pieces '{shown(text)}' and '{shown(next_text)}' have the same score, so that which of "
                "them is merged first depends on the text, which is not supported; use a tokenizer.json instead"
            )
    return [(left, right) for *_, left, right in merges]
