"""Loading of checkpoints that transformers and safetensors wrote."""

import gc
import hashlib
import json
import os
import shutil
import struct
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from llama_fast.config import LlamaConfig
from llama_fast.errors import CheckpointIOError, CheckpointMismatchError, ConfigError, OutOfMemoryError
from llama_fast.model import checkpoint, checkpoint_files
from llama_fast.model.checkpoint import CheckpointFiles, load_weights
from llama_fast.model.llama import LlamaDecoder, LlamaLM
from tests.model.checkpoint_samples import (
    EMBEDDING,
    HEAD,
    INDEX,
    SINGLE,
    assert_same_state,
    meta,
    raw_file,
    same_bits,
    transformers_lm,
    write,
    write_shards,
)

# What is loaded


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("max_shard_size", ["5GB", "60KB"])
def test_F2_F3_loads_what_transformers_saved(tmp_path, dtype, max_shard_size):
    theirs = transformers_lm(dtype, attention_bias=True, mlp_bias=True)
    theirs.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / INDEX).exists() == (max_shard_size != "5GB")
    ours = meta(attention_bias=True, mlp_bias=True)
    report = load_weights(ours, tmp_path)
    assert_same_state(ours.state_dict(), theirs.state_dict())
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert report.paths == tuple(sorted(tmp_path.glob("*.safetensors")))
    assert report.weight_bytes == sum(parameter.nbytes for parameter in theirs.parameters())
    assert (report.dtype, report.cast, report.ignored) == (dtype, (), ())


@settings(max_examples=25, deadline=None)
@given(homes=st.lists(st.integers(0, 3), min_size=21, max_size=21), prefixed=st.booleans())
def test_F3_any_partition_into_shards_loads_the_same(state, tmp_path_factory, homes, prefixed):
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for home, (name, tensor) in zip(homes, state.items(), strict=True):
        stored = name if prefixed else name.removeprefix("model.")
        shards.setdefault(f"part{home}.safetensors", {})[stored] = tensor
    ours = meta()
    load_weights(ours, write_shards(tmp_path_factory.mktemp("shards"), shards))
    assert_same_state(ours.state_dict(), state)


def test_C08_single_file_is_loaded_before_an_index(tmp_path, state, caplog):
    write_shards(tmp_path, {"model-00001-of-00001.safetensors": {n: torch.zeros_like(t) for n, t in state.items()}})
    write(tmp_path, state)
    ours = meta()
    load_weights(ours, tmp_path)
    assert_same_state(ours.state_dict(), state)
    assert "the first is loaded" in caplog.text


def test_files_are_described_without_reading_a_weight(folder, state):
    files = CheckpointFiles.open(folder)
    assert files.shapes == {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert files.dtypes == dict.fromkeys(state, torch.float32)
    assert files.total_bytes == sum(tensor.nbytes for tensor in state.values())
    assert same_bits(files.tensor(HEAD), state[HEAD])


@pytest.mark.parametrize("stored_with_prefix", [True, False])
@pytest.mark.parametrize("module_class", [LlamaLM, LlamaDecoder])
def test_prefix_is_added_or_stripped(tmp_path, stored_with_prefix, module_class):
    theirs = transformers_lm(tie_word_embeddings=True)
    (theirs if stored_with_prefix else theirs.model).save_pretrained(tmp_path)
    assert (EMBEDDING in load_file(tmp_path / SINGLE)) == stored_with_prefix
    ours = meta(module_class, tie_word_embeddings=True)
    load_weights(ours, tmp_path)
    assert_same_state(ours.state_dict(), (theirs if module_class is LlamaLM else theirs.model).state_dict())


def test_decoder_ignores_the_head(folder, state):
    ours = meta(LlamaDecoder)
    assert load_weights(ours, folder).ignored == (HEAD,)
    assert set(ours.state_dict()) == {name.removeprefix("model.") for name in state} - {HEAD}


def test_stored_inv_freq_is_ignored(tmp_path, state, caplog):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    ours = meta()
    assert load_weights(ours, write(tmp_path, {**state, name: torch.ones(8)})).ignored == (name,)
    assert_same_state(ours.state_dict(), state)
    assert not caplog.text


# Mapped, not copied


class CountedCopies(TorchDispatchMode):
    """Counts the operators that write a tensor's bytes somewhere else."""

    COPIES = ("clone", "copy_", "_to_copy", "_copy_from", "cat", "contiguous", "empty_like", "repeat")

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func._opname] += 1
        return func(*args, **(kwargs or {}))

    @property
    def copies(self):
        return sum(self.calls[name] for name in self.COPIES)


