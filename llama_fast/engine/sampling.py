"""How a request is sampled: its parameters, generation_config.json beneath them, and both made concrete.

Precedence, field by field: explicit argument, then generation_config.json, then the built-in default.
Differences from Hugging Face's `generate`: top_k that nobody set is off (there 50), max_tokens that nobody set runs to
the context's end (there 20 tokens in all), and giving temperature, top_k, top_p or min_p is enough to sample (there
do_sample=True as well).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from llama_fast.engine.generation_config import GenerationDefaults
from llama_fast.engine.parameter_checks import MAX_LOGIT_BIAS, checked, id_tuple
from llama_fast.errors import MAX_NAMES, ContextLengthError, RequestError, UnsupportedError, listed

__all__ = ["MIN_TEMPERATURE", "GenerationDefaults", "ResolvedSampling", "SamplingParams"]

_T = TypeVar("_T")

# Fields of other engines' requests that would change the answer. Known here to be told "not supported".
_UNSUPPORTED = {
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_decoding_backend"),
    *("structured_outputs", "structural_tag", "response_format", "json_schema", "regex", "grammar", "ebnf"),
    *("best_of", "use_beam_search", "num_beams", "length_penalty", "early_stopping"),
    *("bad_words", "allowed_token_ids", "logits_processors", "no_repeat_ngram_size", "typical_p"),
    *("tools", "tool_choice", "functions", "function_call", "truncate_prompt_tokens", "echo", "suffix"),
}

# Below this, dividing by the temperature leaves fp32 nothing to choose from: greedy, exactly.
MIN_TEMPERATURE = 1e-5


@dataclass(frozen=True)
class SamplingParams:
    """Parameters of one request; None = unset: generation_config.json decides, then the built-in default.

    Attributes:
        n: samples per prompt, 1 to 1024 (default 1); above 1 needs sampling, greedy samples would be equal.
        max_tokens: most new tokens, from 0, which only scores the prompt. Default: max_new_tokens of
            generation_config.json, else what its max_length leaves, else to the context's end.
        min_tokens: stop ids are forbidden and stop strings ignored before this many new tokens (default 0).
        temperature: 0 to 1e4; 0 and anything below 1e-5 is greedy. Default: generation_config.json's (else 1) if its
            do_sample is true or if top_k, top_p or min_p is given here; else 0.
        top_k: draw from the k most probable tokens, ties with the k-th included; 0, -1 or at least the vocabulary is
            off (default off).
        top_p: 1e-6 to 1: draw from the most probable tokens that hold this mass; 1 is off (default 1).
        min_p: 0 to 1: drop tokens less probable than min_p times the most probable; 0 is off (default 0).
        repetition_penalty: 0.01 to 100, default 1 (off). Counts **prompt and generated** tokens, once per token id:
            a negative logit is multiplied, any other divided, as in Hugging Face.
        frequency_penalty: -2 to 2, default 0; subtracted once per occurrence among **generated** tokens only.
        presence_penalty: -2 to 2, default 0; subtracted once if the token was **generated**, prompt not counted.
        logit_bias: token id -> -100 to 100, added to the logit after the penalties; at most 16,384 entries.
        seed: 0 to 2**64 - 1. Same seed, same tokens, whatever runs beside it. Default: drawn from torch's global
            generator, so torch.manual_seed makes it repeatable.
        stop: a string or at most 16, of 1 to 1024 characters; text ends before the first that appears.
        stop_token_ids: at most 1024 ids that end the text besides eos.
        ignore_eos: go on after eos (default False); stop_token_ids still end the text.
        logprobs: 0 to 128: report the chosen token's log-probability and that many of the most probable ones, of the
            raw distribution (before penalties, bias, temperature and filters). Default: none.
        prompt_logprobs: the same for each prompt token but the first. Default: none.
        skip_special_tokens: leave special tokens out of the text (default True).
        prompt_lookup_num_tokens: 0 to 64: guess up to so many tokens from what followed the last ones before, and
            verify them at once; the same tokens, sooner where text repeats itself. Nothing is guessed with penalties,
            logit_bias or min_tokens. Default: 0, off.
        max_matching_ngram_size: 1 to 16: last tokens that must have stood in the text before (default 3; tried down to
            2).

    Raises:
        RequestError: a field is out of its range or of another type (bools are not numbers, NaN is refused).
    """

    n: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    prompt_lookup_num_tokens: int = 0
    max_matching_ngram_size: int = 3

    def __post_init__(self) -> None:
        for spec in fields(self):
            value = getattr(self, spec.name)
            if not (value is None and spec.default is None):
                # Plain int, float, tuple and dict from here on, and later changes to a caller's list have no effect.
                object.__setattr__(self, spec.name, checked(spec.name, value))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens={self.min_tokens} exceeds max_tokens={self.max_tokens}; lower min_tokens")

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> SamplingParams:
        """Parameters of a request from outside, as JSON has them: null is unset, keys of logit_bias are texts.

        Raises:
            RequestError: a field is unknown, of another type or out of range; nothing is converted or ignored.
            UnsupportedError: a field that other engines know and that would change the answer.
        """
        if not isinstance(content, Mapping):
            raise RequestError(f"sampling parameters must be an object; got {type(content).__name__}")
        # A stranger's object may have a million fields: they are looked at once, and not copied.
        if unsupported := sorted(name for name in _UNSUPPORTED if content.get(name) is not None):
            raise UnsupportedError(f"{', '.join(unsupported)}: not supported; leave the field out")
        known = {spec.name: spec for spec in fields(cls)}
        unknown: list[Any] = [name for name, value in content.items() if name not in known and value is not None]
        if unknown:
            unknown[:MAX_NAMES] = map(str, unknown[:MAX_NAMES])
            raise RequestError(f"unknown fields: {listed(unknown)}; known are {', '.join(known)}")
        given = {name: content[name] for name in known if content.get(name) is not None}
        bias = given.get("logit_bias")
        if isinstance(bias, Mapping) and len(bias) <= MAX_LOGIT_BIAS:
            given["logit_bias"] = {_token_id(key): value for key, value in bias.items()}
        return cls(**given)

    def check_vocab(self, vocab_size: int) -> None:
        """Check the token ids that the fields name.

        Raises:
            RequestError: an id of logit_bias or stop_token_ids is outside the vocabulary.
        """
        for name in ("logit_bias", "stop_token_ids"):
            for token_id in getattr(self, name) or ():
                if token_id >= vocab_size:
                    raise RequestError(f"{name} names token {token_id}; ids go from 0 to {vocab_size - 1}")

    def resolve(
        self,
        defaults: GenerationDefaults,
        config_eos_token_id: int | Sequence[int] | None,
        *,
        prompt_len: int,
        max_seq_len: int,
        vocab_size: int,
    ) -> ResolvedSampling:
        """Make every field concrete (precedence: module docstring).

        Args:
            defaults: of the model's folder.
            config_eos_token_id: config.json's eos; used if generation_config.json names none.
            prompt_len: prompt tokens.
            max_seq_len: most tokens of prompt and answer together.
            vocab_size: number of logits.

        Raises:
            RequestError: ids outside the vocabulary, n > 1 with greedy, min_tokens above the resolved max_tokens, or
                min_tokens > 0 where every token is a stop id.
            ContextLengthError: the prompt leaves no room for max_tokens, or for one token if that is unset.
        """
        self.check_vocab(vocab_size)
        temperature = self.temperature
        if temperature is None:
            samples = defaults.do_sample or any(v is not None for v in (self.top_k, self.top_p, self.min_p))
            temperature = _first(defaults.temperature, 1.0) if samples else 0.0
        greedy = temperature < MIN_TEMPERATURE
        if greedy and self.n > 1:
            raise RequestError(f"n={self.n} with greedy decoding gives {self.n} equal texts; set temperature, or n=1")
        top_k = 0 if greedy else _first(self.top_k, defaults.top_k, 0)
        # Old config.json files say -1 for "none".
        config_eos = None if config_eos_token_id == -1 else config_eos_token_id
        eos = None if self.ignore_eos else _first(defaults.eos_token_id, config_eos, ())
        end_ids = {*id_tuple("eos_token_id", eos), *(self.stop_token_ids or ())}
        # Some files name an eos that the embedding lacks: it cannot be drawn.
        stop_token_ids = frozenset(token_id for token_id in end_ids if token_id < vocab_size)
        max_tokens = self._max_tokens(defaults, prompt_len, max_seq_len)
        if self.min_tokens > max_tokens:
            raise RequestError(
                f"min_tokens={self.min_tokens} exceeds the {max_tokens} new tokens that generation_config.json or the "
                "context allow; lower min_tokens"
            )
        if self.min_tokens and len(stop_token_ids) == vocab_size:
            raise RequestError(f"min_tokens={self.min_tokens} forbids every token: all {vocab_size} are stop ids")
        return ResolvedSampling(
            n=self.n,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            temperature=0.0 if greedy else temperature,
            top_k=top_k if 0 < top_k < vocab_size else 0,
            top_p=1.0 if greedy else _first(self.top_p, defaults.top_p, 1.0),
            min_p=0.0 if greedy else _first(self.min_p, defaults.min_p, 0.0),
            repetition_penalty=_first(self.repetition_penalty, defaults.repetition_penalty, 1.0),
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            logit_bias=self.logit_bias or {},
            # Greedy takes nothing from torch's generator.
            seed=self.seed if self.seed is not None else 0 if greedy else _draw_seed(),
            stop=tuple(self.stop or ()),
            stop_token_ids=stop_token_ids,
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
            skip_special_tokens=self.skip_special_tokens,
            prompt_lookup_num_tokens=self.prompt_lookup_num_tokens,
            max_matching_ngram_size=self.max_matching_ngram_size,
        )

    def _max_tokens(self, defaults: GenerationDefaults, prompt_len: int, max_seq_len: int) -> int:
        room = max_seq_len - prompt_len
        if self.max_tokens is not None:
            if self.max_tokens > room:
                raise ContextLengthError(
                    f"{prompt_len} prompt tokens + max_tokens={self.max_tokens} exceed the context of {max_seq_len}; "
                    "shorten the prompt or lower max_tokens"
                )
            return self.max_tokens
        if defaults.max_new_tokens is not None:
            room = min(room, defaults.max_new_tokens)
        elif defaults.max_length is not None:
            room = min(room, defaults.max_length - prompt_len)
        if room < 1:
            raise ContextLengthError(
                f"{prompt_len} prompt tokens leave no room for a new one: the context holds {max_seq_len}, "
                f"generation_config.json has max_length={defaults.max_length}, max_new_tokens="
                f"{defaults.max_new_tokens}; shorten the prompt or set max_tokens (0 only scores the prompt)"
            )
        return room


@dataclass(frozen=True)
class ResolvedSampling:
    """Sampling parameters with every field concrete; meanings and ranges as `SamplingParams`.

    temperature 0 is greedy; top_k 0, top_p 1, min_p 0 are off; stop_token_ids holds eos unless it is ignored.
    """

    n: int
    max_tokens: int
    min_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    logit_bias: Mapping[int, float]
    seed: int
    stop: tuple[str, ...]
    stop_token_ids: frozenset[int]
    logprobs: int | None
    prompt_logprobs: int | None
    skip_special_tokens: bool
    prompt_lookup_num_tokens: int = 0
    max_matching_ngram_size: int = 3

    @property
    def penalizes(self) -> bool:
        """Whether tokens of the prompt and of the answer so far count."""
        return self.repetition_penalty != 1.0 or bool(self.frequency_penalty or self.presence_penalty)


def _token_id(key: Any) -> Any:
    """A JSON object's key as an id if it is one's decimal digits, else as it is, for `checked` to refuse."""
    return int(key) if isinstance(key, str) and re.fullmatch(r"0|[1-9][0-9]{0,9}", key) else key


def _first(*values: _T | None) -> _T:
    """The first value that is set; the last always is."""
    return next(value for value in values if value is not None)


def _draw_seed() -> int:
    """64 bits from torch's global generator."""
    import torch  # here, so that checking parameters (a CLI's usage errors) does not wait for it

    return int(torch.empty((), dtype=torch.int64, device="cpu").random_(-(2**63), None)) % 2**64
