"""A tiny random model and an engine that records the logits it sampled from."""

import torch

from llama_fast.config import LlamaConfig
from llama_fast.engine.engine import Engine
from llama_fast.engine.request import Request
from llama_fast.engine.sampling import GenerationDefaults, SamplingParams
from llama_fast.model.int4_modules import int4_module, linears
from llama_fast.model.int4_rounding import round_weight
from llama_fast.model.llama import LlamaLM
from llama_fast.ops import select_backend, shared
from llama_fast.ops.int4 import pack_rows

# The module whose functions an engine without `backend` calls here.
OPS = select_backend("auto", torch.device("cpu"))


def to_int4(model, group_size=32, *, symmetric=True, head=False):
    """Round a model's projections in place; returns it."""
    for name, linear in list(linears(model)):
        if name == "lm_head" and not head:
            continue
        rounded, _ = round_weight(linear.weight, group_size, symmetric, model.dtype)
        int4 = int4_module(pack_rows(rounded.values), rounded.scales, rounded.zeros, linear.bias)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, int4)
    model.refresh()
    return model


class RecordingEngine(Engine):
    """Keeps every row of logits that was sampled from, by request and sample."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.recorded = {}
        self.decoder.on_logits = self._record

    def _record(self, samples, logits):
        for sample, row in zip(samples, logits, strict=False):
            if sample is not None:
                self.recorded.setdefault((sample.request.index, sample.index), []).append(row.clone())

    def generate(self, requests):
        """(tokens, logits) of every sample, keyed by (request index, sample index)."""
        self.recorded = {}
        for _ in self.run(requests):
            pass
        # Draws enqueued behind a sample's end are nobody's.
        return {
            (request.index, sample.index): (
                sample.token_ids,
                torch.stack(self.recorded[request.index, sample.index][: max(1, len(sample.token_ids))]),
            )
            for request in requests
            for sample in request.samples
        }


def make_model(dtype=torch.float32, seed=0, **changes):
    """Odd widths on purpose: 33 intermediate, 97 tokens."""
    fields = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 33,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        **changes,
    }
    torch.manual_seed(seed)
    return randomize(LlamaLM(LlamaConfig(**fields))).to(dtype)


def randomize(model):
    """Weights that make logits differ clearly and norms do something."""
    model.requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(0, 0.2) if parameter.ndim > 1 else parameter.uniform_(0.5, 1.5)
    return model


def make_request(model, prompt, index=0, *, max_seq_len=256, defaults=None, tokenizer=None, **params):
    resolved = SamplingParams(**params).resolve(
        defaults or GenerationDefaults(),
        None,
        prompt_len=len(prompt),
        max_seq_len=max_seq_len,
        vocab_size=model.config.vocab_size,
    )
    return Request(None, list(prompt), resolved, tokenizer, index)


def op_by_op(monkeypatch, ops=OPS):
    """The layers call the module's functions, which a test may have replaced, and not one native function for all."""

    def run_layers(layers, x, batch, cache):
        return shared.run_layers(getattr(layers, "layers", layers), x, batch, cache)

    monkeypatch.setattr(ops, "run_layers", run_layers)


def fail_at(monkeypatch, op_name, call, error):
    """The `call`-th use of an op (from 1) raises `error`; Ctrl-C is a KeyboardInterrupt wherever Python stands."""
    op, calls = getattr(OPS, op_name), []

    def failing(*args, **kwargs):
        calls.append(op_name)
        if len(calls) == call:
            raise error("injected")
        return op(*args, **kwargs)

    op_by_op(monkeypatch)
    monkeypatch.setattr(OPS, op_name, failing)
