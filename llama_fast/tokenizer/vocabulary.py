"""Tokens and ids of a tokenizer: its vocabulary, and its special tokens by name."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, overload

from tokenizers import AddedToken, Tokenizer

from llama_fast.errors import ConfigError, RequestError, UnsupportedError, shown
from llama_fast.tokenizer.token_stream import checked_id, translated

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class _NamedToken:
    """The attribute `bos_token` and its like: the token's text, or None. Set it to a token of the vocabulary."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, tokenizer: "Vocabulary", owner: type | None = None) -> str | None:
        return tokenizer._named.get(self._name)

    def __set__(self, tokenizer: "Vocabulary", token: str | AddedToken | None) -> None:
        if token is None:
            tokenizer._named.pop(self._name, None)
        else:
            tokenizer._named[self._name] = tokenizer._known_token(token, self._name)


class _NamedTokenId:
    """The attribute `bos_token_id` and its like: the token's id, or None."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name.removesuffix("_id")

    def __get__(self, tokenizer: "Vocabulary", owner: type | None = None) -> int | None:
        token = tokenizer._named.get(self._name)
        return None if token is None else tokenizer._tokenizer.token_to_id(token)

    def __set__(self, tokenizer: "Vocabulary", token_id: int | None) -> None:
        if token_id is not None and tokenizer.convert_ids_to_tokens(token_id) is None:
            raise RequestError(f"{self._name}_id={token_id!r:.80} is no id of this tokenizer; it has {len(tokenizer)}")
        setattr(tokenizer, self._name, None if token_id is None else tokenizer.convert_ids_to_tokens(token_id))


class Vocabulary:
    """What a tokenizer knows of its tokens. A part of `LlamaTokenizer`.

    Reading is safe from several threads; settings are for before that.
    """

    _tokenizer: Tokenizer
    _named: dict[str, str]
    _extra_special_tokens: list[str]
    special_token_ids: frozenset[int]  # all that the tokenizer's files call special, named or not
    _special_texts: tuple[str, ...]  # the same, as they are written

    bos_token, bos_token_id = _NamedToken(), _NamedTokenId()
    eos_token, eos_token_id = _NamedToken(), _NamedTokenId()
    unk_token, unk_token_id = _NamedToken(), _NamedTokenId()
    sep_token, sep_token_id = _NamedToken(), _NamedTokenId()
    pad_token, pad_token_id = _NamedToken(), _NamedTokenId()
    cls_token, cls_token_id = _NamedToken(), _NamedTokenId()
    mask_token, mask_token_id = _NamedToken(), _NamedTokenId()
    pad_token_type_id = 0

    def __len__(self) -> int:
        """Number of tokens, added tokens included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def vocab_size(self) -> int:
        """Number of tokens of the BPE model alone, without added tokens."""
        return self._tokenizer.get_vocab_size(with_added_tokens=False)

    def get_vocab(self) -> dict[str, int]:
        """Ids by token, added tokens included."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    @property
    def vocab(self) -> dict[str, int]:
        return self.get_vocab()

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """Added tokens by id: those that are matched in a text as a whole, before BPE."""
        return self._tokenizer.get_added_tokens_decoder()

    def get_added_vocab(self) -> dict[str, int]:
        """Ids of the added tokens."""
        return {token.content: token_id for token_id, token in sorted(self.added_tokens_decoder.items())}

    @overload
    def convert_tokens_to_ids(self, tokens: str) -> int | None: ...  # type: ignore[overload-overlap]

    @overload
    def convert_tokens_to_ids(self, tokens: Iterable[str]) -> list[int | None]: ...

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> int | list[int | None] | None:
        """The id of a token, or of each; the unk token's for one that does not exist, None if there is no such."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        token_id = self._tokenizer.token_to_id(tokens)
        return self.unk_token_id if token_id is None else token_id

    @overload
    def convert_ids_to_tokens(self, ids: int, skip_special_tokens: bool = False) -> str | None: ...

    @overload
    def convert_ids_to_tokens(self, ids: Iterable[int], skip_special_tokens: bool = False) -> list[str | None]: ...

    def convert_ids_to_tokens(
        self, ids: int | Iterable[int], skip_special_tokens: bool = False
    ) -> str | list[str | None] | None:
        """The token of an id, or of each; None for an id that the tokenizer does not know.

        Raises:
            RequestError: an id is not an integer in [0, 2**32).
        """
        if not isinstance(ids, Iterable):
            return self._tokenizer.id_to_token(checked_id(ids))
        checked = [checked_id(token_id, index) for index, token_id in enumerate(ids)]
        skipped = self.special_token_ids if skip_special_tokens else frozenset()
        return [self._tokenizer.id_to_token(token_id) for token_id in checked if token_id not in skipped]

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The named special tokens that are set, by name."""
        return {name: self._named[name] for name in NAMED_TOKENS if name in self._named}

    @property
    def extra_special_tokens(self) -> list[str]:
        """Special tokens without a name. Set it to a list of tokens of the vocabulary."""
        return list(self._extra_special_tokens)

    @extra_special_tokens.setter
    def extra_special_tokens(self, tokens: Sequence[str | AddedToken] | None) -> None:
        self._extra_special_tokens = [self._known_token(token, "extra_special_tokens") for token in tokens or ()]

    additional_special_tokens = extra_special_tokens  # the name before transformers 5

    @property
    def extra_special_tokens_ids(self) -> list[int | None]:
        return self.convert_tokens_to_ids(self._extra_special_tokens)

    additional_special_tokens_ids = extra_special_tokens_ids

    @property
    def all_special_tokens(self) -> list[str]:
        """The named special tokens and `extra_special_tokens`, each once."""
        return list(dict.fromkeys([*self.special_tokens_map.values(), *self._extra_special_tokens]))

    @property
    def all_special_ids(self) -> list[int | None]:
        return self.convert_tokens_to_ids(self.all_special_tokens)

    def add_special_tokens(
        self, special_tokens_dict: Mapping[str, Any], replace_extra_special_tokens: bool = True
    ) -> int:
        """Names tokens of the vocabulary, as `{"pad_token": "</s>"}`, and makes them special: decoding can skip them.

        Returns:
            0, the number of new ids.

        Raises:
            UnsupportedError: a token is not in the vocabulary.
            ConfigError: a name is not one of NAMED_TOKENS, `extra_special_tokens` or `additional_special_tokens`.
        """
        for name, value in special_tokens_dict.items():
            if name in NAMED_TOKENS:
                self.add_tokens([value], special_tokens=True)
                setattr(self, name, value)
            elif name in ("extra_special_tokens", "additional_special_tokens"):
                self.add_tokens(value, special_tokens=True)
                kept = [] if replace_extra_special_tokens else self.extra_special_tokens
                self.extra_special_tokens = list(dict.fromkeys([*kept, *map(str, value)]))
            else:
                accepted = ", ".join([*NAMED_TOKENS, "extra_special_tokens"])
                raise ConfigError(f"special token name {name!r:.80} is not known; accepted are {accepted}")
        return 0

    def add_tokens(
        self, new_tokens: str | AddedToken | Sequence[str | AddedToken], special_tokens: bool = False
    ) -> int:
        """Makes tokens of the vocabulary match in a text as a whole; `special_tokens`: only where special ones do.

        Returns:
            0, the number of new ids.

        Raises:
            UnsupportedError: a token is not in the vocabulary; the model's embedding has no row for a new id.
        """
        tokens = [new_tokens] if isinstance(new_tokens, str | AddedToken) else list(new_tokens)
        for token in tokens:
            self._known_token(token, "add_tokens")
        with translated(ConfigError, "the tokens could not be added"):
            (self._tokenizer.add_special_tokens if special_tokens else self._tokenizer.add_tokens)(tokens)
        self._backend_changed()
        return 0

    @property
    def unk_token_length(self) -> int:
        """Number of tokens of the unk token written as plain text."""
        return len(self._tokenizer.encode(self.unk_token or "", add_special_tokens=False))

    def _known_token(self, token: str | AddedToken, name: str) -> str:
        if not isinstance(token, str | AddedToken):
            raise ConfigError(f"{name} must be a string or an AddedToken; got {type(token).__name__}")
        text = str(token)
        if self._tokenizer.token_to_id(text) is None:
            raise UnsupportedError(
                f"{name}: '{shown(text)}' is not in the vocabulary, and a new id has no row in the model's embedding; "
                "use a token that is, such as tokenizer.eos_token for pad_token"
            )
        return text

    def _backend_changed(self) -> None:
        """Forget what was derived from the tokenizer."""
        added = self._tokenizer.get_added_tokens_decoder()
        special = {token_id: token.content for token_id, token in added.items() if token.special}
        self.special_token_ids, self._special_texts = frozenset(special), tuple(special.values())
