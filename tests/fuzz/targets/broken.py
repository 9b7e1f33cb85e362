"""Not a product: every kind of finding, made on purpose, to see that it is found."""

import ctypes
import logging
import random
import time
from pathlib import Path

from llama_fast.errors import CheckpointError, ConfigError
from tests.bad_inputs.harness import check
from tests.fuzz.target import Target as Base

KEPT = []
FAULTS = {
    "right": lambda: None,
    "refusal": lambda: _raise(ConfigError("hidden_size=0; use a positive integer")),
    "other_error": lambda: _raise(KeyError("x")),
    "base_exception": lambda: _raise(SystemExit(0)),
    "other_kind": lambda: _raise(CheckpointError("x")),
    "escape": lambda: _raise(ConfigError("\x1b[2J")),
    "unbounded": lambda: _raise(ConfigError("x" * 5000)),
    "wrong_result": lambda: check(1 == 2, "unequal"),
    "log_format": lambda: logging.getLogger("llama_fast").warning("%d", "x"),
    "memory": lambda: KEPT.append(b"x" * (100 << 20)),
    "address_space": lambda: bytearray(1 << 34),
    "crash": lambda: ctypes.string_at(0),
    "busy": lambda: _busy(),
}


def _raise(error: BaseException) -> None:
    raise error


def _busy() -> None:
    while True:
        time.process_time()


class Target(Base):
    refusals = (ConfigError,)

    def make(self, rng: random.Random) -> str:
        quick = [name for name in FAULTS if name != "busy"]
        return rng.choice([*quick * 3, "busy"])

    def run(self, value: str, folder: Path) -> None:
        FAULTS[value]()
