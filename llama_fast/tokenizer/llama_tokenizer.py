"""`LlamaTokenizer`: a checkpoint's tokenizer, text to token ids and back.

What this package's tokenizer does differently from transformers is told where it does: `text_encoder.py` for encoding,
`vocabulary.py` for new tokens. `files.py` tells which file decides what.
"""

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from llama_fast.errors import RequestError, TokenizerFileError, UnsupportedError, listed
from llama_fast.files import written_whole
from llama_fast.hub import find_folder
from llama_fast.tokenizer.batch_encoding import check_length, check_side
from llama_fast.tokenizer.chat_template import Chat, choose_template, write_chat_templates
from llama_fast.tokenizer.chat_tokens import encode_pieces, pieces_of_prompt
from llama_fast.tokenizer.files import read_sentencepiece, read_tokenizer_files
from llama_fast.tokenizer.patterns import bound_patterns
from llama_fast.tokenizer.settings import (
    extra_special_tokens,
    flag,
    model_input_names,
    model_max_length,
    named_tokens,
    side,
)
from llama_fast.tokenizer.text_decoder import TextDecoder
from llama_fast.tokenizer.text_encoder import TextEncoder
from llama_fast.tokenizer.token_stream import translated
from llama_fast.tokenizer.vocabulary import NAMED_TOKENS

__all__ = ["LlamaTokenizer", "LlamaTokenizerFast"]

logger = logging.getLogger(__name__)

# Arguments that become attributes of the same name.
_ATTRIBUTES = (
    "clean_up_tokenization_spaces",
    "model_input_names",
    "model_max_length",
    "padding_side",
    "split_special_tokens",
    "truncation_side",
)
_TOKENS = (*NAMED_TOKENS, "extra_special_tokens", "additional_special_tokens")
_ADDED = ("add_bos_token", "add_eos_token")
# Arguments of transformers that ask for nothing with these values, and are refused with others.
_WITHOUT_EFFECT = {
    "sp_model_kwargs": {},
    "spaces_between_special_tokens": False,
    "trust_remote_code": False,
    "use_default_system_prompt": False,
    "use_fast": True,
}


