"""LLM: prompts in, texts out."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Self, cast, get_args

import torch
from torch import Tensor

from llama_fast.engine import inputs
from llama_fast.engine.engine import DEFAULT_MAX_BATCH, DEFAULT_PREFILL_CHUNK, Engine
from llama_fast.engine.inputs import Prompt, Prompts
from llama_fast.engine.outputs import EngineStats, RequestOutput, TokenChunk
from llama_fast.engine.plan import engine_sizes
from llama_fast.engine.request import Pooling, Request, Sample
from llama_fast.engine.sampling import GenerationDefaults, SamplingParams
from llama_fast.errors import GenerationInterrupted, RequestError, TemplateError, brief
from llama_fast.hub import find_folder
from llama_fast.model.kv_cache import PAGE_SIZE, SPLIT_SIZE
from llama_fast.model.llama import LlamaLM
from llama_fast.model.loading import check_tokenizer, open_checkpoint, read_model
from llama_fast.model.progress import ProgressBar
from llama_fast.model.quantization import Int4Config
from llama_fast.ops import select_backend
from llama_fast.tokenizer import LlamaTokenizer

OnToken = Callable[[TokenChunk], None]


class LLM:
    """A model, its tokenizer and its engine.

    ```python
    llm = LLM("path/to/checkpoint")
    outputs = llm.generate(["Once upon a time", "The dog"], SamplingParams(temperature=0.8, seed=1))
    print(outputs[0].outputs[0].text)
    ```

    One thread generates at a time; a second one gets a RequestError. AsyncLLM serves many callers at once.

    Args:
        model: checkpoint folder or hub id `owner/name`.
        device: None picks the first GPU, else the CPU.
        dtype: "auto" keeps the checkpoint's; else a torch dtype or its name.
        backend: "auto", "reference", "cpu" or "gpu".
        load: "mmap" shares the weights' pages with their files on the CPU; "copy" reads them into memory of their own,
            so that files may be rewritten while the model runs.
        quantization: "int4", or an Int4Config, rounds the projections' weights while they are read.
        max_batch, max_seq_len, cache_bytes, page_size, split_size, prefill_chunk, prefix_caching, graphs,
            steps_ahead: see `Engine`.
        revision, cache_dir, token, local_files_only: for hub ids, as in huggingface_hub.

    Raises:
        ConfigError, CheckpointError, TokenizerFileError: a file of the folder is wrong.
        UnsupportedError, BackendError, OutOfMemoryError, RequestError: an argument is.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        device: str | int | torch.device | None = None,
        dtype: str | torch.dtype | None = "auto",
        backend: str = "auto",
        load: str = "mmap",
        quantization: str | Int4Config | None = None,
        max_batch: int = DEFAULT_MAX_BATCH,
        max_seq_len: int | None = None,
        cache_bytes: int | None = None,
        page_size: int = PAGE_SIZE,
        split_size: int = SPLIT_SIZE,
        prefill_chunk: int = DEFAULT_PREFILL_CHUNK,
        prefix_caching: bool = True,
        graphs: bool = True,
        steps_ahead: int | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | None = None,
        local_files_only: bool = False,
    ) -> None:
        self._closed = False
        folder = find_folder(
            model, revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only
        )
        checkpoint = open_checkpoint(folder, dtype=dtype, device=device, quantization=quantization)
        self.tokenizer = LlamaTokenizer.from_pretrained(folder)
        self.generation_defaults = GenerationDefaults.from_folder(folder)
        self.generation_defaults.check_vocab(checkpoint.config.vocab_size)
        check_tokenizer(self.tokenizer, checkpoint.config, checkpoint.folder)
        select_backend(backend, checkpoint.device, checkpoint.dtype)
        # Before a weight is read, so that what does not fit costs nothing. Engine would count weights that were copied
        # or cast twice: as memory that is taken, and as memory that they will take.
        max_seq_len, cache_bytes = engine_sizes(
            checkpoint,
            max_batch=max_batch,
            max_seq_len=max_seq_len,
            cache_bytes=cache_bytes,
            page_size=page_size,
            prefill_chunk=prefill_chunk,
        )
        self.model: LlamaLM = read_model(LlamaLM, checkpoint, load=load)
        self.engine = Engine(
            self.model,
            backend=backend,
            max_batch=max_batch,
            max_seq_len=max_seq_len,
            cache_bytes=cache_bytes,
            page_size=page_size,
            split_size=split_size,
            prefill_chunk=prefill_chunk,
            prefix_caching=prefix_caching,
            graphs=graphs,
            steps_ahead=steps_ahead,
        )
        self.engine.make_ready()

    def generate(
        self,
        prompts: Prompts,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] = 0,
        cache_salt: str = "",
        timeout: float | None = None,
        on_token: OnToken | None = None,
        use_tqdm: bool | None = None,
    ) -> list[RequestOutput]:
        """Continue every prompt.

        Args:
            prompts: a text, a list of token ids, a chat (a list of messages), or a list of these. Texts get the
                tokenizer's bos token, chats the checkpoint's template.
            sampling_params: one for all prompts or one for each; unset fields come from generation_config.json.
            priority: one for all or one for each; lower ones run first, equal ones in their order here.
            cache_salt: the prompts share the cache's pages only with those of the same salt.
            timeout: seconds after which what is unfinished ends with finish_reason "error" and a RequestTimeoutError.
            on_token: called with a TokenChunk for every token. What it raises ends the request with a
                RequestFailedError; the others go on.
            use_tqdm: progress bar over the prompts on stderr; None shows it on a terminal for more than one prompt.

        Returns:
            One output a prompt, in order.

        Raises:
            RequestError: a prompt or parameter is invalid, or another thread is generating; nothing has been generated
                then.
            GenerationInterrupted: Ctrl-C; its `outputs` hold everything generated so far, and the LLM stays usable.
        """
        options = {"cache_salt": cache_salt, "timeout": timeout, "on_token": on_token}
        requests = self._requests(prompts, sampling_params, priority, **options)
        self._run(requests, use_tqdm)
        return [request.output() for request in requests]

    def stream(
        self,
        prompts: Prompts,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] = 0,
        cache_salt: str = "",
        timeout: float | None = None,
    ) -> Generator[TokenChunk, None, None]:
        """Like `generate`, handing out text as it becomes final.

        The joined texts of a sample's chunks are the text that `generate` returns. Closing the iterator ends the
        requests. Ctrl-C raises GenerationInterrupted as in `generate`. The call itself refuses invalid requests.
        """
        return self._stream(self._requests(prompts, sampling_params, priority, cache_salt=cache_salt, timeout=timeout))

    def encode(
        self,
        prompts: Prompts,
        pooling: Pooling = "last",
        *,
        normalize: bool = False,
        cache_salt: str = "",
        use_tqdm: bool | None = None,
    ) -> list[Tensor]:
        """Hidden states of the prompts after the final norm, for embeddings.

        Args:
            prompts: as in `generate`.
            pooling: "last" and "first" token, the "mean" over all, or "all" of them.
            normalize: divide each vector by its Euclidean length.

        Returns:
            For each prompt, on the CPU in fp32: [hidden_size], or [num_tokens, hidden_size] for "all".

        Raises:
            RequestError: a prompt or an argument is invalid; nothing has been run then.
            KeyboardInterrupt: Ctrl-C; the LLM stays usable.
        """
        if pooling not in get_args(Pooling):
            raise RequestError(f"pooling={brief(pooling)} must be one of {', '.join(get_args(Pooling))}")
        params = SamplingParams(max_tokens=0)
        requests = self._requests(prompts, params, pooling=pooling, cache_salt=cache_salt)
        self._run(requests, use_tqdm)
        vectors = []
        for request in requests:
            if request.pooled is None:
                raise request.error or RequestError(f"prompt {request.index} was aborted; nothing was encoded")
            vectors.append(request.pooled)
        return [torch.nn.functional.normalize(one, dim=-1) for one in vectors] if normalize else vectors

    def abort(self, request_index: int) -> bool:
        """End a request of the call that is running: from `on_token`, between two chunks, or from another thread.

        It keeps what it has and ends before the next step, with finish_reason "abort".

        Returns:
            Whether there was such a request and it had not ended.
        """
        open_requests = [] if self._closed else self.engine.open_requests
        request = next((one for one in open_requests if one.index == request_index), None)
        if request is None:
            return False
        self.engine.abort_soon(request)
        return True

    def stats(self) -> EngineStats:
        """Counts of the engine: steps, pages, preemptions, shared prefixes.

        Raises:
            RequestError: this LLM is closed.
        """
        if self._closed:
            raise RequestError("this LLM is closed; make a new one")
        return self.engine.stats()

    def close(self) -> None:
        """Give the cache, the captured graphs and the model back. Nothing can be generated any more; twice is once.

        Raises:
            RequestError: it is generating.
        """
        if not self._closed:
            self.engine.close()
            self._closed = True
            del self.model

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, requests: list[Request], use_tqdm: bool | None) -> None:
        if use_tqdm is None:
            use_tqdm = len(requests) > 1 and sys.stderr.isatty()
        try:
            with (
                closing(self.engine.run(requests)) as steps,
                ProgressBar(total=len(requests), desc="prompts", disable=not use_tqdm) as bar,
            ):
                for samples in steps:
                    ended = {s.request.index for s in samples if s.request.metrics.finished is not None}
                    bar.update(len(ended))
        except KeyboardInterrupt as interrupt:
            raise GenerationInterrupted(_aborted(requests)) from interrupt

    def _stream(self, requests: list[Request]) -> Generator[TokenChunk, None, None]:
        try:
            with closing(self.engine.run(requests)) as steps:
                for samples in steps:
                    for sample in samples:
                        yield chunk_of(sample)
        except KeyboardInterrupt as interrupt:
            raise GenerationInterrupted(_aborted(requests)) from interrupt

    def _requests(
        self,
        prompts: Prompts,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        priority: int | Sequence[int] = 0,
        **options: Any,
    ) -> list[Request]:
        listed = inputs.prompt_list(prompts)
        sampling_params = SamplingParams() if sampling_params is None else sampling_params
        params = inputs.one_each("sampling_params", SamplingParams, sampling_params, len(listed))
        priorities = inputs.one_each("priority", int, priority, len(listed))
        return [
            self.request(prompt, params[index], index, priority=priorities[index], **options)
            for index, prompt in enumerate(listed)
        ]

    def request(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams,
        index: int = 0,
        *,
        priority: int = 0,
        cache_salt: str = "",
        timeout: float | None = None,
        on_token: OnToken | None = None,
        pooling: Pooling | None = None,
    ) -> Request:
        """A request for `Engine.add`, checked. Its arguments are those of `generate`; `index` names it in messages.

        Raises:
            RequestError: the prompt or an argument is invalid, or this LLM is closed.
        """
        if self._closed:
            raise RequestError("this LLM is closed; make a new one")
        inputs.check_options(priority, cache_salt, timeout, on_token)
        prompt_ids: Sequence[int]
        if isinstance(prompt, str):
            prompt_ids = self.tokenizer.encode(prompt)
        elif inputs.is_chat(prompt):
            try:
                prompt_ids = self.tokenizer.apply_chat_template(cast(Any, prompt), add_generation_prompt=True)
            except (RequestError, TemplateError) as error:
                raise RequestError(f"prompt {index}: {error}") from error
        else:
            prompt_ids = inputs.id_list(prompt, index)
        resolved = sampling_params.resolve(
            self.generation_defaults,
            self.model.config.eos_token_id,
            prompt_len=len(prompt_ids),
            max_seq_len=self.engine.max_seq_len,
            vocab_size=self.model.config.vocab_size,
        )
        request = Request(
            prompt if isinstance(prompt, str) else None,
            # Made plain only now: a prompt that is too long by far has been refused by its length alone.
            inputs.plain_ids(prompt_ids),
            resolved,
            self.tokenizer,
            index,
            priority=priority,
            cache_salt=cache_salt,
            timeout=timeout,
            on_token=None if on_token is None else lambda sample: on_token(chunk_of(sample)),
            pooling=pooling,
        )
        self.engine.check(request)
        return request


def chunk_of(sample: Sample) -> TokenChunk:
    """What came to a sample since its last chunk."""
    text, token_ids = sample.news()
    return TokenChunk(
        request_index=sample.request.index,
        index=sample.index,
        text=text,
        token_ids=token_ids,
        finish_reason=sample.finish_reason,
        error=sample.request.error,
    )


def _aborted(requests: list[Request]) -> list[RequestOutput]:
    for request in requests:
        for sample in request.samples:
            if sample.finish_reason is None:
                sample.finish("abort")
                request.metrics.finished = time.monotonic()
    return [request.output() for request in requests]
