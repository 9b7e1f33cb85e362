"""LlamaForCausalLM as on the page: from_pretrained, forward with labels, save_pretrained, generate."""

from __future__ import annotations

import logging
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_fast.api.generation import GeneratingLM
from llama_fast.api.outputs import CausalLMOutputWithPast
from llama_fast.engine.sampling import GenerationDefaults
from llama_fast.errors import RequestError, UnsupportedError
from llama_fast.model.batch import Batch
from llama_fast.model.checkpoint import find_folder, save_weights
from llama_fast.model.kv_cache import PAGE_SIZE, SPLIT_SIZE, PagedKVCache
from llama_fast.model.loading import load_model
from llama_fast.ops import reference, select_backend

logger = logging.getLogger(__name__)

_IGNORED_LABEL = -100


class LlamaForCausalLM(GeneratingLM):
    """Llama with a language-model head.

    `LlamaForCausalLM(config)` has random weights and trains; `from_pretrained` gives parameters that do not require
    gradients (call `requires_grad_()` to fine-tune) and share their pages with the file until they are written.
    """

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        dtype: str | torch.dtype | None = "auto",
        device: str | int | torch.device | None = None,
        backend: str = "auto",
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Load a checkpoint folder or hub id.

        Args:
            pretrained_model_name_or_path: folder with config.json and safetensors, or a hub id `owner/name`.
            dtype: "auto" keeps the checkpoint's; else a torch dtype or its name.
            device: None picks the first GPU, else the CPU.
            backend: "auto", "reference", "cpu" or "gpu".
            revision, cache_dir, token, local_files_only: for hub ids, as in huggingface_hub.

        Raises:
            ConfigError, CheckpointError, UnsupportedError, BackendError: see errors.py.
        """
        folder = find_folder(
            pretrained_model_name_or_path,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
        )
        model = load_model(cls, folder, dtype=dtype, device=device)
        select_backend(backend, model.device)
        model.backend = backend
        model.generation_defaults = GenerationDefaults.from_folder(folder)
        return model

    def save_pretrained(self, save_directory: str | Path, *, max_shard_size: int | str = "5GB") -> None:
        """Write config.json, generation_config.json and the weights, as safetensors shards of `max_shard_size`."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.dtype = self.dtype
        self.config.architectures = [type(self).__name__]
        self.config.save_pretrained(folder)
        self.generation_defaults.save(folder)
        save_weights(self, folder, max_shard_size=max_shard_size)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **unsupported: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of whole sequences; with labels also the loss.

        Args:
            input_ids: [batch_size, seq_len].
            attention_mask: [batch_size, seq_len] of 1 and 0; padding may stand on either side. Logits of masked
                positions are zeros.
            position_ids: [batch_size, seq_len] or [1, seq_len]; default 0..seq_len-1, as on the page not derived from
                the mask.
            labels: [batch_size, seq_len]; position t is scored on label t+1; -100 is ignored.
            logits_to_keep: 0 for all positions, n for the last n, or an index tensor.

        Returns:
            loss (mean cross entropy over the labels that count, in fp32) and logits.

        Raises:
            RequestError: shapes that do not fit.
            UnsupportedError: an argument of the page that is not supported yet.
        """
        for name, value in unsupported.items():
            if value is not None:
                raise UnsupportedError(f"LlamaForCausalLM.forward({name}=...) is not supported yet")
        batch_size, seq_len = _check_shapes(input_ids, attention_mask, position_ids, labels)
        ops = self._ops_for_call()
        self.prepare(ops)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        kept = mask.bool()
        batch = self._pack(ops, input_ids, kept, position_ids)
        cache = PagedKVCache(self.config, max(1, batch.page_table.numel()), dtype=self.dtype, device=self.device)
        hidden_states = self.model.run(batch, cache)

        columns = torch.arange(seq_len, device=input_ids.device)
        columns = columns[-logits_to_keep:] if isinstance(logits_to_keep, int) else columns[logits_to_keep]
        packed_row = (kept.flatten().cumsum(0) - 1).view(batch_size, seq_len)[:, columns]
        wanted = kept[:, columns]
        packed_logits = self.logits(hidden_states[packed_row[wanted]], ops)
        logits = packed_logits.new_zeros(*wanted.shape, packed_logits.shape[-1])
        logits[wanted] = packed_logits
        return CausalLMOutputWithPast(None if labels is None else _causal_loss(logits, labels), logits)

    def _ops_for_call(self) -> ModuleType:
        ops = select_backend(self.backend, self.device)
        if ops is not reference and torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            logger.info("gradients are wanted: this call runs on the reference backend, kernels are inference-only")
            return reference
        return ops

    def _pack(self, ops: ModuleType, input_ids: Tensor, kept: Tensor, position_ids: Tensor | None) -> Batch:
        """The unpadded tokens of all rows; each row starts at slot 0 of pages of its own."""
        batch_size, seq_len = input_ids.shape
        device = input_ids.device
        if position_ids is None:
            position_ids = torch.arange(seq_len, device=device)[None]
        position_ids = position_ids.expand(batch_size, seq_len)
        lengths = kept.sum(-1)
        # Every token of the call is prompt: its row's longest position rotates it.
        rope_lens = position_ids.masked_fill(~kept, -1).amax(-1, keepdim=True).expand(batch_size, seq_len) + 1
        cos, sin = self.model.rotary(position_ids[kept], rope_lens[kept])
        pages_per_row = -(-seq_len // PAGE_SIZE)
        return Batch(
            ops=ops,
            token_ids=input_ids[kept],
            slots=(kept.cumsum(-1) - 1)[kept],
            seq_ids=torch.arange(batch_size, device=device)[:, None].expand_as(kept)[kept],
            query_starts=F.pad(lengths.cumsum(0), (1, 0)),
            seq_lens=lengths,
            page_table=torch.arange(batch_size * pages_per_row, device=device).view(batch_size, pages_per_row),
            cos=cos,
            sin=sin,
            split_size=SPLIT_SIZE,
        )


def _check_shapes(
    input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, labels: Tensor | None
) -> tuple[int, int]:
    if input_ids.ndim != 2 or input_ids.dtype not in (torch.int64, torch.int32) or not input_ids.numel():
        raise RequestError(
            "input_ids must be integers [batch_size, seq_len], not empty; "
            f"got {input_ids.dtype} {tuple(input_ids.shape)}"
        )
    shape = tuple(input_ids.shape)
    for name, tensor in (("attention_mask", attention_mask), ("labels", labels), ("position_ids", position_ids)):
        if tensor is None:
            continue
        accepted = (shape, (1, shape[1])) if name == "position_ids" else (shape,)
        if tuple(tensor.shape) not in accepted:
            raise RequestError(f"{name} has shape {tuple(tensor.shape)}; input_ids [batch_size, seq_len] is {shape}")
    return shape[0], shape[1]


def _causal_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of position t's logits against label t+1; NaN when every label is ignored, as on the page."""
    if labels.shape[1] != logits.shape[1]:
        raise RequestError(f"labels need the logits of every position; got logits_to_keep={logits.shape[1]}")
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=_IGNORED_LABEL)
