"""LLM: prompts in, texts out."""

from __future__ import annotations

import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import cast

import torch
from tqdm import tqdm

from llama_fast.engine.engine import DEFAULT_MAX_BATCH, DEFAULT_PREFILL_CHUNK, Engine
from llama_fast.engine.outputs import RequestOutput, TokenChunk
from llama_fast.engine.request import Request
from llama_fast.engine.sampling import GenerationDefaults, SamplingParams
from llama_fast.errors import GenerationInterrupted, RequestError
from llama_fast.model.checkpoint import find_folder
from llama_fast.model.kv_cache import PAGE_SIZE, SPLIT_SIZE
from llama_fast.model.llama import LlamaLM
from llama_fast.model.loading import load_model
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
        max_batch, max_seq_len, cache_bytes, page_size, split_size, prefill_chunk: see `Engine`.
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
        max_batch: int = DEFAULT_MAX_BATCH,
        max_seq_len: int | None = None,
        cache_bytes: int | None = None,
        page_size: int = PAGE_SIZE,
        split_size: int = SPLIT_SIZE,
        prefill_chunk: int = DEFAULT_PREFILL_CHUNK,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | None = None,
        local_files_only: bool = False,
    ) -> None:
        folder = find_folder(
            model, revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only
        )
        self.tokenizer = LlamaTokenizer.from_pretrained(folder)
        self.generation_defaults = GenerationDefaults.from_folder(folder)
        self.model: LlamaLM = load_model(LlamaLM, folder, dtype=dtype, device=device)
        self.engine = Engine(
            self.model,
            backend=backend,
            max_batch=max_batch,
            max_seq_len=max_seq_len,
            cache_bytes=cache_bytes,
            page_size=page_size,
            split_size=split_size,
            prefill_chunk=prefill_chunk,
        )

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
        steps = self.engine.run(requests)
        try:
            with tqdm(total=len(requests), desc="prompts", disable=not use_tqdm) as bar:
                for samples in steps:
                    ended = [s.request for s in samples if s.request.metrics.finished is not None]
                    bar.update(len({id(request) for request in ended}))
        except KeyboardInterrupt as interrupt:
            steps.close()
            raise GenerationInterrupted(_aborted(requests)) from interrupt
        return [request.output() for request in requests]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Generator[TokenChunk, None, None]:
        """Like `generate`, handing out text as it becomes final.

        The joined texts of a sample's chunks are the text that `generate` returns. Closing the iterator ends the
        requests. Ctrl-C raises GenerationInterrupted as in `generate`.
        """
        requests = self._requests(prompts, sampling_params)
        steps = self.engine.run(requests)
        try:
            for samples in steps:
                for sample in samples:
                    new_ids = sample.token_ids[-1:] if sample.finish_reason != "error" else []
                    yield TokenChunk(sample.request.index, sample.index, sample.new_text, new_ids, sample.finish_reason)
        except KeyboardInterrupt as interrupt:
            steps.close()
            raise GenerationInterrupted(_aborted(requests)) from interrupt
        finally:
            steps.close()

    def _requests(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[Request]:
        prompt_list = _prompt_list(prompts)
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            params = [sampling_params or SamplingParams()] * len(prompt_list)
        else:
            params = list(sampling_params)
        if len(params) != len(prompt_list):
            raise RequestError(
                f"{len(params)} sampling_params for {len(prompt_list)} prompts; give one, or one for each"
            )
        config = self.model.config
        requests = []
        for index, (prompt, one) in enumerate(zip(prompt_list, params, strict=True)):
            prompt_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
            resolved = one.resolve(
                self.generation_defaults,
                config.eos_token_id,
                prompt_len=len(prompt_ids),
                max_seq_len=self.engine.max_seq_len,
                vocab_size=config.vocab_size,
            )
            text = prompt if isinstance(prompt, str) else None
            requests.append(Request(text, prompt_ids, resolved, self.tokenizer, index))
        return requests


def _prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One text or one list of ids is one prompt; anything else is a list of prompts."""
    if isinstance(prompts, str):
        return [prompts]
    if len(prompts) and isinstance(prompts[0], int):
        return [cast(Sequence[int], prompts)]
    return list(cast(Sequence[Prompt], prompts))


def _aborted(requests: list[Request]) -> list[RequestOutput]:
    for request in requests:
        for sample in request.samples:
            if sample.finish_reason is None:
                sample.finish("abort")
    return [request.output() for request in requests]
