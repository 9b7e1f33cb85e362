"""Loading and saving of checkpoints, with transformers and safetensors as the writers and readers on the other side."""

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
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from llama_fast.config import LlamaConfig
from llama_fast.errors import (
    CheckpointFormatError,
    CheckpointIOError,
    CheckpointMismatchError,
    CheckpointPathError,
    ConfigError,
    OutOfMemoryError,
)
from llama_fast.model import checkpoint, checkpoint_files
from llama_fast.model.checkpoint import CheckpointFiles, find_folder, load_weights, save_weights
from llama_fast.model.llama import LlamaDecoder, LlamaLM

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def transformers_lm(dtype=torch.float32, **overrides):
    """A random transformers model: the writer of the checkpoints."""
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, **overrides)).to(dtype)


def meta(module_class=LlamaLM, **overrides):
    """Our module without memory, as `from_pretrained` makes it."""
    with torch.device("meta"):
        return module_class(LlamaConfig(**SHAPE, **overrides))


def write(folder, tensors, name=SINGLE):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / name, metadata={"format": "pt"})
    return folder


def write_shards(folder, shards, **changes):
    """Shards {file: {name: tensor}} and their index; `changes` replace entries of the index's weight_map."""
    for file, tensors in shards.items():
        write(folder, tensors, file)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map | changes}))
    return folder


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def assert_same_state(state, expected):
    assert state.keys() == expected.keys()
    assert [name for name in expected if not same_bits(state[name], expected[name])] == []


@pytest.fixture(scope="module")
def state():
    """The state of a transformers model, untied."""
    return {name: tensor.clone() for name, tensor in transformers_lm().state_dict().items()}


@pytest.fixture
def folder(tmp_path, state):
    return write(tmp_path / "checkpoint", state)


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


