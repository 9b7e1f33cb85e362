"""One answer from the native CPU ops: a token's bits in any company, chunking, role and on any number of threads."""

import contextlib
import dataclasses
import random
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from llama_fast.model.batch import Chunk, pack
from llama_fast.model.kv_cache import PagedKVCache
from llama_fast.model.llama import LlamaDecoder
from llama_fast.ops import cpu, reference
from tests.kernels import test_attention as attention_tests
from tests.kernels import test_rope_and_cache as rope_tests
from tests.kernels.accuracy import DTYPES, same_bits
from tests.ops.cpu_cases import projection
from tests.tiny import RecordingEngine, make_model, make_request, op_by_op

pytestmark = pytest.mark.usefixtures("instruction_set", "uninitialised_memory_is_nan")

CPU = torch.device("cpu")
THREADS = (1, 2, 3, 8)


@contextlib.contextmanager
def on_threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- linear -----------------------------------------------------------------------------------------------------------

EPILOGUES = ["store", "residual", "gated", "head", "normed"]
# Tails of every register and step; rows of 4,096 bytes in 16 and 32 bits; deeper than what is laid out at a time.
WIDTHS = [1, 2, 7, 16, 33, 100, 1000, 1024, 2048]
OUTS = 70


def linear_op(epilogue, ins, dtype, outs=OUTS):
    """An op of rows of x alone, with weights in parts of which some have a bias."""
    weight = (torch.randn(2 * outs, ins) / ins**0.5).to(dtype)
    bias = torch.randn(2 * outs).to(dtype)
    norm = SimpleNamespace(weight=torch.rand(ins).to(dtype) + 0.5, eps=1e-5)
    if epilogue == "gated":
        gate_up = cpu.prepare_linear([projection(weight[:outs], bias[:outs]), projection(weight[outs:])])
        return lambda x: cpu.norm_gate_up_act(x, norm, gate_up, None)
    parts = [projection(weight[:33], bias[:33]), projection(weight[33:34]), projection(weight[34:outs])]
    whole, residual = cpu.prepare_linear(parts), torch.randn(1, outs).to(dtype)
    return {
        "store": lambda x: cpu.linear(x, whole),
        "residual": lambda x: cpu.linear_residual(x, whole, residual.expand(len(x), -1), None),
        "head": lambda x: cpu.norm_lm_head(x, norm, whole),
        "normed": lambda x: cpu.linear(cpu.rms_norm(x, norm.weight, norm.eps), whole),
    }[epilogue]


def assert_rows_are_alone(function, x, counts):
    """Every row of a batch has the bits that it has in the whole, wherever the batch is cut."""
    whole = function(x)
    for count in counts:
        start = (7 * count) % (len(x) - count + 1)
        rows = slice(start, start + count)
        assert same_bits(function(x[rows]), whole[rows]), f"rows {start} to {start + count} of {len(x)}"
    assert same_bits(function(x.flip(0)).flip(0), whole), "the order of the rows shows"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("ins", WIDTHS)
