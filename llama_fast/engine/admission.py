"""What an engine refuses before any work: requests that could never run."""

from __future__ import annotations

from llama_fast.engine.request import Request
from llama_fast.engine.scheduler import Scheduler
from llama_fast.errors import ContextLengthError, RequestError, brief


def check_request(request: Request, scheduler: Scheduler, vocab_size: int, max_seq_len: int) -> None:
    """Refuse what could never run.

    Raises:
        RequestError: token ids, n or a token id of the parameters are out of range.
        ContextLengthError: prompt and new tokens do not fit max_seq_len or the cache.
    """
    sampling, prompt_ids = request.sampling, request.prompt_token_ids
    if not prompt_ids:
        raise RequestError(
            f"prompt {request.index}: the prompt has no tokens; give at least one (the tokenizer adds no bos here)"
        )
    for position, token_id in enumerate(prompt_ids):
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise RequestError(
                f"prompt {request.index}: prompt_token_ids[{position}]={brief(token_id)} is not an id of the "
                f"vocabulary, 0 to {vocab_size - 1}"
            )
    if sampling.n > scheduler.max_batch:
        raise RequestError(
            f"n={sampling.n} exceeds max_batch={scheduler.max_batch}; build the engine with a larger one"
        )
    length = len(prompt_ids) + sampling.max_tokens
    if length > max_seq_len:
        raise ContextLengthError(
            f"{len(prompt_ids)} prompt tokens + max_tokens={sampling.max_tokens} exceed max_seq_len={max_seq_len}"
        )
    needed = scheduler.pages_needed(request.samples[0].sequence)
    if needed > scheduler.allocator.num_pages:
        raise ContextLengthError(
            f"the request needs {needed} cache pages of {scheduler.page_size} tokens, the cache has "
            f"{scheduler.allocator.num_pages}; lower n or max_tokens, or raise cache_bytes"
        )