def parameters_in_mappings(module, paths):
    """How many parameters lie, whole, inside a private writable mapping of one of `paths`."""
    mappings = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, permissions, _, _, _, *path = line.split(maxsplit=5)
        if path and Path(path[0]) in paths:
            assert permissions == "rw-p"
            mappings.append([int(address, 16) for address in span.split("-")])
    inside = 0
    for parameter in module.parameters():
        start = parameter.data_ptr()
        inside += any(low <= start and start + parameter.nbytes <= high for low, high in mappings)
    return inside


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the mappings are read from Linux' /proc")
@pytest.mark.parametrize("max_shard_size", ["5GB", "60KB"])
@pytest.mark.parametrize("cast", [False, True])
def test_no_byte_is_copied_on_the_cpu(tmp_path, max_shard_size, cast):
    transformers_lm().save_pretrained(tmp_path, max_shard_size=max_shard_size)
    ours = meta()
    num_parameters = len(list(ours.parameters()))
    with CountedCopies() as counted:
        report = load_weights(ours, tmp_path, dtype=torch.bfloat16 if cast else None)
    paths = {path.resolve() for path in report.paths}
    # The cast is the control: the same counters must see every one of its copies.
    assert counted.copies == (num_parameters if cast else 0)
    assert parameters_in_mappings(ours, paths) == (0 if cast else num_parameters)
    assert len(report.cast) == (num_parameters if cast else 0)


def test_a_write_never_reaches_the_file(folder, state):
    digest = hashlib.sha256((folder / SINGLE).read_bytes()).digest()
    ours = meta()
    load_weights(ours, folder)
    norm = ours.model.norm.weight
    ours.lm_head.weight.zero_()
    ours.model.embed_tokens.weight.data.fill_(7)
    norm.requires_grad_(True)
    norm.sum().backward()
    torch.optim.SGD([norm], lr=0.5).step()
    assert torch.equal(norm.detach(), state["model.norm.weight"] - 0.5)
    assert hashlib.sha256((folder / SINGLE).read_bytes()).digest() == digest
    again = meta()
    load_weights(again, folder)
    assert_same_state(again.state_dict(), state)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_copy_and_mmap_give_the_same_bits(tmp_path, stored, dtype):
    transformers_lm(stored).save_pretrained(tmp_path, max_shard_size="60KB")
    mapped, copied = meta(), meta()
    load_weights(mapped, tmp_path, dtype=dtype)
    load_weights(copied, tmp_path, dtype=dtype, load="copy")
    assert_same_state(copied.state_dict(), mapped.state_dict())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the mappings are read from Linux' /proc")
def test_copy_maps_nothing(folder):
    ours, control = meta(), meta()
    load_weights(ours, folder, load="copy")
    assert str(folder) not in Path("/proc/self/maps").read_text()
    load_weights(control, folder)
    assert str(folder) in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("load", ["MMAP", "", None, "read"])
def test_unknown_ways_to_load_are_refused(folder, load):
    with pytest.raises(ConfigError, match=rf"load={load!r} is not a way to load; use 'mmap' or 'copy'"):
        load_weights(meta(), folder, load=load)


@pytest.mark.parametrize(
    ("options", "disable"),
    [({}, True), ({"load": "copy"}, None), ({"dtype": torch.float64}, None), ({"device": "meta"}, None)],
)
def test_what_takes_long_has_a_bar_on_a_terminal(folder, monkeypatch, options, disable):
    bars = []
    monkeypatch.setattr(checkpoint, "ProgressBar", lambda work, *rest, **kwargs: bars.append(kwargs["disable"]) or work)
    load_weights(meta(), folder, **options)
    assert bars == [disable]  # None: tqdm looks whether stderr is a terminal


def test_files_may_be_opened_before(folder, state):
    ours = meta()
    load_weights(ours, CheckpointFiles.open(folder))
    assert_same_state(ours.state_dict(), state)


# What changes meanwhile


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def replace(path):
    shutil.copy(path, path.with_name("new"))
    os.replace(path.with_name("new"), path)


def rewrite(path):
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(1, 1))  # a clock may be coarser than this test


# Not here: a mapped file that is cut later. Its pages are gone; copy is the way to load one that may be.
CHANGES = [
    (load, when, change)
    for load in ("copy", "mmap")
    for when in ("first", "later")
    for change in (cut, replace, rewrite, Path.unlink)
    if (load, when, change) != ("mmap", "later", cut)
]