def test_bits_of_a_row_do_not_depend_on_its_company(dtype, epilogue, ins):
    # Around every change of tile and route; wide rows cost most and get fewer counts.
    groups = [127, 128, 129, 159, 160, 161, 191, 192, 193]
    narrow = ins <= 100
    counts = [*range(1, 65), *groups, 320, 321, 384, 385, 511] if narrow else [*range(1, 23), 31, 33, 64, *groups[4:]]
    x = torch.randn(512 if narrow else 200, ins).to(dtype)
    assert_rows_are_alone(linear_op(epilogue, ins, dtype), x, counts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_each_of_512_wide_rows_is_the_row_alone(dtype, epilogue):
    ins = 4096 // dtype.itemsize
    function, x = linear_op(epilogue, ins, dtype), torch.randn(512, ins).to(dtype)
    whole = function(x)
    for row in (0, 1, 127, 128, 255, 300, 510, 511):
        assert same_bits(function(x[row : row + 1]), whole[row : row + 1]), row
    for rows in (slice(100, 105), slice(500, 512), slice(3, 260)):
        assert same_bits(function(x[rows]), whole[rows]), rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_any_number_of_threads_gives_the_bits_of_one(dtype, epilogue, rows):
    # So many outputs that the blocks of a task end elsewhere for every number of threads.
    function, x = linear_op(epilogue, 130, dtype, outs=1000), torch.randn(rows, 130).to(dtype)
    with on_threads(1):
        expected = function(x)
    for count in THREADS:
        with on_threads(count):
            for _ in range(2):
                assert same_bits(function(x), expected), f"{count} threads"


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_of_the_calling_thread_changes_no_bit(dtype):
    """Subnormal sums and outputs, while the caller flushes them to zero."""
    tiny = torch.finfo(dtype).tiny
    weight, x = torch.randn(200, 64).to(dtype), (torch.randn(3, 64) * tiny / 8).to(dtype)
    whole, gate_up = cpu.prepare_linear([projection(weight)]), cpu.prepare_linear([projection(weight)] * 2, "linear")
    norm = SimpleNamespace(weight=torch.ones(64, dtype=dtype) * tiny, eps=1.0)

    def results():
        outputs = cpu.linear(x, whole), cpu.silu_mul(x, "linear"), cpu.rms_norm(x, norm.weight, 1.0)
        return *outputs, cpu.norm_lm_head(x, norm, whole), cpu.norm_gate_up_act(x, norm, gate_up, None)

    expected = results()
    before = torch.tensor([tiny / 4], dtype=torch.float32)
    for count in (1, 2):
        with on_threads(count):
            assert torch.set_flush_denormal(True)
            try:
                got = results()
            finally:
                torch.set_flush_denormal(False)
            assert all(map(same_bits, got, expected)), f"{count} threads"
    assert before * 1 == before  # what the caller had set holds again


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_control_a_sum_that_depends_on_the_number_of_rows_is_noticed(dtype):
    x, weight = torch.randn(64, 256).to(dtype), torch.randn(OUTS, 256).to(dtype)
    halves = [cpu.prepare_linear([projection(part.contiguous())]) for part in weight.chunk(2, dim=1)]
    whole = cpu.prepare_linear([projection(weight)])

    def by_rows(rows):
        if len(rows) > 8:
            return cpu.linear(rows, whole)
        return sum(cpu.linear(part, half) for part, half in zip(rows.chunk(2, dim=1), halves, strict=True))

    assert_rows_are_alone(lambda rows: cpu.linear(rows, whole), x, range(1, 65))
    with pytest.raises(AssertionError, match="rows .* of 64"):
        assert_rows_are_alone(by_rows, x, range(1, 65))


def test_control_torch_in_its_place_is_noticed():
    """MKL's fp32 product of one row has other bits than that of many."""
    x, weight = torch.randn(64, 1024), torch.randn(OUTS, 1024)
    with pytest.raises(AssertionError, match="rows .* of 64"):
        assert_rows_are_alone(lambda rows: F.linear(rows, weight), x, range(1, 65))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 33, 130, 1025])
def test_bits_of_a_normed_or_activated_row_do_not_depend_on_its_company(dtype, width):
    weight, x = torch.randn(width).to(dtype), torch.randn(140, 2 * width).to(dtype)
    for function in (lambda rows: cpu.rms_norm(rows[:, :width], weight, 1e-5), cpu.silu_mul):
        assert_rows_are_alone(function, x, [*range(1, 18), 64, 129])
        expected = function(x)
        for count in THREADS[1:]:
            with on_threads(count):
                assert same_bits(function(x), expected), f"{count} threads"


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_a_rotated_token_do_not_depend_on_its_company(dtype):
    heads, head_dim, rows = (6, 2), 20, 40
    batch, num_pages = rope_tests.make_batch([(rows, 5)], 16, 16, CPU)
    q, k, v = rope_tests.draw(rows, heads, head_dim, dtype, False, CPU)

    def run(q, k, v, batch):
        return rope_tests._by_token(q, k, v, batch, num_pages, cpu.rope_and_cache)

    whole = run(q, k, v, batch)
    for token in range(rows):
        only = rope_tests._only(batch, token)
        alone = run(*(x[token : token + 1] for x in (q, k, v)), only)
        assert same_bits(alone, whole[token : token + 1])
    for count in THREADS[1:]:
        with on_threads(count):
            assert same_bits(run(q, k, v, batch), whole), f"{count} threads"


# --- attention --------------------------------------------------------------------------------------------------------


