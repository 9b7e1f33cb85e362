"""The requests of a certificate: always the same for a vocabulary, a tokenizer, a page, a split and a size.

short    plain ones of a few tokens, for runs in which the number of rows counts.
border   prompts as long as a page or a split, and a token more or less, with every kind of sampling.
growing  prompts that need another page while they decode, for pools that are too small.
prefix   prompts with a common beginning, one of which goes on where the text of another ended.
looping  prompts that repeat themselves, for prompt lookup.
recalled prompts that are said again behind their answers: what follows is likely what followed before.
scored   log probabilities of prompt tokens.
text     texts, where there is a tokenizer.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llama_fast.engine.sampling import GenerationDefaults, ResolvedSampling, SamplingParams
from llama_fast.model.kv_cache import PAGE_SIZE, SPLIT_SIZE
from llama_fast.model.llama import LlamaLM
from llama_fast.tokenizer import LlamaTokenizer

_SEED = 20250101
# Of one request: rows that it has alone.
MOST_SAMPLES = 3
# Models below this get the larger sets of requests on the CPU's kernels; a GPU runs them whatever the model is.
_LIGHT_BYTES = 1 << 29

_SHORT: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.9},
    {"temperature": 1.1, "top_k": 20, "top_p": 0.9},
    {"temperature": 1.3, "min_p": 0.02},
)
_EVERY: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 1.0, "n": 2},
    {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "logit_bias": "some"},
    {"temperature": 0.9, "logprobs": 2},
    {"temperature": 1.2, "top_k": 20, "top_p": 0.9},
    {"temperature": 1.4, "stop_token_ids": "a third", "min_tokens": 3},
    {"temperature": 0.7, "presence_penalty": 0.4, "logprobs": 0},
    {"temperature": 1.1, "min_p": 0.02, "repetition_penalty": 1.1, "n": 2},
)
# Samples that grow together want more pages than are kept for their request.
_GROWING: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 1.0, "n": 3},
    {"temperature": 0.9, "n": 2, "repetition_penalty": 1.2, "logprobs": 1},
    {"temperature": 1.2, "n": 3, "top_k": 20, "top_p": 0.9},
    {"temperature": 1.4, "n": 2, "stop_token_ids": "a third", "min_tokens": 3},
    {"temperature": 0.8, "n": 2, "logit_bias": "some"},
)
_TEXTS = (
    ("Once upon a time there was a little girl", {"stop": [".", "!"], "min_tokens": 2}),
    ("one two three one two three one two three one two", {"logprobs": 1}),
    ("Grüße, 你好, здравствуйте: ", {"temperature": 0.8, "top_p": 0.95}),
    (
        "def add(a, b):\n    return a + b\n\n\ndef add(a, b):\n    return",
        {"temperature": 0.7, "repetition_penalty": 1.1},
    ),
)


@dataclass(frozen=True)
class Size:
    """How much is run.

    Attributes:
        short: lengths of the short prompts.
        borders: lengths of the border prompts: pages, splits and tokens that are added up.
        growing, prefix, looping, text: how many of them.
        new_tokens: of one request; the looping ones take three times as many, the short ones at most four.
        most_rows: of the runs with every number of rows.
        mixed: runs in which everything happens at once.
        everywhere: whether paths that are not about lengths run the long prompts, too.
    """

    name: str
    short: tuple[int, ...]
    borders: tuple[tuple[int, int, int], ...]
    growing: int
    prefix: int
    looping: int
    text: int
    new_tokens: int
    most_rows: int
    mixed: int
    everywhere: bool = True


SMALL = Size(
    name="small",
    short=(1, 2, 5, 9),
    borders=((0, 1, 1),),
    growing=2,
    prefix=2,
    looping=1,
    text=1,
    new_tokens=5,
    most_rows=5,
    mixed=1,
    everywhere=False,
)
MEDIUM = Size(
    name="medium",
    short=(1, 2, 5, 9, 3, 7),
    borders=((1, 0, -1), (1, 0, 0), (1, 0, 1), (2, 0, 0), (0, 1, -2), (0, 1, 1)),
    growing=4,
    prefix=2,
    looping=2,
    text=2,
    new_tokens=8,
    most_rows=9,
    mixed=1,
)
_LARGE_BORDERS = (
    *((1, 0, -1), (1, 0, 0), (1, 0, 1), (2, 0, -1), (2, 0, 0), (2, 0, 1)),
    *((0, 1, -4), (0, 1, -1), (0, 1, 0), (0, 1, 1), (1, 1, 1)),
)
LARGE = Size(
    name="large",
    short=(1, 2, 5, 9, 3, 7, 13, 4),
    borders=_LARGE_BORDERS,
    growing=6,
    prefix=3,
    looping=3,
    text=4,
    new_tokens=12,
    most_rows=17,
    mixed=3,
)


def size_of(model: LlamaLM, backend: str, quick: bool) -> Size:
    """The size for a model on its device.

    Args:
        backend: the name of the one that runs.
    """
    if model.device.type == "cuda":
        return MEDIUM if quick else replace(LARGE, most_rows=65)
    light = sum(parameter.nbytes for parameter in model.parameters()) < _LIGHT_BYTES
    sizes = (MEDIUM, LARGE) if light and backend != "reference" else (SMALL, MEDIUM)
    return sizes[not quick]


@dataclass(frozen=True)
class Spec:
    """A request, as often as it is run.

    Attributes:
        group: see above.
        params: `SamplingParams` that leave nothing to be drawn.
        text: the prompt, if it was one.
    """

    group: str
    prompt: tuple[int, ...]
    params: SamplingParams
    text: str | None = None

    @property
    def max_len(self) -> int:
        """Tokens of prompt and answer, at most."""
        return len(self.prompt) + (self.params.max_tokens or 0)

    def grows(self, page_size: int) -> bool:
        """Whether its answer needs another page than its prompt."""
        return -(-len(self.prompt) // page_size) < -(-(self.max_len - 1) // page_size)

    @property
    def is_plain(self) -> bool:
        """Whether a decoding step of it needs neither tables of penalties and bias nor logits afterwards."""
        params = self.params
        penalizes = params.repetition_penalty or params.frequency_penalty or params.presence_penalty
        return not penalizes and not params.logit_bias and not params.min_tokens and params.logprobs is None

    def resolve(self, model: LlamaLM, **changes: Any) -> ResolvedSampling:
        """Its parameters with some changed."""
        return replace(self.params, **changes).resolve(
            GenerationDefaults(),
            model.config.eos_token_id,
            prompt_len=len(self.prompt),
            max_seq_len=self.max_len,
            vocab_size=model.config.vocab_size,
        )


@dataclass
class Requests:
    """The requests of one certificate, in their order.

    Attributes:
        continued: place of the one whose prompt is another one's text and more; made when that text is known.
    """

    size: Size
    specs: list[Spec] = field(default_factory=list)
    continued: int | None = None

    def of(self, *groups: str) -> list[int]:
        """Places of the groups' requests; of all without an argument."""
        return [place for place, spec in enumerate(self.specs) if not groups or spec.group in groups]

    def most(self) -> list[int]:
        """Places of the requests for paths that are not about lengths."""
        return self.of() if self.size.everywhere else self.of("short", "growing", "looping", "text")

    @property
    def longest(self) -> int:
        """Tokens of prompt and answer of the longest one."""
        return max(spec.max_len for spec in self.specs)

    def add_behind(self, answers: Mapping[int, Sequence[int]], context_len: int) -> list[int]:
        """Add what can be made only when answers are known; the places.

        Args:
            answers: of the requests so far, by place.
        """
        before = len(self.specs)
        ways = (("prefix", "growing"), ("recalled", "growing"), ("recalled", "looping"))
        for group, first in ways[: 3 if self.size.everywhere else 1]:
            for place in self.of(first)[:1]:
                spec = self.specs[place]
                more = spec.prompt[:3] if group == "prefix" else spec.prompt
                tokens = self.size.new_tokens * (1 if group == "prefix" else 3)
                made = Spec(group, (*spec.prompt, *answers[place], *more), _params({}, len(self.specs), tokens))
                if made.max_len <= context_len:
                    self.continued = len(self.specs) if group == "prefix" else self.continued
                    self.specs.append(made)
        return list(range(before, len(self.specs)))