@pytest.mark.parametrize(("load", "when", "change"), CHANGES)
def test_B11_C09_a_file_that_changes_loads_nothing(folder, monkeypatch, load, when, change):
    """Changed before its first tensor is read, or before its tenth."""
    seen = []
    method = "copy" if load == "copy" else "tensor"
    real = getattr(CheckpointFiles, method)

    def read(self, name):
        seen.append(name)
        if len(seen) == (1 if when == "first" else 10):
            change(folder / SINGLE)
        return real(self, name)

    monkeypatch.setattr(CheckpointFiles, method, read)
    ours = meta()
    with pytest.raises(
        CheckpointIOError, match=r"model\.safetensors (was cut, written to or replaced|cannot be read: No such)"
    ):
        load_weights(ours, folder, load=load)
    assert all(parameter.is_meta for parameter in ours.parameters())


def test_C09_a_shard_replaced_after_planning(tmp_path, state):
    body = {name: tensor for name, tensor in state.items() if name != HEAD}
    write_shards(tmp_path, {"a.safetensors": body, "b.safetensors": {HEAD: state[HEAD]}})
    files = CheckpointFiles.open(tmp_path)
    write(tmp_path, {HEAD: state[HEAD] + 1}, "b.safetensors")  # same header, same size
    os.utime(tmp_path / "b.safetensors", ns=(1, 1))
    for load in ("mmap", "copy"):
        with pytest.raises(CheckpointIOError, match=r"b\.safetensors was cut, written to or replaced"):
            load_weights(meta(), files, load=load)


# Values


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_B14_values_that_are_no_numbers_are_named(tmp_path, state, value, caplog):
    stored = {name: tensor.clone() for name, tensor in state.items()}
    stored["model.norm.weight"][-1] = value
    stored[HEAD][7, 3] = value
    write(tmp_path, stored)
    load_weights(meta(), tmp_path)
    assert not caplog.text  # a mapped tensor is not read
    load_weights(meta(), tmp_path, load="copy")
    load_weights(meta(), tmp_path, dtype=torch.bfloat16)
    assert caplog.text.count("2 tensors hold NaN or infinity: model.norm.weight, lm_head.weight") == 2
    assert len(caplog.records) == 2


def test_B14_a_cast_that_overflows_is_told(tmp_path, state, caplog):
    load_weights(meta(), write(tmp_path, {**state, HEAD: state[HEAD] + 1e5}), dtype=torch.float16)
    assert "1 tensors hold NaN or infinity: lm_head.weight" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_is_finite_sees_every_position(dtype):
    for size in (1, 31, 33, 1000):
        for position in (0, size // 2, size - 1):
            for value in (torch.nan, torch.inf, -torch.inf, torch.finfo(dtype).max, -0.0):
                tensor = torch.ones(size, dtype=dtype)
                tensor[position] = value
                assert checkpoint.is_finite(tensor) == bool(tensor.isfinite().all())
    assert checkpoint.is_finite(torch.empty(0, dtype=dtype))


def test_parameters_outlive_the_files(folder, state):
    ours = meta()
    load_weights(ours, folder)
    shutil.rmtree(folder)
    gc.collect()
    assert_same_state(ours.state_dict(), state)


def test_load_leaves_no_open_file(folder):
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("open files are read from Linux' /proc")
    before = len(list(descriptors.iterdir()))
    ours = meta()
    load_weights(ours, folder)
    assert len(list(descriptors.iterdir())) == before


def test_B20_misaligned_tensors_are_copied(tmp_path):
    header = json.dumps({"weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}).encode()
    raw_file(tmp_path / SINGLE, header + b" " * (1 - len(header) % 4), struct.pack("<6f", *range(6)))
    with torch.device("meta"):
        module = nn.Linear(3, 2, bias=False)
    load_weights(module, tmp_path)
    assert module.weight.data_ptr() % 4 == 0
    assert module.weight.tolist() == [[0, 1, 2], [3, 4, 5]]


# Dtypes and devices


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_B15_cast_on_request(folder, state, dtype, caplog):
    ours = meta()
    report = load_weights(ours, folder, dtype=dtype)
    assert_same_state(ours.state_dict(), {name: tensor.to(dtype) for name, tensor in state.items()})
    assert report.dtype == dtype
    assert set(report.cast) == set(state)
    assert not caplog.text


def test_B15_mixed_dtypes_are_cast_to_the_embeddings(tmp_path, state, caplog):
    norms = {name for name in state if "norm" in name}
    stored = {name: tensor if name in norms else tensor.bfloat16() for name, tensor in state.items()}
    ours = meta()
    report = load_weights(ours, write(tmp_path, stored))
    assert_same_state(ours.state_dict(), {name: tensor.bfloat16() for name, tensor in state.items()})
    assert (report.dtype, set(report.cast)) == (torch.bfloat16, norms)
    assert "mixed dtypes; 5 tensors are cast to torch.bfloat16" in caplog.text


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_B15_integers_and_float8_are_refused(tmp_path, state, dtype):
    stored = {**state, "model.norm.weight": torch.ones(64).to(dtype)}
    with pytest.raises(CheckpointMismatchError, match=rf"model.norm.weight has dtype {dtype}, expected a float of 16"):
        load_weights(meta(), write(tmp_path, stored))


def test_other_devices_get_every_tensor(folder):
    ours = meta()
    report = load_weights(ours, folder, device=torch.device("meta"))  # stands in for an accelerator
    assert {parameter.device.type for parameter in ours.parameters()} == {"meta"}
    assert report.cast == ()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), "CUDA out of memory. Tried;"),
        # What torch.empty(2**46) raises.
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate"),
            "DefaultCPU",
        ),
    ],
)
def test_full_memory_is_told_with_the_bytes_needed(folder, monkeypatch, error, reason):
    def full(self, name):
        raise error

    monkeypatch.setattr(CheckpointFiles, "tensor", full)
    ours = meta()
    needed = sum(parameter.numel() for parameter in ours.parameters()) * 2
    with pytest.raises(
        OutOfMemoryError, match=rf"need {needed:,} bytes on cpu; .* ran out at model.embed_tokens.*{reason}"
    ):
        load_weights(ours, folder, dtype=torch.bfloat16)
    assert ours.lm_head.weight.is_meta


