"""The rope_and_cache kernel against its plain-PyTorch twin: rotation, cache writes, bits, layouts, refusals."""

import dataclasses
import random

import pytest
import torch

from llama_fast.errors import KernelArgumentError
from llama_fast.kernels import rope_and_cache as module
from llama_fast.kernels.rope_and_cache import rope_and_cache
from llama_fast.model.batch import Batch
from llama_fast.model.kv_cache import LayerPages
from llama_fast.ops import reference
from tests.kernels.accuracy import DTYPES, assert_accurate, outliers, same_bits
from tests.kernels.conftest import INTERPRETED

# (head_dim, rotary_dim)
DIMS = [(8, 8), (16, 16), (24, 6), (32, 32), (40, 2), (64, 64), (64, 32), (80, 80), (80, 20), (96, 96), (96, 48)]
DIMS += [(111, 70), (128, 128), (128, 64), (128, 126), (160, 160), (192, 128), (256, 256), (256, 64)]
HEADS = [(1, 1), (2, 1), (4, 4), (6, 2), (7, 1), (8, 2), (12, 12), (16, 2), (24, 8), (32, 8), (9, 3), (33, 11)]
PAGE_SIZES = [16, 32, 64, 1, 5, 48]
# (new tokens, first slot) of each sequence.
SEQUENCES = [
    [(1, 0)],
    [(3, 0)],
    [(1, 63), (1, 64), (1, 65)],
    [(5, 14), (1, 31), (2, 0)],
    [(17, 0)],
    [(2, 4095), (3, 7)],
    [(1, n) for n in range(9)],
]
LAYOUTS = ["contiguous", "packed", "offset"]


