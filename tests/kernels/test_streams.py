"""Every kernel of a step on another stream, in a captured graph and from two threads: the same bits."""

import threading

import pytest
import torch

from llama_fast.kernels.int4_linear import pack_int4
from llama_fast.kernels.log_probs import log_probs
from llama_fast.kernels.sample import sample
from llama_fast.model.batch import Chunk, pack
from llama_fast.model.kv_cache import PagedKVCache
from llama_fast.ops import cuda_extension, gpu
from llama_fast.ops.int4 import Int4Weight
from tests.kernels.conftest import INTERPRETED
from tests.tiny import make_model

pytestmark = pytest.mark.skipif(INTERPRETED, reason="streams and graphs are a GPU's")


class _Work:
    """A prompt and a generated token of two sequences through the model, and draws: every kernel of a step but one."""

    def __init__(self, device):
        self.model = make_model(torch.bfloat16, hidden_size=64, num_attention_heads=4).to(device)
        self.model.prepare(gpu)
        self.cache = PagedKVCache(self.model.config, 8, dtype=torch.bfloat16, device=device)
        rotary = self.model.model.rotary
        prompts = [Chunk(list(range(length)), 0, length, [page]) for page, length in enumerate((37, 50))]
        tokens = [Chunk([5], length, None, [page]) for page, length in enumerate((37, 50))]
        self.batches = [
            pack(gpu, rotary, chunks, 256, device, generated=generated)
            for chunks, generated in ((prompts, False), (tokens, True))
        ]
        values = torch.randint(0, 16, (48, 64), dtype=torch.uint8, device=device)
        scales = torch.rand(48, 1, device=device).to(torch.bfloat16)
        self.weight = pack_int4(Int4Weight(values, scales, None, None))

    def run(self, sampling):
        """Logits, tokens and log probabilities."""
        results = []
        for batch in self.batches:
            logits = self.model.logits(self.model.model.run(batch, self.cache), gpu)[:2]
            tokens = sample(logits, sampling)
            results += [logits, tokens, *log_probs(logits, tokens, 3)]
        if cuda_extension.extension()[0] is not None:
            x = torch.ones(3, 64, dtype=torch.bfloat16, device=self.weight.words.device)
            results.append(cuda_extension.int4_linear(x, self.weight))
        return results


def _sampling(device):
    from tests.ops.test_reference_sample import batch_of

    batch = batch_of(2, temperature=0.8, top_k=20, top_p=0.9)
    return type(batch)(**{name: None if t is None else t.to(device) for name, t in vars(batch).items()})


@pytest.fixture
def work(device):
    return _Work(device)


@pytest.fixture
def plain(work, device):
    with torch.no_grad():
        results = work.run(_sampling(device))
    torch.cuda.synchronize()
    return [result.clone() for result in results]


def _assert_same(results, expected):
    assert len(results) == len(expected)
    assert all(torch.equal(result, other) for result, other in zip(results, expected, strict=True))


@torch.no_grad()
def test_F14_on_a_side_stream(work, plain, device):
    stream, sampling = torch.cuda.Stream(), _sampling(device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results = work.run(sampling)
    stream.synchronize()
    _assert_same(results, plain)


@torch.no_grad()
def test_F14_in_a_captured_graph(work, plain, device):
    sampling, graph = _sampling(device), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work.run(sampling)
    for _ in range(3):
        for result in results:
            result.zero_()
        work.cache.pool.zero_()
        graph.replay()
        torch.cuda.synchronize()
        _assert_same(results, plain)


@torch.no_grad()
def test_F14_from_two_threads(plain, device):
    works, outcomes = [_Work(device) for _ in range(2)], [None, None]
    sampling = _sampling(device)

    def run(index):
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                outcomes[index] = works[index].run(sampling)
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    torch.cuda.synchronize()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results in outcomes:
        _assert_same(results, plain)
