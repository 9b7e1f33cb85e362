"""Every error llama_fast raises on purpose, one type per kind.

Each is a `LlamaFastError` and also the built-in it resembles, so `except ValueError` keeps working. Messages name the
file, field or tensor, say what came, what is accepted and how to fix it. `http_status` is what a server answers with.
"""

import re
import reprlib
from collections.abc import Iterable

MAX_NAMES = 10  # listed in a message
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = 50
_REPR.maxlevel = 3


def shown(name: str) -> str:
    """A name from a file as it may stand in a message: no control characters, no megabyte."""
    text = name.encode("unicode_escape").decode("ascii")
    return text if len(text) <= 120 else f"{text[:120]}..."


def listed(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(shown(name) for name in names[:MAX_NAMES]) + more


def brief(value: object) -> str:
    """A value as it may stand in a message: its repr in one line, without object addresses or a megabyte."""
    try:
        text = re.sub(r" at 0x[0-9a-fA-F]+|\n *", "", _REPR.repr(value))
    except ValueError:  # Python's limit on the digits of an integer
        return "an integer of thousands of digits"
    return text if len(text) <= 400 else f"{text[:400]}..."  # six lists of six each are 36 items still


def without_places(message: str) -> str:
    """A message of other people's errors without addresses of objects and paths: a stranger may read it."""
    message = re.sub(r"\b0x[0-9a-fA-F]{4,}", "0x...", message)
    return re.sub(r"(?<![\w.<])(/[\w.@+-]+){2,}/?", "...", message)


class LlamaFastError(Exception):
    """Base of all errors raised on purpose by this package."""

    http_status = 500


class ConfigError(LlamaFastError, ValueError):
    """config.json or a configuration argument is wrong or not supported."""


class CheckpointError(LlamaFastError):
    """A checkpoint cannot be used; one of the four kinds below."""


class CheckpointFormatError(CheckpointError, ValueError):
    """A file is not what its name says: malformed safetensors, index or header."""


class CheckpointMismatchError(CheckpointError, ValueError):
    """The tensors do not fit the model: missing, unexpected or misshapen names."""


class CheckpointPathError(CheckpointError, FileNotFoundError):
    """No loadable checkpoint at this path, or a path that must not be opened."""


class CheckpointIOError(CheckpointError, OSError):
    """Reading or writing a checkpoint failed."""


class TokenizerFileError(LlamaFastError, ValueError):
    """tokenizer.json or a file beside it cannot be used."""


class TemplateError(LlamaFastError, ValueError):
    """A chat template is malformed, fails or leaves its sandbox."""


class RequestError(LlamaFastError, ValueError):
    """A generation request has an invalid field; refused before any work."""

    http_status = 400


class ContextLengthError(RequestError):
    """Prompt plus new tokens do not fit the context."""

    code = "context_length_exceeded"


class UnsupportedError(LlamaFastError, NotImplementedError):
    """Right, but not supported (yet); the message names the field."""

    http_status = 400


class BackendError(LlamaFastError, RuntimeError):
    """The chosen backend cannot run on this machine."""


class KernelArgumentError(LlamaFastError, ValueError):
    """An op was called with tensors it does not accept."""


class OutOfMemoryError(LlamaFastError, MemoryError):
    """Weights or cache do not fit; the message gives needed and available bytes."""

    http_status = 503


class NonFiniteLogitsError(LlamaFastError, ArithmeticError):
    """A request's logits contain NaN or infinity; nothing was sampled from them."""


class AuthError(LlamaFastError, PermissionError):
    """A key is missing or wrong."""

    http_status = 401


class ModelNotFoundError(LlamaFastError, LookupError):
    """No model of that name is served here."""

    http_status = 404


class PayloadTooLargeError(LlamaFastError, ValueError):
    """A request's body is larger than the limit, which the message names."""

    http_status = 413


class QueueFullError(LlamaFastError, RuntimeError):
    """No further request is taken for now; come back after `retry_after_s` seconds."""

    http_status = 429

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class OverloadedError(LlamaFastError, RuntimeError):
    """The engine cannot take requests: it is loading, overloaded or shutting down."""

    http_status = 503


class ShuttingDownError(OverloadedError):
    """The engine finishes what runs and takes nothing new."""


class RequestTimeoutError(LlamaFastError, TimeoutError):
    """A request's deadline passed."""

    http_status = 504


class RequestFailedError(LlamaFastError, RuntimeError):
    """A request's own data or callback raised while it ran; the error it raised is the cause. Others went on."""


class PeerLostError(LlamaFastError, ConnectionError):
    """Another process of a distributed model is gone."""


class EngineDeadError(LlamaFastError, RuntimeError):
    """The engine met an error it cannot go on after; start a new process."""

    http_status = 503


class GenerationInterrupted(KeyboardInterrupt):
    """Ctrl-C during generation. `outputs` is what `generate` would have returned, with what was generated so far."""

    def __init__(self, outputs: object) -> None:
        super().__init__("generation interrupted")
        self.outputs = outputs