def cases(count):
    """`count` different (sequences, heads, dims, page_size, dtype, has outliers, layout), the same in every run."""
    choose, chosen = random.Random(2), {}
    options = (range(len(SEQUENCES)), HEADS, DIMS, PAGE_SIZES, DTYPES, (False, True), LAYOUTS)
    # All dims in every dtype first, with every other option among them.
    for index, dims in enumerate(DIMS * len(DTYPES)):
        picked = [option[index % len(option)] for option in options]
        picked[2], picked[4] = dims, DTYPES[index // len(DIMS)]
        chosen[tuple(picked)] = None
    while len(chosen) < count:
        chosen[tuple(choose.choice(option) for option in options)] = None
    return list(chosen)


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        count = 1500 if metafunc.config.getoption("--full", default=False) else 150
        found = cases(count)
        assert len(found) == count == len(set(found))
        metafunc.parametrize("case", found, ids=str)


def make_batch(sequences, page_size, rotary_dim, device):
    """Sequences of (new tokens, first slot) on shuffled pages, with a page to spare; each dim has its own angle."""
    lengths = torch.tensor([length for length, _ in sequences])
    starts = torch.tensor([start for _, start in sequences])
    width = max(-(-(length + start) // page_size) for length, start in sequences)
    # Entries that no token uses are 0, as in the engine's tables.
    table = torch.zeros(len(sequences), width, dtype=torch.int64)
    used = [range(start // page_size, -(-(start + length) // page_size)) for length, start in sequences]
    free = iter(torch.randperm(sum(map(len, used)) + 1))
    for row, columns in enumerate(used):
        for column in columns:
            table[row, column] = next(free)
    angles = torch.rand(int(lengths.sum()), rotary_dim) * 6.3
    batch = Batch(
        ops=reference,
        token_ids=torch.zeros(len(angles), dtype=torch.int64),
        slots=torch.cat([torch.arange(start, start + length) for length, start in sequences]),
        seq_ids=torch.repeat_interleave(torch.arange(len(sequences)), lengths),
        query_starts=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
        seq_lens=starts + lengths,
        page_table=table,
        cos=angles.cos(),
        sin=angles.sin(),
        split_size=256,
    )
    moved = {name: value.to(device) for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    return dataclasses.replace(batch, **moved), sum(map(len, used)) + 1


def draw(num_tokens, heads, head_dim, dtype, has_outliers, device, layout="contiguous"):
    """q, k and v, each outlier a thousand times (fp16: a hundred times) larger than the rest."""
    num_heads, num_kv_heads = heads
    packed = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim)
    if has_outliers:
        packed = outliers(packed) * (0.1 if dtype == torch.float16 else 1)
    packed = packed.to(dtype).to(device)
    if layout == "offset":
        packed = torch.cat((packed.new_full((1,), torch.nan), packed.flatten()))[1:].view(packed.shape)
    parts = packed.tensor_split((num_heads, num_heads + num_kv_heads), dim=1)
    return tuple(parts) if layout == "packed" else tuple(_own(part, layout) for part in parts)


def _own(part, layout):
    if layout == "contiguous":
        return part.contiguous()
    return torch.cat((part.new_full((1,), torch.nan), part.flatten()))[1:].view(part.shape)


def noise(shape, dtype, device):
    """Random bytes: NaN and infinity among them."""
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (size,), dtype=torch.uint8).to(device).view(dtype).view(shape)


def new_pages(num_pages, num_kv_heads, page_size, head_dim, dtype, device):
    return LayerPages(*noise((2, num_pages, num_kv_heads, page_size, head_dim), dtype, device))


def slot_values(batch, pages):
    """What stands in the batch's slots: k and v [num_tokens, num_kv_heads, head_dim]."""
    page, offset = batch.pages_of_slots(pages.page_size)
    return pages.k[page, :, offset], pages.v[page, :, offset]


def everything(function, batch, num_pages, page_size):
    """`function` as one of q, k, v, cos and sin that returns all it makes: rotated q, cached k and v."""

    def run(q, k, v, cos, sin):
        shape = (2, num_pages, k.shape[1], page_size, k.shape[2])
        pages = LayerPages(*torch.full(shape, torch.nan, dtype=k.dtype, device=k.device))
        own = dataclasses.replace(batch, cos=cos, sin=sin)
        rotated = function(q, k, v, own, pages)
        return torch.cat([x.flatten() for x in (rotated, *slot_values(own, pages))])

    return run


def test_accuracy(device, case):
    index, heads, (head_dim, rotary_dim), page_size, dtype, has_outliers, layout = case
    batch, num_pages = make_batch(SEQUENCES[index], page_size, rotary_dim, device)
    filler, filler_pages = make_batch([(4, 3)], 16, 64, device)

    def both(function):
        # A small case gives few outputs: those of a larger draw fill the pool.
        small, large = (
            everything(function, *args) for args in ((batch, num_pages, page_size), (filler, filler_pages, 16))
        )
        return lambda *x: torch.cat((small(*x[:5]), large(*x[5:])))

    def inputs():
        small = draw(len(batch.slots), heads, head_dim, dtype, has_outliers, device, layout)
        large = draw(4, (8, 4), 64, dtype, has_outliers, device)
        return *small, batch.cos, batch.sin, *large, filler.cos, filler.sin

    assert_accurate(both(rope_and_cache), both(reference.rope_and_cache), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mistake", ["turns the other way", "takes the other half's cosine", "pairs neighbours"])
def test_control_accuracy_notices_a_wrong_rotation(device, dtype, mistake):
    batch, num_pages = make_batch([(8, 3)], 16, 64, device)
    right = everything(reference.rope_and_cache, batch, num_pages, 16)

    def wrong(q, k, v, cos, sin):
        if mistake == "turns the other way":
            sin = -sin
        elif mistake == "takes the other half's cosine":
            cos = cos.roll(32, 1)
        else:
            q = q.view(8, 8, 32, 2).transpose(2, 3).reshape(8, 8, 64)
        return everything(rope_and_cache, batch, num_pages, 16)(q, k, v, cos, sin)

    with pytest.raises(AssertionError, match="beyond one ulp"):
        assert_accurate(wrong, right, lambda: (*draw(8, (8, 2), 64, dtype, False, device), batch.cos, batch.sin))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [16, 32, 64, 5])
@pytest.mark.parametrize(
    ("heads", "dims"), [((8, 2), (64, 64)), ((3, 3), (80, 20)), ((5, 1), (96, 96)), ((4, 2), (8, 6))]
)
def test_only_the_slots_of_the_batch_are_written(device, dtype, page_size, heads, dims):
    head_dim, rotary_dim = dims
    batch, num_pages = make_batch([(3, 14), (1, 0), (6, 61)], page_size, rotary_dim, device)
    pages = new_pages(num_pages, heads[1], page_size, head_dim, dtype, device)
    q, k, v = draw(10, heads, head_dim, dtype, False, device)
    # v and the dims that do not turn are copied: signs of zero and subnormals too.
    v.view(-1)[::7], v.view(-1)[::11] = -0.0, -torch.finfo(dtype).smallest_normal / 4
    expected = LayerPages(pages.k.clone(), pages.v.clone())
    rotated = rope_and_cache(q, k, v, batch, pages)
    page, offset = batch.pages_of_slots(page_size)
    new_k, new_v = slot_values(batch, pages)
    assert same_bits(new_v, v)
    assert same_bits(new_k[..., rotary_dim:], k[..., rotary_dim:])
    assert same_bits(rotated[..., rotary_dim:], q[..., rotary_dim:])
    assert rotated.isfinite().all() and new_k.isfinite().all()
    expected.k[page, :, offset], expected.v[page, :, offset] = new_k, new_v
    assert same_bits(pages.k, expected.k) and same_bits(pages.v, expected.v)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(8, 8), (64, 64), (96, 24), (128, 128), (256, 2)])
def test_quarter_turns_are_exact(device, dtype, head_dim, rotary_dim):
    batch, num_pages = make_batch([(4, 2)], 16, rotary_dim, device)
    cos, sin = torch.tensor([1.0, 0.0, -1.0, 0.0]), torch.tensor([0.0, 1.0, 0.0, -1.0])
    batch = dataclasses.replace(
        batch,
        cos=cos[:, None].repeat(1, rotary_dim).to(device),
        sin=sin[:, None].repeat(1, rotary_dim).to(device),
    )
    inputs = (*draw(4, (4, 2), head_dim, dtype, True, device), batch.cos, batch.sin)
    got = everything(rope_and_cache, batch, num_pages, 16)(*inputs)
    assert torch.equal(got, everything(reference.rope_and_cache, batch, num_pages, 16)(*inputs))
    q, half = inputs[0], rotary_dim // 2
    turned = got[: q.numel()].view_as(q)
    assert torch.equal(turned[0], q[0])
    assert torch.equal(turned[1, :, :half], -q[1, :, half:rotary_dim])
    assert torch.equal(turned[1, :, half:rotary_dim], q[1, :, :half])
    assert torch.equal(turned[2, :, :rotary_dim], -q[2, :, :rotary_dim])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("heads", "dims"), [((3, 3), (64, 64)), ((8, 2), (80, 20)), ((18, 9), (128, 128))])
def test_F12_a_v_that_is_not_finite_breaks_its_own_head_alone(device, dtype, bad, heads, dims):
    batch, num_pages = make_batch([(4, 14)], 16, dims[1], device)
    q, k, v = draw(4, heads, dims[0], dtype, False, device)
    healthy = _by_token(q, k, v, batch, num_pages)
    bad_v = v.clone()
    bad_v[2, 1, dims[0] - 1], bad_v[0, 0, 0] = bad, bad
    q_size = heads[0] * dims[0]
    expected_k, expected_v = (part.view(4, heads[1], -1) for part in healthy[:, q_size:].clone().chunk(2, dim=1))
    for token, head in ((2, 1), (0, 0)):
        expected_k[token, head], expected_v[token, head] = torch.nan, 0
    got = _by_token(q, k, bad_v, batch, num_pages)
    assert same_bits(got[:, :q_size], healthy[:, :q_size])
    got_k, got_v = (part.view(4, heads[1], -1) for part in got[:, q_size:].chunk(2, dim=1))
    assert same_bits(got_v, expected_v)
    assert torch.equal(got_k.isnan(), expected_k.isnan())
    assert same_bits(got_k.nan_to_num(0), expected_k.nan_to_num(0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(32, 32), (80, 20)])
def test_F12_not_finite_values_stand_where_the_twin_has_them(device, dtype, head_dim, rotary_dim):
    info = torch.finfo(dtype)
    values = [torch.nan, torch.inf, -torch.inf, info.max, -info.max, info.tiny, -info.smallest_normal / 4, 0.0, -0.0]
    batch, num_pages = make_batch([(len(values), 1)], 16, rotary_dim, device)
    q, k, v = draw(len(values), (3, 1), head_dim, dtype, False, device)
    for token, value in enumerate(values):
        q[token, 0], q[token, 1, 3], q[token, 2, head_dim - 1] = value, value, value
        k[token, 0, token], v[token, 0, token] = value, value
    # With no angle at all and a quarter turn infinity meets zero.
    batch.cos[3:5, :4], batch.sin[3:5, :4] = 0.0, 1.0
    batch.cos[0:3, 4:8], batch.sin[0:3, 4:8] = 1.0, 0.0
    got = everything(rope_and_cache, batch, num_pages, 16)(q, k, v, batch.cos, batch.sin)
    twin = everything(reference.rope_and_cache, batch, num_pages, 16)(q, k, v, batch.cos, batch.sin)
    assert torch.equal(got.isnan(), twin.isnan())
    assert torch.equal(got.isinf(), twin.isinf()) and torch.equal(got[got.isinf()], twin[twin.isinf()])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [*range(1, 18), 64])
