"""LLM: prompts in, texts out."""

from __future__ import annotations

import numbers
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import cast

import torch

from llama_fast.engine.engine import DEFAULT_MAX_BATCH, DEFAULT_PREFILL_CHUNK, Engine
from llama_fast.engine.outputs import RequestOutput, TokenChunk
from llama_fast.engine.plan import engine_sizes
from llama_fast.engine.request import Request
from llama_fast.engine.sampling import GenerationDefaults, SamplingParams
from llama_fast.errors import GenerationInterrupted, RequestError
from llama_fast.hub import find_folder
from llama_fast.model.kv_cache import PAGE_SIZE, SPLIT_SIZE
from llama_fast.model.llama import LlamaLM
from llama_fast.model.loading import check_tokenizer, open_checkpoint, read_model
from llama_fast.model.progress import ProgressBar
from llama_fast.model.quantization import Int4Config
from llama_fast.ops import select_backend
from llama_fast.tokenizer import LlamaTokenizer

Prompt = str | Sequence[int]


class LLM:
    """A model, its tokenizer and its engine.

    ```python
    llm = LLM("path/to/checkpoint")
    outputs = llm.generate(["Once upon a time", "The dog"], SamplingParams(temperature=0.8, seed=1))
    print(outputs[0].outputs[0].text)
    ```

    Args:
        model: checkpoint folder or hub id `owner/name`.
        device: None picks the first GPU, else the CPU.
        dtype: "auto" keeps the checkpoint's; else a torch dtype or its name.
        backend: "auto", "reference", "cpu" or "gpu".
        load: "mmap" shares the weights' pages with their files on the CPU; "copy" reads them into memory of their own,
            so that files may be rewritten while the model runs.
        quantization: "int4", or an Int4Config, rounds the projections' weights while they are read.
        max_batch, max_seq_len, cache_bytes, page_size, split_size, prefill_chunk, graphs, steps_ahead: see `Engine`.
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
        graphs: bool = True,
        steps_ahead: int | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | None = None,
        local_files_only: bool = False,
    ) -> None:
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
            graphs=graphs,
            steps_ahead=steps_ahead,
        )
        self.engine.make_ready()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | None = None,
    ) -> list[RequestOutput]:
        """Continue every prompt.

        Args:
            prompts: a text, a list of token ids, or a list of either. Texts get the tokenizer's bos token.
            sampling_params: one for all prompts or one for each; unset fields come from generation_config.json.
            use_tqdm: progress bar over the prompts on stderr; None shows it on a terminal for more than one prompt.

        Returns:
            One output a prompt, in order.

        Raises:
            RequestError: a prompt or parameter is invalid; nothing has been generated then.
            GenerationInterrupted: Ctrl-C; its `outputs` hold everything generated so far, and the LLM stays usable.
        """
        requests = self._requests(prompts, sampling_params)
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
        return [request.output() for request in requests]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Generator[TokenChunk, None, None]:
        """Like `generate`, handing out text as it becomes final.

        The joined texts of a sample's chunks are the text that `generate` returns. Closing the iterator ends the
        requests. Ctrl-C raises GenerationInterrupted as in `generate`. The call itself refuses invalid requests.
        """
        return self._stream(self._requests(prompts, sampling_params))

    def _stream(self, requests: list[Request]) -> Generator[TokenChunk, None, None]:
        try:
            with closing(self.engine.run(requests)) as steps:
                for samples in steps:
                    for sample in samples:
                        yield TokenChunk(
                            request_index=sample.request.index,
                            index=sample.index,
                            text=sample.new_text,
                            token_ids=[] if sample.finish_reason == "error" else sample.token_ids[-1:],
                            finish_reason=sample.finish_reason,
                            error=sample.request.error,
                        )
        except KeyboardInterrupt as interrupt:
            raise GenerationInterrupted(_aborted(requests)) from interrupt

    def _requests(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[Request]:
        prompt_list = _prompt_list(prompts)
        params: Sequence[SamplingParams] = ()
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            params = [sampling_params or SamplingParams()] * len(prompt_list)
        elif isinstance(sampling_params, list | tuple):
            params = sampling_params
        if len(params) != len(prompt_list) or not all(isinstance(one, SamplingParams) for one in params):
            raise RequestError(
                f"sampling_params must be SamplingParams, one for all or one for each of {len(prompt_list)} prompts"
            )
        config = self.model.config
        requests = []
        for index, (prompt, one) in enumerate(zip(prompt_list, params, strict=True)):
            prompt_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else _id_list(prompt, index)
            resolved = one.resolve(
                self.generation_defaults,
                config.eos_token_id,
                prompt_len=len(prompt_ids),
                max_seq_len=self.engine.max_seq_len,
                vocab_size=config.vocab_size,
            )
            text = prompt if isinstance(prompt, str) else None
            # Made plain only now: a prompt that is too long by far has been refused by its length alone.
            requests.append(Request(text, _plain(prompt_ids), resolved, self.tokenizer, index))
            self.engine.check(requests[-1])
        return requests


def _prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One text or one list of ids is one prompt; a list of either is several."""
    if isinstance(prompts, str):
        return [prompts]
    if hasattr(prompts, "tolist"):  # a tensor or array of ids
        prompts = prompts.tolist()
    if not isinstance(prompts, list | tuple):
        raise RequestError(
            f"prompts must be a text, a list of token ids, or a list of them; got {type(prompts).__name__}"
        )
    if len(prompts) and isinstance(prompts[0], numbers.Integral):
        return [cast(Sequence[int], prompts)]
    return list(cast(Sequence[Prompt], prompts))


def _id_list(prompt: Sequence[int], index: int) -> Sequence[int]:
    """A list, tuple, tensor or array as a list or tuple."""
    if hasattr(prompt, "tolist"):
        prompt = prompt.tolist()
    if not isinstance(prompt, list | tuple):
        raise RequestError(f"prompt {index} must be a text or a list of token ids; got {type(prompt).__name__}")
    return prompt


def _plain(prompt_ids: Sequence[int]) -> list[int]:
    """Plain ints for any integers; what is not an id is left for the engine to refuse."""
    return [i if isinstance(i, bool) or not isinstance(i, numbers.Integral) else int(i) for i in prompt_ids]


def _aborted(requests: list[Request]) -> list[RequestOutput]:
    for request in requests:
        for sample in request.samples:
            if sample.finish_reason is None:
                sample.finish("abort")
                request.metrics.finished = time.monotonic()
    return [request.output() for request in requests]