def test_other_runtime_errors_are_not_taken_for_full_memory(folder, monkeypatch):
    monkeypatch.setattr(CheckpointFiles, "tensor", lambda self, name: torch.zeros(2).view(3))
    with pytest.raises(RuntimeError, match="shape '\\[3\\]' is invalid"):
        load_weights(meta(), folder)


# Tied heads


@pytest.mark.parametrize("stored", [[EMBEDDING], [EMBEDDING, HEAD], [HEAD]])
def test_A15_tied_head_may_be_stored_once_or_twice(tmp_path, state, stored):
    embedding = state[EMBEDDING].clone()
    embedding[0, 0], embedding[0, 1] = torch.nan, -0.0
    body = {name: tensor for name, tensor in state.items() if name not in (EMBEDDING, HEAD)}
    ours = meta(tie_word_embeddings=True)
    load_weights(ours, write(tmp_path, body | {name: embedding.clone() for name in stored}))
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert same_bits(ours.lm_head.weight.detach(), embedding)


def test_A15_tied_heads_are_compared_in_chunks(tmp_path, state, monkeypatch):
    """Whatever chunk differs is found, without a mapping."""
    monkeypatch.setattr(checkpoint, "_CHUNK_BYTES", 4096)
    body = {**state, HEAD: state[EMBEDDING].clone()}
    load_weights(meta(tie_word_embeddings=True), write(tmp_path, body), load="copy")
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(tmp_path) not in maps.read_text()
    for row in (0, 64, 127):
        head = state[EMBEDDING].clone()
        head[row, -1] += 1
        with pytest.raises(CheckpointMismatchError, match=r"ties lm_head\.weight to model\.embed_tokens\.weight"):
            load_weights(meta(tie_word_embeddings=True), write(tmp_path, {**body, HEAD: head}))


@pytest.mark.parametrize("change", [lambda t: t[3].add_(1), lambda t: t[0, 0].neg_()])
def test_A15_a_different_stored_head_is_refused(tmp_path, state, change):
    embedding = state[EMBEDDING].clone()
    embedding[0, 0] = 0.0  # negated it is equal as a number, not as bits
    head = embedding.clone()
    change(head)
    with pytest.raises(CheckpointMismatchError, match=r"ties lm_head\.weight to model\.embed_tokens\.weight"):
        load_weights(meta(tie_word_embeddings=True), write(tmp_path, {**state, EMBEDDING: embedding, HEAD: head}))


def test_A15_an_untied_model_needs_its_head(tmp_path, state):
    del (body := dict(state))[HEAD]
    with pytest.raises(CheckpointMismatchError, match=r"1 missing: lm_head\.weight; set tie_word_embeddings to true"):
        load_weights(meta(), write(tmp_path, body))


