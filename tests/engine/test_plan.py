"""What a model needs in memory: counted from headers, above what a step takes, refused before a byte is read."""

import gc
import json
import logging
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from bench.shapes import SHAPES
from llama_fast import LLM, LlamaConfig, LlamaForCausalLM, SamplingParams
from llama_fast.engine.engine import Engine
from llama_fast.engine.plan import MemoryPlan, decode_row, step_rows, weight_rows
from llama_fast.errors import OutOfMemoryError, RequestError
from llama_fast.model.checkpoint import CheckpointFiles
from llama_fast.model.llama import LlamaLM
from llama_fast.model.loading import open_checkpoint
from llama_fast.ops import device_memory
from tests.byte_model import save_byte_model
from tests.tiny import make_model, make_request

LLAMA_1B = SHAPES["llama-3.2-1b"]
LLAMA_8B = {
    **LLAMA_1B,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "head_dim": 128,
    "tie_word_embeddings": False,
}


def save_sparse(folder, fields, extra=(), code="BF16", dtype="bfloat16"):
    """A checkpoint of any size whose tensors are a hole in the file: it takes no room on the disk."""
    config = LlamaConfig(**fields, dtype=dtype)
    config.save_pretrained(folder)
    with torch.device("meta"):
        state = LlamaLM(config).state_dict()
    shapes = {
        name: list(t.shape)
        for name, t in state.items()
        if not (name == "lm_head.weight" and config.tie_word_embeddings)
    }
    offset, header, size = 0, {}, {"BF16": 2, "F32": 4}[code]
    for name, shape in [*shapes.items(), *extra]:
        end = offset + torch.Size(shape).numel() * size
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(content)) + content)
        file.truncate(8 + len(content) + offset)
    return folder


def checkpoint_of(folder, dtype=None):
    return open_checkpoint(folder, dtype=dtype, device="cpu")


@pytest.fixture(scope="module")
def llama_1b(tmp_path_factory):
    return checkpoint_of(save_sparse(tmp_path_factory.mktemp("1b"), LLAMA_1B))


@pytest.fixture(scope="module")
def byte_folder(tmp_path_factory):
    return save_byte_model(tmp_path_factory.mktemp("bytes"))


@pytest.fixture
def free(monkeypatch):
    """`free(n)`: the device has n bytes."""
    return lambda count: monkeypatch.setattr(device_memory, "free_bytes", lambda device, weight_bytes: count)


@pytest.fixture
def reads(monkeypatch):
    """Names of the tensors that were read."""
    names = []
    for method in ("tensor", "copy", "chunks"):
        monkeypatch.setattr(CheckpointFiles, method, lambda self, name, *_: names.append(name))
    return names


@pytest.mark.parametrize(
    # Parameters as the model cards have them; K and V: 2 x layers x KV heads x head_dim x 2 bytes.
    ("fields", "parameters", "token_bytes"),
    [(LLAMA_1B, 1_235_814_400, 32_768), (LLAMA_8B, 8_030_261_248, 131_072)],
)
def test_published_sizes(tmp_path, fields, parameters, token_bytes):
    checkpoint = checkpoint_of(save_sparse(tmp_path, fields))
    rows = weight_rows(checkpoint)
    assert sum(row.bytes for row in rows) == sum(row.stored_bytes for row in rows) == 2 * parameters
    assert sum(row.bytes for row in weight_rows(replace(checkpoint, dtype=torch.float32))) == 4 * parameters
    plan = MemoryPlan(checkpoint, rows, 10**12, max_batch=3, max_seq_len=100)
    assert plan.page_bytes == 64 * token_bytes
    (cache,) = (row for row in plan.rows if row.part == "cache")
    assert cache.bytes == (3 * 2 + 1) * 64 * token_bytes  # two pages each, and one for rows without a sequence
    assert plan.needed_bytes == 2 * parameters + cache.bytes + sum(row.bytes for row in plan.rows if row.part == "step")


