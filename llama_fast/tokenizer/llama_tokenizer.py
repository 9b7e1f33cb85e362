"""Text to token ids and back: a checkpoint's tokenizer.json through the `tokenizers` library.

Which file decides what:
    tokenizer.json          the tokenizer itself, taken as it is: pipeline, vocabulary, and the special tokens its
                            post-processor adds. Truncation and padding stored in it are switched off.
    tokenizer_config.json   names bos, eos, unk and pad; model_max_length, clean_up_tokenization_spaces, chat_template.
                            add_bos_token and add_eos_token count only when tokenizer.json has no post-processor.
    special_tokens_map.json names the same four tokens in older checkpoints: it is read, and wins, only where
                            tokenizer_config.json has no added_tokens_decoder (Hugging Face's rule).
    chat_template.jinja     wins over chat_template of tokenizer_config.json.
A token named by a side file is special even if tokenizer.json does not say so; one that tokenizer.json does not contain
is logged and counts as unset, since a new id would have no row in the model's embedding.
"""

import functools
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from llama_fast.errors import RequestError, TokenizerFileError
from llama_fast.tokenizer.chat_template import choose_template, read_chat_templates, render_chat, write_chat_templates
from llama_fast.tokenizer.token_stream import CLEAN_UP, TokenStream, checked_id, translated

__all__ = ["LlamaTokenizer"]

logger = logging.getLogger(__name__)

_NO_LIMIT = int(1e30)  # Hugging Face's model_max_length where none is given


