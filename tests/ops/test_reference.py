"""The reference ops against independent formulas, and row invariance of each."""

import importlib
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llama_fast import config, ops
from llama_fast.errors import BackendError
from llama_fast.model.batch import Batch
from llama_fast.model.kv_cache import LayerPages
from llama_fast.ops import gpu, reference
from llama_fast.ops.activations import ACTIVATIONS
from llama_fast.ops.native import native

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _eps(dtype):
    return torch.finfo(dtype).eps


def _ulp(exact, dtype):
    """One unit in the last place of each number in `dtype`, subnormals included."""
    return exact.abs().clamp(min=torch.finfo(dtype).tiny) * torch.finfo(dtype).eps


def make_batch(lengths, starts, page_size, split_size, num_pages, rotary_dim=8):
    """Sequences of `lengths` new tokens at slots from `starts`, on shuffled pages."""
    generator = torch.Generator().manual_seed(sum(lengths))
    free = torch.randperm(num_pages, generator=generator)
    width = max(-(-(start + length) // page_size) for start, length in zip(starts, lengths, strict=True))
    table = free[: len(lengths) * width].view(len(lengths), width)
    slots = torch.cat([torch.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)])
    num_tokens = sum(lengths)
    return Batch(
        ops=reference,
        token_ids=torch.zeros(num_tokens, dtype=torch.int64),
        slots=slots,
        seq_ids=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        query_starts=F.pad(torch.tensor(lengths).cumsum(0), (1, 0)),
        seq_lens=torch.tensor(starts) + torch.tensor(lengths),
        page_table=table,
        cos=torch.randn(num_tokens, rotary_dim, generator=generator),
        sin=torch.randn(num_tokens, rotary_dim, generator=generator),
        split_size=split_size,
    )


def fill(pages, batch, sequence, keys, values):
    """Write one sequence's K and V [length, num_kv_heads, head_dim] into its pages."""
    for slot in range(keys.shape[0]):
        page = batch.page_table[sequence, slot // pages.page_size]
        pages.k[page, :, slot % pages.page_size] = keys[slot]
        pages.v[page, :, slot % pages.page_size] = values[slot]


def naive_attention(q, keys, values, slots):
    """fp64: q [n, heads, dim], keys and values [length, kv_heads, dim]."""
    group = q.shape[1] // keys.shape[1]
    keys, values = keys.double().repeat_interleave(group, 1), values.double().repeat_interleave(group, 1)
    scores = torch.einsum("nhd,lhd->nhl", q.double(), keys) * q.shape[-1] ** -0.5
    hidden = torch.arange(keys.shape[0])[None, None] > slots[:, None, None]
    return torch.einsum("nhl,lhd->nhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values).flatten(1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "width"), [(0, 64), (1, 64), (7, 33), (40, 1025)])
def test_M11_rms_norm_rounds_as_hugging_face(dtype, num_tokens, width):
    x = torch.randn(num_tokens, width).to(dtype) * 3
    norm = LlamaRMSNorm(width, eps=1e-5).to(dtype)
    norm.weight.data.normal_()
    out = reference.rms_norm(x, norm.weight.data, 1e-5)
    # The same roundings in the same order; the sum of squares may differ in its last bit, so at most one ulp each.
    torch.testing.assert_close(out, norm(x), rtol=2 * _eps(dtype), atol=0)


def test_rms_norm_outliers_against_fp64():
    x = torch.randn(9, 512)
    x[3] *= 1e15
    x[4, 7] = 3e18
    x[5] = 0
    weight = torch.randn(512)
    exact = reference.rms_norm(x.double(), weight.double(), 1e-6)
    torch.testing.assert_close(reference.rms_norm(x, weight, 1e-6).double(), exact, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "width", "outs"), [(0, 64, (32,)), (1, 33, (7, 5)), (17, 256, (64, 32, 32)), (40, 172, (64,))]
)
def test_linear_concatenates_parts(dtype, rows, width, outs):
    parts = [
        nn.Linear(width, out, bias=index % 2 == 0).to(dtype).requires_grad_(False) for index, out in enumerate(outs)
    ]
    x = torch.randn(rows, width).to(dtype)
    got = reference.linear(x, reference.prepare_linear(parts))
    exact = torch.cat(
        [F.linear(x.double(), p.weight.double(), None if p.bias is None else p.bias.double()) for p in parts], 1
    )
    plain = torch.cat([F.linear(x, p.weight, p.bias) for p in parts], 1)
    worst = (plain.double() - exact).abs().max() if rows else 0
    assert got.dtype == dtype and got.shape == exact.shape
    assert ((got.double() - exact).abs() <= 2 * worst + _ulp(exact, dtype)).all()


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_C7_activations_are_hugging_faces(name):
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    # laplace: Hugging Face rounds its constants to six digits.
    torch.testing.assert_close(ACTIVATIONS[name](x), ACT2FN[name](x), rtol=1e-6, atol=1e-6)


def test_C7_config_accepts_exactly_the_activations_there_are():
    assert set(config.ACTIVATIONS) == set(ACTIVATIONS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul_computes_in_fp32_and_rounds_once(dtype):
    gate_up = torch.randn(13, 2 * 43).to(dtype)
    gate, up = gate_up.double().chunk(2, -1)
    exact = F.silu(gate) * up
    got = reference.silu_mul(gate_up)
    worst = (
        (F.silu(gate_up.chunk(2, -1)[0]) * gate_up.chunk(2, -1)[1] - exact).abs().max() if dtype == torch.float32 else 0
    )
    assert got.dtype == dtype
    assert ((got.double() - exact).abs() <= 2 * worst + _ulp(exact, dtype)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"), [(4, 4, 16), (8, 2, 32), (6, 1, 7), (8, 4, 64), (2, 2, 128)]
)
@pytest.mark.parametrize(("page_size", "split_size"), [(4, 8), (8, 32), (64, 256)])
def test_M13_attention_against_fp64_with_stale_pages(dtype, num_heads, num_kv_heads, head_dim, page_size, split_size):
    torch.manual_seed(head_dim)
    lengths, starts = [5, 1, 33, 1, 17], [0, 40, 3, 0, 64]
    batch = make_batch(lengths, starts, page_size, split_size, num_pages=512 // page_size * 2)
    shape = (512 // page_size * 2, num_kv_heads, page_size, head_dim)
    # Everything that was never written is NaN: reading it would show.
    pages = LayerPages(torch.full(shape, torch.nan).to(dtype), torch.full(shape, torch.nan).to(dtype))
    q = (torch.randn(sum(lengths), num_heads, head_dim) * 2).to(dtype)
    exact, plain = [], []
    for sequence, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        keys = torch.randn(start + length, num_kv_heads, head_dim).to(dtype)
        values = torch.randn(start + length, num_kv_heads, head_dim).to(dtype)
        fill(pages, batch, sequence, keys, values)
        rows = batch.seq_ids == sequence
        slots = batch.slots[rows]
        exact.append(naive_attention(q[rows], keys, values, slots))
        visible = torch.arange(start + length) <= slots[:, None]
        sdpa = F.scaled_dot_product_attention(
            q[rows].transpose(0, 1)[None],
            keys.transpose(0, 1)[None],
            values.transpose(0, 1)[None],
            attn_mask=visible,
            enable_gqa=True,
        )
        plain.append(sdpa[0].transpose(0, 1).flatten(1))
    exact, plain = torch.cat(exact), torch.cat(plain)
    got = reference.attention(q, pages, batch)
    assert got.dtype == dtype
    worst = (plain.double() - exact).abs().max()
    assert (got.double() - exact).abs().max() <= 2 * worst + _ulp(exact, dtype).max()


def test_attention_row_is_independent_of_company_chunk_and_page():
    torch.manual_seed(0)
    heads, kv_heads, dim, page_size, split_size = 4, 2, 16, 4, 8
    keys, values = torch.randn(50, kv_heads, dim), torch.randn(50, kv_heads, dim)
    q = torch.randn(50, heads, dim)

    def run(lengths, starts, which, num_pages):
        batch = make_batch(lengths, starts, page_size, split_size, num_pages)
        pages = LayerPages(
            torch.randn(num_pages, kv_heads, page_size, dim), torch.randn(num_pages, kv_heads, page_size, dim)
        )
        fill(pages, batch, which, keys[: starts[which] + lengths[which]], values[: starts[which] + lengths[which]])
        queries = torch.randn(sum(lengths), heads, dim)
        rows = batch.seq_ids == which
        queries[rows] = q[starts[which] : starts[which] + lengths[which]]
        return reference.attention(queries, pages, batch)[rows]

    whole = run([50], [0], 0, 64)
    assert torch.equal(run([7, 50, 3], [9, 0, 1], 1, 128), whole)
    chunks = [run([length], [start], 0, 64) for start, length in ((0, 11), (11, 13), (24, 13), (37, 13))]
    assert torch.equal(torch.cat(chunks), whole)
    assert torch.equal(torch.cat([run([2, 1], [5, start], 1, 64) for start in range(50)]), whole)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_F12_a_value_that_is_not_finite_reaches_exactly_the_rows_that_see_it(bad):
    torch.manual_seed(0)
    keys, values = torch.randn(40, 2, 16), torch.randn(40, 2, 16)
    q = torch.randn(40, 4, 16)
    batch = make_batch([40], [0], 4, 8, 16)

    def run():
        pages = LayerPages(torch.randn(16, 2, 4, 16), torch.randn(16, 2, 4, 16))
        rotated = reference.rope_and_cache(q, keys, values, batch, pages)
        return reference.attention(rotated, pages, batch).view(40, 4, 16)

    healthy = run()
    values[21, 1, 3] = bad
    broken = run()
    assert torch.equal(broken[:21], healthy[:21])
    assert torch.equal(broken[21:, :2], healthy[21:, :2])  # the other KV head's group
    assert broken[21:, 2:].isnan().all()


def test_attention_dense_path_agrees_and_has_gradients():
    torch.manual_seed(0)
    batch = make_batch([5, 9], [0, 3], 4, 8, 32)
    pages = LayerPages(torch.randn(32, 2, 4, 16), torch.randn(32, 2, 4, 16))
    q = torch.randn(14, 4, 16)
    plain = reference.attention(q, pages, batch)
    leaf = q.clone().requires_grad_()
    dense = reference.attention(leaf, pages, batch)
    torch.testing.assert_close(dense, plain, rtol=1e-5, atol=1e-5)
    dense.sum().backward()
    assert leaf.grad.isfinite().all()


def test_rope_and_cache_rotates_and_writes_only_its_slots():
    torch.manual_seed(0)
    batch = make_batch([3, 2], [2, 7], 4, 8, 16, rotary_dim=6)
    shape = (16, 2, 4, 8)
    pages = LayerPages(torch.full(shape, torch.nan), torch.full(shape, torch.nan))
    q, k, v = torch.randn(5, 4, 8), torch.randn(5, 2, 8), torch.randn(5, 2, 8)
    rotated = reference.rope_and_cache(q, k, v, batch, pages)
    half = torch.cat((-q[..., 3:6], q[..., :3]), -1)
    expected = torch.cat((q[..., :6] * batch.cos[:, None] + half * batch.sin[:, None], q[..., 6:]), -1)
    torch.testing.assert_close(rotated, expected, rtol=0, atol=0)
    assert (~pages.v.isnan()).sum() == v.numel()
    page, offset = batch.pages_of_slots(4)
    assert torch.equal(pages.v[page, :, offset], v)


def test_copy_pages_copies_every_layer_and_nothing_else():
    pool = torch.randn(3, 2, 6, 2, 4, 8)
    before = pool.clone()
    reference.copy_pages(pool, [1, 1], [4, 5])
    assert torch.equal(pool[:, :, 4], before[:, :, 1]) and torch.equal(pool[:, :, 5], before[:, :, 1])
    assert torch.equal(pool[:, :, :4], before[:, :, :4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_L3_logits_are_fp32_sums_of_16_bit_products(dtype):
    torch.manual_seed(0)
    head = nn.Linear(64, 5000, bias=False).to(dtype).requires_grad_(False)
    norm = nn.Module()
    norm.weight, norm.eps = torch.ones(64, dtype=dtype), 1e-5
    x = torch.randn(3, 64).to(dtype)
    logits = reference.norm_lm_head(x, norm, reference.prepare_linear([head]))
    hidden = reference.rms_norm(x, norm.weight, 1e-5).double()
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), hidden @ head.weight.double().T, rtol=1e-5, atol=1e-5)


def _shape(function):
    """Names, kinds and defaults of a function's parameters."""
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def test_backends_export_the_same_names_and_signatures():
    backends = [reference, gpu]
    if native()[0] is not None:
        backends.append(importlib.import_module("llama_fast.ops.cpu"))
    for backend in backends:
        assert set(backend.__all__) == set(reference.__all__)
        for name in reference.__all__:
            if callable(getattr(reference, name)):
                assert _shape(getattr(backend, name)) == _shape(getattr(reference, name)), (backend, name)


def test_select_backend_refuses_by_name():
    with pytest.raises(BackendError, match="'auto', 'reference', 'cpu', 'gpu'|auto, reference, cpu, gpu"):
        ops.select_backend("tpu", torch.device("cpu"))
    with pytest.raises(BackendError, match="backend='gpu' cannot run: the device is cpu"):
        ops.select_backend("gpu", torch.device("cpu"))
    with pytest.raises(BackendError, match="backend='cpu' cannot run: the device is meta"):
        ops.select_backend("cpu", torch.device("meta"))
