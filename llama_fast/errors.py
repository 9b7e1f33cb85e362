"""Every error llama_fast raises on purpose, one type per kind.

Each is a `LlamaFastError` and also the built-in it resembles, so `except ValueError` keeps working. Messages say
what came, what is accepted and how to fix it.
"""


class LlamaFastError(Exception):
    """Base of all errors raised on purpose by this package."""


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


class ContextLengthError(RequestError):
    """Prompt plus new tokens do not fit the context."""


class UnsupportedError(LlamaFastError, NotImplementedError):
    """Right, but not supported (yet); the message names the field."""


class BackendError(LlamaFastError, RuntimeError):
    """The chosen backend cannot run on this machine."""


class KernelArgumentError(LlamaFastError, ValueError):
    """An op was called with tensors it does not accept."""


class OutOfMemoryError(LlamaFastError, MemoryError):
    """Weights or cache do not fit; the message gives needed and available bytes."""


class NonFiniteLogitsError(LlamaFastError, ArithmeticError):
    """A request's logits contain NaN or infinity; nothing was sampled from them."""


class GenerationInterrupted(KeyboardInterrupt):
    """Ctrl-C during generation. `outputs` is what `generate` would have returned, with what was generated so far."""

    def __init__(self, outputs: object) -> None:
        super().__init__("generation interrupted")
        self.outputs = outputs