def test_bits_of_a_token_do_not_depend_on_its_company(device, dtype, rows):
    head_dim, rotary_dim = DIMS[rows % len(DIMS)]
    heads = HEADS[rows % 6]
    batch, num_pages = make_batch([(rows, 5)], 16, rotary_dim, device)
    q, k, v = draw(rows, heads, head_dim, dtype, False, device)
    whole = _by_token(q, k, v, batch, num_pages)
    assert same_bits(_by_token(q, k, v, batch, num_pages), whole)
    for token in range(rows) if rows == 17 else {0, 1 % rows, rows // 2, rows - 1}:
        alone = _by_token(*(x[token : token + 1] for x in (q, k, v)), _only(batch, token), num_pages)
        assert same_bits(alone, whole[token : token + 1])


def _only(batch, token):
    """The batch of one token of a batch with one sequence."""
    names = ("cos", "sin", "slots", "seq_ids")
    starts = torch.arange(2, device=batch.slots.device)
    own = {name: getattr(batch, name)[token : token + 1] for name in names}
    return dataclasses.replace(batch, query_starts=starts, **own)


def _by_token(q, k, v, batch, num_pages, function=rope_and_cache):
    pages = new_pages(num_pages, k.shape[1], 16, k.shape[2], k.dtype, k.device)
    rotated = function(q, k, v, batch, pages)
    return torch.cat([x.flatten(1) for x in (rotated, *slot_values(batch, pages))], dim=1)


def test_control_a_rotation_that_depends_on_the_batch_is_noticed(device):
    def by_company(q, k, v, batch, pages):
        # The same mathematically; the number of tokens decides how the angle's cosine is rounded.
        scaled = dataclasses.replace(batch, cos=batch.cos / len(q) * len(q))
        return rope_and_cache(q, k, v, scaled, pages)

    batch, num_pages = make_batch([(13, 5)], 16, 64, device)
    q, k, v = draw(13, (4, 2), 64, torch.float32, False, device)
    whole = _by_token(q, k, v, batch, num_pages, by_company)
    assert not all(
        same_bits(
            _by_token(q[i : i + 1], k[i : i + 1], v[i : i + 1], _only(batch, i), num_pages, by_company),
            whole[i : i + 1],
        )
        for i in range(13)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "dims"), [((4, 2), (64, 64)), ((32, 8), (128, 128)), ((3, 1), (33, 10))])
