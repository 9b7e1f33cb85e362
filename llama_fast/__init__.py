"""llama_fast: Llama inference that gives one answer, bit for bit, whatever runs beside it.

Names are imported from their modules on first use, so that `import llama_fast` costs nothing and loads no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from llama_fast import errors

if TYPE_CHECKING:
    from llama_fast.api.modeling import LlamaForCausalLM
    from llama_fast.api.quantization import TorchAoConfig
    from llama_fast.config import LlamaConfig
    from llama_fast.engine.llm import LLM
    from llama_fast.engine.outputs import CompletionOutput, RequestOutput, TokenChunk
    from llama_fast.engine.sampling import SamplingParams
    from llama_fast.model.quantization import Int4Config
    from llama_fast.serving.async_llm import AsyncLLM
    from llama_fast.tokenizer import BatchEncoding, LlamaTokenizer, LlamaTokenizerFast

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncLLM",
    "BatchEncoding",
    "CompletionOutput",
    "Int4Config",
    "LlamaConfig",
    "LlamaForCausalLM",
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "RequestOutput",
    "SamplingParams",
    "TokenChunk",
    "TorchAoConfig",
    "errors",
]

# The imports above, for the running program.
_HOMES = {
    "AsyncLLM": "llama_fast.serving.async_llm",
    "BatchEncoding": "llama_fast.tokenizer",
    "CompletionOutput": "llama_fast.engine.outputs",
    "Int4Config": "llama_fast.model.quantization",
    "LLM": "llama_fast.engine.llm",
    "LlamaConfig": "llama_fast.config",
    "LlamaForCausalLM": "llama_fast.api.modeling",
    "LlamaTokenizer": "llama_fast.tokenizer",
    "LlamaTokenizerFast": "llama_fast.tokenizer",
    "RequestOutput": "llama_fast.engine.outputs",
    "SamplingParams": "llama_fast.engine.sampling",
    "TokenChunk": "llama_fast.engine.outputs",
    "TorchAoConfig": "llama_fast.api.quantization",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value  # the next access finds it without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