def test_groups(llama_1b):
    embedding = 2 * 128256 * 2048
    sizes = {row.name: (row.bytes, row.stored_bytes) for row in weight_rows(llama_1b)}
    assert sizes["embeddings"] == (embedding, embedding)
    assert sizes["final norm"] == (2 * 2048, 2 * 2048)
    assert sizes["head"] == (0, 0)
    assert sizes["16 layers"][0] == 2 * 1_235_814_400 - embedding - 2 * 2048


def test_what_is_stored_but_not_loaded(tmp_path):
    """A tied head that is stored too, and the rotary frequencies of old checkpoints."""
    extra = [("lm_head.weight", [128256, 2048]), ("model.layers.0.self_attn.rotary_emb.inv_freq", [32])]
    checkpoint = checkpoint_of(save_sparse(tmp_path, LLAMA_1B, extra))
    sizes = {row.name: (row.bytes, row.stored_bytes) for row in weight_rows(checkpoint)}
    assert sizes["head"] == (0, 2 * 128256 * 2048)
    assert sizes["16 layers"][1] - sizes["16 layers"][0] == 2 * 32
    assert sum(stored for _, stored in sizes.values()) == checkpoint.files.total_bytes


def test_dtype_of_the_files_where_nobody_names_one(tmp_path):
    save_sparse(tmp_path, LLAMA_1B, code="F32", dtype=None)
    checkpoint = checkpoint_of(tmp_path)
    assert checkpoint.dtype == torch.float32
    assert sum(row.bytes for row in weight_rows(checkpoint)) == 4 * 1_235_814_400


# --- what fits --------------------------------------------------------------------------------------------------------


def test_fits_ends_where_the_largest_settings_say(llama_1b):
    plan = MemoryPlan(llama_1b, weight_rows(llama_1b), 6 << 30, max_batch=4, max_seq_len=131072)
    assert not plan.fits
    longest = plan.largest_max_seq_len
    assert replace(plan, max_seq_len=longest).fits and not replace(plan, max_seq_len=longest + 1).fits
    short = replace(plan, max_seq_len=1000)
    most = short.largest_max_batch
    assert replace(short, max_batch=most).fits and not replace(short, max_batch=most + 1).fits
    assert (longest, most) != (0, 0)
    # By hand: half of what the weights leave, in pages of 64 tokens.
    half = ((6 << 30) - 2 * 1_235_814_400) // 2
    assert longest == half // (4 * 64 * 32_768) * 64
    assert most == half // (16 * 64 * 32_768)


def test_largest_settings_are_none_where_the_weights_fill_the_memory(llama_1b):
    plan = MemoryPlan(llama_1b, weight_rows(llama_1b), 2 * 1_235_814_400, max_batch=1, max_seq_len=10)
    assert not plan.fits
    assert (plan.largest_max_seq_len, plan.largest_max_batch) == (0, 0)


def test_more_than_the_context_counts_if_it_is_asked_for(llama_1b):
    plan = MemoryPlan(llama_1b, weight_rows(llama_1b), 1 << 40, max_batch=1, max_seq_len=200_000)
    assert plan.fits and plan.largest_max_seq_len == 200_000
    assert replace(plan, max_seq_len=10).largest_max_seq_len == 131_072


# --- a step's buffers -------------------------------------------------------------------------------------------------

ALL_FEATURES = {
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 0.9,
    "min_p": 0.01,
    "repetition_penalty": 1.1,
    "frequency_penalty": 0.1,
    "presence_penalty": 0.1,
    "logit_bias": {3: 1.0},
    "logprobs": 5,
    "prompt_logprobs": 5,
    "seed": 1,
}


