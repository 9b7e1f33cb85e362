"""What a tokenizer puts around a text: its post-processor, for Llama the bos token in front."""

from collections.abc import Sequence

from tokenizers.processors import TemplateProcessing

from llama_fast.errors import ConfigError, RequestError, TokenizerFileError
from llama_fast.tokenizer.token_stream import translated
from llama_fast.tokenizer.vocabulary import Vocabulary


class AroundText(Vocabulary):
    """The part of `LlamaTokenizer` that knows the special tokens around a text, or two texts."""

    _add_bos_token: bool
    _add_eos_token: bool

    @property
    def add_bos_token(self) -> bool:
        """Whether the bos token is put before a text. Set it to change that; see `update_post_processor`."""
        return self._add_bos_token

    @add_bos_token.setter
    def add_bos_token(self, value: bool) -> None:
        self._add_bos_token = value
        self.update_post_processor()

    @property
    def add_eos_token(self) -> bool:
        """Whether the eos token is put after a text."""
        return self._add_eos_token

    @add_eos_token.setter
    def add_eos_token(self, value: bool) -> None:
        self._add_eos_token = value
        self.update_post_processor()

    def update_post_processor(self) -> None:
        """Put the present bos and eos token around texts, as `add_bos_token` and `add_eos_token` say, and nothing else.

        Raises:
            ConfigError: one of them is to be added but is not set. (transformers 5 switches it off without a word.)
        """
        special = []
        for name, added in (("bos_token", self._add_bos_token), ("eos_token", self._add_eos_token)):
            token = self._named.get(name)
            if added and token is None:
                raise ConfigError(f"add_{name} is True but there is no {name}; set {name}, or add_{name}=False")
            if added and token is not None:
                special.append((token, self._tokenizer.token_to_id(token)))
        bos = [self.bos_token] if self._add_bos_token else []
        eos = [self.eos_token] if self._add_eos_token else []
        single = [*bos, "$A", *eos]
        second = [f"{piece}:1".replace("$A", "$B") for piece in single]
        with translated(TokenizerFileError, "no post-processor can be made of the bos and eos token"):
            self._tokenizer.post_processor = TemplateProcessing(single, [*single, *second], special)
        self._backend_changed()

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """How many special tokens are put around a text, or a pair."""
        return self._tokenizer.num_special_tokens_to_add(pair)

    def build_inputs_with_special_tokens(
        self, token_ids_0: Sequence[int], token_ids_1: Sequence[int] | None = None
    ) -> list[int]:
        """The ids of a text, or two, with what the tokenizer puts around them."""
        return [token_id for token_id, _, _ in self._laid_out(token_ids_0, token_ids_1)]

    def get_special_tokens_mask(
        self,
        token_ids_0: Sequence[int],
        token_ids_1: Sequence[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """1 for a special token, 0 for one of a text.

        Args:
            token_ids_0, token_ids_1: ids without special tokens: the mask is for `build_inputs_with_special_tokens`.
            already_has_special_tokens: `token_ids_0` has them; which these are `all_special_ids` says.

        Raises:
            RequestError: `already_has_special_tokens` and `token_ids_1` are both given.
        """
        if not already_has_special_tokens:
            return [int(special) for _, special, _ in self._laid_out(token_ids_0, token_ids_1)]
        if token_ids_1 is not None:
            raise RequestError("with already_has_special_tokens=True all ids stand in token_ids_0; drop token_ids_1")
        special_ids = set(self.all_special_ids)
        return [int(int(token_id) in special_ids) for token_id in token_ids_0]

    def create_token_type_ids_from_sequences(
        self, token_ids_0: Sequence[int], token_ids_1: Sequence[int] | None = None
    ) -> list[int]:
        """Type ids for `build_inputs_with_special_tokens`: 0 for the first text, 1 for the second where the tokenizer
        distinguishes them, special tokens included."""
        return [type_id for _, _, type_id in self._laid_out(token_ids_0, token_ids_1)]

    def _laid_out(self, first: Sequence[int], second: Sequence[int] | None) -> list[tuple[int, bool, int]]:
        """(id, whether the post-processor put it there, type id) of a text's ids, or two texts', in order."""
        # What stands around one character stands around every text.
        example = self._tokenizer.encode("a", None if second is None else "a")
        laid_out: list[tuple[int, bool, int]] = []
        seen: set[int] = set()
        for token_id, type_id, sequence in zip(example.ids, example.type_ids, example.sequence_ids, strict=True):
            if sequence is None:
                laid_out.append((token_id, True, type_id))
            elif sequence not in seen:
                seen.add(sequence)
                ids = second if sequence and second is not None else first
                laid_out += [(int(inner), False, type_id) for inner in ids]
        return laid_out
