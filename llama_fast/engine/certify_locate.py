"""Where two ways to an answer first differ: the request, the token, the layer and the op."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, replace

from llama_fast.engine.certify_runner import NotTaken, Outcome, Run, Runner, Runs
from llama_fast.engine.certify_watch import ORDER, Trace

_FAR = 1e30
_LOGITS, _TOKEN, _LOGPROBS, _PROMPT_LOGPROBS = "logits", "token", "log probabilities", "prompt log probabilities"


@dataclass(frozen=True)
class Difference:
    """What differs first in what a request ended with.

    Attributes:
        sample: of the request.
        token: which of its tokens; of its prompt for prompt_logprobs; None where it is no token.
        what: "logits", "token", "log probabilities", ...
    """

    sample: int
    token: int | None
    what: str


@dataclass(frozen=True)
class Location:
    """Where a path left the baseline.

    Attributes:
        run: which of the path's.
        request: place in the certificate's list.
        about: its group and length.
        sample, token, what: as in Difference.
        layer: None where no layer's op is meant.
        op: the first whose output differs; None where running again did not show it.
        at: the token for which it differs: "prompt token 5" or "generated token 2", from 0.
        logits_off_by: the largest difference of a logit of `token`; None where it is not known.
        note: what else is known.
    """

    run: str
    request: int
    about: str
    sample: int
    token: int | None
    what: str
    layer: int | None = None
    op: str | None = None
    at: str | None = None
    logits_off_by: float | None = None
    note: str = ""

    def __str__(self) -> str:
        where = f"{self.run}: " if self.run else ""
        where += f"request {self.request} ({self.about})" + (f", sample {self.sample}" if self.sample else "")
        token = "" if self.token is None else f" of token {self.token}"
        told = f"{where}: {self.what}{token}"
        if self.op is not None:
            layer = "" if self.layer is None else f"layer {self.layer}, "
            told += f"; the first op is {layer}{self.op}" + (f", at {self.at}" if self.at else "")
        if self.logits_off_by is not None:
            told += f"; logits off by {self.logits_off_by:.3g}"
        return told + (f" ({self.note})" if self.note else "")


def first_difference(expected: Outcome, found: Outcome) -> Difference | None:
    """What differs first; None if all is the same, bit for bit."""
    if found.error != expected.error:
        return Difference(0, None, f"error: {found.error}")
    if found.prompt_logprobs != expected.prompt_logprobs:
        pairs = enumerate(zip(found.prompt_logprobs or [], expected.prompt_logprobs or [], strict=False))
        place = next((place for place, (one, other) in pairs if one != other), None)
        return Difference(0, place, _PROMPT_LOGPROBS)
    for index, (one, other) in enumerate(zip(found.samples, expected.samples, strict=True)):
        for place in range(max(one.draws, other.draws)):
            known = None not in (one.digests, other.digests)
            if known and (one.digests or ())[place : place + 1] != (other.digests or ())[place : place + 1]:
                return Difference(index, place, _LOGITS)
            if one.token_ids[place : place + 1] != other.token_ids[place : place + 1]:
                return Difference(index, place, _TOKEN)
            if (one.logprobs or [])[place : place + 1] != (other.logprobs or [])[place : place + 1]:
                return Difference(index, place, _LOGPROBS)
        for what in ("finish_reason", "stop_reason", "text"):
            if getattr(one, what) != getattr(other, what):
                return Difference(index, None, what)
    return None


def place_of(runner: Runner, run: Run, position: int, found: Difference) -> Location:
    """The location as far as it is known without running anything again; arguments as of `locate`."""
    place = run.group.places[position]
    spec = runner.requests.specs[place]
    about = f"{spec.group}, prompt of {len(spec.prompt)}"
    return Location(run.label, place, about, found.sample, found.token, found.what)


def locate(runner: Runner, function: Callable[[Runner], Runs], run: Run, position: int, found: Difference) -> Location:
    """Run both ways again with every op looked at.

    Args:
        function: the path's.
        run, position: in which of its runs, and which request of that.
        found: what differs there.
    """
    place, known = run.group.places[position], place_of(runner, run, position, found)
    if found.what in (_TOKEN, _LOGPROBS) and run.outcomes[position].samples[found.sample].digests is not None:
        # The logits are the same.
        return replace(known, op="sample" if found.what == _TOKEN else "log_probs")
    if found.token is None:
        return known
    ways = ((lambda r: r.alone([place]), 0, 0), (function, run.group.number, position))
    alone, other = (_traced(runner, way, Trace(number, at, found.sample)) for way, number, at in ways)
    prompt_len = len(runner.requests.specs[place].prompt)
    last = found.token if found.what == _PROMPT_LOGPROBS else prompt_len - 1 + found.token
    off_by = _distance(alone, other, found)
    for slot in sorted(alone.digests.keys() & other.digests.keys()):
        if slot > last:
            break
        for layer, op in sorted(alone.digests[slot].keys() & other.digests[slot].keys(), key=_order):
            if alone.digests[slot][layer, op] != other.digests[slot][layer, op]:
                at = f"prompt token {slot}" if slot < prompt_len else f"generated token {slot - prompt_len}"
                return replace(known, layer=layer, op=op, at=at, logits_off_by=off_by)
    if off_by:
        return replace(known, op="norm_lm_head", logits_off_by=off_by)
    alone, other = (_traced(runner, way, Trace(number, at, found.sample, ops=False)) for way, number, at in ways)
    note = "the same where ops are called one by one and nothing is captured"
    return replace(known, logits_off_by=_distance(alone, other, found), note=note)


def _distance(alone: Trace, other: Trace, found: Difference) -> float | None:
    """The largest difference of the logits, if these differ."""
    if found.what != _LOGITS or found.token not in alone.logits.keys() & other.logits.keys():
        return None
    distance = (alone.logits[found.token] - other.logits[found.token]).abs()
    # What is not finite has no place in JSON.
    return float(distance.nan_to_num(_FAR).clamp(max=_FAR).max())


def _order(key: tuple[int, str]) -> tuple[int, int]:
    return key[0], ORDER.index(key[1])


def _traced(runner: Runner, function: Callable[[Runner], Runs], trace: Trace) -> Trace:
    """Run a path up to the group of a trace."""
    runner.begin(trace)
    try:
        # What a path is about need not happen where ops are traced.
        with closing(function(runner)) as runs, suppress(NotTaken):
            for run in runs:
                if run.group.number == trace.number:
                    break
    finally:
        runner.begin()
    return trace
