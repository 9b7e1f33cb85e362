"""After an engine is ready nothing is compiled: what it launches then, with any prompts, was launched before.

The launches are those that the launchers would make on a GPU, with Triton's own specialisation (kernels/launches.py).
Tensors have no memory, so models of real shapes cost nothing.
"""

import os
import random

import pytest
import torch
from triton.runtime import driver

from llama_fast.config import LlamaConfig
from llama_fast.engine.decode_graph import DecodeGraph
from llama_fast.engine.warm_up import warm_up
from llama_fast.kernels import launches
from llama_fast.model.batch import Chunk, pack
from llama_fast.model.kv_cache import PagedKVCache
from llama_fast.model.llama import LlamaLM
from llama_fast.ops import gpu
from llama_fast.ops.int4 import Int4Linear
from tests.engine.graph_double import capturing

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="about compiled kernels")


@pytest.fixture(autouse=True)
def _chip_for_a_test(monkeypatch):
    """`recording` makes Triton compile for a chip that is not here; afterwards it is as before."""
    monkeypatch.setattr(driver, "_active", None)


META = torch.device("meta")
SHAPES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8},
    "odd": {"hidden_size": 48, "intermediate_size": 33, "num_attention_heads": 6, "num_key_value_heads": 2},
}
# Names of these are of models whose projections are quantized.
SHAPES |= {"1b int4": SHAPES["1b"], "odd int4": {**SHAPES["odd"], "hidden_size": 96, "intermediate_size": 160}}


def _quantize(model, group_size):
    """Every projection of the layers in 4 bits, some with zeros."""
    for layer in model.model.layers:
        for owner in (layer.self_attn, layer.mlp):
            for index, (name, linear) in enumerate(list(owner.named_children())):
                outs, ins = linear.weight.shape
                part = Int4Linear(ins, outs, group_size=group_size, symmetric=index % 2 == 0)
                setattr(owner, name, part.to(torch.bfloat16))


class _Engine:
    """What an engine makes ready and runs, without a host that reads."""

    def __init__(self, shape, max_batch, prefill_chunk, max_seq_len, graphs=True):
        config = LlamaConfig(vocab_size=1024, num_hidden_layers=1, max_position_embeddings=max_seq_len, **SHAPES[shape])
        with META:
            self.model = LlamaLM(config).to(torch.bfloat16)
            if shape.endswith("int4"):
                _quantize(self.model, 128 if shape.startswith("1b") else 32)
        self.model.requires_grad_(False)
        self.cache = PagedKVCache(config, 256, dtype=torch.bfloat16, device=META)
        self.max_batch, self.prefill_chunk, self.max_seq_len = max_batch, prefill_chunk, max_seq_len
        self.graph = DecodeGraph(self.model, self.cache, gpu, max_batch, max_seq_len, graphs=graphs)
        self.model.prepare(gpu)

    def make_ready(self):
        if self.graph.captures:
            self.graph.capture()
        warm_up(self.model, gpu, self.cache, self.graph, self.prefill_chunk)

    def run_prompts(self, draw):
        """A step with prompts: chunks of any lengths, of which some draw their first token."""
        left, chunks = draw.randint(1, self.prefill_chunk), []
        while left and len(chunks) < self.max_batch:
            count = draw.choice([1, min(2, left), left, draw.randint(1, left)])
            start = draw.choice([0, 64, draw.randrange(self.max_seq_len - count)])
            pages = -(-draw.randint(start + count, self.max_seq_len) // 64)
            chunks.append(Chunk([1] * count, start, start + count, [0] * pages))
            left -= count
        batch = pack(gpu, self.model.model.rotary, chunks, self.cache.split_size, META)
        states = self.model.model.run(batch, self.cache)
        due = draw.randint(1, len(chunks))
        logits = self.model.logits(states[:1].repeat(due, 1), gpu)
        index = torch.zeros(due, dtype=torch.int64, device=META)
        full = draw.random() < 0.5
        tokens = gpu.sample(logits, self.graph.rows.sampling_of(index, with_tables=full))
        gpu.advance(tokens, index, self.graph.rows, full)
        gpu.log_probs(logits, tokens, draw.randint(0, 20))

    def score_prompts(self, draw):
        count = draw.randint(1, 64)
        states = torch.empty(count, self.model.config.hidden_size, dtype=torch.bfloat16, device=META)
        targets = torch.zeros(count, dtype=torch.int64, device=META)
        gpu.log_probs(self.model.logits(states, gpu), targets, draw.randint(0, 20))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize(
    ("shape", "max_batch", "prefill_chunk"),
    [
        *[("1b", 16, 512), ("1b", 1, 100), ("1b", 37, 600), ("odd", 5, 33)],
        *[("1b int4", 16, 512), ("1b int4", 37, 600), ("1b int4", 1, 30), ("odd int4", 5, 33)],
    ],
)
def test_prompts_of_every_kind_compile_nothing(monkeypatch, arch, shape, max_batch, prefill_chunk, graphs):
    capturing(monkeypatch)
    with torch.no_grad(), launches.recording(arch) as launched:
        engine = _Engine(shape, max_batch, prefill_chunk, 1000, graphs)
        engine.make_ready()
        known = set(launched)
        assert len(known) > 15
        draw = random.Random(arch)
        for _ in range(60):
            launched.clear()
            engine.run_prompts(draw)
            engine.score_prompts(draw)
            engine.graph.run(draw.choice(engine.graph.buckets), full=draw.random() < 0.5)
            new = [(launch.name, launch.config) for launch in launched if launch not in known]
            assert not new


def test_control_without_the_warm_up_prompts_compile(monkeypatch):
    capturing(monkeypatch)
    with torch.no_grad(), launches.recording(90) as launched:
        engine = _Engine("1b", 16, 512, 1000)
        engine.graph.capture()
        known = set(launched)
        launched.clear()
        engine.run_prompts(random.Random(0))
        assert set(launched) - known


@pytest.mark.parametrize("lengths", [[1], [3, 2], [1, 1, 1], [7, 1, 4, 2]])
def test_every_field_of_a_batch_starts_at_sixteen_bytes(lengths):
    """Another start is another kernel to Triton, which meta tensors, all at address 0, do not show."""
    rotary = LlamaLM(LlamaConfig(vocab_size=8, num_hidden_layers=1, **SHAPES["odd"])).model.rotary
    chunks = [Chunk([1] * length, 5, 5 + length, [0] * (1 + index)) for index, length in enumerate(lengths)]
    batch = pack(gpu, rotary, chunks, 256, torch.device("cpu"))
    for name in ("token_ids", "slots", "seq_ids", "query_starts", "seq_lens", "page_table"):
        assert getattr(batch, name).data_ptr() % 16 == 0, name
