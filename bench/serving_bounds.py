"""What serving has to read and to multiply, and how long that takes at the rates of this machine.

A phase takes at least its bytes over the bandwidth or its FLOPs over the matmul rate, whichever is more:

    prefill       weights read once, K and V of the prompts written; FLOPs of the layers, of attention under its causal
                  mask and of the LM head on each prompt's last token
    decode step   weights read once, K and V of every sequence's context read; the same FLOPs for one token a sequence

An embedding counts only where it is the LM head too: else only rows of it are read. A model that fits the CPU's cache
may beat its bound, and on a GPU, whose bandwidth is that of a copy, what only reads may come out a little ahead.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from gpu_timing import Gpu
from timing import linear_flops, read_bandwidth

from llama_fast.model.llama import LlamaLM


def decode_weight_bytes(model: LlamaLM) -> int:
    """What a decode step reads of the weights: all of them once, but of an embedding of its own only a few rows."""
    unread = set() if model.config.tie_word_embeddings else {model.model.embed_tokens.weight}
    return sum(parameter.nbytes for parameter in model.parameters() if parameter not in unread)


def decode_kv_bytes(model: LlamaLM, batch_size: int, context: float) -> float:
    """What a decode step reads of the cache: K and V of `context` tokens for each sequence."""
    config = model.config
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return batch_size * context * values * model.dtype.itemsize


def prefill_flops(model: LlamaLM, batch_size: int, prompt_len: int) -> int:
    """Two FLOPs for each multiply-add of the layers' matmuls, Q K^T, P V and the LM head on the last tokens."""
    pairs = prompt_len * (prompt_len + 1) // 2  # (query, key) under the causal mask
    layers, head, attended = _multiply_adds(model)
    return 2 * batch_size * (prompt_len * layers + pairs * attended + head)


def decode_flops(model: LlamaLM, batch_size: int, context: float) -> float:
    """The same for one token of each sequence, which attends to `context` tokens."""
    layers, head, attended = _multiply_adds(model)
    return 2 * batch_size * (layers + context * attended + head)


def _multiply_adds(model: LlamaLM) -> tuple[int, int, int]:
    """Of a token in the layers' matmuls, of a token in the LM head, of a (query, key) pair in all layers."""
    config = model.config
    layers = sum(parameter.numel() for parameter in model.model.layers.parameters() if parameter.ndim == 2)
    attended = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return layers, config.vocab_size * config.hidden_size, attended


@dataclass(frozen=True)
class Work:
    """Bytes to move and FLOPs to do."""

    num_bytes: float
    flops: float

    def __add__(self, other: Work) -> Work:
        return Work(self.num_bytes + other.num_bytes, self.flops + other.flops)

    def __mul__(self, times: float) -> Work:
        return Work(times * self.num_bytes, times * self.flops)


@dataclass(frozen=True)
class Rates:
    """What the machine reached by itself: the denominators of every bound.

    Attributes:
        name: of the GPU; None on a CPU.
    """

    bytes_per_s: float
    flops_per_s: float
    name: str | None = None

    def seconds(self, work: Work) -> float:
        """What one phase takes at least."""
        return max(work.num_bytes / self.bytes_per_s, work.flops / self.flops_per_s)

    def terms(self, work: Work) -> str:
        """Both terms of the bound, in words."""
        return (
            f"{work.num_bytes / 1e6:,.1f} MB at {self.bytes_per_s / 1e9:,.1f} GB/s = "
            f"{1e3 * work.num_bytes / self.bytes_per_s:.3f} ms, {work.flops / 1e9:,.3f} GFLOP at "
            f"{self.flops_per_s / 1e9:,.1f} GFLOP/s = {1e3 * work.flops / self.flops_per_s:.3f} ms"
        )


def prefill_work(model: LlamaLM, batch_size: int, prompt_len: int) -> Work:
    """Of `batch_size` prompts, up to the first token of each."""
    num_bytes = decode_weight_bytes(model) + decode_kv_bytes(model, batch_size, prompt_len)
    return Work(num_bytes, prefill_flops(model, batch_size, prompt_len))


def decode_work(model: LlamaLM, batch_size: int, context: float) -> Work:
    """Of one step in which every sequence gets a token."""
    num_bytes = decode_weight_bytes(model) + decode_kv_bytes(model, batch_size, context)
    return Work(num_bytes, decode_flops(model, batch_size, context))


def measure_rates(device: torch.device, dtype: torch.dtype, smoke: bool) -> Rates:
    """Of this machine, now; on a GPU those of gpu_timing.Gpu, whose matmul is in bf16 for every dtype."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        gpu = Gpu(seconds_per_case=0.01)
        rates = Rates(gpu.bandwidth, gpu.flops, gpu.name)
        del gpu
        torch.cuda.empty_cache()
        return rates
    # Without its instructions a CPU multiplies bf16 more slowly than fp32, which kernels widen to.
    flops = max(linear_flops(one, 256 if smoke else 1024) for one in {dtype, torch.float32})
    return Rates(read_bandwidth(2**26 if smoke else 2**29), flops)
