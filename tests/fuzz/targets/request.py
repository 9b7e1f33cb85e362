"""Prompts and sampling parameters, run beside a request whose tokens are known: they must not change."""

import math
import random
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llama_fast.engine.llm import LLM
from llama_fast.engine.sampling import SamplingParams
from llama_fast.errors import RequestError, UnsupportedError
from tests.bad_inputs.harness import check
from tests.byte_model import save_byte_model
from tests.fuzz.mutate import CONTAINERS, NUMBERS, STRINGS, mutate_document
from tests.fuzz.target import Target as Base

_VOCAB_SIZE = 258
_MAX_SEQ_LEN = 64
_VALID: dict[str, tuple[Any, ...]] = {
    "n": (1, 1, 2, 3),
    "max_tokens": (0, 1, 2, 4),
    "min_tokens": (0, 1, 2),
    "temperature": (0.0, 0, 1e-6, 1e-5, 0.7, 1, 1e4),
    "top_k": (0, -1, 1, 5, 257, 258, 10**9),
    "top_p": (1e-6, 0.5, 0.9, 1, 1.0),
    "min_p": (0.0, 0.1, 1.0),
    "repetition_penalty": (0.01, 0.5, 1.0, 1.3, 100),
    "frequency_penalty": (-2.0, 0.5, 2),
    "presence_penalty": (-2.0, 0.5, 2),
    "logit_bias": ({}, {5: 100.0}, {257: -100, 3: 1.5}, dict.fromkeys(range(258), -100.0)),
    "seed": (0, 1, 2**64 - 1),
    "stop": ("a", ["b", "é"], [], "\ufffd"),
    "stop_token_ids": ([], [257], [0, 1, 2], list(range(258))),
    "ignore_eos": (True, False),
    "logprobs": (0, 1, 5, 128),
    "prompt_logprobs": (0, 2),
    "skip_special_tokens": (True, False),
}
_ARRAYS = (
    *(np.float32(0.5), np.int64(2), np.array(2), np.array([1, 2]), np.array([[1], [2]]), np.array([1.5])),
    *(np.float64("nan"), np.array([], dtype=np.int64), np.array(["a"]), [np.int64(5)], [np.float32(5)]),
    *(torch.tensor(2), torch.tensor([1, 2]), torch.tensor([[1, 2]]), torch.tensor([]), torch.tensor([1.5])),
)
_ALSO = (
    *_ARRAYS,
    *(float("nan"), float("inf"), -float("inf"), 1e-45, 1e9, 2**63, -1, 2**64, 10**400, "5", "nan", 1j, b"5", object()),
    *({5: float("nan")}, {-1: 1.0}, {258: 1.0}, {"5": 1.0}, {5.0: 1}, {True: 1}, {2**70: 1}, {5: "1"}, {5: 101}),
    *(["a"] * 17, ["a"] * 10**5, [""], ["x" * 1025], "", ["\ud800"], [7], [[1]], list(range(2000)), [1.5], [None]),
)
_KEYS = {**_VALID, "logit_bias": (*_VALID["logit_bias"], dict.fromkeys(range(10**5), 0.0))}
_PROMPTS = (
    *_ARRAYS,
    *("", "a", "Hello", "é\U0001f917", "\0", "\ud800", "x" * 61, "x" * 63, "x" * 64, "x" * 5000, "<s></s>", "\x1b[2J"),
    *([1], [256, 5, 7], [257], [], [-1], [258], [2**63], [2**70], [1.0], [True], ["a"], [[1]], [None], [1, "a"]),
    *([5] * 62, [5] * 63, [5] * 64, [5] * 10**5, (1, 2), range(3), {1, 2}, {1: 2}, None, 5, 1.5, b"abc", object()),
)


class Target(Base):
    refusals = (RequestError, UnsupportedError)

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self._llm = LLM(save_byte_model(Path(folder)), max_seq_len=_MAX_SEQ_LEN, max_batch=4, page_size=16)
        self._golden = SamplingParams(max_tokens=2, temperature=0.9, seed=7)
        self._golden_ids = self._llm.generate("golden", self._golden)[0].outputs[0].token_ids

    def make(self, rng: random.Random) -> tuple[Any, dict[str, Any], bool]:
        """A prompt, fields of SamplingParams, and whether it is streamed as well."""
        params = {name: rng.choice(values) for name, values in _VALID.items() if rng.random() < 0.2}
        params.setdefault("max_tokens", rng.choice((1, 1, 2)))
        if params.get("n", 1) > 1:
            params.setdefault("temperature", 0.8)
        if rng.random() < 0.5:
            params = mutate_document(rng, params, also=_ALSO, keys=_KEYS, raw=False)
        prompt = "Hello" if rng.random() < 0.4 else rng.choice(_PROMPTS)
        if rng.random() < 0.1:
            prompt = mutate_document(rng, [256, 5, 7, 9], also=(*_ALSO, *NUMBERS, *STRINGS, *CONTAINERS), raw=False)
        # Other names are Python's to refuse.
        known = {field.name for field in fields(SamplingParams)}
        named = {name: value for name, value in params.items() if name in known} if isinstance(params, dict) else {}
        return prompt, named, rng.random() < 0.2

    def run(self, value: tuple[Any, dict[str, Any], bool], folder: Path) -> None:
        prompt, named, streamed = value
        torch.manual_seed(0)  # a request without a seed draws it there
        params = SamplingParams(**named)
        outputs = self._llm.generate([prompt, "golden"], [params, self._golden], use_tqdm=False)
        check(outputs[1].outputs[0].token_ids == self._golden_ids, "the request beside it has other tokens than alone")
        allocator, cache = self._llm.engine.scheduler.allocator, self._llm.engine.cache
        check(allocator.num_free == cache.num_pages, f"{cache.num_pages - allocator.num_free} pages are not free")
        check(outputs[0].error is None, f"failed: {outputs[0].error!r}")
        check(len(outputs[0].outputs) == params.n, f"{len(outputs[0].outputs)} samples instead of {params.n}")
        for one in outputs[0].outputs:
            check(one.finish_reason in ("stop", "length"), f"finish_reason {one.finish_reason!r}")
            check(all(0 <= token_id < _VOCAB_SIZE for token_id in one.token_ids), f"tokens {one.token_ids}")
            limit = _MAX_SEQ_LEN if params.max_tokens is None else params.max_tokens
            check(params.min_tokens <= len(one.token_ids) <= limit, f"{len(one.token_ids)} tokens for {params}")
            for position in one.logprobs or ():
                for token_id, entry in position.items():
                    check(0 <= token_id < _VOCAB_SIZE, f"logprob of token {token_id}")
                    check(math.isfinite(entry.logprob) and entry.logprob <= 0, f"logprob {entry.logprob}")
            for stop in params.stop or ():
                check(
                    stop not in one.text or params.min_tokens, f"the text {one.text!r} holds the stop string {stop!r}"
                )
        if streamed:
            self._check_stream(prompt, params, outputs[0].outputs)

    def _check_stream(self, prompt: Any, params: SamplingParams, samples: Any) -> None:
        torch.manual_seed(0)
        texts, ids = [""] * params.n, [[] for _ in range(params.n)]
        for chunk in self._llm.stream([prompt], params):
            texts[chunk.index] += chunk.text
            ids[chunk.index] += chunk.token_ids
        check(ids == [one.token_ids for one in samples], "streamed, other tokens than at once")
        check(texts == [one.text for one in samples], f"streamed as {texts}, at once {[one.text for one in samples]}")