def test_F04_F05_strides_and_addresses_change_no_bit(device, dtype, heads, dims):
    batch, num_pages = make_batch([(4, 15), (2, 3)], 16, dims[1], device)
    q, k, v = draw(6, heads, dims[0], dtype, False, device)
    expected = _by_token(q, k, v, batch, num_pages)
    packed = torch.cat((q, k, v), dim=1).tensor_split((heads[0], sum(heads)), dim=1)
    assert not packed[1].is_contiguous()
    assert same_bits(_by_token(*packed, batch, num_pages), expected)
    assert same_bits(_by_token(*(_own(x, "offset") for x in (q, k, v)), batch, num_pages), expected)
    assert same_bits(_by_token(*(x.repeat_interleave(2, 0)[::2] for x in (q, k, v)), batch, num_pages), expected)
    moved = {name: _own(getattr(batch, name), "offset") for name in ("cos", "sin")}
    assert same_bits(_by_token(q, k, v, dataclasses.replace(batch, **moved), num_pages), expected)
    wide = torch.cat((batch.page_table, torch.zeros_like(batch.page_table)), dim=1)[:, : batch.page_table.shape[1]]
    assert same_bits(_by_token(q, k, v, dataclasses.replace(batch, page_table=wide), num_pages), expected)


def test_one_rotation_and_one_token_may_serve_several(device):
    """Stride 0 between tokens."""
    batch, num_pages = make_batch([(5, 0)], 16, 32, device)
    q, k, v = draw(1, (4, 2), 32, torch.bfloat16, False, device)
    expected = _by_token(q.repeat(5, 1, 1), k.repeat(5, 1, 1), v.repeat(5, 1, 1), batch, num_pages)
    assert same_bits(_by_token(*(x.expand(5, -1, -1) for x in (q, k, v)), batch, num_pages), expected)


