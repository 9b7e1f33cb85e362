"""Text to token ids and back, and conversations to prompts."""

from llama_fast.tokenizer.llama_tokenizer import LlamaTokenizer
from llama_fast.tokenizer.token_stream import TokenStream

__all__ = ["LlamaTokenizer", "TokenStream"]
