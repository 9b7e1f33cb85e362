"""The attention kernels against plain PyTorch: accuracy, masks, pages, bits in any company, refusals."""

import dataclasses
import random

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from llama_fast.errors import KernelArgumentError
from llama_fast.kernels import attention as module
from llama_fast.kernels import batch_checks, configs
from llama_fast.kernels.attention import attention, page_size_problem
from llama_fast.model.batch import Batch
from llama_fast.model.kv_cache import LayerPages
from llama_fast.ops import reference
from tests.kernels.accuracy import DTYPES, POOL, assert_accurate, same_bits, ulp
from tests.kernels.conftest import INTERPRETED

# Groups of 1 to 8 heads, and of more than the 16 rows of a tile.
HEADS = [(1, 1), (4, 2), (3, 1), (4, 1), (5, 1), (12, 2), (7, 1), (16, 2), (16, 1), (32, 1), (20, 1), (6, 3), (2, 2)]
DIMS = [32, 64, 128, 80, 96, 256, 48, 112, 144, 160, 176, 192, 208, 224, 240, 16, 8, 6, 33, 111]
# (page_size, split_size)
SIZES = [(16, 32), (32, 32), (16, 64), (64, 64), (16, 16), (32, 96), (128, 128), (64, 256), (16, 256)]
# Prompts: (new tokens, first slot) of each sequence.
PROMPTS = [
    [(1, 0)],
    [(2, 15), (16, 0)],
    [(17, 0), (1, 31)],
    [(3, 14), (0, 7), (1, 33), (5, 0)],
    [(1, 0), (1, 64), (1, 65), (2, 30)],
    [(33, 0)],
    [(9, 3), (33, 40)],
    [(1, 95), (1, 96), (4, 97), (2, 0), (3, 62)],
    [(5, 140), (2, 100)],
    [(40, 25)],
]
# What a prompt tile of 128 rows just holds, and one row more.
TILES = [([(128, 0)], (1, 1)), ([(129, 5)], (1, 1)), ([(32, 9), (33, 0)], (4, 1)), ([(17, 0), (16, 20)], (16, 2))]