@pytest.mark.parametrize("view", ["layer of a pool", "heads first"])
def test_pages_may_be_a_view(device, view):
    batch, num_pages = make_batch([(4, 15), (2, 3)], 16, 32, device)
    q, k, v = draw(6, (4, 2), 32, torch.float16, False, device)
    if view == "layer of a pool":
        pool = noise((3, 2, num_pages, 2, 16, 32), torch.float16, device)
        before, pages = pool.clone(), LayerPages(pool[1, 0], pool[1, 1])
    else:
        pool = noise((3, 2, 2, num_pages, 16, 32), torch.float16, device)
        before, pages = pool.clone(), LayerPages(pool[1, 0].transpose(0, 1), pool[1, 1].transpose(0, 1))
    rotated = rope_and_cache(q, k, v, batch, pages)
    got = torch.cat([x.flatten(1) for x in (rotated, *slot_values(batch, pages))], dim=1)
    assert same_bits(got, _by_token(q, k, v, batch, num_pages))
    assert same_bits(pool[::2], before[::2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "dims"), [((1, 1), (8, 8)), ((33, 11), (64, 64)), ((9, 3), (96, 24))])
def test_F13_every_output_is_written_and_nothing_beside(device, guarded, dtype, heads, dims):
    batch, num_pages = make_batch([(3, 1)], 4, dims[1], device)
    q, k, v = draw(3, heads, dims[0], dtype, False, device)
    shape = (num_pages, heads[1], 4, dims[0])
    with guarded():
        pages = LayerPages(
            torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device)
        )
        out = rope_and_cache(q, k, v, batch, pages)
    assert not out.isnan().any()
    assert (~pages.k.isnan()).sum() == (~pages.v.isnan()).sum() == k.numel()


def test_inputs_keep_their_bits(device):
    batch, num_pages = make_batch([(3, 1)], 16, 32, device)
    inputs = draw(3, (4, 2), 32, torch.bfloat16, False, device)
    watched = (*inputs, batch.cos, batch.sin, batch.slots, batch.seq_ids, batch.page_table)
    before = [x.clone() for x in watched]
    _by_token(*inputs, batch, num_pages)
    assert all(same_bits(x, y) for x, y in zip(watched, before, strict=True))


def test_F06_no_tokens_launch_nothing(device, launches):
    grids = launches(module, "_rope_and_cache_kernel")
    batch, _ = make_batch([(0, 0)], 16, 32, device)
    pages = new_pages(1, 2, 16, 32, torch.float32, device)
    before = pages.k.clone(), pages.v.clone()
    out = rope_and_cache(*draw(0, (4, 2), 32, torch.float32, False, device), batch, pages)
    assert out.shape == (0, 4, 32) and out.dtype == torch.float32 and out.device.type == device.type
    assert grids == []
    assert same_bits(pages.k, before[0]) and same_bits(pages.v, before[1])


def test_F06_no_heads_at_all_launch_nothing(device, launches):
    grids = launches(module, "_rope_and_cache_kernel")
    batch, num_pages = make_batch([(2, 0)], 16, 32, device)
    _by_token(*draw(2, (0, 0), 32, torch.float32, False, device), batch, num_pages)
    assert grids == []


def test_F06_no_heads_on_one_side(device):
    batch, num_pages = make_batch([(2, 0)], 16, 32, device)
    q, k, v = draw(2, (3, 2), 32, torch.float32, False, device)
    both = _by_token(q, k, v, batch, num_pages)
    assert same_bits(_by_token(q, k[:, :0], v[:, :0], batch, num_pages), both[:, : 3 * 32])
    assert same_bits(_by_token(q[:, :0], k, v, batch, num_pages), both[:, 3 * 32 :])


@pytest.mark.parametrize(
    ("heads", "head_dim", "programs"),
    [((32, 8), 128, 5), ((32, 8), 64, 3), ((1, 1), 64, 2), ((33, 1), 64, 4), ((4, 1), 256, 2), ((5, 5), 256, 4)],
)
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_one_launch(device, launches, heads, head_dim, programs, num_tokens):
    grids = launches(module, "_rope_and_cache_kernel")
    batch, num_pages = make_batch([(num_tokens, 0)], 16, head_dim, device)
    _by_token(*draw(num_tokens, heads, head_dim, torch.bfloat16, False, device), batch, num_pages)
    assert grids == [(num_tokens, programs)]