def attend(q, contents, batch, page_size):
    return cpu.attention(q, attention_tests.make_pages(batch, page_size, contents), batch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "head_dim", "sizes"),
    [((4, 2), 20, (8, 32)), ((3, 1), 96, (32, 32)), ((1, 1), 6, (16, 64)), ((65, 1), 16, (8, 16))],
)
def test_bits_of_a_prompt_token_do_not_depend_on_company_or_chunks(dtype, heads, head_dim, sizes):
    length, page_size = 70, sizes[0]
    q, contents = attention_tests.draw([(length, 0)], heads, head_dim, dtype, CPU, 2)
    whole = attend(q, contents, attention_tests.make_batch([(length, 0)], sizes, CPU), page_size)
    for ends in ((1, length), (31, 32, 33, length), (11, 48, length - 1, length), range(1, length + 1)):
        done, out = 0, []
        for end in ends:
            batch = attention_tests.make_batch([(end - done, done)], sizes, CPU, spare=0)
            visible = [(contents[0][0][:end], contents[0][1][:end])]
            out.append(attend(q[done:end], visible, batch, page_size))
            done = end
        assert same_bits(torch.cat(out), whole), f"chunks {ends}"
    # Between others, some of them longer: other pages, another place in the table, other tasks.
    for before, after in (([(7, 9)], [(3, 1)]), ([(1, 100), (0, 5), (2, 0)], []), ([], [(1, 33)] * 3)):
        sequences = [*before, (length, 0), *after]
        company, others = attention_tests.draw(sequences, heads, head_dim, dtype, CPU, 2)
        first = sum(new for new, _ in before)
        company[first : first + length] = q
        others[len(before)] = contents[0]
        got = attend(company, others, attention_tests.make_batch(sequences, sizes, CPU, spare=5), page_size)
        assert same_bits(got[first : first + length], whole), f"between {before} and {after}"


LAST_TOKENS = [(1, length - 1) for length in (1, 8, 9, 33, 100, 260)]
SHAPES = [((4, 2), 20, (8, 32)), ((17, 1), 96, (32, 32)), ((2, 2), 128, (64, 256)), ((6, 1), 6, (8, 64))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_dim", "sizes"), SHAPES)
def test_prefill_is_decode(dtype, heads, head_dim, sizes):
    """A generated token alone, beside others, marked as prompt, and as the last token of its prompt."""
    page_size = sizes[0]
    q, contents = attention_tests.draw(LAST_TOKENS, heads, head_dim, dtype, CPU, 2)
    together = attend(q, contents, attention_tests.make_batch(LAST_TOKENS, sizes, CPU, True), page_size)
    as_prompt = attend(q, contents, attention_tests.make_batch(LAST_TOKENS, sizes, CPU, False), page_size)
    assert same_bits(as_prompt, together)
    for row, (_, slot) in enumerate(LAST_TOKENS):
        one = q[row : row + 1], contents[row : row + 1]
        alone = attend(*one, attention_tests.make_batch([(1, slot)], sizes, CPU, True), page_size)
        assert same_bits(alone, together[row : row + 1]), f"sequence {row} shows its company"
        whole = torch.cat((torch.randn(slot, *q.shape[1:]).to(dtype), one[0]))
        prompt = attend(whole, one[1], attention_tests.make_batch([(slot + 1, 0)], sizes, CPU), page_size)
        assert same_bits(prompt[-1:], together[row : row + 1]), f"sequence {row} differs in a prompt"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("sequences", "heads"),
    [
        ([(1, 299)], (1, 1)),
        ([(1, 299)], (40, 1)),  # few blocks and many splits: each split is a task
        ([(1, 287)], (2, 2)),
        ([(1, 299), (1, 40), (1, 3)], (4, 1)),
        ([(5, 295)], (3, 1)),
        ([(70, 230)], (1, 1)),  # rows of one block that end in different splits
    ],
)
def test_splits_as_tasks_give_the_bits_of_one_task(dtype, sequences, heads):
    sizes = (8, 32)
    batch = attention_tests.make_batch(sequences, sizes, CPU)
    q, contents = attention_tests.draw(sequences, heads, 20, dtype, CPU, 2)
    pages = attention_tests.make_pages(batch, sizes[0], contents)
    expected = cpu.attention(q, pages, batch)
    for count in range(2, 9):
        with on_threads(count):
            for _ in range(2):
                assert same_bits(cpu.attention(q, pages, batch), expected), f"{count} threads"


