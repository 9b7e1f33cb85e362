"""Ids to texts."""

from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers.models import BPE

from llama_fast.errors import RequestError
from llama_fast.tokenizer.token_stream import CLEAN_UP, TokenStream, checked_id, translated
from llama_fast.tokenizer.vocabulary import Vocabulary


class TextDecoder(Vocabulary):
    """The part of `LlamaTokenizer` that makes texts of ids."""

    clean_up_tokenization_spaces: bool

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> str | list[str]:
        """Text of ids: one id, a sequence, or a 1-D array or tensor; of several sequences or a 2-D one a list of texts.

        An id that the tokenizer does not know gives no text: a model's embedding may have more rows than the
        tokenizer has tokens.

        Args:
            skip_special_tokens: leave special tokens out.
            clean_up_tokenization_spaces: remove spaces before punctuation, which can corrupt text. None: what
                tokenizer_config.json says, except that for BPE it is off.

        Raises:
            RequestError: an id is not an integer in [0, 2**32).
        """
        plain = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
        values: list[Any] = list(plain) if isinstance(plain, Iterable) else [plain]
        if any(isinstance(row, list | tuple) or getattr(row, "shape", None) for row in values[:1]):
            return [str(self.decode(row, skip_special_tokens, clean_up_tokenization_spaces)) for row in values]
        checked = [checked_id(value, index) for index, value in enumerate(values)]
        if skip_special_tokens:
            # By id, not by the library's flag: that compares text and misses special tokens stored as "normalized".
            checked = [token_id for token_id in checked if token_id not in self.special_token_ids]
        with translated(RequestError, "the ids could not be decoded"):
            text = self._tokenizer.decode(checked, skip_special_tokens=False)
        if self._cleans_up(clean_up_tokenization_spaces):
            for pattern, replacement in CLEAN_UP:
                text = text.replace(pattern, replacement)
        return text

    def batch_decode(
        self, sequences: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> list[str]:
        """`decode`, giving a list also for one sequence."""
        texts = self.decode(sequences, skip_special_tokens, clean_up_tokenization_spaces)
        return [texts] if isinstance(texts, str) else texts

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """Text of tokens as they stand in the vocabulary."""
        decoder = self._tokenizer.decoder
        with translated(RequestError, "the tokens could not be decoded"):
            return " ".join(tokens) if decoder is None else decoder.decode(list(tokens))

    def stream(
        self, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> TokenStream:
        """Decodes ids one at a time; the arguments are those of `decode`."""
        skipped = self.special_token_ids if skip_special_tokens else frozenset()
        return TokenStream(self._tokenizer, skipped, self._cleans_up(clean_up_tokenization_spaces))

    def _cleans_up(self, asked: bool | None) -> bool:
        # The flag was made for WordPiece. Llama 3 checkpoints set it, but in BPE it deletes genuine spaces.
        return (
            (self.clean_up_tokenization_spaces and not isinstance(self._tokenizer.model, BPE))
            if asked is None
            else asked
        )
