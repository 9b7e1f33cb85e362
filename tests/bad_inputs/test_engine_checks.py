"""The checks round an engine see what they are there to see: each of these entries must be reported."""

import time

import pytest
import torch

from llama_fast.errors import RequestError, UnsupportedError
from tests.bad_inputs.engine_checks import ENGINE, engine_entry
from tests.bad_inputs.server import run

KEPT = []


def _refuse(work):
    """A call that does `work` and is then refused."""

    def call():
        work()
        raise RequestError("refused")

    return lambda engine: engine.refused_call(RequestError, call)


def _busy():
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass


def _unsupported():
    raise UnsupportedError("n=2 of /home/me/model is not supported")


def _overwrite_cache(_):
    ENGINE.engine.cache.pool.fill_(1.0)


def _change_weights(_):
    """After the requests in flight have drawn their last tokens, so that only the next request sees it."""
    step = ENGINE.engine.step

    def stepping():
        samples = step()
        if not ENGINE.engine.scheduler.has_work:
            ENGINE.model.lm_head.weight.data.mul_(-1)
        return samples

    ENGINE.engine.step = stepping


def _keep_page(_):
    finish = ENGINE.engine.scheduler.finish

    def finishing(sequence):
        sequence.pages.pop()
        finish(sequence)

    ENGINE.engine.scheduler.finish = finishing


BROKEN = {
    "slow": (_refuse(_busy), "s of processor time"),
    "page": (_refuse(lambda: ENGINE.engine.scheduler.allocator.allocate(1)), "pages free, waiting, running"),
    "queued": (_refuse(lambda: ENGINE.engine.scheduler.waiting.append(None)), "pages free, waiting, running"),
    "path": (lambda engine: engine.refused_call(UnsupportedError, _unsupported), "a path: "),
    "accepted": (lambda engine: engine.refused(RequestError, max_tokens=1), "not refused"),
    "cache": (_overwrite_cache, "requests in flight"),
    "weights": (_change_weights, "afterwards: not its golden tokens"),
    "lost_page": (_keep_page, "pages are free"),
    "leak": (lambda _: KEPT.append(torch.ones(1 << 20)), "memory grows by"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_entry_is_reported(name):
    body, told = BROKEN[name]
    body.__name__ = name
    assert told in (run(engine_entry(body)) or "nothing")


def test_entry_that_holds_is_not():
    assert run(engine_entry(lambda engine: engine.refused(RequestError, "n=0", n=0))) is None
