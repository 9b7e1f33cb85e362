"""Text to token ids and back, and conversations to prompts."""

from llama_fast.tokenizer.batch_encoding import BatchEncoding
from llama_fast.tokenizer.llama_tokenizer import LlamaTokenizer, LlamaTokenizerFast
from llama_fast.tokenizer.token_stream import TokenStream

__all__ = ["BatchEncoding", "LlamaTokenizer", "LlamaTokenizerFast", "TokenStream"]
