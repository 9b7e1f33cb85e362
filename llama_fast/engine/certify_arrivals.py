"""Paths on which requests come, wait and go: in a queue, one by one, preempted, beside others that are aborted."""

from __future__ import annotations

import random
from contextlib import closing

from llama_fast.engine.certify_requests import MOST_SAMPLES
from llama_fast.engine.certify_runner import NotTaken, Runner, Runs, check_taken, feed


def queue(runner: Runner) -> Runs:
    places = runner.requests.most()
    random.Random(1).shuffle(places)
    engine, group, waited = runner.engine(places, max_batch=MOST_SAMPLES), runner.group(places), False
    with closing(engine.run(group.requests)) as steps:
        for _ in steps:
            waited |= bool(engine.scheduler.waiting and engine.decoder.samples)
    yield runner.ended(engine, group)
    check_taken(waited, "no request waited for another one")


def staggered(runner: Runner) -> Runs:
    places, draw = runner.requests.most(), random.Random(2)
    draw.shuffle(places)
    engine, group = runner.engine(places), runner.group(places)
    joined, _ = feed(engine, group, None, draw)
    yield runner.ended(engine, group)
    check_taken(joined, "no request came while others decoded")


def preempted(runner: Runner) -> Runs:
    specs, size = runner.requests.specs, runner.page_size
    places = [place for place in runner.requests.of("growing", "border") if specs[place].grows(size)]
    places.sort(key=lambda place: -specs[place].params.n)
    longest, most = max(specs[place].max_len for place in places), max(runner.pages([place]) for place in places)
    for ahead, chunk in ((1, 512), (2, max(3, size // 3 | 1))):
        # What they take when they are let in, and a page for each but the last, which may be kept for them.
        begun = 0
        for spec in (specs[place] for place in places):
            pages = -(-min(spec.max_len - 1, len(spec.prompt) - 1 + ahead) // size)
            begun += pages + (spec.params.n - 1) * (pages - len(spec.prompt) // size)
        for pages in (begun + len(places) - 1, begun, most):
            pages = max(pages, most)
            engine = runner.engine(places, pages=pages, max_seq_len=longest, steps_ahead=ahead, prefill_chunk=chunk)
            yield runner.run(engine, places, f"{pages} pages, {ahead} ahead, chunks of {chunk}")
            if engine.stats().preempted:
                break
        else:
            raise NotTaken("no request was preempted")


def aborted(runner: Runner) -> Runs:
    places = runner.requests.most()
    victims = runner.requests.of("growing", "looping")
    engine = runner.engine([*places, *victims])
    group, doomed = runner.group(places), runner.group(victims)
    _, aborted = feed(engine, group, doomed, random.Random(3))
    yield runner.ended(engine, group)
    check_taken(aborted, "no request was aborted while it decoded")


def after_abort(runner: Runner) -> Runs:
    places = runner.requests.most()
    engine, given_up = runner.engine(places, prefix_caching=True), runner.group(places)
    with closing(engine.run(given_up.requests)) as steps:
        for _ in steps:
            if engine.decoder.samples and len(given_up.requests[0].samples[0].token_ids) > 1:
                break
    cut = [s for request in given_up.requests for s in request.samples if s.token_ids and s.finish_reason == "abort"]
    yield runner.run(engine, places)
    check_taken(cut, "no request was decoding when the run was given up")


def all_at_once(runner: Runner) -> Runs:
    wanted, taken = runner.requests.size.mixed, 0
    for seed in range(4 * wanted):
        draw = random.Random(100 + seed)
        places = sorted({*runner.requests.most(), *runner.requests.of("prefix")})
        draw.shuffle(places)
        victims = runner.requests.of("growing")
        engine = runner.engine(
            places,
            pages=max(runner.pages(places) // 4, *(runner.pages([place]) for place in places)),
            max_batch=draw.choice([4, 7, 12]),
            steps_ahead=draw.choice([1, 2, 3]),
            prefill_chunk=draw.choice([runner.page_size - 1, runner.page_size, runner.split_size + 3]),
            prefix_caching=True,
        )
        changes = {"prompt_lookup_num_tokens": draw.choice([0, 4]), "max_matching_ngram_size": 1}
        group, doomed = runner.group(places, **changes), runner.group(victims, **changes)
        for request in group.requests:
            request.priority = draw.choice([0, 0, 1])
        joined, aborted = feed(engine, group, doomed, draw)
        yield runner.ended(engine, group, f"seed {seed}")
        stats = engine.stats()
        taken += bool(joined and aborted and (stats.preempted or stats.shared_tokens))
        if taken == wanted:
            return
    raise NotTaken("too little came in between")