def raw_file(path, header, data):
    """A safetensors file with a header of any bytes."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


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


def test_a_full_device_is_told_with_the_bytes_needed(folder, monkeypatch):
    def full(self, name):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(CheckpointFiles, "tensor", full)
    ours = meta()
    needed = sum(parameter.numel() for parameter in ours.parameters()) * 2
    with pytest.raises(OutOfMemoryError, match=rf"need {needed:,} bytes on cpu, which ran out at model.embed_tokens"):
        load_weights(ours, folder, dtype=torch.bfloat16)
    assert ours.lm_head.weight.is_meta


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
        "1 of another shape or dtype: model.layers.1.mlp.up_proj.weight [64, 96], expected [96, 64]"
    )
    assert all(parameter.is_meta and parameter.requires_grad for parameter in ours.parameters())


def test_B16_lists_ten_names(tmp_path, state):
    stored = {f"module.{name}": tensor for name, tensor in state.items()}
    with pytest.raises(CheckpointMismatchError) as caught:
        load_weights(meta(), write(tmp_path, stored))
    message = str(caught.value)
    assert message.count("module.") == 10
    assert "21 missing: model.embed_tokens.weight, " in message
    assert message.count(" and 11 more") == 2


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
    with pytest.raises(CheckpointMismatchError, match="quantized checkpoint, which is not supported"):
        load_weights(meta(), write(tmp_path, stored))


def test_B17_names_are_escaped_and_cut_in_messages(tmp_path, state):
    with pytest.raises(CheckpointMismatchError) as caught:
        load_weights(meta(), write(tmp_path, {**state, "\x1b[2J../\n": torch.ones(1), "x" * 10**6: torch.ones(1)}))
    assert r"\x1b[2J../\n" in str(caught.value)
    assert len(str(caught.value)) < 1000


# Files that are not what their name says


def test_B13_pickles_are_refused(tmp_path, state):
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointPathError, match=r"pickles \(pytorch_model\.bin\).* refused; convert"):
        load_weights(meta(), tmp_path)


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_without_weights(tmp_path, exists):
    with pytest.raises(CheckpointPathError, match=r"needs model\.safetensors" if exists else "no folder .*; give"):
        load_weights(meta(), tmp_path if exists else tmp_path / "absent")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "header too small"),
        (b"1234567", "header too small"),
        (struct.pack("<Q", 0), "truncated or corrupt"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "header too large"),
        (struct.pack("<Q", 4) + b"[1,2", "truncated or corrupt"),
        (struct.pack("<Q", 2) + b"{}" + b"tail", "not fully covered"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pull|git lfs pull"),
        (b"PK\x03\x04" + bytes(99), "zip or torch.save archive; pickles are refused"),
        (b"\x80\x02}q\x00." + bytes(99), "Python pickle; pickles are refused"),
        (b"GGUF\x03\x00\x00\x00" + bytes(99), "GGUF"),
        (b"\n<!DOCTYPE html><html><body>404</body></html>", "download returned an error page"),
    ],
)
def test_B01_B02_B03_B12_not_safetensors(tmp_path, content, reason):
    (tmp_path / SINGLE).write_bytes(content)
    with pytest.raises(CheckpointFormatError, match=rf"model\.safetensors is not a whole.*({reason})"):
        load_weights(meta(), tmp_path)


@pytest.mark.parametrize("cut", [1, 64 * 64 * 4, 0.5])
def test_B10_truncated_files_load_nothing(folder, cut):
    content = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(content[: -cut if isinstance(cut, int) else int(len(content) * cut)])
    ours = meta()
    with pytest.raises(CheckpointFormatError, match=r"model\.safetensors is not a whole .* bytes\): truncated"):
        load_weights(ours, folder)
    assert all(parameter.is_meta for parameter in ours.parameters())


def test_B08_dtypes_no_weight_can_have(tmp_path):
    raw_file(tmp_path / SINGLE, {"a": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}, bytes(8))
    with pytest.raises(CheckpointFormatError, match="tensor 'a' has dtype C64; accepted are F64"):
        load_weights(meta(), tmp_path)


def test_a_folder_in_place_of_a_file(tmp_path):
    (tmp_path / SINGLE).mkdir()
    with pytest.raises(CheckpointIOError, match="not a regular file"):
        load_weights(meta(), tmp_path)


# Index and shards


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 10**6, "not JSON"),
        ("[]", "needs a .weight_map."),
        ('{"metadata": {}}', "needs a .weight_map."),
        ('{"weight_map": ["a"]}', "needs a .weight_map."),
        ('{"weight_map": {"a": 1}}', "needs a .weight_map."),
        ('{"weight_map": {}}', "empty weight_map"),
        (" " * (10 * 2**20 + 1), "larger than 10,485,760 bytes"),
    ],
)
def test_C01_malformed_index(tmp_path, content, reason):
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(CheckpointFormatError, match=rf"index\.json .*{reason}"):
        load_weights(meta(), tmp_path)


@pytest.mark.parametrize(
    "name", ["/etc/hostname", "../x.safetensors", "a/b", "a//b", "a\\b", "C:x", "..", ".", "", "\0"]
)
def test_C02_shard_names_are_plain(tmp_path, state, name):
    write_shards(tmp_path / "inner", {"a.safetensors": state}, **{HEAD: name})
    write(tmp_path, state, "x.safetensors")
    with pytest.raises(CheckpointPathError, match="is not a plain file name in that folder"):
        load_weights(meta(), tmp_path / "inner")


def test_C02_symlinks_out_of_the_folder_are_refused(tmp_path, state):
    write_shards(tmp_path / "inner", {"a.safetensors": state})
    (tmp_path / "inner" / "a.safetensors").rename(tmp_path / "outside.safetensors")
    (tmp_path / "inner" / "a.safetensors").symlink_to("../outside.safetensors")
    with pytest.raises(CheckpointPathError, match=r"a\.safetensors is a symlink out of its folder"):
        load_weights(meta(), tmp_path / "inner")


@pytest.mark.parametrize("as_folder", [False, True])
def test_C03_missing_shards_are_named_before_reading(tmp_path, state, as_folder):
    head = {HEAD: state[HEAD]}
    body = {name: tensor for name, tensor in state.items() if name != HEAD}
    write_shards(tmp_path, {"a.safetensors": body, "b.safetensors": head})
    (tmp_path / "b.safetensors").unlink()
    if as_folder:
        (tmp_path / "b.safetensors").mkdir()
    (tmp_path / "a.safetensors").write_bytes(b"would be a format error if it were opened")
    with pytest.raises(CheckpointIOError, match=r"1 of the 2 shards .* missing or not files: b\.safetensors"):
        load_weights(meta(), tmp_path)


def test_C05_tensor_in_the_index_but_not_in_its_shard(tmp_path, state):
    write_shards(tmp_path, {"a.safetensors": state}, **{"model.layers.0.mlp.up_proj.weight_scale": "a.safetensors"})
    with pytest.raises(CheckpointMismatchError, match=r"a\.safetensors .* lacks 1 tensors \(model\.layers\.0\.mlp\.up"):
        load_weights(meta(), tmp_path)


def test_C04_tensor_in_a_shard_the_index_does_not_name(tmp_path, state):
    head = {HEAD: state[HEAD]}
    write_shards(tmp_path, {"a.safetensors": state, "b.safetensors": head})
    with pytest.raises(CheckpointMismatchError, match=r"a\.safetensors .*has 1 .* not put there \(lm_head\.weight\)"):
        load_weights(meta(), tmp_path)


# Finding the folder


def test_an_existing_folder_wins_over_a_hub_id(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_folder("owner/name") == Path("owner/name")


@pytest.mark.parametrize("name", ["absent", "./a/b/c", "/absent/folder", "a b/c", "owner/na--me", ""])
def test_neither_folder_nor_hub_id(name, tmp_path, monkeypatch):
    (tmp_path / "x").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointPathError, match=r"no folder .*give an existing folder, or a hub id"):
        find_folder(name)


def test_a_file_is_not_a_folder(folder):
    with pytest.raises(CheckpointPathError, match="is a file; give the folder"):
        find_folder(folder / SINGLE)


@pytest.fixture
def hub_cache(tmp_path, state):
    """The hub's cache after a download of owner/name: snapshot files are links to blobs."""
    repo, revision = tmp_path / "hub" / "models--owner--name", "0" * 40
    write_shards(repo / "blobs", {"model-00001-of-00001.safetensors": state})
    snapshot = repo / "snapshots" / revision
    snapshot.mkdir(parents=True)
    for number, blob in enumerate(sorted((repo / "blobs").iterdir())):
        (snapshot / blob.name).symlink_to(f"../../blobs/{number}")
        blob.rename(repo / "blobs" / str(number))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(revision)
    return tmp_path / "hub"


