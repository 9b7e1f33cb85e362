"""Outputs of the page's classes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class CausalLMOutputWithPast:
    """What `LlamaForCausalLM.forward` returns.

    Attributes:
        loss: scalar, if labels were given.
        logits: [batch_size, positions kept, vocab_size], fp32; zeros where the attention mask is 0.
    """

    loss: Tensor | None
    logits: Tensor