def make_requests(
    model: LlamaLM,
    tokenizer: LlamaTokenizer | None,
    size: Size,
    page_size: int = PAGE_SIZE,
    split_size: int = SPLIT_SIZE,
) -> Requests:
    """The requests for a model; those that its context is too short for are left out."""
    draw = random.Random(_SEED)
    vocab_size, room = model.config.vocab_size, model.model.rotary.context_len
    requests = Requests(size)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(vocab_size) for _ in range(count))

    def add(group: str, prompt: Sequence[int], params: dict[str, Any], tokens: int, text: str | None = None) -> None:
        if 0 < len(prompt) <= room - tokens:
            made = _params(_for_vocab(params, vocab_size), len(requests.specs), tokens, ends=text is not None)
            requests.specs.append(Spec(group, tuple(prompt), made, text))

    for place, length in enumerate(size.short):
        add("short", ids(length), _SHORT[place % len(_SHORT)], min(4, size.new_tokens))
    for place, (pages, splits, more) in enumerate(size.borders):
        add("border", ids(pages * page_size + splits * split_size + more), _EVERY[place % len(_EVERY)], size.new_tokens)
    for place in range(size.growing):
        add("growing", ids(page_size - 1 - place % 3), _GROWING[place % len(_GROWING)], size.new_tokens)
    common = ids(2 * page_size)
    for place in range(size.prefix):
        pages = 1 + place % 2 if size.everywhere else 1
        prompt = (*common[: pages * page_size], *ids(2 + place))
        add("prefix", prompt, _EVERY[(3 * place) % len(_EVERY)], size.new_tokens)
    for place, prompt in enumerate(_loops(ids, size.looping)):
        # The plain ones among them guess; all say the same again sooner or later.
        add("looping", prompt, ({}, {"temperature": 0.3})[place % 2], 3 * size.new_tokens)
    add("scored", ids(24), {"prompt_logprobs": 1}, 2)
    add("scored", ids(5), {"prompt_logprobs": 0}, 0)
    if tokenizer is not None:
        for text, params in _TEXTS[: size.text]:
            add("text", tokenizer.encode(text), params, 2 * size.new_tokens, text)
    return requests


def _loops(ids: Any, count: int) -> Iterator[tuple[int, ...]]:
    for place in range(count):
        period = ids((4, 1, 7, 3)[place % 4])
        yield (period * 24)[:22]


def _for_vocab(params: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    params = dict(params)
    if params.get("stop_token_ids") == "a third":
        params["stop_token_ids"] = list(range(0, min(3 * 1024, vocab_size), 3))
    if params.get("logit_bias") == "some":
        params["logit_bias"] = {vocab_size // 3: 3.0, vocab_size // 5: -100.0}
    return params


def _params(params: dict[str, Any], place: int, tokens: int, ends: bool = False) -> SamplingParams:
    """Parameters that leave nothing to a default; `ends`: whether the model's end of a text ends it."""
    params = {"max_tokens": tokens, "seed": 1000 + place, "temperature": 0.0, "ignore_eos": not ends, **params}
    params["min_tokens"] = min(params.get("min_tokens", 0), tokens)
    return SamplingParams(**params)