def test_F1_hub_id_from_the_cache(hub_cache, state):
    found = find_folder("owner/name", cache_dir=hub_cache, local_files_only=True)
    assert found.parent.name == "snapshots"
    ours = meta()
    load_weights(ours, found)
    assert_same_state(ours.state_dict(), state)


def test_F1_hub_id_that_is_not_cached(hub_cache):
    with pytest.raises(CheckpointPathError, match=r"no cached copy of that hub id.*or pass local_files_only=False"):
        find_folder("owner/other", cache_dir=hub_cache, local_files_only=True)


def test_F1_arguments_reach_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **rest: asked.update(rest) or str(tmp_path))
    assert find_folder("owner/name", revision="v1", cache_dir=tmp_path, token="t") == tmp_path
    assert (asked["revision"], asked["cache_dir"], asked["token"]) == ("v1", tmp_path, "t")
    offered = ["config.json", "model-1.safetensors", "chat_template.jinja", "tokenizer.model", "pytorch_model.bin"]
    offered += ["original/params.json", "consolidated.safetensors", "README.md"]
    wanted = huggingface_hub.utils.filter_repo_objects(
        offered, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert list(wanted) == offered[:4]


@pytest.mark.parametrize(
    ("error", "fix"),
    [("GatedRepoError", "accept its licence"), ("RepositoryNotFoundError", "pass token= if it is private")],
)
def test_F1_refusals_of_the_hub(monkeypatch, error, fix):
    import huggingface_hub

    error_class = getattr(huggingface_hub.errors, error)

    def refuse(*args, **kwargs):
        raise error_class.__new__(error_class, "refused")  # its constructor wants an HTTP response

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CheckpointPathError, match=fix):
        find_folder("owner/name")


# Saving


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_shard_size", ["5GB", "60KB", 20_000])
def test_F11_transformers_reads_what_is_saved(tmp_path, max_shard_size, tied):
    theirs = transformers_lm(torch.bfloat16, tie_word_embeddings=tied)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = meta(tie_word_embeddings=tied)
    load_weights(ours, tmp_path / "theirs")
    written = save_weights(ours, tmp_path / "ours", max_shard_size=max_shard_size)

    shards = [path for path in written if path.suffix == ".safetensors"]
    stored = {path: load_file(path) for path in shards}
    assert sorted(written) == sorted((tmp_path / "ours").iterdir())
    names = [name for tensors in stored.values() for name in tensors]
    assert Counter(names) == Counter(
        [name for name, _ in ours.named_parameters()]
    )  # each once, tied ones under the first name
    for path in shards:
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
    if max_shard_size == "5GB":
        assert written == [tmp_path / "ours" / SINGLE]
    else:
        index = json.loads(written[-1].read_text())
        assert index["weight_map"] == {name: path.name for path, tensors in stored.items() for name in tensors}
        assert index["metadata"]["total_size"] == sum(parameter.nbytes for parameter in ours.parameters())
        limit = 60_000 if max_shard_size == "60KB" else max_shard_size
        sizes = [[tensor.nbytes for tensor in tensors.values()] for tensors in stored.values()]
        assert all(sum(size) <= limit or len(size) == 1 for size in sizes)

    theirs.config.save_pretrained(tmp_path / "ours")
    reread = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert_same_state(reread.state_dict(), theirs.state_dict())
    again = meta(tie_word_embeddings=tied)
    load_weights(again, tmp_path / "ours")
    assert_same_state(again.state_dict(), ours.state_dict())