def lengths(page_size, split_size):
    """Slots that a generated token sees: beside the borders of pages and splits."""
    borders = (page_size, split_size, 2 * split_size)
    return [1, 2, *(border + step for border in borders for step in (-1, 0, 1)), 3 * split_size + page_size // 2]


def cases(count):
    """`count` different (sequences, generated, heads, head_dim, sizes, dtype, factor of q), the same in every run."""
    choose, chosen = random.Random(5), {}

    def add(sequences, generated, heads, head_dim, sizes, dtype, factor):
        # What an interpreted case takes grows with rows times keys: small ones are enough.
        work = sum((length + 4) * (start + length) for length, start in sequences) * heads[0]
        if sizes[0] > configs.largest_page(90, dtype, head_dim):
            sizes = (64, 128)
        if work * head_dim <= (2**21 if dtype == torch.float32 else 2**23):
            chosen[(tuple(sequences), generated, heads, head_dim, sizes, dtype, factor)] = None

    for index, (sequences, heads) in enumerate(TILES * 2):
        add(sequences, False, heads, (32, 64)[index % 2], SIZES[index % 3], DTYPES[1 + index % 2], 1)
    for index, head_dim in enumerate(DIMS * len(DTYPES)):
        heads, dtype = HEADS[index % len(HEADS)], DTYPES[index % len(DTYPES)]
        # Splits of 32 in most, so that short sequences cross several.
        sizes = SIZES[index % 2] if index % 5 < 3 else SIZES[index % len(SIZES)]
        add(PROMPTS[index % len(PROMPTS)], False, heads, head_dim, sizes, dtype, (1, 8)[index % 2])
        seen = lengths(*sizes)
        picked = [seen[(index + 3 * step) % len(seen)] for step in range(1 + index % 6)]
        add([(1, length - 1) for length in picked], True, heads, head_dim, sizes, dtype, (1, 8)[index % 2])
    while len(chosen) < count:
        sizes, generated = choose.choice(SIZES[:2] if choose.random() < 0.7 else SIZES), choose.random() < 0.5
        seen = lengths(*sizes)
        if generated:
            sequences = [(1, choose.choice(seen) - 1) for _ in range(choose.randint(1, 9))]
        else:
            sequences = [(choose.randint(0, 9), choose.choice(seen) - 1) for _ in range(choose.randint(0, 4))]
            sequences.insert(choose.randint(0, len(sequences)), (choose.randint(1, 20), choose.randint(0, 40)))
        rest = choose.choice(HEADS), choose.choice(DIMS), sizes, choose.choice(DTYPES), choose.choice([1, 8])
        add(sequences, generated, *rest)
    return list(chosen)


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        count = 1500 if metafunc.config.getoption("--full", default=False) else 160
        found = cases(count)
        assert len(found) == count == len(set(found))
        several = [s for s, _, _, _, (page, _), _, _ in found if len(s) > 1 and any(sum(x) > page for x in s)]
        assert len(several) >= 40
        splits = [split for _, _, _, _, (_, split), _, _ in found]
        assert splits.count(32) > count // 2 and splits.count(256) >= 8
        assert min(sum(case[1] for case in found), sum(not case[1] for case in found)) >= 50
        metafunc.parametrize("case", found, ids=str)


@pytest.fixture
def chained():
    """tl.dot as hardware sums, whatever the tile: the interpreter's own is BLAS."""
    if INTERPRETED:
        from tests.kernels.interpreter import exact_dot

        with exact_dot():
            yield
    else:
        yield


def make_batch(sequences, sizes, device, generated=False, spare=1):
    """A batch of (new tokens, first slot) on shuffled pages, some of them nobody's; entries past a length are 0."""
    page_size, split_size = sizes
    new = torch.tensor([length for length, _ in sequences])
    starts = torch.tensor([start for _, start in sequences])
    used = [-(-(start + length) // page_size) for length, start in sequences]
    free = iter(torch.randperm(sum(used) + spare).tolist())
    table = torch.zeros(len(sequences), max(used), dtype=torch.int64)
    for row, count in enumerate(used):
        table[row, :count] = torch.tensor([next(free) for _ in range(count)])
    batch = Batch(
        ops=reference,
        token_ids=torch.zeros(int(new.sum()), dtype=torch.int64),
        slots=torch.cat([torch.arange(start, start + length) for length, start in sequences]),
        seq_ids=torch.repeat_interleave(torch.arange(len(sequences)), new),
        query_starts=F.pad(new.cumsum(0), (1, 0)),
        seq_lens=starts + new,
        page_table=table,
        cos=torch.zeros(int(new.sum()), 2),
        sin=torch.zeros(int(new.sum()), 2),
        split_size=split_size,
        generated=generated,
    )
    moved = {name: value.to(device) for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    return dataclasses.replace(batch, **moved)


def make_pages(batch, page_size, contents):
    """Pages that hold each sequence's (keys, values), [slots, num_kv_heads, head_dim]; all else is NaN."""
    _, num_kv_heads, head_dim = contents[0][0].shape
    num_pages = int(batch.page_table.max()) + 3
    pages = LayerPages(*contents[0][0].new_full((2, num_pages, num_kv_heads, page_size, head_dim), torch.nan).unbind(0))
    write(batch, pages, contents)
    return pages


def write(batch, pages, contents):
    for row, (keys, values) in enumerate(contents):
        slots = torch.arange(len(keys), device=keys.device)
        page = batch.page_table[row, slots // pages.page_size]
        pages.k[page, :, slots % pages.page_size], pages.v[page, :, slots % pages.page_size] = keys, values


def draw_kv(length, num_kv_heads, head_dim, dtype, device):
    return tuple(torch.randn(2, length, num_kv_heads, head_dim).to(dtype).to(device).unbind(0))


def draw(sequences, heads, head_dim, dtype, device, factor=1):
    """q, and each sequence's keys and values; a factor of 8 makes attention look at few of them."""
    num_tokens = sum(length for length, _ in sequences)
    q = (torch.randn(num_tokens, heads[0], head_dim) * factor).to(dtype).to(device)
    return q, [draw_kv(start + length, heads[1], head_dim, dtype, device) for length, start in sequences]


def run(q, contents, batch, page_size):
    return attention(q, make_pages(batch, page_size, contents), batch)


def plain(q, contents, batch):
    """PyTorch's attention, sequence after sequence."""
    out, starts = [], batch.query_starts.tolist()
    for row, (keys, values) in enumerate(contents):
        rows = slice(starts[row], starts[row + 1])
        visible = torch.arange(len(keys), device=q.device) <= batch.slots[rows, None]
        heads_first = (x.transpose(0, 1)[None] for x in (q[rows], keys, values))
        attended = F.scaled_dot_product_attention(*heads_first, attn_mask=visible, enable_gqa=True)
        out.append(attended[0].transpose(0, 1).flatten(1))
    return torch.cat(out)


def both(batch, page_size, function=attention):
    """The kernel and PyTorch as functions of q, keys, values, keys, values, ..."""

    def kernel(q, *kv):
        contents = list(zip(kv[::2], kv[1::2], strict=True))
        return function(q, make_pages(batch, page_size, contents), batch)

    return kernel, lambda q, *kv: plain(q, list(zip(kv[::2], kv[1::2], strict=True)), batch)


def flat(q, contents):
    return (q, *(x for pair in contents for x in pair))


def assert_within_bound(got, q, contents, batch):
    """fp32: the bounds of its sums, of q and a key and over the slots, carried through the softmax.

    PyTorch on a CPU sums in sixteen lanes, more accurately than one fused multiply-add after the other can, so its own
    error is no measure in fp32.
    """
    unit, starts = torch.finfo(torch.float32).eps / 2, batch.query_starts.tolist()
    for row, (keys, values) in enumerate(contents):
        rows = slice(starts[row], starts[row + 1])
        if not len(q[rows]):
            continue
        group, scale = q.shape[1] // keys.shape[1], q.shape[2] ** -0.5
        queries, length = q[rows].double(), len(keys)
        keys, values = (x.double().repeat_interleave(group, 1) for x in (keys, values))
        hidden = torch.arange(length, device=q.device) > batch.slots[rows, None, None]
        scores = torch.einsum("nhd,lhd->nhl", queries, keys) * scale
        magnitudes = torch.einsum("nhd,lhd->nhl", queries.abs(), keys.abs()) * scale
        shares = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        # A score's sum; its products with scale and log2 e and the maximum's, each rounded; once a page exp2 of a
        # difference of maxima and a multiplication with it, twice as many where every page is a split.
        sums = 4 * q.shape[2] ** 0.5 * unit * magnitudes
        exponents = sums + 8 * unit * (1 + scores.abs().amax(-1, keepdim=True))
        exponents += 8 * unit * (1 + length / 16)
        exact = torch.einsum("nhl,lhd->nhd", shares, values)
        spread = torch.einsum("nhl,lhd->nhd", shares, values.abs()) + exact.abs()
        by_weights = torch.einsum("nhl,lhd->nhd", shares * exponents, values.abs())
        by_weights += (shares * exponents).sum(-1, keepdim=True) * exact.abs()
        bound = by_weights + 4 * length**0.5 * unit * spread + ulp(exact, torch.float32)
        error = (got[rows].double().view(exact.shape) - exact).abs()
        assert (error <= bound).all(), f"{(error - bound).max():.3g} beyond the bound"


def test_accuracy(device, case):
    sequences, generated, heads, head_dim, sizes, dtype, factor = case
    # What fills the pool below has 256 dims.
    dims = [head_dim] if dtype == torch.float32 else [head_dim, 256]
    problems = [page_size_problem(sizes[0], dim, dtype, device) for dim in dims]
    if any(problems):
        pytest.skip(f"this GPU's shared memory is small: {problems}")
    batch = make_batch(sequences, sizes, device, generated)
    if dtype == torch.float32:
        q, contents = draw(sequences, heads, head_dim, dtype, device, factor)
        got = run(q, contents, batch, sizes[0])
        assert got.dtype == dtype and got.shape == (len(q), heads[0] * head_dim)
        assert_within_bound(got, q, contents, batch)
        return
    kernel, pytorch = both(batch, sizes[0])
    count = 1 + 2 * len(sequences)

    def pooled(function):
        return lambda *x: torch.cat([function(*part).flatten() for part in (x[:count], x[count:]) if part])

    def inputs():
        # Where a case gives few outputs, those of more heads and dims fill the pool, at hardly any cost.
        small = flat(*draw(sequences, heads, head_dim, dtype, device, factor))
        full = small[0].numel() >= POOL
        return small if full else (*small, *flat(*draw(sequences, (16, 1), 256, dtype, device, factor)))

    assert_accurate(pooled(kernel), pooled(pytorch), inputs)


MIXED = [(9, 3), (1, 40), (33, 0), (5, 62)]
MISTAKES = ["sees one slot too many", "misses its first slot", "takes a neighbour's head", "another scale"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_control_accuracy_notices_a_mistake(device, dtype, mistake):
    sequences = [(length, start + 1) for length, start in MIXED]
    batch = make_batch(sequences, (16, 32), device)
    q, contents = draw(sequences, (4, 2), 64, dtype, device)

    def wrong(q, contents):
        if mistake == "sees one slot too many":
            longer = [tuple(F.pad(x, (0, 0, 0, 0, 0, 1), value=0.5) for x in pair) for pair in contents]
            more = dataclasses.replace(make_batch([(n, start + 1) for n, start in sequences], (16, 32), device))
            return run(q, longer, more, 16)
        if mistake == "misses its first slot":
            fewer = make_batch([(n, start - 1) for n, start in sequences], (16, 32), device)
            return run(q, [(k[1:], v[1:]) for k, v in contents], fewer, 16)
        if mistake == "takes a neighbour's head":
            return run(q, [(k.flip(1), v) for k, v in contents], batch, 16)
        return run((q.double() * 1.2).to(dtype), contents, batch, 16)

    if dtype == torch.float32:
        assert_within_bound(run(q, contents, batch, 16), q, contents, batch)
        got = wrong(q, contents)
        with pytest.raises(AssertionError, match="beyond the bound"):
            assert_within_bound(got, q, contents, batch)
        return
    _, pytorch = both(batch, 16)
    with pytest.raises(AssertionError, match="beyond one ulp"):
        assert_accurate(
            lambda q, *kv: wrong(q, list(zip(kv[::2], kv[1::2], strict=True))), pytorch, lambda: flat(q, contents)
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("generated", [False, True])
@pytest.mark.parametrize("head_dim", [64, 96])
def test_one_slot_in_sight_is_exact(device, dtype, generated, head_dim):
    # Score 4096 for one slot, whose product with any scale is exact, and 0 for the others, whose weights underflow.
    alone = [(1, slot) for slot in (0, 15, 16, 31, 32, 33, 63)]
    sequences = alone if generated else [(20, 0), (33, 31), (3, 30)]
    batch = make_batch(sequences, (16, 32), device, generated)
    q, contents = draw(sequences, (6, 2), head_dim, dtype, device)
    expected, looked_at = torch.zeros_like(q), []
    for token, slot in enumerate(batch.slots.tolist()):
        looked_at.append([(slot * (head + 1)) // 6 for head in range(6)])
        for head, seen in enumerate(looked_at[-1]):
            q[token, head] = 0
            q[token, head, seen] = 64
            expected[token, head] = contents[int(batch.seq_ids[token])][1][seen, head // 3]
    for keys, _ in contents:
        keys[:] = torch.eye(head_dim, device=device, dtype=dtype)[: len(keys), None] * 64
    assert torch.equal(run(q, contents, batch, 16), expected.flatten(1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("generated", [False, True])
@pytest.mark.parametrize("sizes", [(16, 32), (64, 64), (32, 256)])
def test_equal_weights_of_integers_are_exact(device, dtype, generated, sizes):
    # A power of two of slots: their mean is exact, or rounded once.
    seen = [1, 2, 4, 8, 16, 32, 64, 128] + ([] if sizes == (32, 256) else [256])
    sequences = [(1, length - 1) for length in seen]
    batch = make_batch(sequences, sizes, device, generated)
    q, contents = draw(sequences, (4, 2), 32, dtype, device)
    q.zero_()
    for _, values in contents:
        values.copy_(torch.randint(-8, 9, values.shape))
    expected = torch.stack([values.double().mean(0).repeat_interleave(2, 0).flatten() for _, values in contents])
    assert torch.equal(run(q, contents, batch, sizes[0]), expected.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("generated", [False, True])
def test_equal_values_come_out_unchanged(device, dtype, generated):
    # Powers of two: products and sums of the weights and of the values are rounded alike.
    sequences = [(1, length - 1) for length in (1, 15, 33, 70)] if generated else [(20, 3), (40, 30)]
    batch = make_batch(sequences, (16, 32), device, generated)
    q, contents = draw(sequences, (4, 2), 32, dtype, device, 3)
    values = 2.0 ** torch.arange(-4, 4).repeat(2, 4).to(device).view(2, 32)
    values = values * torch.tensor([1.0, -1.0], device=device)[:, None]
    got = run(q, [(keys, values.to(dtype).expand_as(keys)) for keys, _ in contents], batch, 16).view(-1, 4, 32)
    expected = values.repeat_interleave(2, 0).to(dtype).expand_as(got)
    if dtype == torch.float32:
        # The sum of the weights and their sum with values take different paths through fp32: roundings of both.
        error = (got.double() / expected.double() - 1).abs()
        assert error.max() <= (4 * 70**0.5 + 8) * torch.finfo(torch.float32).eps / 2
    else:
        assert torch.equal(got, expected)


def chunked(q, contents, sizes, device, ends):
    """One sequence in several batches, up to slot after slot of `ends`; keys and values beyond are not written."""
    (keys, values), done, out = contents, 0, []
    for end in ends:
        batch = make_batch([(end - done, done)], sizes, device, spare=0)
        visible = (keys[:end], values[:end])
        out.append(run(q[done:end], [visible], batch, sizes[0]))
        done = end
    return torch.cat(out)


@pytest.mark.usefixtures("chained")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "head_dim", "sizes"), [((4, 2), 64, (16, 32)), ((3, 1), 96, (32, 32)), ((1, 1), 40, (16, 64))]
)
def test_bits_of_a_prompt_do_not_depend_on_company_or_chunks(device, dtype, heads, head_dim, sizes):
    length = 70
    q, contents = draw([(length, 0)], heads, head_dim, dtype, device, 2)
    whole = run(q, contents, make_batch([(length, 0)], sizes, device), sizes[0])
    assert same_bits(run(q, contents, make_batch([(length, 0)], sizes, device), sizes[0]), whole)
    chunkings = [(1, length), (31, 32, 33, length), (11, 48, length - 1, length)]
    for ends in chunkings:
        assert same_bits(chunked(q, contents[0], sizes, device, ends), whole), f"chunks {ends}"
    # Between others, some of them longer: other pages, another place in the table, other tiles.
    for before, after in (([(7, 9)], [(3, 1)]), ([(1, 100), (0, 5), (2, 0)], []), ([], [(1, 33)] * 3)):
        sequences = [*before, (length, 0), *after]
        company, others = draw(sequences, heads, head_dim, dtype, device, 2)
        first = sum(new for new, _ in before)
        company[first : first + length] = q
        others[len(before)] = contents[0]
        got = run(company, others, make_batch(sequences, sizes, device, spare=5), sizes[0])
        assert same_bits(got[first : first + length], whole), f"between {before} and {after}"


def assert_generated_alone(function, q, contents, sequences, sizes, device):
    """Generated tokens of a batch have the bits that they have alone, in any order."""
    together = function(q, contents, make_batch(sequences, sizes, device, True))
    backwards = function(q.flip(0), contents[::-1], make_batch(sequences[::-1], sizes, device, True))
    assert same_bits(backwards.flip(0), together), "the order of the sequences shows"
    for row, sequence in enumerate(sequences):
        alone = function(q[row : row + 1], contents[row : row + 1], make_batch([sequence], sizes, device, True))
        assert same_bits(alone, together[row : row + 1]), f"sequence {row} shows its company"


@pytest.mark.usefixtures("chained")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "head_dim", "sizes"), [((4, 2), 64, (16, 32)), ((5, 1), 96, (32, 32)), ((1, 1), 40, (64, 256))]
)
def test_bits_of_a_generated_token_do_not_depend_on_company(device, monkeypatch, dtype, heads, head_dim, sizes):
    sequences = [(1, length - 1) for length in (1, 33, sizes[1], sizes[1] + 1, 2 * sizes[1] + 5)]
    q, contents = draw(sequences, heads, head_dim, dtype, device, 2)

    def function(q, contents, batch):
        return run(q, contents, batch, sizes[0])

    assert_generated_alone(function, q, contents, sequences, sizes, device)
    # Fewer programs than splits deal the same list otherwise.
    batch = make_batch(sequences, sizes, device, True)
    expected = function(q, contents, batch)
    for programs in (1, 3 * heads[1]):
        monkeypatch.setattr(configs, "GENERATED_ATTENTION_PROGRAMS", programs)
        assert same_bits(function(q, contents, batch), expected)


def descending(monkeypatch, splits, when):
    """From here on the merge meets each sequence's splits last first, where `when` says so of their number."""
    merge = module._merge_kernel

    class Shuffled:
        def __getitem__(self, grid):
            def launch(partial, stats, *rest, **options):
                if when(len(splits)):
                    start = 0
                    for count in splits:
                        for x in (partial, stats):
                            x[start : start + count] = x[start : start + count].flip(0)
                        start += count
                merge[grid](partial, stats, *rest, **options)

            return launch

    monkeypatch.setattr(module, "_merge_kernel", Shuffled())


@pytest.mark.usefixtures("chained")
@pytest.mark.parametrize("dtype", [torch.float32])
def test_control_a_merge_whose_order_depends_on_company_is_noticed(device, monkeypatch, dtype):
    sizes = (16, 32)
    sequences = [(1, length - 1) for length in (1, 133, 32, 33, 169)]
    q, contents = draw(sequences, (4, 2), 64, dtype, device, 2)
    splits = []
    descending(monkeypatch, splits, lambda count: count > 1)

    def by_company(q, contents, batch):
        splits[:] = (batch.slots // sizes[1] + 1).tolist()
        return run(q, contents, batch, sizes[0])

    with pytest.raises(AssertionError, match="sequence 1 shows its company"):
        assert_generated_alone(by_company, q, contents, sequences, sizes, device)


def assert_prefill_is_decode(q, contents, sequences, sizes, device):
    prompt = run(q, contents, make_batch(sequences, sizes, device), sizes[0])
    generated = run(q, contents, make_batch(sequences, sizes, device, True), sizes[0])
    assert same_bits(generated, prompt), "the routes differ"


only_where_routes_agree = pytest.mark.skipif(
    not INTERPRETED
    and torch.cuda.is_available()
    and configs.table_of(torch.device("cuda")) not in configs.PREFILL_EQUALS_DECODE,
    reason="not shown on this architecture",
)
LAST_TOKENS = [(1, length - 1) for length in (1, 16, 17, 33, 100, 260)]


@only_where_routes_agree
@pytest.mark.usefixtures("chained")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "head_dim", "sizes"),
    [((4, 2), 64, (16, 32)), ((17, 1), 96, (32, 32)), ((2, 2), 128, (64, 256)), ((6, 1), 256, (32, 64))],
)
def test_prefill_is_decode(device, dtype, heads, head_dim, sizes):
    q, contents = draw(LAST_TOKENS, heads, head_dim, dtype, device, 2)
    assert_prefill_is_decode(q, contents, LAST_TOKENS, sizes, device)


@only_where_routes_agree
@pytest.mark.usefixtures("chained")
def test_control_a_merge_in_descending_order_is_noticed(device, monkeypatch):
    sizes = (16, 32)
    q, contents = draw(LAST_TOKENS, (4, 2), 64, torch.float32, device, 2)
    descending(monkeypatch, [slot // sizes[1] + 1 for _, slot in LAST_TOKENS], lambda count: True)
    with pytest.raises(AssertionError, match="the routes differ"):
        assert_prefill_is_decode(q, contents, LAST_TOKENS, sizes, device)


@pytest.mark.usefixtures("chained")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [-0.0, 0.0])
def test_tiles_out_of_sight_change_no_sign_of_zero(device, dtype, value):
    # The weight of the first slot's -1 underflows to -0 in the second page, whose values are zeros.
    q, contents = draw([(1, 20)], (1, 1), 32, dtype, device)
    keys, values = contents[0]
    q[:], keys[:], values[:], values[0] = 0, 0, value, -1
    q[..., 0], keys[16:, ..., 0] = 64, 64
    alone = run(q, contents, make_batch([(1, 20)], (16, 64), device), 16)
    # In a chunk whose later tokens see more pages and splits.
    more, longer = draw([(120, 20)], (1, 1), 32, dtype, device)
    more[0], longer[0][0][:21], longer[0][1][:21] = q[0], keys, values
    longer[0][1][21:] = 1
    together = run(more, longer, make_batch([(120, 20)], (16, 64), device), 16)
    assert same_bits(together[:1], alone)
    if INTERPRETED:
        assert same_bits(run(q, contents, make_batch([(1, 20)], (16, 64), device, True), 16), alone)


@pytest.mark.parametrize("generated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("where", "bad"),
    [(where, bad) for where in ("key", "query") for bad in (torch.nan, torch.inf, -torch.inf)] + [("token", torch.nan)],
)
def test_F12_not_finite_values_reach_exactly_the_rows_that_see_them(device, generated, dtype, where, bad):
    if generated:
        sequences, broken = [(1, slot) for slot in (20, 21, 40, 70)], [False, True, True, True]
    else:
        sequences, broken = [(40, 0)], [slot >= 21 for slot in range(40)]
    broken = torch.tensor(broken, device=device)
    batch = make_batch(sequences, (16, 32), device, generated)
    q, contents = draw(sequences, (4, 2), 32, dtype, device)
    # Positive, so that an infinite score is never minus infinity, which says nothing.
    q[:, 2:, 5] = q[:, 2:, 5].abs() + 0.1
    for keys, _ in contents:
        keys[:, 1, 5] = keys[:, 1, 5].abs() + 0.1
    healthy = run(q, contents, batch, 16).view(-1, 4, 32)
    if where == "query":
        broken = torch.arange(len(q), device=device) == 2
        q[2, 2:, 5] = bad
    for keys, values in contents:
        if where == "key" and len(keys) > 21:
            keys[21, 1, 5] = bad
        elif where != "query" and len(keys) > 21:
            # What rope_and_cache writes for a token whose values are not finite.
            keys[21, 1], values[21, 1] = torch.nan, 0
    pages = make_pages(batch, 16, contents)
    got, twin = (function(q, pages, batch).view(-1, 4, 32) for function in (attention, reference.attention))
    # The other key's group, and rows that do not see it.
    assert same_bits(got[:, :2], healthy[:, :2]) and same_bits(got[~broken], healthy[~broken])
    if bad == -torch.inf:
        # Scores of minus infinity: a key without weight, or rows that see nothing at all.
        assert got[broken, 2:].isnan().all() if where == "query" else not got.isnan().any()
        return
    assert torch.equal(got.isnan(), twin.isnan())
    assert got[broken, 2:].isnan().all() and not got[~broken].isnan().any()


@pytest.mark.parametrize("generated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_F04_F05_pages_tables_and_addresses_change_no_bit(device, generated, dtype):
    sequences = [(1, 0), (1, 40), (1, 33)] if generated else [(9, 3), (1, 40), (5, 30)]
    batch = make_batch(sequences, (16, 32), device, generated)
    q, contents = draw(sequences, (4, 2), 48, dtype, device)
    pages = make_pages(batch, 16, contents)
    expected = attention(q, pages, batch)
    num_pages = len(pages.k)

    def offset(x):
        return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)

    layers = q.new_full((3, 2, num_pages, 2, 16, 48), torch.nan)
    heads_first = q.new_full((3, 2, 2, num_pages, 16, 48), torch.nan)
    layers[1, 0], layers[1, 1] = pages.k, pages.v
    heads_first[1, 0], heads_first[1, 1] = pages.k.transpose(0, 1), pages.v.transpose(0, 1)
    views = {
        "layer of a pool": LayerPages(layers[1, 0], layers[1, 1]),
        "heads first": LayerPages(heads_first[1, 0].transpose(0, 1), heads_first[1, 1].transpose(0, 1)),
        "one element past": LayerPages(offset(pages.k), offset(pages.v)),
    }
    for name, view in views.items():
        assert same_bits(attention(q, view, batch), expected), name
    assert same_bits(attention(offset(q), pages, batch), expected)
    moved = {name: offset(getattr(batch, name)) for name in ("slots", "query_starts", "seq_lens", "page_table")}
    assert same_bits(attention(q, pages, dataclasses.replace(batch, **moved)), expected)
    wide = F.pad(batch.page_table, (0, 13))
    for table in (wide, wide[:, :-3]):
        assert same_bits(attention(q, pages, dataclasses.replace(batch, page_table=table)), expected)


@pytest.mark.parametrize("generated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_dim"), [((1, 1), 8), ((20, 1), 48), ((6, 2), 96), ((3, 3), 33)])
def test_F13_every_output_is_written_and_nothing_beside(device, guarded, generated, dtype, heads, head_dim):
    sequences = [(1, 0), (1, 40), (1, 31)] if generated else [(5, 30), (0, 3), (2, 0)]
    batch = make_batch(sequences, (16, 32), device, generated)
    q, contents = draw(sequences, heads, head_dim, dtype, device)
    pages = make_pages(batch, 16, contents)
    inputs = (q, pages.k, pages.v, batch.slots, batch.query_starts, batch.seq_lens, batch.page_table)
    before = [x.clone() for x in inputs]
    with guarded():
        out = attention(q, pages, batch)
    assert out.shape == (len(q), heads[0] * head_dim) and not out.isnan().any()
    assert all(same_bits(x, y) for x, y in zip(inputs, before, strict=True))


def kernels(launches, run=True):
    """The grids of all kernels."""
    return [launches(module, name, run) for name in ("_prompt_kernel", "_generated_kernel", "_merge_kernel")]


@pytest.mark.parametrize("generated", [False, True])
@pytest.mark.parametrize(("num_seqs", "heads"), [(0, (4, 2)), (1, (4, 2)), (3, (0, 2)), (3, (0, 0))])
def test_F06_nothing_to_do_launches_nothing(device, launches, generated, num_seqs, heads):
    grids = kernels(launches)
    new = 1 if heads[0] == 0 else 0
    sequences = [(new, 5)] * max(num_seqs, 1)
    batch = make_batch(sequences, (16, 32), device, generated and new == 1)
    if num_seqs == 0:
        names = ("seq_lens", "page_table")
        empty = {name: getattr(batch, name)[:0] for name in names}
        batch = dataclasses.replace(batch, **empty, query_starts=batch.query_starts[:1], generated=generated)
    q = torch.zeros(new * num_seqs, heads[0], 32, dtype=torch.bfloat16, device=device)
    pages = LayerPages(*torch.zeros(2, 9, heads[1], 16, 32, dtype=torch.bfloat16, device=device).unbind(0))
    out = attention(q, pages, batch)
    assert out.shape == (len(q), heads[0] * 32) and out.dtype == q.dtype and out.device.type == device.type
    assert grids == [[], [], []]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_launches(device, launches, dtype, head_dim):
    table = configs.table_of(device)
    grids = kernels(launches, run=False)
    q, contents = draw(MIXED, (20, 2), head_dim, dtype, device)
    batch = make_batch(MIXED, (16, 32), device)
    run(q, contents, batch, 16)
    block_m = configs.prompt_attention_tile(table, dtype, head_dim).block_m
    (grid,), *others = grids
    tiles = sum(-(-length * 10 // block_m) for length, _ in MIXED)
    assert tiles <= grid[0] <= tiles + len(MIXED) and grid[1:] == (2,) and others == [[], []]
    # Generated: as many programs as there may be splits, if that many, and one merge for each head.
    sequences = [(1, 100), (1, 3)]
    q, contents = draw(sequences, (20, 2), head_dim, dtype, device)
    run(q, contents, make_batch(sequences, (16, 32), device, True), 16)
    assert grids[1:] == [[(2 * 4, 2)], [(2, 20)]] and len(grids[0]) == 1


class _NoHostReads(TorchDispatchMode):
    """What waits for the device, or cannot be captured."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            raise AssertionError(f"{func} reads from the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("generated", [False, True])
def test_the_host_reads_nothing(device, launches, monkeypatch, generated):
    # What the interpreter and LLAMA_FAST_CHECK=1 add.
    monkeypatch.setattr(batch_checks, "ENABLED", False)
    grids = kernels(launches, run=False)
    sequences = [(1, 0), (1, 40)]
    batch = make_batch(sequences, (16, 32), device, generated)
    q, contents = draw(sequences, (4, 2), 32, torch.bfloat16, device)
    pages = make_pages(batch, 16, contents)
    with _NoHostReads():
        attention(q, pages, batch)
    assert [len(grid) for grid in grids] == ([0, 1, 1] if generated else [1, 0, 0])
    with pytest.raises(AssertionError, match="reads from the device"), _NoHostReads():
        batch.slots.max().item()


def test_F09_more_than_65535_tiles(device, launches):
    tokens = 70_000
    # Interpreting so many programs would take minutes: there the grid shows that axis 0 takes them.
    grids = launches(module, "_prompt_kernel", run=not INTERPRETED)
    batch = make_batch([(tokens, 0)], (16, 32), device)
    batch = dataclasses.replace(batch, slots=batch.slots % 3)
    q, contents = draw([(3, 0)], (16, 1), 16, torch.float32, device)
    pages = make_pages(batch, 16, contents)
    out = attention(q.repeat(tokens // 3 + 1, 1, 1)[:tokens], pages, batch)
    block_m = configs.prompt_attention_tile(configs.table_of(device), torch.float32, 16).block_m
    assert grids == [(tokens * 16 // block_m + 1, 1)] and grids[0][0] > 65_535
    if not INTERPRETED:
        few = run(q, contents, make_batch([(3, 0)], (16, 32), device), 16)
        assert same_bits(out, few.repeat(tokens // 3 + 1, 1)[:tokens])


def test_F09_more_than_65535_sequences(device, launches):
    grids = kernels(launches, run=False)
    sequences = 70_000
    batch = make_batch([(1, 0)], (16, 32), device, True)
    one = {name: getattr(batch, name).repeat(sequences) for name in ("slots", "seq_lens")}
    starts = torch.arange(sequences + 1, device=device)
    batch = dataclasses.replace(batch, **one, query_starts=starts, page_table=batch.page_table.expand(sequences, -1))
    pages = LayerPages(*torch.zeros(2, 1, 1, 16, 16, device=device).unbind(0))
    attention(torch.zeros(sequences, 3, 16, device=device), pages, batch)
    assert grids == [[], [(configs.GENERATED_ATTENTION_PROGRAMS, 1)], [(sequences, 3)]]


@pytest.mark.parametrize("generated", [False, True])
@pytest.mark.parametrize("where", ["pages", "heads"])
def test_F08_a_pool_beyond_2_31_elements(device, huge, generated, where):
    # Pages 2^26 elements apart, or heads 2^30 apart: the last of each begins beyond 2^31.
    heads, head_dim, page_size = 3, 16, 16
    page_stride, head_stride, num_pages = (2**26, 256, 34) if where == "pages" else (256, 2**30 + 64, 6)
    count = (num_pages - 1) * page_stride + (heads - 1) * head_stride + page_size * head_dim
    shape, stride = (num_pages, heads, page_size, head_dim), (page_stride, head_stride, head_dim, 1)
    pages = LayerPages(*(huge(count, torch.bfloat16).as_strided(shape, stride) for _ in range(2)))
    sequences = [(1, 20), (1, 17)] if generated else [(3, 18), (2, 0)]
    near = make_batch(sequences, (page_size, 32), device, generated)
    q, contents = draw(sequences, (6, heads), head_dim, torch.bfloat16, device)
    far = dataclasses.replace(near, page_table=num_pages - 1 - near.page_table)
    write(far, pages, contents)
    assert same_bits(attention(q, pages, far), run(q, contents, near, page_size))


def test_F08_tokens_beyond_2_31_elements(device, huge, monkeypatch, only_programs):
    tokens, heads, head_dim = 2**21 + 1, 16, 64
    q, contents = draw([(1, 20)], (heads, 1), head_dim, torch.bfloat16, device)
    batch = make_batch([(1, 20)], (16, 32), device)
    expected = run(q, contents, batch, 16)
    pages = make_pages(batch, 16, contents)
    far, out = (huge(tokens * heads * head_dim, torch.bfloat16).view(tokens, heads, -1) for _ in range(2))
    far[-1] = q[0]
    many = {"slots": batch.slots.repeat(tokens), "query_starts": batch.query_starts * tokens}
    kernel = module._prompt_kernel

    class First:
        def __getitem__(self, grid):
            only_programs([0])  # the last tile: tiles are taken from the end
            return kernel[(1, *grid[1:])]

    if INTERPRETED:
        monkeypatch.setattr(module, "_prompt_kernel", First())
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: out.flatten(1))
    assert same_bits(attention(far, pages, dataclasses.replace(batch, **many))[-1:], expected)


def good(device, generated=False):
    """Arguments that are accepted, by name, and the rest of their batch."""
    sequences = [(1, 3), (1, 20)]
    batch = make_batch(sequences, (16, 32), device, generated)
    q, contents = draw(sequences, (4, 2), 32, torch.float32, device)
    pages = make_pages(batch, 16, contents)
    names = ("slots", "query_starts", "seq_lens", "page_table", "split_size", "generated")
    return batch, {"q": q, "pages.k": pages.k, "pages.v": pages.v} | {name: getattr(batch, name) for name in names}


def call(batch, arguments):
    names = ("slots", "query_starts", "seq_lens", "page_table", "split_size", "generated")
    own = dataclasses.replace(batch, **{name: arguments[name] for name in names})
    return attention(arguments["q"], LayerPages(arguments["pages.k"], arguments["pages.v"]), own)


def assert_refused(batch, arguments, message):
    with pytest.raises(KernelArgumentError, match=message):
        call(batch, arguments)


FLOATING = ["q", "pages.k", "pages.v"]
INDICES = ["slots", "query_starts", "seq_lens", "page_table"]


@pytest.mark.parametrize("generated", [False, True])
def test_good_arguments_are_accepted(device, generated):
    assert call(*good(device, generated)).shape == (2, 128)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.bool, torch.complex64])
def test_F01_dtypes(device, dtype):
    batch, arguments = good(device)
    arguments |= {name: arguments[name].to(dtype) for name in FLOATING}
    assert_refused(batch, arguments, f"attention: q is {dtype}; use float16, bfloat16 or float32")


@pytest.mark.parametrize("name", FLOATING[1:])
def test_F01_mixed_dtypes(device, name):
    batch, arguments = good(device)
    arguments[name] = arguments[name].half()
    assert_refused(batch, arguments, f"{name} is torch.float16 and q is torch.float32; give both one dtype")


@pytest.mark.parametrize("name", INDICES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.bool])
def test_F01_indices_are_int64(device, name, dtype):
    batch, arguments = good(device)
    arguments[name] = arguments[name].to(dtype)
    assert_refused(batch, arguments, f"{name} is {dtype}; use int64")


@pytest.mark.parametrize("name", FLOATING[1:] + INDICES)
def test_F03_devices(device, name):
    batch, arguments = good(device)
    arguments[name] = arguments[name].to("meta")
    assert_refused(batch, arguments, f"{name} is on meta and q on .*; move one of them")


def test_F03_a_device_without_kernels(device):
    batch, arguments = good(device)
    arguments |= {name: arguments[name].to("meta") for name in FLOATING + INDICES}
    assert_refused(batch, arguments, "q is on meta; the kernel takes .*backend='reference'")


@pytest.mark.parametrize("name", FLOATING)
def test_F03_gradients(device, name):
    batch, arguments = good(device)
    arguments[name].requires_grad_()
    assert_refused(batch, arguments, f"{name} requires grad and kernels have no backward")
    with torch.no_grad():
        call(batch, arguments)


def apart(x):
    """The same numbers, the last dimension strided."""
    return x.repeat_interleave(2, -1)[..., ::2]


QUERIES = r"q must be \[num_tokens, num_heads, head_dim\] and contiguous, head_dim at most 256; got shape .*, stride"
PAGES = r"pages.{} must be \[num_pages, num_kv_heads, page_size, 32\] with num_kv_heads dividing 4 heads; got {}"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q", lambda x: x[0], QUERIES),
        ("q", lambda x: x[None], QUERIES),
        ("q", lambda x: x.flatten(1), QUERIES),
        ("q", lambda x: x[..., :0], QUERIES),
        ("q", lambda x: x.repeat(1, 1, 9)[..., :257].contiguous(), QUERIES),
        ("q", apart, QUERIES),
        ("q", lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), QUERIES),
        ("q", lambda x: x[:1].expand(2, -1, -1), QUERIES),
        ("q", lambda x: x.repeat(1, 2, 1)[:, :4], QUERIES),
        ("pages.k", lambda x: x[0], PAGES.format("k", r"\(2, 16, 32\)")),
        ("pages.k", lambda x: x[..., :16].contiguous(), PAGES.format("k", r"\(.*, 2, 16, 16\)")),
        ("pages.k", lambda x: x[:, :0], PAGES.format("k", r"\(.*, 0, 16, 32\)")),
        ("pages.k", lambda x: x.repeat(1, 2, 1, 1)[:, :3], PAGES.format("k", r"\(.*, 3, 16, 32\)")),
        ("pages.v", lambda x: x[0], PAGES.format("v", r"\(2, 16, 32\)")),
        ("pages.v", lambda x: x[1:], PAGES.format("v", r"\(.*, 2, 16, 32\)")),
        ("pages.v", lambda x: x[:, :1], PAGES.format("v", r"\(.*, 1, 16, 32\)")),
        ("pages.v", lambda x: x[:, :, :8], PAGES.format("v", r"\(.*, 2, 8, 32\)")),
        ("seq_lens", lambda x: x[None], r"seq_lens must be \[num_seqs\], num_seqs > 0 where tokens are; got \(1, 2\)"),
        ("seq_lens", lambda x: x[0], r"seq_lens must be \[num_seqs\], num_seqs > 0 where tokens are; got \(\)"),
        ("seq_lens", lambda x: x[:0], r"seq_lens must be \[num_seqs\], num_seqs > 0 where tokens are; got \(0,\)"),
        ("seq_lens", lambda x: x[:1], r"slots must be \[2\] and query_starts \[2\]; got \(2,\) and \(3,\)"),
        ("slots", lambda x: x[:1], r"slots must be \[2\] and query_starts \[3\]; got \(1,\) and \(3,\)"),
        ("slots", lambda x: x[None], r"slots must be \[2\] and query_starts \[3\]; got \(1, 2\) and \(3,\)"),
        ("query_starts", lambda x: x[:2], r"slots must be \[2\] and query_starts \[3\]; got \(2,\) and \(2,\)"),
        ("page_table", lambda x: x[0], r"page_table must be \[2, max_pages\] with contiguous rows; got"),
        ("page_table", lambda x: x[:1], r"page_table must be \[2, max_pages\] with contiguous rows; got"),
        ("page_table", apart, r"page_table must be \[2, max_pages\] with contiguous rows; got"),
        ("slots", apart, "slots, query_starts and seq_lens must be contiguous"),
        ("query_starts", apart, "slots, query_starts and seq_lens must be contiguous"),
        ("seq_lens", lambda x: x[:1].expand(2), "slots, query_starts and seq_lens must be contiguous"),
    ],
)
def test_F02_shapes(device, name, change, message):
    batch, arguments = good(device)
    arguments[name] = change(arguments[name])
    assert_refused(batch, arguments, message)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("k", apart),
        ("v", apart),
        ("k", lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)),
        ("k", lambda x: x[:, :, :1].expand(-1, -1, 16, -1)),
        # Contiguous, but not as the keys are.
        ("v", lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)),
        ("v", lambda x: torch.cat((x, x), 1)[:, :2]),
    ],
)
def test_F04_strides_that_are_refused(device, name, change):
    batch, arguments = good(device)
    arguments[f"pages.{name}"] = change(arguments[f"pages.{name}"])
    assert_refused(batch, arguments, f"pages.{name}: slots and dims must be contiguous; got stride")


@pytest.mark.parametrize(("page_size", "split_size"), [(24, 48), (256, 256), (16, 40), (32, 16), (16, 0), (16, -16)])
def test_F02_page_and_split_sizes(device, page_size, split_size):
    batch, arguments = good(device)
    pages = torch.zeros(2, 2, 2, page_size, 32, device=device)
    arguments |= {"pages.k": pages[0], "pages.v": pages[1], "split_size": split_size}
    message = f"page_size={page_size} must divide split_size={split_size}"
    if page_size in (24, 256):
        message = f"page_size={page_size} must be a power of two from .* to 128 for head_dim=32 in torch.float32"
    assert_refused(batch, arguments, message)


def test_F02_pages_that_shared_memory_does_not_hold(device):
    batch, arguments = good(device)
    pages = torch.zeros(2, 2, 2, 128, 256, device=device)
    arguments |= {"q": torch.zeros(arguments["q"].shape[0], 4, 256, device=device)}
    arguments |= {"pages.k": pages[0], "pages.v": pages[1], "split_size": 128}
    assert_refused(batch, arguments, "page_size=128 must be a power of two from .* to 64 for head_dim=256")


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes any power of two")
def test_F02_pages_smaller_than_an_mma(device):
    batch, arguments = good(device)
    pages = torch.zeros(2, 2, 2, 8, 32, device=device)
    arguments |= {"pages.k": pages[0], "pages.v": pages[1]}
    assert_refused(batch, arguments, "page_size=8 must be a power of two from 16 to 128")


def test_several_generated_tokens_of_a_sequence_are_refused(device):
    batch = make_batch([(2, 3), (1, 20)], (16, 32), device, True)
    q, contents = draw([(2, 3), (1, 20)], (4, 2), 32, torch.float32, device)
    with pytest.raises(KernelArgumentError, match="generated tokens come one a sequence; got 3 tokens of 2 sequences"):
        run(q, contents, batch, 16)