@pytest.mark.parametrize("dtype", [torch.float32])
def test_control_a_merge_in_another_order_is_noticed(dtype):
    """The last token sees all slots, so that whole splits may change places: the same sum in another order."""
    sizes, slots = (8, 32), 320
    batch = attention_tests.make_batch([(1, slots - 1)], sizes, CPU)
    q, contents = attention_tests.draw([(1, slots - 1)], (4, 1), 64, dtype, CPU, 2)
    pages = attention_tests.make_pages(batch, sizes[0], contents)
    ascending = cpu.attention(q, pages, batch)
    splits = batch.page_table.view(-1, sizes[1] // sizes[0])
    for order in (splits.flip(0), splits.roll(1, 0)):
        shuffled = dataclasses.replace(batch, page_table=order.reshape(1, -1))
        got = cpu.attention(q, pages, shuffled)
        torch.testing.assert_close(got, ascending, rtol=1e-4, atol=1e-5)
        assert not same_bits(got, ascending)


# --- the engine -------------------------------------------------------------------------------------------------------

PAGE, SPLIT = 8, 32  # small, so that short prompts cross pages and splits
MAX_TOKENS = 4


def _specs():
    """64 requests: prompts of 1 to 97 tokens, greedy and sampled, with and without penalties and filters."""
    draw = random.Random(0)
    lengths = [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 40, 64, 65, 70, 97]
    lengths += [draw.randint(1, 60) for _ in range(64 - len(lengths))]
    specs = []
    for index, length in enumerate(lengths):
        params = {"max_tokens": MAX_TOKENS}
        if index % 2:
            params |= {"temperature": 1.3, "seed": index, "n": 1 + index // 2 % 2}
        if index % 4 == 3:
            params |= {"top_p": 0.9, "top_k": 40, "repetition_penalty": 1.2, "frequency_penalty": 0.3}
        if index % 8 == 6:
            params |= {"presence_penalty": 0.5, "repetition_penalty": 1.3}
        specs.append(([draw.randrange(97) for _ in range(length)], params))
    return specs


SPECS = _specs()


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def model(request):
    return make_model(request.param)


def make_engine(model, **sizes):
    sizes = {"max_batch": 64, "page_size": PAGE, "split_size": SPLIT, "max_seq_len": 128, **sizes}
    engine = RecordingEngine(model, backend="cpu", **sizes)
    assert engine.ops is cpu
    # What nobody wrote must not be read.
    engine.cache.pool.fill_(torch.nan)
    return engine


def run(model, order, **sizes):
    engine = make_engine(model, **sizes)
    results = engine.generate([make_request(model, SPECS[index][0], index, **SPECS[index][1]) for index in order])
    assert engine.scheduler.allocator.num_free == engine.cache.num_pages
    return results


def assert_same(results, expected):
    for key, (tokens, logits) in results.items():
        assert tokens == expected[key][0], key
        assert torch.equal(logits, expected[key][1]), key


@pytest.fixture(scope="module")
def alone(model, instruction_set):
    return {key: value for index in range(len(SPECS)) for key, value in run(model, [index]).items()}


EVERYTHING = range(len(SPECS))


def shuffled(seed, count):
    return random.Random(seed).sample(EVERYTHING, count)


def test_64_prompts_at_once_equal_alone(model, alone):
    assert len(alone) > len(SPECS)  # some have two samples
    assert_same(run(model, EVERYTHING), alone)
    assert_same(run(model, shuffled(1, len(SPECS))), alone)


@pytest.mark.parametrize("size", [2, 3, 5, 12, 13, 17])
def test_any_batch_in_any_order_equals_alone(model, alone, size):
    assert_same(run(model, shuffled(size, size)), alone)


@pytest.mark.parametrize("prefill_chunk", [1, 7, 13, 32, 100])
def test_any_chunking_equals_alone(model, alone, prefill_chunk):
    """Steps hold prompt and generated tokens together."""
    assert_same(run(model, shuffled(prefill_chunk, 16), prefill_chunk=prefill_chunk), alone)


@pytest.mark.parametrize("max_batch", [3, 10])
def test_a_full_queue_and_reused_pages_equal_alone(model, alone, max_batch):
    assert_same(run(model, shuffled(max_batch, 24), max_batch=max_batch, prefill_chunk=50), alone)


@pytest.mark.parametrize("num_threads", [2, 3])
def test_any_number_of_threads_equals_one(model, alone, num_threads):
    with on_threads(num_threads):
        assert_same(run(model, shuffled(num_threads, 12), prefill_chunk=21), alone)
        for index in (15, 13, 4):
            assert_same(run(model, [index]), alone)


def test_prompt_and_generated_tokens_share_one_run_a_step(model, alone):
    engine = make_engine(model, prefill_chunk=20)
    requests = [make_request(model, SPECS[index][0], index, **SPECS[index][1]) for index in shuffled(5, 12)]
    runs, mixed, plain = [], 0, LlamaDecoder.run

    def counted(self, batch, cache):
        runs.append(batch)
        return plain(self, batch, cache)

    engine.recorded = {}
    with mock.patch.object(LlamaDecoder, "run", counted):
        for _ in engine.run(requests):
            (batch,) = runs
            counts = batch.query_starts.diff()
            mixed += bool((counts == 1).any() and (counts > 1).any())
            runs.clear()
    assert mixed >= 4
    for key, logits in engine.recorded.items():
        assert torch.equal(torch.stack(logits), alone[key][1]), key


def test_a_generated_token_has_the_logits_that_it_has_as_a_prompt_token(model, alone):
    for index in (0, 10, 14):
        tokens, logits = alone[index, 0]
        for count in range(1, MAX_TOKENS):
            longer = make_request(model, SPECS[index][0] + tokens[:count], max_tokens=1, temperature=0.0)
            ((_, again),) = make_engine(model).generate([longer]).values()
            assert torch.equal(again[0], logits[count])


def test_whole_layers_prefill_is_decode(model):
    """Every hidden state and every slot of the cache, of a prompt at once and of its tokens one by one."""
    model.prepare(cpu)
    token_ids, pages = SPECS[15][0][:75], list(range(10))
    caches = [
        PagedKVCache(model.config, 10, page_size=PAGE, split_size=SPLIT, dtype=model.dtype, device=CPU)
        for _ in range(2)
    ]

    def states(cache, start, end, generated):
        chunk = Chunk(token_ids[start:end], start, None, pages)
        batch = pack(cpu, model.model.rotary, [chunk], SPLIT, CPU, generated=generated)
        with torch.no_grad():
            return model.model.run(batch, cache)

    whole = states(caches[0], 0, 75, False)
    one_by_one = torch.cat([states(caches[1], slot, slot + 1, True) for slot in range(75)])
    assert torch.equal(one_by_one, whole)
    for layer in range(model.config.num_hidden_layers):
        for mine, theirs in zip(caches[0].pool[layer], caches[1].pool[layer], strict=True):
            filled = slice(None, 75)
            mine, theirs = (x.transpose(1, 2).flatten(0, 1)[filled] for x in (mine, theirs))
            assert mine.isfinite().all() and torch.equal(mine, theirs)


# --- controls: the comparisons above must be able to fail -------------------------------------------------------------


@pytest.mark.parametrize(
    ("mistake", "dtype"),
    [
        ("torch's product", torch.float32),  # heights 1 and 17 take different kernels of MKL at ordinary widths
        ("a sum split by the number of rows", torch.float32),
        ("a sum split by the number of rows", torch.bfloat16),
    ],
)
def test_control_a_linear_that_depends_on_the_number_of_rows_is_noticed(monkeypatch, mistake, dtype):
    model, order = make_model(dtype, hidden_size=64, intermediate_size=128), [2, 8, 14]
    plain = cpu.linear_residual

    def product(x, weight, residual, batch):
        return residual + F.linear(x, weight.parts[0].weight)

    def split(x, weight, residual, batch):
        if len(x) == 1:
            return plain(x, weight, residual, batch)
        for columns in (slice(None, 16), slice(16, None)):
            part = cpu.prepare_linear([projection(weight.parts[0].weight[:, columns].contiguous())])
            residual = plain(x[:, columns], part, residual, batch)
        return residual

    def alone():
        return {key: value for index in order for key, value in run(model, [index]).items()}

    assert_same(run(model, order), alone())
    op_by_op(monkeypatch, cpu)
    monkeypatch.setattr(cpu, "linear_residual", product if mistake == "torch's product" else split)
    expected = alone()
    with pytest.raises(AssertionError):
        assert_same(run(model, order), expected)


def test_control_splits_that_depend_on_company_are_noticed(monkeypatch):
    # In bf16 few roundings see the last bits of such a sum.
    model, order, plain = make_model(torch.float32), [10, 12, 14], cpu.attention
    expected = {key: value for index in order for key, value in run(model, [index]).items()}

    def by_company(q, pages, batch):
        size = SPLIT if len(batch.seq_lens) == 1 else PAGE
        return plain(q, pages, dataclasses.replace(batch, split_size=size))

    op_by_op(monkeypatch, cpu)
    monkeypatch.setattr(cpu, "attention", by_company)
    for index in order:
        assert_same(run(model, [index]), expected)
    with pytest.raises(AssertionError):
        assert_same(run(model, order), expected)


def test_control_noise_by_batch_row_is_noticed(model, alone, monkeypatch):
    plain = cpu.sample

    def by_row(logits, batch):
        return plain(logits, dataclasses.replace(batch, seeds=torch.arange(logits.shape[0])))

    monkeypatch.setattr(cpu, "sample", by_row)
    with pytest.raises(AssertionError):
        assert_same(run(model, [1, 3, 5]), alone)


def test_control_the_reference_gives_other_bits(model, alone):
    engine = RecordingEngine(model, backend="reference", max_batch=8, page_size=PAGE, split_size=SPLIT)
    assert engine.ops is reference
    result = engine.generate([make_request(model, SPECS[14][0], 14, **SPECS[14][1])])
    assert not torch.equal(result[14, 0][1], alone[14, 0][1])