def test_F09_more_than_65535_tokens(device, launches):
    tokens = 70_000
    # Interpreting so many programs would take minutes: there the grid shows that axis 0 takes them.
    grids = launches(module, "_rope_and_cache_kernel", run=not INTERPRETED)
    batch, num_pages = make_batch([(tokens, 0)], 64, 8, device)
    q, k, v = draw(tokens, (1, 1), 8, torch.bfloat16, False, device)
    pages = LayerPages(*torch.zeros(2, num_pages, 1, 64, 8, dtype=torch.bfloat16, device=device))
    out = rope_and_cache(q, k, v, batch, pages)
    assert grids == [(tokens, 2)]
    if not INTERPRETED:
        expected = reference.rope_and_cache(q.double(), k.double(), v, batch, LayerPages(pages.k.double(), pages.v))
        torch.testing.assert_close(out.double(), expected, rtol=2**-7, atol=1e-6)
        assert same_bits(slot_values(batch, pages)[1], v)


@pytest.mark.parametrize("where", ["pages", "heads"])
def test_F08_a_pool_beyond_2_31_elements(device, huge, where):
    # 33 pages 2^26 elements apart, or heads 2^30 apart: the last of each begins beyond 2^31.
    heads, page_size, head_dim = 3, 4, 16
    page_stride, head_stride, num_pages = (2**26, page_size * head_dim, 34) if where == "pages" else (64, 2**30 + 64, 2)
    count = (num_pages - 1) * page_stride + (heads - 1) * head_stride + page_size * head_dim
    shape, stride = (num_pages, heads, page_size, head_dim), (page_stride, head_stride, head_dim, 1)
    pages = LayerPages(*(huge(count, torch.bfloat16).as_strided(shape, stride) for _ in range(2)))
    batch, _ = make_batch([(4, 2)], page_size, head_dim, device)
    batch.page_table[0, 0], batch.page_table[0, 1] = num_pages - 1, 0
    small, table = (
        LayerPages(*torch.zeros(2, 2, heads, page_size, head_dim).to(torch.bfloat16).to(device)),
        batch.page_table,
    )
    q, k, v = draw(4, (3, heads), head_dim, torch.bfloat16, False, device)
    out = rope_and_cache(q, k, v, batch, pages)
    near = dataclasses.replace(batch, page_table=(table > 0).long())
    assert same_bits(out, rope_and_cache(q, k, v, near, small))
    for got, expected in zip(slot_values(batch, pages), slot_values(near, small), strict=True):
        assert same_bits(got, expected)


def test_F08_tokens_beyond_2_31_elements(device, huge):
    stride = 2**30 + 8
    batch, num_pages = make_batch([(3, 2)], 16, 32, device)
    near = draw(3, (2, 2), 32, torch.bfloat16, False, device)
    memory = huge(2 * stride + 3 * 64, torch.bfloat16)
    far = [memory[64 * i :].as_strided((3, 2, 32), (stride, 32, 1)) for i in range(3)]
    for x, y in zip(far, near, strict=True):
        x.copy_(y)
    assert same_bits(_by_token(*far, batch, num_pages), _by_token(*near, batch, num_pages))


