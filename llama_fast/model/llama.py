"""The Llama graph on packed tokens: five ops a layer, run by whichever backend the batch carries.

Modules hold parameters under the checkpoint's names; what the ops read are weights prepared from them by the backend.
Source: Llama, arXiv:2302.13971; Llama 2, arXiv:2307.09288; rounding and layout as Hugging Face's LlamaForCausalLM.
"""

from __future__ import annotations

from itertools import islice
from types import ModuleType
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from llama_fast.config import LlamaConfig
from llama_fast.errors import UnsupportedError
from llama_fast.model.batch import Batch
from llama_fast.model.kv_cache import LayerPages, PagedKVCache
from llama_fast.model.rope import RotaryEmbedding
from llama_fast.ops.int4 import Int4Linear


class Linear(nn.Linear):
    """nn.Linear whose weights come from a checkpoint or `init_weights`.

    PyTorch's own initialisation would be thrown away, and on the meta device it costs a second of imports.
    """

    def reset_parameters(self) -> None:
        """Leave the parameters as they are."""


class Embedding(nn.Embedding):
    """nn.Embedding, likewise."""

    def reset_parameters(self) -> None:
        """Leave the parameters as they are."""


class Norm(NamedTuple):
    """What an op reads of a norm: weight [hidden_size] and eps."""

    weight: Tensor
    eps: float


class RMSNorm(nn.Module):
    """Parameters of a root-mean-square norm: weight [hidden_size] and eps."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def prepare(self) -> Norm:
        """Its parameters as they are now; a module's attributes cost a small model's decoding step too much."""
        return Norm(self.weight, self.eps)


class Attention(nn.Module):
    """Parameters of the attention projections."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        query_size = config.num_attention_heads * config.head_dim
        key_value_size = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.v_proj = Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.o_proj = Linear(query_size, config.hidden_size, bias=config.attention_bias)


class MLP(nn.Module):
    """Parameters of the gated feed-forward projections."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)


class DecoderLayer(nn.Module):
    """One layer: attention and feed-forward, each behind a norm and a residual."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_act = config.hidden_act

    def prepare(self, ops: ModuleType) -> None:
        """Let the backend make its weights from the parameters as they are now."""
        attn, mlp = self.self_attn, self.mlp
        self.attention_norm, self.mlp_norm = self.input_layernorm.prepare(), self.post_attention_layernorm.prepare()
        self.qkv_proj: Any = ops.prepare_linear([attn.q_proj, attn.k_proj, attn.v_proj])
        self.o_proj: Any = ops.prepare_linear([attn.o_proj])
        self.gate_up_proj: Any = ops.prepare_linear([mlp.gate_proj, mlp.up_proj], activation=self.hidden_act)
        self.down_proj: Any = ops.prepare_linear([mlp.down_proj])

    def forward(self, x: Tensor, batch: Batch, pages: LayerPages) -> Tensor:
        """x [num_tokens, hidden_size] -> the same shape; K and V of the batch's tokens are written into `pages`."""
        ops = batch.ops
        q = ops.norm_qkv_rope_cache(x, self.attention_norm, self.qkv_proj, batch, pages)
        x = ops.linear_residual(ops.attention(q, pages, batch), self.o_proj, x, batch)
        h = ops.norm_gate_up_act(x, self.mlp_norm, self.gate_up_proj, batch)
        return ops.linear_residual(h, self.down_proj, x, batch)


class LlamaDecoder(nn.Module):
    """Embedding, layers and final norm: the checkpoint's `model.` part."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        # First, because it validates the configuration: ConfigError before torch complains of a shape.
        self.rotary = RotaryEmbedding(config)
        # Old files say -1 for "none".
        pad = config.pad_token_id if config.pad_token_id in range(config.vocab_size) else None
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, pad)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def settings(self) -> tuple:
        """What prepared weights depend on besides parameters."""
        layers = [cast(DecoderLayer, layer) for layer in self.layers]
        epsilons = [(layer.input_layernorm.eps, layer.post_attention_layernorm.eps) for layer in layers]
        return self.config.num_hidden_layers, self.norm.eps, epsilons

    def prepare(self, ops: ModuleType) -> None:
        """Let the backend make its weights of every layer that the configuration counts."""
        layers = [cast(DecoderLayer, layer) for layer in islice(self.layers, self.config.num_hidden_layers)]
        for layer in layers:
            layer.prepare(ops)
        self.prepared_layers: Any = ops.prepare_layers(layers)

    def run(self, batch: Batch, cache: PagedKVCache) -> Tensor:
        """Hidden states [num_tokens, hidden_size] after the last layer, before the final norm; fills the cache."""
        x = batch.ops.embed(batch.token_ids, self.embed_tokens)
        return batch.ops.run_layers(self.prepared_layers, x, batch, cache)


class LlamaLM(nn.Module):
    """The decoder and its LM head; parameters carry the checkpoint's names.

    Args:
        config: the model's configuration. Weights are random (see `init_weights`), or absent on the meta device.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = LlamaDecoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self._prepared: tuple | None = None
        if self.device.type != "meta":
            self.init_weights()

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters and of the activations."""
        return self.model.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """As nn.Module's.

        Raises:
            UnsupportedError: gradients are wanted of int4 weights; nothing has changed then.
        """
        if requires_grad and any(isinstance(module, Int4Linear) for module in self.modules()):
            raise UnsupportedError("int4 weights cannot be trained; load the model with float weights")
        return super().requires_grad_(requires_grad)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Random weights: Linear and Embedding ~ N(0, initializer_range), biases and the padding row 0, norms 1."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(0.0, self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()

    def prepare(self, ops: ModuleType) -> object:
        """Make the backend's weights anew if a parameter, a setting or the backend changed since the last call.

        Returns:
            The same object as long as the weights that ops read stay where they are.
        """
        if self._prepared is not None and self._prepared == (ops.__name__, self.model.settings(), self._versions()):
            return self._prepared
        self.model.prepare(ops)
        self.prepared_head: Any = ops.prepare_linear([self.lm_head])
        self.prepared_norm = self.model.norm.prepare()
        # Taken again: a backend may have joined parameters and made them views of the whole.
        self._prepared = (ops.__name__, self.model.settings(), self._versions())
        return self._prepared

    @property
    def prepared(self) -> object:
        """What `prepare` returned last; None where it must run again."""
        return self._prepared

    def linears(self) -> list[Any]:
        """The backend's weights of one layer, which stand for all layers, and of the head."""
        layer = cast(DecoderLayer, self.model.layers[0])
        return [layer.qkv_proj, layer.o_proj, layer.gate_up_proj, layer.down_proj, self.prepared_head]

    def __getstate__(self) -> dict[str, Any]:
        # A copy's parameters are others.
        return {**self.__dict__, "_prepared": None}

    def _versions(self) -> list[tuple[int, int, int]]:
        # Tensors made in inference mode count no versions: their writes need `refresh`.
        return [(id(p), p.data_ptr(), -1 if p.is_inference() else p._version) for p in self.parameters()]

    def refresh(self) -> None:
        """Drop the backend's weights, for writes through `.data` that PyTorch does not count."""
        self._prepared = None

    def logits(self, hidden_states: Tensor, ops: ModuleType) -> Tensor:
        """hidden_states [num_tokens, hidden_size] as `run` returns them -> logits [num_tokens, vocab_size], fp32."""
        return ops.norm_lm_head(hidden_states, self.prepared_norm, self.prepared_head)
