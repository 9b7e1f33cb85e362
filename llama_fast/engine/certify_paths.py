"""The ways by which a request can get its answer: alone, in company, in pieces, late, interrupted.

A path is a generator of runs, each compared with the baseline as it comes. It raises NotTaken where what it is about
did not happen: then nothing was shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import torch

from llama_fast.engine import certify_arrivals
from llama_fast.engine.certify_runner import NotHere, Runner, Runs, check_taken
from llama_fast.engine.decode_graph import bucket_sizes
from llama_fast.engine.prompt_lookup import PromptLookup
from llama_fast.engine.request import Sample
from llama_fast.ops import select_backend, shared


@dataclass(frozen=True)
class Path:
    """A row of the matrix.

    Attributes:
        name: short.
        about: what happens to the requests.
        function: runs it.
    """

    name: str
    about: str
    function: Callable[[Runner], Runs]


def paths_of(runner: Runner) -> list[Path]:
    """All paths, in the order of the table."""
    page, split = runner.page_size, runner.split_size
    odd = max(3, page // 3 | 1)
    return [
        Path("alone again", "each request alone once more, in a new engine", lambda r: r.alone(r.requests.of())),
        Path("together", "all requests in one batch", _together),
        Path("batch sizes", "as many rows as a bucket or a kernel's limit, one fewer, one more", _batch_sizes),
        Path("every row", "the order turned until each request was in each row", _every_row),
        Path("queue", "in another order, three at once, the others wait", certify_arrivals.queue),
        Path("staggered", "added while others decode", certify_arrivals.staggered),
        Path("chunks of 1", "prompts token by token", partial(_chunks, size=1, groups=("short",))),
        Path(f"chunks of {odd}", "an odd number", partial(_chunks, size=odd, groups=("short", "growing", "prefix"))),
        Path(f"chunks of {page}", "a page", partial(_chunks, size=page)),
        Path(f"chunks of {split}", "a split", partial(_chunks, size=split)),
        Path("one chunk", "all prompts in one step", _one_chunk),
        Path("shared prefixes", "prompts begin with pages that others filled, and all of it again", _shared_prefixes),
        Path("preempted", "too few pages: requests wait in the host's memory", certify_arrivals.preempted),
        Path("prompt lookup", "tokens guessed from the text and verified at once", _prompt_lookup),
        *(
            Path(f"steps ahead {ahead}", "enqueued before the first is read", partial(_ahead, ahead=ahead))
            for ahead in (1, 2, 3)
        ),
        Path("graphs", "captured steps", _graphs),
        Path("eager", "every kernel launched anew", _eager),
        Path("plain steps", "no logits kept, as users run them: the same tokens and log probabilities", _plain_steps),
        Path("op by op", "the layers' ops called one by one", _op_by_op),
        Path("aborted neighbours", "others end in the middle", certify_arrivals.aborted),
        Path(
            "after an abort",
            "in an engine whose last run was given up, with the pages that it filled",
            certify_arrivals.after_abort,
        ),
        *(Path(f"threads {n}", "of torch.set_num_threads", partial(_threads, number=n)) for n in (1, 2)),
        Path("all at once", "of all that is above, at random", certify_arrivals.all_at_once),
    ]


# --- company ----------------------------------------------------------------------------------------------------------


def _together(runner: Runner) -> Runs:
    places = runner.requests.of()
    engine = runner.engine(places)
    yield runner.run(engine, places)
    check_taken(max(engine.recorder.counts) > 1, "no decoding step had more than one row")


def _batch_sizes(runner: Runner) -> Runs:
    short, most = runner.requests.of("short"), runner.requests.size.most_rows
    engine = runner.engine(short * (most // len(short) + 1), max_batch=most)
    engine.make_ready()
    starts = {*bucket_sizes(most), *engine.ops.warm_up_rows(runner.model.linears(), most)}
    sizes = sorted({size for start in starts for size in (start - 1, start, start + 1) if 1 <= size <= most})
    for size in sizes:
        yield runner.run(engine, [short[index % len(short)] for index in range(size)], f"batch of {size}")
    missing = [size for size in sizes if size not in engine.recorder.counts]
    check_taken(not missing, f"no decoding step had {missing} rows")


def _every_row(runner: Runner) -> Runs:
    short = runner.requests.of("short")
    engine = runner.engine(short)
    for first in range(len(short)):
        run = runner.run(engine, [*short[first:], *short[:first]], f"turned by {first}")
        yield run
        samples = [request.samples[0] for request in run.group.requests]
        wrong = [row for row, sample in enumerate(samples) if (sample, row) not in engine.recorder.rows]
        check_taken(not wrong, f"rows {wrong} were not those of the order")


# --- prompts ----------------------------------------------------------------------------------------------------------


def _chunks(runner: Runner, size: int, groups: tuple[str, ...] = ()) -> Runs:
    places = runner.requests.of(*groups)
    engine, group, cut = runner.engine(places, prefill_chunk=size), runner.group(places), False
    with closing(engine.run(group.requests)) as steps:
        for _ in steps:
            cut |= any(one.is_prompt and one.num_computed for one in engine.scheduler.running)
    yield runner.ended(engine, group)
    check_taken(cut, f"no prompt was longer than {size} tokens")


def _one_chunk(runner: Runner) -> Runs:
    places = runner.requests.of()
    tokens = sum(len(runner.requests.specs[place].prompt) for place in places)
    engine, group = runner.engine(places, prefill_chunk=tokens), runner.group(places)
    with closing(engine.run(group.requests)) as steps:
        next(steps)
        whole = not any(one.is_prompt for one in engine.scheduler.running)
        for _ in steps:
            pass
    yield runner.ended(engine, group)
    check_taken(whole, "the prompts took more than one step")


def _shared_prefixes(runner: Runner) -> Runs:
    first, *others = runner.requests.of("growing")
    others += runner.requests.of("prefix", "scored")
    engine = runner.engine([first, *others], prefix_caching=True)
    # Alone, so that the one whose prompt goes on behind its text finds its page.
    yield runner.run(engine, [first], "the first")
    run = runner.run(engine, others, "others behind it")
    yield run
    before = engine.stats().shared_tokens
    check_taken(before, "no prompt began with a page that another one had filled")
    continued = runner.requests.continued
    if engine.scheduler.share_generated and continued is not None:
        request = run.group.requests[others.index(continued)]
        check_taken(request.metrics.shared_tokens, "no prompt began with a page that holds a generated token")
    yield runner.run(engine, [first, *others], "all again")
    check_taken(engine.stats().shared_tokens > before, "no prompt began with a page of its own last run")


# --- decoding ---------------------------------------------------------------------------------------------------------


class _KnownAnswer(PromptLookup):
    """Guesses what the baseline drew for a sample, and every other time something else at the end."""

    def __init__(self, sample: Sample, answer: Sequence[int], vocab_size: int) -> None:
        self._sample, self._answer, self._vocab_size, self._asked = sample, answer, vocab_size, 0

    def guess(self, most: int) -> list[int]:
        """Up to four tokens."""
        count = len(self._sample.token_ids)
        found = list(self._answer[count : count + min(4, most)])
        self._asked += 1
        if found and self._asked % 2 == 0:
            found[-1] = (found[-1] + 1) % self._vocab_size
        return found

    def verified(self, guessed: int, right: int) -> None:
        """It goes on as before."""


def _prompt_lookup(runner: Runner) -> Runs:
    right, loops = 0, runner.requests.of("looping", "recalled")
    for known, places in ((False, loops), (False, runner.requests.most()), (True, runner.requests.most())):
        engine = runner.engine(places, max_batch=runner.samples(places) + 8)
        # A random model says nothing twice: with what is known to come there are right guesses always.
        group = runner.group(places, prompt_lookup_num_tokens=6, max_matching_ngram_size=2 if places != loops else 1)
        for place, request in zip(places, group.requests, strict=True) if known else ():
            for sample, expected in zip(request.samples, runner.expected[place].samples, strict=True):
                if sample.lookup is not None:
                    answer = _KnownAnswer(sample, expected.token_ids, runner.model.config.vocab_size)
                    vars(sample)["lookup"] = answer
        for _ in engine.run(group.requests):
            pass
        yield runner.ended(engine, group, "answers known" if known else "from the text")
        right += sum(request.metrics.guessed_right for request in group.requests)
    check_taken(right, "no guess was right")


def _ahead(runner: Runner, ahead: int) -> Runs:
    places = runner.requests.of("short", "growing", "text")
    engine = runner.engine(places, steps_ahead=ahead)
    yield runner.run(engine, places)
    check_taken(engine.recorder.most_ahead >= ahead, f"at most {engine.recorder.most_ahead} steps were on their way")


def _captures(runner: Runner) -> bool:
    engine = runner.engine(runner.requests.of("short"))
    engine.make_ready()
    return bool(engine.stats().captured)


def _graphs(runner: Runner) -> Runs:
    # Where ops are traced nothing is captured; the path was here before.
    if runner.trace is None and not _captures(runner):
        raise NotHere("steps are captured on a GPU only")
    places = runner.requests.most()
    yield runner.run(runner.engine(places), places)


def _eager(runner: Runner) -> Runs:
    if runner.trace is None and not _captures(runner):
        raise NotHere("nothing is captured here: all the others are eager")
    places = runner.requests.most()
    yield runner.run(runner.engine(places, graphs=False), places)


def _plain_steps(runner: Runner) -> Runs:
    places = [place for place in runner.requests.most() if runner.requests.specs[place].is_plain]
    engine = runner.engine(places, records=False)
    yield runner.run(engine, places)
    check_taken(engine.stats().decode_steps, "no step was run")


def _op_by_op(runner: Runner) -> Runs:
    model = runner.model
    if select_backend(runner.backend, model.device, model.dtype).run_layers is shared.run_layers:
        raise NotHere("this backend has no other way")
    places = runner.requests.most()
    yield runner.run(runner.engine(places, op_by_op=True), places)


def _threads(runner: Runner, number: int) -> Runs:
    if runner.model.device.type != "cpu":
        raise NotHere("the model is not on the CPU")
    places, before = runner.requests.most(), torch.get_num_threads()
    try:
        torch.set_num_threads(number)
        yield runner.run(runner.engine(places), places)
    finally:
        torch.set_num_threads(before)