def test_F08_outputs_beyond_2_31_elements(device, huge, only_programs):
    heads, head_dim, last = 16, 64, 2**21
    batch, num_pages = make_batch([(1, 2)], 16, head_dim, device)
    q, k, v = draw(1, (heads, 1), head_dim, torch.bfloat16, False, device)
    pages = new_pages(num_pages, 1, 16, head_dim, torch.bfloat16, device)
    expected = rope_and_cache(q, k, v, batch, pages)
    out = huge((last + 1) * heads * head_dim, torch.bfloat16).view(-1, heads, head_dim)
    if INTERPRETED:
        only_programs([last])
    # One token's everything for all tokens, so that only the output is large; all write the same slot.
    many = {"cos": huge((last + 1) * head_dim, torch.float32), "sin": huge((last + 1) * head_dim, torch.float32)}
    for name, rows in many.items():
        rows.view(-1, head_dim)[last] = getattr(batch, name)[0]
    slots, seq_ids = (x.new_zeros(last + 1) for x in (batch.slots, batch.seq_ids))
    slots += batch.slots
    dims = (heads, 1, head_dim, head_dim, 16, heads, head_dim, head_dim // 2, 1)
    strides = (0, 0, 0, batch.page_table.stride(0), pages.k.stride(0), pages.k.stride(1))
    tensors = (q, k, v, out, pages.k, pages.v, *many.values(), slots, seq_ids, batch.page_table)
    module._rope_and_cache_kernel[(1 if INTERPRETED else last + 1, 2)](*tensors, *strides, *dims, False, num_warps=2)
    assert same_bits(out[last:], expected)


def good(device):
    """Arguments that are accepted, by name."""
    batch, num_pages = make_batch([(3, 1)], 16, 32, device)
    q, k, v = draw(3, (4, 2), 32, torch.float32, False, device)
    pages = new_pages(num_pages, 2, 16, 32, torch.float32, device)
    names = ("cos", "sin", "slots", "seq_ids", "page_table")
    return batch, {"q": q, "k": k, "v": v, "pages.k": pages.k, "pages.v": pages.v} | {
        n: getattr(batch, n) for n in names
    }


def call(batch, tensors):
    own = {name: tensors[name] for name in ("cos", "sin", "slots", "seq_ids", "page_table")}
    pages = LayerPages(tensors["pages.k"], tensors["pages.v"])
    return rope_and_cache(tensors["q"], tensors["k"], tensors["v"], dataclasses.replace(batch, **own), pages)


def assert_refused(batch, tensors, message):
    before = [tensors[name].clone() for name in ("pages.k", "pages.v")]
    with pytest.raises(KernelArgumentError, match=message):
        call(batch, tensors)
    assert all(same_bits(tensors[name], x) for name, x in zip(("pages.k", "pages.v"), before, strict=True))


def test_good_arguments_are_accepted(device):
    call(*good(device))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.bool, torch.complex64])
def test_F01_dtypes(device, dtype):
    batch, tensors = good(device)
    tensors |= {name: tensors[name].to(dtype) for name in ("q", "k", "v", "pages.k", "pages.v")}
    assert_refused(batch, tensors, f"q is {dtype}; use float16, bfloat16 or float32")


@pytest.mark.parametrize("name", ["k", "v", "pages.k", "pages.v"])
def test_F01_mixed_dtypes(device, name):
    batch, tensors = good(device)
    tensors[name] = tensors[name].half()
    assert_refused(batch, tensors, f"{name} is torch.float16 and q is torch.float32; give both one dtype")


