"""LlamaForCausalLM as on the page: from_pretrained, forward with labels, save_pretrained, generate."""

from __future__ import annotations

import logging
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_fast.api.arguments import check_input_ids, kept_tokens, refuse_unsupported
from llama_fast.api.generation import GeneratingLM
from llama_fast.api.outputs import CausalLMOutputWithPast
from llama_fast.api.quantization import one_quantization
from llama_fast.engine.plan import check_weights
from llama_fast.engine.sampling import GenerationDefaults
from llama_fast.errors import RequestError, UnsupportedError
from llama_fast.hub import find_folder
from llama_fast.model.batch import Batch
from llama_fast.model.kv_cache import PAGE_SIZE, SPLIT_SIZE, PagedKVCache
from llama_fast.model.loading import open_checkpoint, read_model
from llama_fast.model.quantization import Int4Config
from llama_fast.model.saving import default_canary, save_model
from llama_fast.ops import reference, select_backend
from llama_fast.ops.replay import on_device
from llama_fast.ops.rows import needs_grad

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
        load: str = "mmap",
        quantization: str | Int4Config | None = None,
        quantization_config: object = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | None = None,
        local_files_only: bool = False,
        **unsupported: Any,
    ) -> Self:
        """Load a checkpoint folder or hub id.

        Args:
            pretrained_model_name_or_path: folder with config.json and safetensors, or a hub id `owner/name`.
            dtype: "auto" keeps the checkpoint's; else a torch dtype or its name.
            device: None picks the first GPU, else the CPU.
            backend: "auto", "reference", "cpu" or "gpu".
            load: "mmap" shares the weights' pages with their files on the CPU until they are written; "copy" reads
                them into memory of their own.
            quantization: "int4", or an Int4Config, rounds the projections' weights while they are read.
            quantization_config: the page's name for it: an Int4Config or a TorchAoConfig, transformers' own as well.
            revision, cache_dir, token, local_files_only: for hub ids, as in huggingface_hub.

        Raises:
            ConfigError, CheckpointError, BackendError: see errors.py.
            OutOfMemoryError: the weights do not fit; nothing has been read then.
            UnsupportedError: an argument of the page that is not supported yet, by name.
        """
        refuse_unsupported("from_pretrained", unsupported)
        quantization = one_quantization(quantization, quantization_config)
        folder = find_folder(
            pretrained_model_name_or_path,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
        )
        generation_defaults = GenerationDefaults.from_folder(folder)
        checkpoint = open_checkpoint(folder, dtype=dtype, device=device, quantization=quantization)
        generation_defaults.check_vocab(checkpoint.config.vocab_size)
        select_backend(backend, checkpoint.device, checkpoint.dtype)
        check_weights(checkpoint)
        model = read_model(cls, checkpoint, load=load)
        model.backend, model.generation_defaults = backend, generation_defaults
        return model

    def save_pretrained(self, save_directory: str | Path, *, max_shard_size: int | str = "5GB") -> None:
        """Write the weights, as safetensors shards of `max_shard_size`, config.json and generation_config.json.

        Each file is whole at any time, and the weights change all at once (see `save_weights`); the two small files
        follow at once. int4 weights are written as compressed-tensors' "pack-quantized" files, with a canary.

        Raises:
            ConfigError: the configuration cannot be written, or `max_shard_size` is no size; nothing is written then.
            UnsupportedError: int4 zeros that the format cannot hold.
            CheckpointIOError: a file cannot be written.
        """
        folder = Path(save_directory)
        canary = default_canary(self, select_backend(self.backend, self.device, self.dtype))
        save_model(self, folder, max_shard_size=max_shard_size, canary=canary)
        self.generation_defaults.save(folder)

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
                the mask. Restarts (packed sequences) are refused.
            labels: [batch_size, seq_len]; position t is scored on label t+1; -100 is ignored, and so is what a masked
                position would predict.
            logits_to_keep: 0 for all positions, n for the last n, or an index tensor.

        Autocast has no effect: cast the model instead.

        Returns:
            loss (mean cross entropy over the labels that count, in fp32) and logits.

        Raises:
            RequestError: shapes that do not fit.
            UnsupportedError: an argument of the page that is not supported yet.
        """
        refuse_unsupported("LlamaForCausalLM.forward", unsupported)
        self._check_forward(input_ids, position_ids, labels)
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise RequestError("labels need the logits of every position: leave logits_to_keep at 0")
        kept = kept_tokens(input_ids, attention_mask)
        if position_ids is not None and attention_mask is None and (position_ids.diff() < 0).any():
            raise UnsupportedError("position_ids that restart (packed sequences) are not supported yet; pad the rows")
        # The graph has roundings of its own, which autocast would change.
        with on_device(self.device), torch.autocast(self.device.type, enabled=False):
            logits = self._logits(input_ids, kept, position_ids, logits_to_keep)
            return CausalLMOutputWithPast(None if labels is None else _causal_loss(logits, labels, kept), logits)

    def _logits(
        self, input_ids: Tensor, kept: Tensor, position_ids: Tensor | None, logits_to_keep: int | Tensor
    ) -> Tensor:
        batch_size, seq_len = input_ids.shape
        ops = self._ops_for_call()
        self.prepare(ops)
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
        return logits

    def _check_forward(self, input_ids: Tensor, position_ids: Tensor | None, labels: Tensor | None) -> None:
        check_input_ids(input_ids)
        shape, vocab_size = tuple(input_ids.shape), self.config.vocab_size
        if int(input_ids.min()) < 0 or int(input_ids.max()) >= vocab_size:
            raise RequestError(f"input_ids hold an id outside the vocabulary, 0 to {vocab_size - 1}")
        if position_ids is not None:
            if tuple(position_ids.shape) not in (shape, (1, shape[1])):
                raise RequestError(f"position_ids has shape {tuple(position_ids.shape)}; input_ids has {shape}")
            if position_ids.is_floating_point() or position_ids.min() < 0:
                raise RequestError("position_ids must be integers from 0")
        if labels is not None:
            if tuple(labels.shape) != shape or labels.dtype != torch.int64:
                raise RequestError(
                    f"labels must be int64 {shape} as input_ids; got {labels.dtype} {tuple(labels.shape)}"
                )
            if (((labels < 0) & (labels != _IGNORED_LABEL)) | (labels >= vocab_size)).any():
                raise RequestError(f"labels must be {_IGNORED_LABEL} (ignored) or an id from 0 to {vocab_size - 1}")
        if self.training and self.config.attention_dropout:
            raise UnsupportedError(
                f"attention_dropout={self.config.attention_dropout} is not supported in training; set it to 0"
            )

    def _ops_for_call(self) -> ModuleType:
        ops = select_backend(self.backend, self.device, self.dtype)
        if ops is not reference and needs_grad(*self.parameters()):
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


def _causal_loss(logits: Tensor, labels: Tensor, kept: Tensor) -> Tensor:
    """Mean cross entropy of position t's logits against label t+1; NaN when no label counts, as on the page."""
    targets = labels[:, 1:].masked_fill(~kept[:, :-1], _IGNORED_LABEL)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=_IGNORED_LABEL)
