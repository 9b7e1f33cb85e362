"""Requests of many lengths: drawn from a seed, and what all of them have to read and to multiply."""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from typing import Any, Self

from serving_bounds import Work, decode_kv_bytes, decode_weight_bytes, decode_work, prefill_flops, prefill_work


@dataclass(frozen=True)
class Mix:
    """Lengths of prompts and outputs: the least and the most, uniform between them."""

    prompt_lens: tuple[int, int]
    output_lens: tuple[int, int]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Of "32-512/16-128"."""
        ranges = [part.split("-") for part in text.split("/")]
        if [len(ends) for ends in ranges] == [2, 2] and all(end.isdecimal() for ends in ranges for end in ends):
            (low, high), (short, long) = ((int(a), int(b)) for a, b in ranges)
            if 1 <= low <= high and 2 <= short <= long:
                return cls((low, high), (short, long))
        raise argparse.ArgumentTypeError(
            f"{text!r} is not prompts/outputs like 32-512/16-128, of 1 and 2 tokens at least"
        )

    def __str__(self) -> str:
        return "/".join(f"{low}-{high}" for low, high in (self.prompt_lens, self.output_lens))

    @property
    def longest(self) -> int:
        """Tokens that the longest request may have."""
        return self.prompt_lens[1] + self.output_lens[1]


# The second for models that are made for 512 tokens.
MIXES = [Mix((32, 512), (16, 128)), Mix((32, 256), (16, 128))]


@dataclass(frozen=True)
class Requests:
    """Prompts, and how many tokens to generate for each."""

    prompts: list[list[int]]
    output_lens: list[int]

    @classmethod
    def draw(cls, mix: Mix, count: int, vocab_size: int, seed: int) -> Self:
        """From the seed; more of them begin with the same ones."""
        source = random.Random(seed)
        prompts, output_lens = [], []
        for _ in range(count):
            length = source.randint(*mix.prompt_lens)
            output_lens.append(source.randint(*mix.output_lens))
            prompts.append([source.randrange(vocab_size) for _ in range(length)])
        return cls(prompts, output_lens)

    def first(self, count: int) -> Requests:
        return Requests(self.prompts[:count], self.output_lens[:count])

    @property
    def prompt_lens(self) -> list[int]:
        return list(map(len, self.prompts))

    @property
    def prompt_tokens(self) -> int:
        return sum(self.prompt_lens)

    @property
    def generated(self) -> int:
        return sum(self.output_lens)

    @property
    def decoded(self) -> int:
        """Tokens that a decoding step gives: all but each request's first."""
        return self.generated - len(self.prompts)

    @property
    def longest(self) -> int:
        return max(a + b for a, b in zip(self.prompt_lens, self.output_lens, strict=True))

    @property
    def attended(self) -> float:
        """Mean over all prompt tokens of what they attend to."""
        return sum(length * (length + 1) / 2 for length in self.prompt_lens) / self.prompt_tokens

    @property
    def context(self) -> float:
        """Mean over all decoded tokens of what they attend to: the tokens up to the one that the step runs."""
        pairs = zip(self.prompt_lens, self.output_lens, strict=True)
        return sum((length - 1) * (prompt_len + length / 2) for prompt_len, length in pairs) / self.decoded


def phases(model: Any, requests: Requests, places: int) -> dict[str, Work]:
    """What has to be read and multiplied, in parts that cannot be done at once."""
    decode = decode_work(model, requests.decoded, requests.context)
    weights, lengths = decode_weight_bytes(model), requests.prompt_lens
    if places == 1:
        prompts = sum((prefill_work(model, 1, length) for length in lengths), Work(0, 0))
        return {"prompts": prompts, "decoding": decode + Work((requests.decoded - 1) * weights, 0)}
    # The first step has no token to decode yet.
    num_steps = 1 + max(requests.decoded / min(places, len(lengths)), max(requests.output_lens) - 1)
    written = decode_kv_bytes(model, 1, requests.prompt_tokens)
    prompts = Work(written, sum(prefill_flops(model, 1, length) for length in lengths))
    return {"prompts and decoding": prompts + decode + Work((num_steps - 1) * weights, 0)}


def shortened(requests: Requests, places: int, most_prompt: int, most_output: int) -> list[tuple[list[int], int]]:
    """Enough of the requests to fill places anew, with lengths in proportion: prompts, and tokens to generate."""
    some = requests.first(places + places // 2 + 1)
    prompt_scale = min(1.0, most_prompt / max(some.prompt_lens))
    output_scale = min(1.0, most_output / max(some.output_lens))
    return [
        (prompt[: max(1, int(prompt_scale * len(prompt)))], max(2, int(output_scale * length)))
        for prompt, length in zip(some.prompts, some.output_lens, strict=True)
    ]