def test_F11_shards_of_an_earlier_save_are_removed(tmp_path, folder, state):
    ours = meta()
    load_weights(ours, folder)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model-card.safetensors").write_bytes(b"not ours")
    for max_shard_size, files in ((20_000, None), (60_000, None), ("5GB", [SINGLE]), (60_000, None)):
        written = save_weights(ours, tmp_path / "out", max_shard_size=max_shard_size)
        present = {path.name for path in (tmp_path / "out").iterdir()}
        assert present == {path.name for path in written} | {"model-card.safetensors"}
        assert files is None or [path.name for path in written] == files
        again = meta()
        load_weights(again, tmp_path / "out")
        assert_same_state(again.state_dict(), state)


def test_F11_saving_over_the_mapped_files(folder, state):
    ours = meta()
    load_weights(ours, folder)
    with torch.no_grad():
        ours.model.norm.weight.mul_(3)
    expected = {**state, "model.norm.weight": state["model.norm.weight"] * 3}
    for max_shard_size in ("5GB", 20_000):
        save_weights(ours, folder, max_shard_size=max_shard_size)
        assert_same_state(ours.state_dict(), expected)
        again = meta()
        load_weights(again, folder)
        assert_same_state(again.state_dict(), expected)


def test_F11_views_of_one_packed_weight_are_saved_apart(tmp_path):
    module = nn.ModuleDict({"q": nn.Linear(4, 4, bias=False), "k": nn.Linear(4, 2, bias=False)})
    packed = torch.arange(24.0).view(6, 4)
    module.q.weight, module.k.weight = nn.Parameter(packed[:4]), nn.Parameter(packed[4:])
    written = save_weights(module, tmp_path, max_shard_size=64)
    assert [load_file(path)[name].tolist() for path, name in zip(written, ("q.weight", "k.weight"), strict=False)] == [
        packed[:4].tolist(),
        packed[4:].tolist(),
    ]


def test_F11_transposed_parameters_are_saved_by_value(tmp_path):
    module = nn.Linear(3, 2, bias=False)
    module.weight = nn.Parameter(torch.arange(6.0).view(3, 2).T)
    save_weights(module, tmp_path)
    assert torch.equal(load_file(tmp_path / SINGLE)["weight"], module.weight)


def test_F11_a_failed_save_leaves_the_old_checkpoint(folder, state, monkeypatch):
    ours = meta()
    load_weights(ours, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def disk_full(tensors, path, metadata):
        Path(path).write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", disk_full)
    with pytest.raises(CheckpointIOError, match=r"saving weights to .*No space left on device"):
        save_weights(ours, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_F11_a_file_in_place_of_the_folder(folder):
    ours = meta()
    load_weights(ours, folder)
    with pytest.raises(CheckpointIOError, match="saving weights to"):
        save_weights(ours, folder / SINGLE)


@pytest.mark.parametrize("max_shard_size", [0, -1, "5", "many", "5GiB", ""])
def test_F11_sizes_that_are_not(tmp_path, max_shard_size):
    with pytest.raises(ConfigError, match=r"max_shard_size=.*; give bytes as an int, or a string such as '5GB'"):
        save_weights(nn.Linear(2, 2), tmp_path, max_shard_size=max_shard_size)
    assert not list(tmp_path.iterdir())


def test_published_checkpoint(shared_data):
    folder = shared_data / "stories260K"
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype="auto")
    with torch.device("meta"):
        ours = LlamaLM(LlamaConfig.from_pretrained(folder))
    load_weights(ours, folder)
    assert_same_state(ours.state_dict(), theirs.state_dict())
    assert checkpoint_files.SINGLE_FILE == SINGLE


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_saved_files_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        (path,) = save_weights(torch.nn.Linear(3, 2), tmp_path / "saved")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
