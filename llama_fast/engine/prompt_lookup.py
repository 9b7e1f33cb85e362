"""Guesses at what comes next: what followed the last tokens when they stood in the text before. No torch here.

A guess is verified by the model, so it changes how fast tokens come and never which. Text that repeats itself (a
summary, an edited file, a list) is often guessed right for many tokens; for other text hardly anything is guessed.

Source: prompt lookup decoding, https://github.com/apoorvumang/prompt-lookup-decoding; speculative decoding,
arXiv:2211.17192. Here the drawn token is compared, not its distribution: draws are keyed by position, so that the token
at a place is the same however many are verified at once.
"""

from __future__ import annotations

from collections.abc import Sequence

# Tokens without a guess after one that was wrong from its first token: one more with each in a row, up to this.
_LONGEST_PAUSE = 32


class PromptLookup:
    """Guesses for one growing sequence.

    Args:
        token_ids: prompt and generated ids; grows elsewhere.
        most: tokens of a guess, at most.
        ngram: tokens that must have stood there before, tried from this many down to 2.
    """

    def __init__(self, token_ids: Sequence[int], most: int, ngram: int) -> None:
        self._token_ids, self._most = token_ids, most
        self._sizes = range(ngram, min(2, ngram) - 1, -1)
        # For each size: tokens -> the place behind their last occurrence.
        self._places: dict[int, dict[tuple[int, ...], int]] = {size: {} for size in self._sizes}
        self._seen = 0
        self._length = min(most, 4)
        self._pause = self._paused_until = 0

    def guess(self, most: int) -> list[int]:
        """Up to `most` tokens that may follow; often none."""
        ids, count = self._token_ids, len(self._token_ids)
        self._index()
        if count < self._paused_until:
            return []
        for size in self._sizes:
            place = self._places[size].get(tuple(ids[count - size :])) if count > size else None
            if place is not None:
                # Beyond the end it goes on as it would if the text from there repeated itself.
                period = count - place
                return [ids[place + index % period] for index in range(min(most, self._length))]
        return []

    def _index(self) -> None:
        """Note the tokens before every place that a token stands at."""
        ids, count = self._token_ids, len(self._token_ids)
        for size, places in self._places.items():
            for place in range(max(size, self._seen), count):
                places[tuple(ids[place - size : place])] = place
        self._seen = count

    def verified(self, guessed: int, right: int) -> None:
        """So many tokens were guessed, so many of them rightly: longer or shorter guesses follow."""
        if right == guessed:
            self._length = min(self._most, 2 * self._length)
        elif 2 * right < guessed:
            self._length = max(1, self._length // 2)
        self._pause = 0 if right else min(_LONGEST_PAUSE, 2 * self._pause + 1)
        self._paused_until = len(self._token_ids) + self._pause