class LlamaTokenizer:
    """Tokenizer of a Llama checkpoint, SentencePiece-like (Llama 1 and 2) or byte-level BPE (Llama 3).

    Safe to use from several threads. `backend` is taken over: do not change it afterwards.
    """

    def __init__(
        self,
        backend: Tokenizer,
        config: Mapping[str, Any] | None = None,
        chat_templates: Mapping[str, str] | None = None,
    ) -> None:
        """`config` is tokenizer_config.json's content; `chat_templates` are Jinja sources by name, usually "default".

        Raises:
            TokenizerFileError: a field of `config` has a wrong type.
        """
        self._tokenizer = backend
        self._config = dict(config or {})
        self._chat_templates = dict(chat_templates or {})
        backend.no_truncation()  # or long prompts would be cut without a word
        backend.no_padding()
        backend.encode_special_tokens = True  # reads: special tokens written in a text stay text

        self.bos_token, self.bos_token_id = self._named_token("bos_token")
        self.eos_token, self.eos_token_id = self._named_token("eos_token")
        self.unk_token, self.unk_token_id = self._named_token("unk_token")
        self.pad_token, self.pad_token_id = self._named_token("pad_token")
        self.special_token_ids = frozenset(
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        )
        if backend.post_processor is None:
            self._add_post_processor()
        self.model_max_length = self._model_max_length()
        # The flag was made for WordPiece. Llama 3 checkpoints set it, but in BPE it deletes genuine spaces.
        self._clean_up = bool(self._config.get("clean_up_tokenization_spaces")) and not isinstance(backend.model, BPE)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "LlamaTokenizer":
        """Reads a checkpoint folder; the module's docstring says which file decides what.

        Raises:
            TokenizerFileError: tokenizer.json is missing or a file cannot be used.
            TemplateError: `chat_template` in tokenizer_config.json has a wrong shape.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise TokenizerFileError(_no_tokenizer_json(folder))
        config = _read_json_object(folder / "tokenizer_config.json")
        if "added_tokens_decoder" not in config:
            config.update(_read_json_object(folder / "special_tokens_map.json"))
        with translated(TokenizerFileError, f"{path} cannot be loaded; download or convert it again"):
            backend = Tokenizer.from_buffer(path.read_bytes())
        return cls(backend, config, read_chat_templates(folder, config))

    def save_pretrained(self, folder: str | Path) -> list[Path]:
        """Writes tokenizer.json, tokenizer_config.json and the chat templates; returns their paths.

        Raises:
            TokenizerFileError: the folder or a file cannot be written.
        """
        folder = Path(folder)
        config = {key: value for key, value in self._config.items() if key != "chat_template"}
        # PreTrainedTokenizerFast takes tokenizer.json as it is, as we do; LlamaTokenizer would rebuild its pipeline.
        config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        paths = [folder / "tokenizer.json", folder / "tokenizer_config.json"]
        with translated(TokenizerFileError, f"the tokenizer could not be saved to {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            self._tokenizer.save(str(paths[0]))
            paths[1].write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            return paths + write_chat_templates(folder, self._chat_templates)

    def __len__(self) -> int:
        """Number of tokens, added tokens included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def vocab_size(self) -> int:
        """Number of tokens of the BPE model alone, without added tokens."""
        return self._tokenizer.get_vocab_size(with_added_tokens=False)

    @property
    def chat_template(self) -> str | None:
        """Source of the default chat template."""
        return self._chat_templates.get("default")

    def encode(self, text: str, add_special_tokens: bool = True, parse_special_tokens: bool = False) -> list[int]:
        """Token ids of `text`.

        Args:
            text: any Unicode text.
            add_special_tokens: add what the tokenizer puts around a text, for Llama the bos token.
            parse_special_tokens: turn special tokens written in the text into their ids, which a prompt rendered from
                a chat template needs and text from strangers must not get. If the text itself starts with the bos
                token then no second one is added.

        Raises:
            RequestError: `text` is not a string, holds a lone surrogate, or makes the tokenizer fail.
        """
        if not isinstance(text, str):
            raise RequestError(f"text must be a string; got {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as cause:
            raise RequestError(
                f"text[{cause.start}] is the lone surrogate U+{ord(text[cause.start]):04X}, which is no character; "
                'remove it or decode the text with errors="replace"'
            ) from cause
        tokenizer = self._parsing_tokenizer if parse_special_tokens else self._tokenizer
        with translated(RequestError, "the text could not be encoded"):
            encoding = tokenizer.encode(text, add_special_tokens=add_special_tokens)
        ids = encoding.ids
        if parse_special_tokens:
            mask = encoding.special_tokens_mask  # 1 where the post-processor added the token
            num_added = mask.index(0) if 0 in mask else 0
            if num_added and ids[:num_added] == ids[num_added : 2 * num_added]:
                return ids[num_added:]
        return ids

    def decode(
        self,
        ids: int | Iterable[int],
        skip_special_tokens: bool = True,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> str:
        """Text of `ids` (one id, a sequence, or a 1-D array or tensor).

        An id that the tokenizer does not know gives no text: a model's embedding may have more rows than the
        tokenizer has tokens.

        Args:
            skip_special_tokens: leave special tokens out.
            clean_up_tokenization_spaces: remove spaces before punctuation, which can corrupt text. None: what
                tokenizer_config.json says, except that for BPE it is off.

        Raises:
            RequestError: an id is not an integer in [0, 2**32).
        """
        values = ids.tolist() if hasattr(ids, "tolist") else ids
        values = values if isinstance(values, Iterable) else [values]
        checked = [checked_id(value, index) for index, value in enumerate(values)]
        if skip_special_tokens:
            # By id, not by the library's flag: that compares text and misses special tokens stored as "normalized".
            checked = [token_id for token_id in checked if token_id not in self.special_token_ids]
        with translated(RequestError, "the ids could not be decoded"):
            text = self._tokenizer.decode(checked, skip_special_tokens=False)
        if self._clean_up if clean_up_tokenization_spaces is None else clean_up_tokenization_spaces:
            for pattern, replacement in CLEAN_UP:
                text = text.replace(pattern, replacement)
        return text

    def stream(self, skip_special_tokens: bool = True, clean_up_tokenization_spaces: bool | None = None) -> TokenStream:
        """Decodes ids one at a time; the arguments are those of `decode`."""
        clean_up = self._clean_up if clean_up_tokenization_spaces is None else clean_up_tokenization_spaces
        return TokenStream(self._tokenizer, self.special_token_ids if skip_special_tokens else frozenset(), clean_up)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool | None = None,
        tokenize: bool = False,
        chat_template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str | list[int]:
        """The prompt for a conversation: text, or ids with `tokenize`.

        Special tokens in the rendered prompt become ids wherever they stand, in messages too, and none is added: where
        a bos token belongs the template writes it. To tokenize the returned text later use
        `encode(text, add_special_tokens=False, parse_special_tokens=True)`.

        Args:
            messages: `{"role": ..., "content": ...}` each, oldest first.
            add_generation_prompt: end with the header of an assistant message. None: unless `continue_final_message`.
            chat_template: name of one of the checkpoint's templates, or a Jinja source.
            tools, documents: JSON schemas of functions, and texts, for templates that know them.
            continue_final_message: end inside the final message, so that the model goes on writing it.
            kwargs: further variables of the template, such as `date_string`; they win over `bos_token` and the like.

        Raises:
            RequestError: the messages are malformed or the template refuses them.
            TemplateError: there is no template, or it fails.
        """
        if add_generation_prompt and continue_final_message:
            raise RequestError("add_generation_prompt and continue_final_message exclude each other; pass one of them")
        named = {name: getattr(self, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
        prompt = render_chat(
            choose_template(self._chat_templates, chat_template, with_tools=tools is not None),
            messages,
            add_generation_prompt=not continue_final_message
            if add_generation_prompt is None
            else add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            documents=documents,
            variables={**{name: token for name, token in named.items() if token is not None}, **kwargs},
        )
        return self.encode(prompt, add_special_tokens=False, parse_special_tokens=True) if tokenize else prompt

    @functools.cached_property
    def _parsing_tokenizer(self) -> Tokenizer:
        # A second tokenizer and not a switch of the first: another thread may be encoding.
        twin = Tokenizer.from_str(self._tokenizer.to_str())
        twin.encode_special_tokens = False
        return twin

    def _named_token(self, name: str) -> tuple[str | None, int | None]:
        entry = self._config.get(name)
        token = entry.get("content") if isinstance(entry, Mapping) else entry
        if token is None and not isinstance(entry, Mapping):
            return None, None
        if not isinstance(token, str):
            raise TokenizerFileError(f'{name} must be a string, {{"content": string}} or null; got {entry!r:.80}')
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            logger.warning("%s %r is not in tokenizer.json and counts as unset", name, token)
            return None, None
        known = self._tokenizer.get_added_tokens_decoder().get(token_id)
        if known is None or not known.special:
            self._tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        return token, token_id

    def _add_post_processor(self) -> None:
        bos = self.bos_token if self._config.get("add_bos_token") else None
        eos = self.eos_token if self._config.get("add_eos_token") else None
        special = [(token, self._tokenizer.token_to_id(token)) for token in (bos, eos) if token is not None]
        if special:
            first = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
            second = [f"{piece}:1".replace("$A", "$B") for piece in first]
            with translated(TokenizerFileError, f"no post-processor can be made of {first}"):
                self._tokenizer.post_processor = TemplateProcessing(first, [*first, *second], special)

    def _model_max_length(self) -> int:
        value = self._config.get("model_max_length")
        if value is None:
            return _NO_LIMIT
        if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value < float("inf"):
            raise TokenizerFileError(f"model_max_length must be a positive number; got {value!r:.80}")
        return int(value)


def _no_tokenizer_json(folder: Path) -> str:
    if (folder / "tokenizer.model").is_file():
        return (
            f"{folder} has tokenizer.model but no tokenizer.json, and SentencePiece files are not read yet; convert it "
            'once: python -c "from transformers import AutoTokenizer as T; '
            f"T.from_pretrained('{folder}').save_pretrained('{folder}')\""
        )
    return f"{folder} has no tokenizer.json; download the whole checkpoint, or copy tokenizer.json into this folder"


def _read_json_object(path: Path) -> dict[str, Any]:
    """The object in `path`; {} if there is no such file."""
    if not path.is_file():
        return {}
    with translated(TokenizerFileError, f"{path} is not valid JSON"):
        content = json.loads(path.read_bytes())
    if not isinstance(content, dict):
        raise TokenizerFileError(f"{path} must hold a JSON object; got {type(content).__name__}")
    return content