def _peak_bytes(call):
    """The most that torch had allocated at once on the CPU during `call`, beyond what there was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("max_batch", "prefill_chunk", "max_seq_len", "prompt_len", "params", "changes", "largest"),
    [
        (2, 128, 256, 250, {}, {}, "gate and up"),
        (1, 32, 2048, 2000, {}, {"num_hidden_layers": 1}, "attention"),
        (16, 64, 64, 10, ALL_FEATURES, {"vocab_size": 8000}, "logits, sampling"),
        (2, 16, 64, 10, {}, {"vocab_size": 32001}, "logits, sampling"),
    ],
)
def test_a_step_takes_at_most_what_is_planned(
    dtype, max_batch, prefill_chunk, max_seq_len, prompt_len, params, changes, largest
):
    fields = {"hidden_size": 128, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4}
    fields |= {"vocab_size": 2000, "max_position_embeddings": 4096, **changes}
    model = make_model(dtype, **fields)
    sizes = {"max_batch": max_batch, "max_seq_len": max_seq_len, "prefill_chunk": prefill_chunk}
    engine = Engine(model, backend="reference", **sizes)
    new_tokens = min(6, max_seq_len - prompt_len)
    requests = [
        make_request(model, range(prompt_len), index, max_seq_len=4096, max_tokens=new_tokens, **params)
        if prompt_len < 1000
        else make_request(model, [i % 97 for i in range(prompt_len)], index, max_seq_len=4096, max_tokens=1, **params)
        for index in range(max_batch)
    ]
    peak = _peak_bytes(lambda: [None for _ in engine.run(requests)])
    rows = step_rows(model.config, dtype, max_batch, max_seq_len, prefill_chunk)
    assert [row.name for row in rows] == ["hidden states", largest]
    planned = sum(row.bytes for row in rows)
    assert peak <= planned <= 2.5 * peak


# --- refused before reading -------------------------------------------------------------------------------------------


def test_L01_weights_that_do_not_fit_are_not_read(llama_1b, free, reads):
    free(1 << 30)
    message = (
        r"the weights need 2,471,628,800 bytes in torch.bfloat16 on cpu, where 1,073,741,824 are available; use a sma"
    )
    with pytest.raises(OutOfMemoryError, match=message):
        LlamaForCausalLM.from_pretrained(llama_1b.folder, device="cpu")
    free(3 << 30)
    message = r"need 4,943,257,600 bytes in torch.float32 .* use dtype='bfloat16' \(2,471,628,800 bytes\)"
    with pytest.raises(OutOfMemoryError, match=message):
        LlamaForCausalLM.from_pretrained(llama_1b.folder, device="cpu", dtype="float32")
    assert reads == []


def test_L01_a_refused_model_leaves_nothing_mapped(tmp_path, free):
    save_sparse(tmp_path, LLAMA_1B)
    free(1 << 30)
    with pytest.raises(OutOfMemoryError):
        LlamaForCausalLM.from_pretrained(tmp_path, device="cpu")
    gc.collect()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def _plan(folder, available, **settings):
    checkpoint = checkpoint_of(folder)
    settings = {"max_batch": 16, "at_once": 1, **settings}
    return MemoryPlan(checkpoint, weight_rows(checkpoint), available, **settings)


def _least_memory(plan):
    """All that is needed, and the cache not more than half of what the weights leave."""
    return max(plan.needed_bytes, sum(row.bytes for row in plan.weights) + 2 * plan.sequence_bytes)


@pytest.mark.parametrize("load", ["mmap", "copy"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_L01_an_engine_gets_what_was_planned(byte_folder, free, dtype, load):
    """One byte less than the plan needs is refused; with it the pool is as planned, however the weights are loaded."""
    arguments = {"max_batch": 2, "max_seq_len": 2048, "prefill_chunk": 64}
    checkpoint = checkpoint_of(byte_folder, dtype)
    plan = MemoryPlan(checkpoint, weight_rows(checkpoint), 0, **arguments, at_once=1)
    arguments |= {"dtype": dtype, "load": load, "device": "cpu"}
    least = _least_memory(plan)
    free(least - 1)
    with pytest.raises(OutOfMemoryError, match=f"{least - 1:,} are available: .* use max_seq_len=1\\d\\d\\d or "):
        LLM(byte_folder, **arguments)
    free(least)
    llm = LLM(byte_folder, **arguments)
    assert llm.engine.max_seq_len == 2048
    assert llm.engine.cache.pool.nbytes == plan.sequence_bytes + plan.page_bytes
    assert llm.generate("ab", SamplingParams(max_tokens=3))[0].outputs[0].finish_reason == "length"
    free(10 * least)
    assert LLM(byte_folder, **arguments).engine.cache.pool.nbytes == 2 * plan.sequence_bytes + plan.page_bytes


def test_L01_settings_that_would_fit_are_named(byte_folder, free, reads):
    plan = _plan(byte_folder, 0, max_seq_len=2048)
    free(plan.needed_bytes - 1)
    with pytest.raises(OutOfMemoryError, match=r"a step of max_batch=16; use .*prefill_chunk=511 or dtype='bfloat16'$"):
        LLM(byte_folder, max_seq_len=2048, device="cpu")
    free(plan.needed_bytes * 10)
    with pytest.raises(OutOfMemoryError, match=r"use cache_bytes=(\d+)") as caught:
        LLM(byte_folder, max_seq_len=2048, cache_bytes=plan.needed_bytes * 10, device="cpu")
    assert reads == []
    cache_bytes = int(str(caught.value).partition("cache_bytes=")[2].partition(" ")[0])
    assert replace(_plan(byte_folder, plan.needed_bytes * 10, max_seq_len=2048), cache_bytes=cache_bytes).fits


def test_more_than_half_of_the_rest_is_for_the_user_to_give(llama_1b):
    plan = MemoryPlan(llama_1b, weight_rows(llama_1b), 0, max_batch=1, max_seq_len=131072)
    assert plan.needed_bytes < _least_memory(plan)
    plan = replace(plan, available_bytes=plan.needed_bytes)
    with pytest.raises(OutOfMemoryError, match=f"or cache_bytes={plan.sequence_bytes}$"):
        plan.check()
    replace(plan, cache_bytes=plan.sequence_bytes).check()
    with pytest.raises(OutOfMemoryError, match=r"use max_seq_len=\d+ or prefill_chunk=\d+$"):
        replace(plan, cache_bytes=plan.sequence_bytes, available_bytes=plan.needed_bytes - 1).check()


def test_a_cache_of_too_few_bytes_is_refused_before_reading(byte_folder, reads):
    plan = _plan(byte_folder, 0, max_seq_len=2048)
    with pytest.raises(OutOfMemoryError, match=f"it may take 1,000.* cache_bytes={plan.sequence_bytes}"):
        LLM(byte_folder, max_seq_len=2048, cache_bytes=1000, device="cpu")
    assert reads == []


def test_sequences_are_limited_where_no_length_was_given(byte_folder, free, caplog):
    free(_least_memory(_plan(byte_folder, 0, max_seq_len=1024, max_batch=1, prefill_chunk=16)))
    with caplog.at_level(logging.WARNING):
        llm = LLM(byte_folder, max_batch=1, prefill_chunk=16, device="cpu")
    assert llm.engine.max_seq_len == 1024
    assert "limited to 1024 tokens: the model is made for 2048" in caplog.text
    assert llm.generate("ab", SamplingParams(max_tokens=3))[0].outputs[0].finish_reason == "length"


def test_nothing_is_read_for_wrong_arguments(byte_folder, reads):
    for argument in ("max_batch", "max_seq_len", "cache_bytes", "page_size", "prefill_chunk"):
        with pytest.raises(RequestError, match=f"{argument}=0 must be a positive integer"):
            LLM(byte_folder, device="cpu", **{argument: 0})
        with pytest.raises(RequestError, match=f"{argument}=an integer of thousands of digits must be"):
            LLM(byte_folder, device="cpu", **{argument: 10**5000})
    with pytest.raises(OutOfMemoryError, match=r"for max_seq_len=9223372036854775807 .* use max_seq_len=\d+$"):
        LLM(byte_folder, device="cpu", max_seq_len=2**63 - 1)
    assert reads == []


def test_the_buffers_for_decoding_are_as_large_as_planned(byte_folder):
    sizes = {"max_batch": 16, "max_seq_len": 2048, "page_size": 16}
    engine = LLM(byte_folder, **sizes).engine
    graph = engine.decoder.graph
    tensors = [value for owner in (graph, graph.rows) for value in vars(owner).values() if torch.is_tensor(value)]
    storages = {storage.data_ptr(): storage for storage in (tensor.untyped_storage() for tensor in tensors)}
    taken = sum(storage.nbytes() for storage in storages.values())
    planned = decode_row(engine.model.config, 16, 2048, 16).bytes
    assert planned <= taken <= 1.1 * planned + 16 * 1024