class LlamaTokenizer(TextEncoder, TextDecoder):
    """Tokenizer of a Llama checkpoint, SentencePiece-like (Llama 1 and 2) or byte-level BPE (Llama 3).

    Encoding and decoding are safe from several threads; change settings before that. It can be copied and pickled.
    """

    is_fast = True
    name_or_path = ""
    vocab_file: str | None = None  # tokenizer.model, where the checkpoint has one

    def __init__(
        self,
        vocab_file: str | Path,
        *,
        unk_token: str | AddedToken = "<unk>",
        bos_token: str | AddedToken = "<s>",
        eos_token: str | AddedToken = "</s>",
        add_bos_token: bool = True,
        add_eos_token: bool = False,
        legacy: bool | None = None,
        add_prefix_space: bool | None = None,
        chat_template: str | Mapping[str, str] | None = None,
        **settings: Any,
    ) -> None:
        """A tokenizer of SentencePiece's file alone; `from_pretrained` reads a whole folder.

        Args:
            vocab_file: path of a tokenizer.model.
            legacy, add_prefix_space: as in `from_pretrained`.
            settings: those of `from_pretrained`.

        Raises:
            TokenizerFileError: the file cannot be read, is malformed or not supported.
            UnsupportedError: an argument is not supported, or a token is not in the file.
        """
        names = {"unk_token": str(unk_token), "bos_token": str(bos_token), "eos_token": str(eos_token)}
        added = {at: AddedToken(name, normalized=False, special=True) for at, name in enumerate(names.values())}
        backend = read_sentencepiece(Path(vocab_file), bool(legacy), add_prefix_space, added)
        added_flags = {"add_bos_token": add_bos_token, "add_eos_token": add_eos_token}
        self._start(backend, {**names, **added_flags, "legacy": bool(legacy)}, None)
        self.vocab_file = str(vocab_file)
        self.chat_template = chat_template
        self._change(settings)

    @classmethod
    def from_backend(
        cls,
        backend: Tokenizer,
        config: Mapping[str, Any] | None = None,
        chat_templates: Mapping[str, str] | None = None,
    ) -> "LlamaTokenizer":
        """A tokenizer around one of the `tokenizers` library, which is taken over: do not change it afterwards.

        Args:
            config: tokenizer_config.json's content.
            chat_templates: Jinja sources by name, usually "default".

        Raises:
            TokenizerFileError: a field of `config` has a wrong type, or the backend is not supported.
        """
        tokenizer = cls.__new__(cls)
        tokenizer._start(backend, config, chat_templates)
        return tokenizer

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        legacy: bool | None = None,
        from_slow: bool = False,
        add_prefix_space: bool | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        **settings: Any,
    ) -> "LlamaTokenizer":
        """Reads a checkpoint folder; the docstring of `files.py` says which file decides what.

        Args:
            pretrained_model_name_or_path: the folder, or a hub id `owner/name`.
            legacy: how tokenizer.model is converted: True puts "▁" before every text between special tokens, False
                only at the start. None: what tokenizer_config.json says, else False.
            from_slow: convert tokenizer.model even if there is a tokenizer.json.
            add_prefix_space: whether "▁" is put there at all; not None implies `from_slow`.
            revision, cache_dir, token, local_files_only: for hub ids, as in huggingface_hub.
            settings: what replaces the files' content: `bos_token`, `eos_token`, `unk_token`, `pad_token` and the like,
                `extra_special_tokens` (`additional_special_tokens`), each a token of the vocabulary; `add_bos_token`,
                `add_eos_token`, `clean_up_tokenization_spaces`, `model_input_names`, `model_max_length`,
                `padding_side`, `split_special_tokens`, `truncation_side`.

        Raises:
            CheckpointPathError: there is no such folder and no such hub repository.
            TokenizerFileError: the folder has no tokenizer, or a file cannot be used.
            TemplateError: `chat_template` in tokenizer_config.json has a wrong shape.
            UnsupportedError: a setting is not supported, or a token is not in the vocabulary.
        """
        folder = find_folder(
            pretrained_model_name_or_path,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            weights=False,
        )
        files = read_tokenizer_files(folder, legacy=legacy, from_slow=from_slow, add_prefix_space=add_prefix_space)
        tokenizer = cls.from_backend(files.backend, files.config, files.chat_templates)
        tokenizer.vocab_file = None if files.vocab_file is None else str(files.vocab_file)
        tokenizer.name_or_path = str(pretrained_model_name_or_path)
        tokenizer._change(settings)
        return tokenizer

    def _start(
        self, backend: Tokenizer, config: Mapping[str, Any] | None, chat_templates: Mapping[str, str] | None
    ) -> None:
        bound_patterns(backend)
        if getattr(backend.model, "dropout", None):
            raise TokenizerFileError(
                f"tokenizer.json: model.dropout is {backend.model.dropout}, which is for training: a text would have "
                "other ids each time; set it to null"
            )
        self._tokenizer = backend
        self._config = dict(config or {})
        self._chat_templates = dict(chat_templates or {})
        self._warned = set()
        backend.no_truncation()  # or long prompts would be cut without a word
        backend.no_padding()
        backend.encode_special_tokens = True  # reads: special tokens written in a text stay text
        # A file's split_special_tokens does not count: special tokens in a text are for its author to ask for.
        self.split_special_tokens = True

        self._named = named_tokens(backend, self._config)
        self._extra_special_tokens = extra_special_tokens(backend, self._config)
        self.model_max_length = model_max_length(self._config)
        self.model_input_names = model_input_names(self._config)
        self.padding_side = side(self._config, "padding_side", "left")
        self.truncation_side = side(self._config, "truncation_side", "right")
        self.clean_up_tokenization_spaces = bool(flag(self._config, "clean_up_tokenization_spaces"))
        self._backend_changed()

        self._add_bos_token = bool(flag(self._config, "add_bos_token")) and self.bos_token is not None
        self._add_eos_token = bool(flag(self._config, "add_eos_token")) and self.eos_token is not None
        # DeepSeek's tokenizer.json leaves the bos token to add_bos_token, and has a post-processor that adds nothing.
        specials = [special for _, special, _ in self._laid_out([0], None)] or [False]
        if backend.post_processor is None or (not any(specials) and (self._add_bos_token or self._add_eos_token)):
            self.update_post_processor()
        else:
            self._add_bos_token, self._add_eos_token = specials[0], specials[-1]
            for name in _ADDED:
                if self._config.get(name) not in (None, getattr(self, name)):
                    logger.warning("%s in tokenizer_config.json does not count: tokenizer.json decides", name)

    def _change(self, settings: Mapping[str, Any]) -> None:
        """Takes a caller's settings; None is the same as not given."""
        settings = {name: value for name, value in settings.items() if value is not None}
        for name, value in settings.items():
            if name in _WITHOUT_EFFECT:
                if value != _WITHOUT_EFFECT[name]:
                    raise UnsupportedError(f"{name}={value!r:.80} is not supported")
            elif name not in (*_ATTRIBUTES, *_TOKENS, *_ADDED):
                accepted = ", ".join(sorted([*_ATTRIBUTES, *_TOKENS, *_ADDED]))
                raise UnsupportedError(f"tokenizer argument {name!r:.80} is not supported; accepted are {accepted}")
            elif name in _ATTRIBUTES:
                setattr(self, name, value)
        check_side("padding_side", self.padding_side)
        check_side("truncation_side", self.truncation_side)
        check_length("model_max_length", self.model_max_length)
        self.add_special_tokens({name: settings[name] for name in _TOKENS if name in settings})
        if settings.keys() & {*_ADDED, "bos_token", "eos_token"}:
            self._add_bos_token = bool(settings.get("add_bos_token", self._add_bos_token))
            self._add_eos_token = bool(settings.get("add_eos_token", self._add_eos_token))
            self.update_post_processor()

    def save_pretrained(self, save_directory: str | Path) -> list[Path]:
        """Writes tokenizer.json, tokenizer_config.json and the chat templates; returns their paths.

        Each file is written whole or not at all. `save_vocabulary` copies tokenizer.model.

        Raises:
            TokenizerFileError: the folder or a file cannot be written.
        """
        folder = Path(save_directory)
        dropped = ("chat_template", "additional_special_tokens", *NAMED_TOKENS)
        config = {key: value for key, value in self._config.items() if key not in dropped}
        config.update(self.special_tokens_map)
        config.update({name: getattr(self, name) for name in (*_ADDED, "padding_side", "truncation_side")})
        config["clean_up_tokenization_spaces"] = self.clean_up_tokenization_spaces
        config["extra_special_tokens"] = self.extra_special_tokens
        config["model_input_names"] = self.model_input_names
        config["model_max_length"] = self.model_max_length
        # PreTrainedTokenizerFast takes tokenizer.json as it is, as we do; LlamaTokenizer would rebuild its pipeline.
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        paths = [folder / "tokenizer.json", folder / "tokenizer_config.json"]
        with translated(TokenizerFileError, f"the tokenizer could not be saved to {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            with written_whole(paths[0]) as temporary:
                self._tokenizer.save(str(temporary))
            with written_whole(paths[1]) as temporary:
                temporary.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            return paths + write_chat_templates(folder, self._chat_templates)

    def save_vocabulary(self, save_directory: str | Path, filename_prefix: str | None = None) -> tuple[str]:
        """Copies the checkpoint's tokenizer.model to `save_directory`, as `[prefix-]tokenizer.model`.

        Raises:
            TokenizerFileError: the checkpoint has none, the folder does not exist, or the copy fails.
        """
        folder = Path(save_directory)
        name = f"{filename_prefix}-tokenizer.model" if filename_prefix else "tokenizer.model"
        if self.vocab_file is None:
            raise TokenizerFileError(
                "this tokenizer has no tokenizer.model to copy; save_pretrained writes tokenizer.json, which is enough"
            )
        if not folder.is_dir() or Path(name).name != name:
            raise TokenizerFileError(
                f"cannot write {name!r:.80} to {folder}: it must be a file name, and an existing folder"
            )
        path = folder / name
        with translated(TokenizerFileError, f"{self.vocab_file} could not be copied to {path}"):
            if not path.exists() or not path.samefile(self.vocab_file):
                with written_whole(path) as temporary:
                    shutil.copyfile(self.vocab_file, temporary)
        return (str(path),)

    @property
    def backend_tokenizer(self) -> Tokenizer:
        """The tokenizer of the `tokenizers` library behind this one."""
        return self._tokenizer

    @property
    def chat_template(self) -> str | None:
        """Source of the default chat template."""
        return self._chat_templates.get("default")

    @chat_template.setter
    def chat_template(self, source: str | Mapping[str, str] | None) -> None:
        self._chat_templates = {"default": source} if isinstance(source, str) else dict(source or {})

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = False,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        parse_special_tokens: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The prompt for a conversation, or for several.

        No special token is added: where a bos token belongs the template writes it. To tokenize the returned text later
        use `encode(text, add_special_tokens=False, parse_special_tokens=True)`.

        Args:
            conversation: `{"role": ..., "content": ...}` each, oldest first; or a list of such lists.
            tools, documents: JSON schemas of functions, and texts, for templates that know them.
            chat_template: name of one of the checkpoint's templates, or a Jinja source.
            add_generation_prompt: end with the header of an assistant message.
            continue_final_message: end inside the final message, so that the model goes on writing it.
            tokenize: give ids and not text.
            padding, truncation, max_length, return_tensors: as in `tokenizer(texts)`.
            return_dict: give all columns that `tokenizer(texts)` gives, and not ids alone.
            return_assistant_tokens_mask: not supported.
            tokenizer_kwargs: `padding_side`, `pad_to_multiple_of` or `return_attention_mask` of `tokenizer(texts)`.
            parse_special_tokens: make ids also of special tokens that are written in messages, names, tools, documents
                and `kwargs`. By default only those that the template writes become ids, and whoever writes a message
                cannot end it. (transformers makes ids of all.) Added tokens that the tokenizer's files do not call
                special are ids wherever they stand.
            kwargs: further variables of the template, such as `date_string`; they win over `bos_token` and the like.

        Returns:
            The text, its ids, a tensor [num_conversations, seq_len] with `return_tensors`, or a BatchEncoding with
            `return_dict`; a list of texts or of ids for several conversations.

        Raises:
            RequestError: the messages are malformed or the template refuses them.
            TemplateError: there is no template, or it fails.
            UnsupportedError: an argument is not supported.
        """
        if return_assistant_tokens_mask:
            raise UnsupportedError("apply_chat_template(return_assistant_tokens_mask=True) is not supported")
        if add_generation_prompt and continue_final_message:
            raise RequestError("add_generation_prompt and continue_final_message exclude each other; pass one of them")
        source = choose_template(self._chat_templates, chat_template, with_tools=tools is not None)
        conversations: Sequence[Any] = conversation
        several = isinstance(conversation, list | tuple) and isinstance(next(iter(conversation), None), list | tuple)
        chats = [
            Chat(
                source,
                messages,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                documents=documents,
                variables={name: value for name, value in kwargs.items() if name not in NAMED_TOKENS},
                tokens={**self.special_tokens_map, **{name: kwargs[name] for name in NAMED_TOKENS if name in kwargs}},
            )
            for messages in (conversations if several else [conversations])
        ]
        if not tokenize:
            texts = [chat.text() for chat in chats]
            return texts if several else texts[0]
        rows = [self._chat_ids(chat, parse_special_tokens) for chat in chats]
        options = dict(tokenizer_kwargs or {})
        if unknown := options.keys() - {"padding_side", "pad_to_multiple_of", "return_attention_mask"}:
            raise UnsupportedError(f"tokenizer_kwargs: {listed(sorted(unknown))} is not supported")
        strategy, length = self._truncation(truncation, max_length, padding, options.get("pad_to_multiple_of"))
        if strategy is not None and length is not None:
            rows = [row[-length:] if self.truncation_side == "left" else row[:length] for row in rows]
        elif max_length is None:
            self._warn_of_length(max(map(len, rows)))
        one = not several and return_tensors is None
        encoding = self.pad(
            {"input_ids": rows[0] if one else rows},
            padding,
            max_length=length,
            return_tensors=return_tensors,
            **options,
        )
        return encoding if return_dict else encoding["input_ids"]

    def _chat_ids(self, chat: Chat, parse_special_tokens: bool) -> list[int]:
        prompt = chat.text()
        special = [token.content for token in self.added_tokens_decoder.values() if token.special]
        pieces = None if parse_special_tokens else pieces_of_prompt(chat, prompt, special)
        if pieces is None:
            return self.encode(prompt, add_special_tokens=False, parse_special_tokens=True, verbose=False)
        with translated(RequestError, "the prompt could not be encoded"):
            return encode_pieces(self._tokenizer, pieces)

    def __repr__(self) -> str:
        return (
            f"LlamaTokenizer(name_or_path={self.name_or_path!r}, vocab_size={self.vocab_size}, len={len(self)}, "
            f"model_max_length={self.model_max_length}, padding_side={self.padding_side!r}, "
            f"truncation_side={self.truncation_side!r}, special_tokens={self.special_tokens_map})"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_parsing_tokenizer"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._tokenizer.encode_special_tokens = True  # not a part of tokenizer.json


LlamaTokenizerFast = LlamaTokenizer  # transformers' second name of it
