"""generate() as on the page: padded tensors in, padded tensors out, over the engine."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from llama_fast.api.arguments import check_input_ids, kept_tokens, refuse_unsupported
from llama_fast.config import LlamaConfig
from llama_fast.engine.engine import Engine
from llama_fast.engine.parameter_checks import checked, id_tuple
from llama_fast.engine.request import Request
from llama_fast.engine.sampling import GenerationDefaults, SamplingParams
from llama_fast.errors import GenerationInterrupted, RequestError
from llama_fast.model.llama import LlamaLM
from llama_fast.ops import select_backend

# Hugging Face's budget when nothing says how much to generate.
_DEFAULT_NEW_TOKENS = 20


class GeneratingLM(LlamaLM):
    """A LlamaLM with `generate`.

    Attributes:
        backend: "auto", "reference", "cpu" or "gpu".
        generation_defaults: of the checkpoint's generation_config.json.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.backend = "auto"
        self.generation_defaults = GenerationDefaults()
        self._engine: Engine | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model makes an engine of its own.
        return {**super().__getstate__(), "_engine": None}

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        min_new_tokens: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        eos_token_id: int | Sequence[int] | Tensor | None = None,
        pad_token_id: int | None = None,
        num_return_sequences: int = 1,
        seed: int | None = None,
        **unsupported: Any,
    ) -> Tensor:
        """Continue every row.

        Arguments that are not given come from generation_config.json, then from the defaults below.

        Args:
            input_ids: [batch_size, seq_len].
            attention_mask: [batch_size, seq_len] of 1 and 0, padding on either side. Without one, pad tokens are taken
                for padding if pad and eos differ, else every token counts.
            max_new_tokens: most tokens to generate; beats max_length. Default 20, at most to the context's end.
            max_length: the same counted with the padded prompt.
            min_new_tokens: eos is forbidden before.
            do_sample: False for greedy.
            temperature, top_k, top_p, min_p: for sampling. An unset top_k is off (the page's default is 50).
            repetition_penalty: over prompt and generated tokens.
            eos_token_id: one or several ids that end a row; -1 or an empty list for none.
            pad_token_id: fills rows that ended; default the first eos.
            num_return_sequences: samples a row; rows of one prompt stand together.
            seed: of the whole call; row i uses seed + i. Unset, seeds are drawn from torch's default generator.

        Returns:
            [batch_size * num_return_sequences, seq_len + longest continuation]: prompts as given, new tokens, padding.

        Raises:
            RequestError: an argument is invalid.
            UnsupportedError: an argument of the page that is not supported yet, by name.
            GenerationInterrupted: Ctrl-C; its `outputs` is the tensor of what was generated so far.
        """
        refuse_unsupported("generate", unsupported)
        check_input_ids(input_ids)
        defaults = self._call_defaults(do_sample, eos_token_id)
        pad_token_id = self._pad_token_id(pad_token_id, defaults)
        mask = self._prompt_mask(input_ids, attention_mask, pad_token_id, defaults)
        asked = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        ignored = [name for name, value in asked.items() if value]  # temperature=0 asks for what it gets
        if ignored and not defaults.do_sample:
            warnings.warn(f"no effect without do_sample=True: {', '.join(ignored)}", stacklevel=2)
        base_seed = None if seed is None else checked("seed", seed)
        new_tokens = self._new_token_budget(input_ids.shape[1], max_new_tokens, max_length, defaults)
        # A budget that nobody asked for ends with the context; one that was asked for may go beyond, with a warning.
        explicit = max_new_tokens is not None or max_length is not None
        limit = self.model.rotary.context_len
        requests = []
        for index, (row, kept) in enumerate(zip(input_ids, mask, strict=True)):
            prompt_ids = row[kept].tolist()
            params = SamplingParams(
                n=checked("num_return_sequences", num_return_sequences),
                max_tokens=new_tokens if explicit else min(new_tokens, max(1, limit - len(prompt_ids))),
                min_tokens=0 if min_new_tokens is None else checked("min_new_tokens", min_new_tokens),
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                seed=None if base_seed is None else (base_seed + index) % (1 << 64),
            )
            params = dataclasses.replace(params, temperature=0.0) if not defaults.do_sample else params
            resolved = params.resolve(
                defaults,
                self.config.eos_token_id,
                prompt_len=len(prompt_ids),
                max_seq_len=max(limit, len(prompt_ids) + new_tokens) if explicit else limit,
                vocab_size=self.config.vocab_size,
            )
            requests.append(Request(None, prompt_ids, resolved, None, index))

        try:
            with closing(self._engine_for(requests).run(requests)) as steps:
                for _ in steps:
                    pass
        except KeyboardInterrupt as interrupt:
            raise GenerationInterrupted(_padded(input_ids, requests, pad_token_id)) from interrupt
        for request in requests:
            if request.error is not None:
                raise request.error
        return _padded(input_ids, requests, pad_token_id)

    def _call_defaults(
        self, do_sample: bool | None, eos_token_id: int | Sequence[int] | Tensor | None
    ) -> GenerationDefaults:
        changes: dict[str, Any] = {}
        if do_sample is not None:
            changes["do_sample"] = checked("do_sample", do_sample)
        if eos_token_id is not None:
            given = eos_token_id.tolist() if hasattr(eos_token_id, "tolist") else eos_token_id
            # -1 is a common way to say "none".
            changes["eos_token_id"] = list(id_tuple("eos_token_id", [] if given == -1 else given))
        return dataclasses.replace(self.generation_defaults, **changes)

    def _eos_token_ids(self, defaults: GenerationDefaults) -> list[int]:
        eos = self.config.eos_token_id if defaults.eos_token_id is None else defaults.eos_token_id
        return list(id_tuple("eos_token_id", None if eos == -1 else eos))

    def _pad_token_id(self, given: int | None, defaults: GenerationDefaults) -> int | None:
        """The pad token that somebody set, else the first eos, else None."""
        if given is not None and (type(given) is not int or not 0 <= given < self.config.vocab_size):
            raise RequestError(
                f"pad_token_id={given!r} is not an id of the vocabulary, 0 to {self.config.vocab_size - 1}"
            )
        for candidate in (given, defaults.pad_token_id, self.config.pad_token_id, *self._eos_token_ids(defaults)):
            if candidate is not None and candidate >= 0:  # old files say -1 for "none"
                return candidate
        return None

    def _prompt_mask(
        self, input_ids: Tensor, attention_mask: Tensor | None, pad_token_id: int | None, defaults: GenerationDefaults
    ) -> Tensor:
        """bool [batch_size, seq_len]: which tokens are prompt."""
        if attention_mask is not None:
            return kept_tokens(input_ids, attention_mask)
        everything = torch.ones_like(input_ids, dtype=torch.bool)
        if pad_token_id is None or not (input_ids == pad_token_id).any():
            return everything
        if pad_token_id not in self._eos_token_ids(defaults):
            return input_ids.ne(pad_token_id)
        if input_ids.shape[0] > 1:
            warnings.warn(
                "pad_token_id is an eos token and occurs in input_ids; every token counts as text: pass attention_mask",
                stacklevel=3,
            )
        return everything

    def _new_token_budget(
        self, seq_len: int, max_new_tokens: int | None, max_length: int | None, defaults: GenerationDefaults
    ) -> int:
        if max_new_tokens is not None:
            return checked("max_new_tokens", max_new_tokens)
        if max_length is None and defaults.max_new_tokens is not None:
            return defaults.max_new_tokens
        max_length = defaults.max_length if max_length is None else checked("max_length", max_length)
        if max_length is None:
            warnings.warn(
                f"neither max_new_tokens nor max_length is given: generating at most {_DEFAULT_NEW_TOKENS} tokens",
                stacklevel=3,
            )
            return _DEFAULT_NEW_TOKENS
        if seq_len >= max_length:
            raise RequestError(
                f"input_ids has {seq_len} tokens, max_length={max_length}; raise it or use max_new_tokens"
            )
        return max_length - seq_len

    def _engine_for(self, requests: list[Request]) -> Engine:
        """The model's engine; rebuilt only when a call needs more than it has, or the weights moved."""
        max_batch = max(16, sum(request.sampling.n for request in requests))
        max_seq_len = max(request.samples[0].sequence.max_len for request in requests)
        engine = self._engine
        if (
            engine is None
            or engine.max_batch < max_batch
            or engine.max_seq_len < max_seq_len
            or engine.cache.pool.shape[0] < self.config.num_hidden_layers
            or engine.cache.pool.dtype != self.dtype
            or engine.cache.pool.device != self.device
            or engine.ops is not select_backend(self.backend, self.device, self.dtype)
        ):
            # Twice the length that is needed, up to the context's end: a conversation grows with every call.
            max_seq_len = max(max_seq_len, min(2 * max_seq_len, self.model.rotary.context_len))
            if engine is not None:
                max_batch, max_seq_len = max(max_batch, engine.max_batch), max(max_seq_len, engine.max_seq_len)
            engine = self._engine = None  # frees the old cache before the new one is made
            engine = self._engine = Engine(self, backend=self.backend, max_batch=max_batch, max_seq_len=max_seq_len)
        return engine


def _padded(input_ids: Tensor, requests: list[Request], pad_token_id: int | None) -> Tensor:
    samples = [sample for request in requests for sample in request.samples]
    longest = max((len(sample.token_ids) for sample in samples), default=0)
    new = input_ids.new_full((len(samples), longest), 0 if pad_token_id is None else pad_token_id)
    for row, sample in enumerate(samples):
        new[row, : len(sample.token_ids)] = new.new_tensor(sample.token_ids)
    copies = len(samples) // max(1, len(requests))
    return torch.cat((input_ids.repeat_interleave(copies, dim=0), new), dim=1)
