"""Kinds of errors: one type each, which is also the built-in it resembles; names from files in messages."""

import builtins
import inspect
import pickle

import pytest

from llama_fast import errors
from llama_fast.errors import listed, shown

KINDS = {
    name: kind
    for name, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, errors.LlamaFastError) and kind not in (errors.LlamaFastError, errors.CheckpointError)
}
STATUS = {
    "AuthError": 401,
    "ContextLengthError": 400,
    "EngineDeadError": 503,
    "ModelNotFoundError": 404,
    "NonFiniteLogitsError": 500,
    "OutOfMemoryError": 503,
    "OverloadedError": 503,
    "PayloadTooLargeError": 413,
    "QueueFullError": 429,
    "RequestError": 400,
    "RequestTimeoutError": 504,
    "ShuttingDownError": 503,
    "UnsupportedError": 400,
}


@pytest.mark.parametrize("name", KINDS)
def test_kind_is_also_a_builtin(name):
    kind = KINDS[name]
    builtin = [base for base in kind.__mro__ if vars(builtins).get(base.__name__) is base]
    assert set(builtin) - {Exception, BaseException, object}, "resembles no built-in"
    assert kind.__doc__.endswith(".")
    assert kind.http_status == STATUS.get(name, 500)


@pytest.mark.parametrize("name", KINDS)
def test_kind_travels_between_processes(name):
    error = pickle.loads(pickle.dumps(KINDS[name]("field=1; use 2")))
    assert (type(error), str(error)) == (KINDS[name], "field=1; use 2")


def test_four_kinds_of_checkpoint_errors():
    kinds = {
        name.removeprefix("Checkpoint") for name, kind in KINDS.items() if issubclass(kind, errors.CheckpointError)
    }
    assert kinds == {"FormatError", "MismatchError", "PathError", "IOError"}


def test_context_length_has_the_code_of_the_openai_api():
    assert errors.ContextLengthError("x").code == "context_length_exceeded"


def test_queue_full_tells_when_to_come_back():
    assert errors.QueueFullError("x", retry_after_s=2.5).retry_after_s == 2.5


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("model.norm.weight", "model.norm.weight"),
        ("\x1b[2J\n\0", "\\x1b[2J\\n\\x00"),
        ("\ud800größe", "\\ud800gr\\xf6\\xdfe"),
        ("x" * 10**6, "x" * 120 + "..."),
    ],
)
def test_shown(name, text):
    assert shown(name) == text


def test_listed_names_ten_and_counts_the_rest():
    assert listed(f"a{i}" for i in range(10)) == "a0, a1, a2, a3, a4, a5, a6, a7, a8, a9"
    assert listed(f"a{i}" for i in range(13)).endswith("a8, a9 and 3 more")
    assert listed([]) == ""