@pytest.mark.parametrize("name", ["cos", "sin"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_F01_rotations_are_fp32(device, name, dtype):
    batch, tensors = good(device)
    tensors[name] = tensors[name].to(dtype)
    assert_refused(batch, tensors, f"cos and sin must be float32; got .*{dtype}")


@pytest.mark.parametrize("name", ["slots", "seq_ids", "page_table"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.bool])
def test_F01_indices_are_int64(device, name, dtype):
    batch, tensors = good(device)
    tensors[name] = tensors[name].to(dtype)
    assert_refused(batch, tensors, f"{name} is {dtype}; use int64")


@pytest.mark.parametrize("name", ["k", "v", "pages.k", "pages.v", "cos", "sin", "slots", "seq_ids", "page_table"])
def test_F03_devices(device, name):
    batch, tensors = good(device)
    tensors[name] = tensors[name].to("meta")
    with pytest.raises(KernelArgumentError, match=f"{name} is on meta and q on .*; move one of them"):
        call(batch, tensors)


def test_F03_a_device_without_kernels(device):
    batch, tensors = good(device)
    with pytest.raises(KernelArgumentError, match="q is on meta; the kernel takes .*backend='reference'"):
        call(batch, {name: x.to("meta") for name, x in tensors.items()})


@pytest.mark.parametrize("name", ["q", "k", "v", "pages.k", "pages.v", "cos", "sin"])
def test_F03_gradients(device, name):
    batch, tensors = good(device)
    tensors[name] = tensors[name].requires_grad_()
    assert_refused(batch, tensors, f"{name} requires grad and kernels have no backward")
    with torch.no_grad():
        call(batch, tensors)


ONE_SHAPE = r"q, k and v must be \[num_tokens, heads, head_dim\], k and v alike; got \(.*\), \(.*\), \(.*\)"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q", lambda x: x[0, 0, 0], ONE_SHAPE),
        ("q", lambda x: x.flatten(1), ONE_SHAPE),
        ("q", lambda x: x[:2], ONE_SHAPE),
        ("q", lambda x: x[..., :16].contiguous(), ONE_SHAPE),
        ("k", lambda x: x[0], ONE_SHAPE),
        ("k", lambda x: x[:, :1], ONE_SHAPE),
        ("k", lambda x: x[:2], ONE_SHAPE),
        ("v", lambda x: x[:, :1], ONE_SHAPE),
        ("v", lambda x: x[None], ONE_SHAPE),
        ("cos", lambda x: x[:2], r"cos and sin must be \[3, rotary_dim\]; got \(2, 32\) and \(3, 32\)"),
        ("cos", lambda x: x[0], r"cos and sin must be \[3, rotary_dim\]"),
        ("cos", lambda x: x[0, 0], r"cos and sin must be \[3, rotary_dim\]"),
        ("cos", lambda x: x[:, None], r"cos and sin must be \[3, rotary_dim\]"),
        ("sin", lambda x: x[:, :16], r"cos and sin must be \[3, rotary_dim\]; got \(3, 32\) and \(3, 16\)"),
        ("slots", lambda x: x[:2], r"slots and seq_ids must be \[3\] and page_table 2-D"),
        ("slots", lambda x: x[None], r"slots and seq_ids must be \[3\] and page_table 2-D"),
        ("seq_ids", lambda x: x[:2], r"slots and seq_ids must be \[3\] and page_table 2-D"),
        ("page_table", lambda x: x[0], r"slots and seq_ids must be \[3\] and page_table 2-D"),
        ("pages.k", lambda x: x[0], r"pages.k must be \[num_pages, 2, page_size, 32\]; got \(2, 16, 32\)"),
        ("pages.k", lambda x: x[:, :1], r"pages.k must be \[num_pages, 2, page_size, 32\]; got .*1, 16, 32\)"),
        ("pages.k", lambda x: x[..., :16], r"pages.k must be \[num_pages, 2, page_size, 32\]; got .*2, 16, 16\)"),
        ("pages.v", lambda x: x[:1], r"pages.v must be \[num_pages, 2, page_size, 32\]; got \(1, 2, 16, 32\)"),
        ("pages.v", lambda x: x[:, :, :8], r"pages.v must be \[num_pages, 2, page_size, 32\]; got .*2, 8, 32\)"),
    ],
)
def test_F02_shapes(device, name, change, message):
    batch, tensors = good(device)
    tensors[name] = change(tensors[name])
    assert_refused(batch, tensors, message)


@pytest.mark.parametrize("rotary_dim", [0, 1, 31, 34])
def test_F02_rotary_dim(device, rotary_dim):
    batch, tensors = good(device)
    tensors["cos"] = tensors["sin"] = torch.zeros(3, rotary_dim, device=device)
    assert_refused(batch, tensors, f"rotary_dim={rotary_dim}, the width of cos, must be even, from 2 to head_dim=32")


def apart(x):
    """The same numbers, the last dimension strided."""
    return x.repeat_interleave(2, -1)[..., ::2]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q", apart, "q's heads and dims must be contiguous; got stride"),
        ("k", apart, "k's heads and dims must be contiguous; got stride"),
        ("v", apart, "v's heads and dims must be contiguous; got stride"),
        ("q", lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), "q's heads and dims must be contiguous"),
        ("k", lambda x: x[:, :1].expand(-1, 2, -1), "k's heads and dims must be contiguous"),
        ("cos", apart, "cos and sin must be contiguous; got stride"),
        ("sin", lambda x: x[:1].expand(3, -1), "cos and sin must be contiguous; got stride"),
        ("slots", apart, "slots, seq_ids and the page table's rows must be contiguous"),
        ("seq_ids", lambda x: x[:1].expand(3), "slots, seq_ids and the page table's rows must be contiguous"),
        ("page_table", lambda x: apart(x.repeat(1, 2)), "slots, seq_ids and the page table's rows must be contiguous"),
        ("pages.k", apart, "pages.k: slots and dims must be contiguous; got stride"),
        (
            "pages.k",
            lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
            "pages.k: slots and dims must be contiguous",
        ),
        (
            "pages.v",
            lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
            "pages.v: slots and dims must be contiguous",
        ),
    ],
)
def test_F04_strides_that_are_refused(device, name, change, message):
    batch, tensors = good(device)
    tensors[name] = change(tensors[name])
    assert_refused(batch, tensors, message)