def test_an_untied_model_keeps_two_parameters(folder):
    ours = meta()
    load_weights(ours, folder)
    assert ours.lm_head.weight is not ours.model.embed_tokens.weight


# Every tensor is accounted for


def test_B16_missing_unexpected_and_misshapen_are_one_message(tmp_path, state):
    stored = dict(state)
    stored["model.layers.0.mlp.gate_projection.weight"] = stored.pop("model.layers.0.mlp.gate_proj.weight")
    stored["model.layers.1.mlp.up_proj.weight"] = state["model.layers.1.mlp.up_proj.weight"].T.contiguous()
    ours = meta()
    with pytest.raises(CheckpointMismatchError) as caught:
        load_weights(ours, write(tmp_path, stored))
    assert str(caught.value) == (
        f"{tmp_path} does not fit the model: 1 missing: model.layers.0.mlp.gate_proj.weight; "
        "1 unexpected: model.layers.0.mlp.gate_projection.weight; "
        "1 of another shape or dtype: model.layers.1.mlp.up_proj.weight [64, 96], expected [96, 64]; "
        "1 are transposed: a weight is stored as [out_features, in_features]"
    )
    assert all(parameter.is_meta and parameter.requires_grad for parameter in ours.parameters())


def test_B16_lists_ten_names(tmp_path, state):
    stored = {f"module.{name}": tensor for name, tensor in state.items()}
    with pytest.raises(CheckpointMismatchError) as caught:
        load_weights(meta(), write(tmp_path, stored))
    message = str(caught.value)
    assert message.count("module.") == 10 + 1  # and the hint
    assert "21 missing: model.embed_tokens.weight, " in message
    assert message.count(" and 11 more") == 2
    assert message.endswith("the names have the prefix module. of another program; save them without it")


@pytest.mark.parametrize(
    "name", ["self_attn.qkv_proj.weight", "attention.query_key_value.weight", "mlp.gate_up_proj.bias"]
)
def test_B16_fused_projections_are_named(tmp_path, state, name):
    with pytest.raises(CheckpointMismatchError, match=r"projections are stored fused; split them into q_proj"):
        load_weights(meta(), write(tmp_path, {**state, f"model.layers.0.{name}": torch.ones(3)}))


def test_A14_vocab_size_is_compared_with_the_embedding(tmp_path, state):
    stored = {**state, EMBEDDING: torch.zeros(130, 64)}
    with pytest.raises(CheckpointMismatchError, match=r"embed_tokens.weight \[130, 64\], expected \[128, 64\]"):
        load_weights(meta(), write(tmp_path, stored))


@pytest.mark.parametrize("shape", [(0, 64), (), (1,) * 6 + (64,)])
def test_B18_odd_ranks_are_mismatches(tmp_path, state, shape):
    with pytest.raises(CheckpointMismatchError, match=r"model\.norm\.weight \["):
        load_weights(meta(), write(tmp_path, {**state, "model.norm.weight": torch.ones(shape)}))


def test_a_tensor_stored_under_both_prefixes_is_refused(tmp_path, state):
    stored = {**state, "norm.weight": state["model.norm.weight"].clone()}
    with pytest.raises(CheckpointMismatchError, match=r"1 unexpected: (model.)?norm.weight"):
        load_weights(meta(), write(tmp_path, stored))


@pytest.mark.parametrize("suffix", ["qweight", "weight_packed", "weight_scale_inv", "weight.absmax", "scales"])
def test_quantized_checkpoints_are_refused(tmp_path, state, suffix):
    stored = dict(state)
    stored[f"model.layers.0.mlp.up_proj.{suffix}"] = stored.pop("model.layers.0.mlp.up_proj.weight")
    with pytest.raises(CheckpointMismatchError, match="quantized weights that config.json"):
        load_weights(meta(), write(tmp_path, stored))


def test_B17_names_are_escaped_and_cut_in_messages(tmp_path, state):
    with pytest.raises(CheckpointMismatchError) as caught:
        load_weights(meta(), write(tmp_path, {**state, "\x1b[2J../\n": torch.ones(1), "x" * 10**6: torch.ones(1)}))
    assert r"\x1b[2J../\n" in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_published_checkpoint(shared_data):
    folder = shared_data / "stories260K"
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype="auto")
    with torch.device("meta"):
        ours = LlamaLM(LlamaConfig.from_pretrained(folder))
    load_weights(ours, folder)
    assert_same_state(ours.state_dict(), theirs.state_dict())
    assert checkpoint_files.SINGLE_FILE == SINGLE
