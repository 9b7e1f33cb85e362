"""The harness sees what it is there to see: each of these entries must be reported."""

import os
import signal
import threading
import time

import pytest

from llama_fast.errors import ConfigError, RequestError
from tests.bad_inputs.harness import accepted, check, refused
from tests.bad_inputs.server import run


def raises(error):
    raise error


def busy():
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass


KEPT = []
BROKEN = {
    "crash": (lambda _: os.kill(os.getpid(), signal.SIGSEGV), "killed by SIGSEGV"),
    "abort": (lambda _: os.abort(), "killed by SIGABRT"),
    "hang": (lambda _: time.sleep(60), "hung"),
    "exit": (lambda _: raises(SystemExit(0)), "SystemExit"),
    "check": (lambda _: check(1 == 2, "unequal"), "unequal"),
    "not_refused": (lambda _: refused(ConfigError, lambda: 7), "not refused: 7"),
    "other_error": (lambda _: refused(ConfigError, lambda: raises(KeyError("x"))), "KeyError"),
    "other_kind": (lambda _: refused(ConfigError, lambda: raises(RequestError("x"))), "RequestError instead of"),
    "nothing_named": (lambda _: refused(ConfigError, lambda: raises(ConfigError("x")), "field"), "does not name"),
    "address": (lambda _: refused(ConfigError, lambda: raises(ConfigError(f"{object()}"))), "an object"),
    "escape": (lambda _: refused(ConfigError, lambda: raises(ConfigError("\x1b[2J"))), "not printable"),
    "path_to_a_client": (lambda f: refused(RequestError, lambda: raises(RequestError(f"{f}"))), "a path"),
    "slow": (lambda _: accepted(busy, seconds=0.1), "of processor time, more than 0.1 s"),
    "waiting": (lambda _: accepted(lambda: time.sleep(0.2), seconds=0.01), "waited: took"),
    "memory": (lambda _: accepted(lambda: len(b"x" * (100 << 20))), "bytes of memory"),
    "open_file": (lambda _: KEPT.append(open(__file__)), "open files"),  # noqa: SIM115
    "thread": (lambda _: threading.Thread(target=time.sleep, args=(60,), daemon=True).start(), "threads"),
    "temporary_file": (lambda _: open(os.path.join(os.environ["TMPDIR"], "x"), "w").close(), "temporary files"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_entry_is_reported(name):
    entry, told = BROKEN[name]
    assert told in (run(entry, limit_s=2.0) or "nothing")


def test_entry_that_holds_is_not():
    assert run(lambda _: refused(ConfigError, lambda: raises(ConfigError("field=1; use 2")), "field=1")) is None
