"""Files that are not what their name says: safetensors headers, indexes and shards."""

import contextlib
import json
import re
import struct
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file

from llama_fast.errors import (
    CheckpointError,
    CheckpointFormatError,
    CheckpointIOError,
    CheckpointMismatchError,
    CheckpointPathError,
    UnsupportedError,
)
from llama_fast.model.checkpoint import CheckpointFiles, load_weights
from tests.model.checkpoint_samples import (
    HEAD,
    INDEX,
    SINGLE,
    meta,
    raw_file,
    write,
    write_shards,
)


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
        (b"", "it has 0 bytes and no whole header size"),
        (b"1234567", "it has 7 bytes and no whole header size"),
        (struct.pack("<Q", 0), "header of 0 bytes does not begin"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "the file is 10 bytes, its header needs 18,446,744,073,709,551,623"),
        (struct.pack("<Q", 4) + b"[1,2", "does not begin with '{'"),
        (struct.pack("<Q", 3) + b" {}", "does not begin with '{'"),
        (struct.pack("<Q", 2_500_001) + b"{" + bytes(2_500_000), "more than the 2,500,000 that max_tensors=20,000"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"PK\x03\x04" + bytes(99), "zip or torch.save archive; pickles are refused"),
        (b"\x80\x02}q\x00." + bytes(99), "Python pickle; pickles are refused"),
        (b"GGUF\x03\x00\x00\x00" + bytes(99), "GGUF"),
        (b"\n<!DOCTYPE html><html><body>404</body></html>", "download returned an error page"),
    ],
)
def test_B01_B02_B03_B12_not_safetensors(tmp_path, content, reason):
    (tmp_path / SINGLE).write_bytes(content)
    with pytest.raises(CheckpointFormatError, match=rf"model\.safetensors is not a whole.*({re.escape(reason)})"):
        load_weights(meta(), tmp_path)


@pytest.mark.parametrize("cut", [1, 64 * 64 * 4, 0.5])
def test_B10_truncated_files_load_nothing(folder, cut):
    content = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(content[: -cut if isinstance(cut, int) else int(len(content) * cut)])
    ours = meta()
    with pytest.raises(
        CheckpointFormatError,
        match=r"safetensors: the file is [\d,]+ bytes, its header needs [\d,]+;.*tensor '.*': trun",
    ):
        load_weights(ours, folder)
    assert all(parameter.is_meta for parameter in ours.parameters())


TWO = {
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "b": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]},
}


def changed(name, **changes):
    return TWO | {name: TWO[name] | changes}


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (changed("b", data_offsets=[4, 8]), "tensor 'b' overlaps the tensor before it: it begins at byte 4 of the"),
        (
            changed("b", data_offsets=[9, 13]),
            "tensor 'b' leaves a hole before it: it begins at byte 9 of the data, not at",
        ),
        ({"a": TWO["a"]}, "4 bytes follow the last tensor, which no tensor covers"),
        (changed("b", shape=[2], data_offsets=[8, 16]), "it ends within or before tensor 'b': truncated"),
        (changed("b", data_offsets=[12, 8]), "tensor 'b' has data_offsets [12, 8]"),
        (changed("b", data_offsets=[-4, 0]), "tensor 'b' has data_offsets [-4, 0]"),
        (changed("b", data_offsets=[8, 12.0]), "tensor 'b' has data_offsets [8, 12.0]"),
        (changed("b", data_offsets=[8, True]), "tensor 'b' has data_offsets [8, True]"),
        (changed("b", data_offsets=[8]), "tensor 'b' has data_offsets [8]"),
        (changed("b", data_offsets=[8, 2**63]), "tensor 'b' has data_offsets [8, 9223372036854775808]"),
        (changed("b", shape=[3]), "tensor 'b' of shape [3] and F32 has 12 bytes, but its data_offsets [8, 12] hold 4"),
        (changed("b", shape=[2**62, 4, 0]), "tensor 'b' of shape [4611686018427387904, 4, 0] and F32 has 2**63"),
        (changed("b", shape=[1.0]), "tensor 'b' has shape [1.0]; it must be a list of integers"),
        (changed("b", shape="1"), "tensor 'b' has shape '1'"),
        (changed("b", dtype="C64"), "tensor 'b' has dtype 'C64'; accepted are F64, F32"),
        (changed("b", dtype=["F32"]), "tensor 'b' has dtype ['F32']"),
        (changed("b", stride=[1]), "tensor 'b' needs exactly dtype, shape and data_offsets"),
        ({**TWO, "b": None}, "tensor 'b' needs exactly dtype, shape and data_offsets; got None"),
        ({**TWO, "__metadata__": {"format": 1}}, "__metadata__ must map strings to strings; got {'format': 1}"),
        ({**TWO, "__metadata__": None}, "__metadata__ must map strings to strings; got None"),
        (
            json.dumps(TWO)[:-1].encode() + b', "a": ' + json.dumps(TWO["a"]).encode() + b"}",
            "the key 'a' appears twice",
        ),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b'{"\xff": 1}', "is not UTF-8"),
        (b"{" + b"[" * 60_002, "more than max_tensors=20,000 tensors"),
        (
            b"{" + b",".join(b'"%d":0' % i for i in range(20_001)) + b"}",
            "has 20,001 tensors, more than max_tensors=20,000",
        ),
    ],
)
def test_B03_to_B09_malformed_headers(tmp_path, header, reason):
    raw_file(tmp_path / SINGLE, header, bytes(12))
    with pytest.raises(CheckpointFormatError, match=r"model\.safetensors: .*" + re.escape(reason)):
        CheckpointFiles.open(tmp_path)


@given(st.data())
def test_any_header_that_we_take_safetensors_takes(tmp_path_factory, data):
    """And the other way, where no tensor is named twice: two readers of one file must not see different tensors."""
    numbers = st.sampled_from([0, 1, 2, 3, 4, 6, 8, 12, -1, 2**63, 1.0, True])
    entry = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "I8", "BF16", "X"]),
            "shape": st.lists(numbers, max_size=2),
            "data_offsets": st.lists(numbers, min_size=2, max_size=2),
        }
    )
    valid = st.permutations(["F32", "BF16", "I8"]).map(_filled)
    header = data.draw(st.one_of(valid, st.dictionaries(st.sampled_from("ab"), entry), st.just(TWO)))
    folder = tmp_path_factory.mktemp("header")
    raw_file(folder / SINGLE, header, bytes(data.draw(st.sampled_from([12, 7, 0]))))
    try:
        theirs = load_file(folder / SINGLE)
    except (SafetensorError, OverflowError):
        theirs = None
    try:
        files = CheckpointFiles.open(folder)
    except CheckpointFormatError:
        files = None
    assert (files is None) == (theirs is None)
    if files is not None:
        assert files.shapes == {name: tuple(tensor.shape) for name, tensor in theirs.items()}


def _filled(codes):
    """A header of 7 bytes of tensors, one of each dtype."""
    header, begin = {}, 0
    for code in codes:
        end = begin + {"F32": 4, "BF16": 2, "I8": 1}[code]
        header[code] = {"dtype": code, "shape": [1], "data_offsets": [begin, end]}
        begin = end
    return header


@given(st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=3), st.integers(0, 50))
def test_a_damaged_file_is_refused_or_harmless(tmp_path_factory, changes, cut):
    """Bytes of size and header overwritten, and the end cut: an error of ours, or other names, never another error."""
    folder = tmp_path_factory.mktemp("damaged")
    raw_file(folder / SINGLE, TWO, bytes(12))
    content = bytearray((folder / SINGLE).read_bytes())
    for position, value in changes:
        content[position % (len(content) - 12)] = value
    (folder / SINGLE).write_bytes(content[: len(content) - cut])
    with contextlib.suppress(CheckpointError):
        files = CheckpointFiles.open(folder)
        for name, shape in files.shapes.items():
            assert files.copy(name).shape == shape
            assert files.tensor(name).shape == shape


def test_B09_metadata_is_not_used(tmp_path):
    raw_file(tmp_path / SINGLE, {"__metadata__": {"format": "tf", "x": "{" * 1000}} | TWO, bytes(12))
    assert set(CheckpointFiles.open(tmp_path).shapes) == {"a", "b"}


def test_B19_a_big_endian_machine_is_refused(folder, monkeypatch):
    monkeypatch.setattr(sys, "byteorder", "big")
    with pytest.raises(
        UnsupportedError, match=r"model\.safetensors: safetensors are little-endian and this machine is b"
    ):
        load_weights(meta(), folder)


def test_a_folder_in_place_of_a_file(tmp_path):
    (tmp_path / SINGLE).mkdir()
    with pytest.raises(CheckpointIOError, match="not a regular file"):
        load_weights(meta(), tmp_path)


# Index and shards


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "not strict JSON: the file is empty"),
        ("{", "not strict JSON"),
        ("[" * 10**6, "more than max_tensors=20,000 tensors"),
        ("[" * 10**4, "nested more than 64 deep"),
        ("[]", "it holds a list"),
        ('{"metadata": {}}', "needs a .weight_map."),
        ('{"weight_map": ["a"]}', "needs a .weight_map."),
        ('{"weight_map": {"a": 1}}', "needs a .weight_map."),
        ('{"weight_map": {}}', "needs a .weight_map."),
        (" " * 1_250_001, "has at most 1,250,000"),
    ],
)
def test_C01_malformed_index(tmp_path, content, reason):
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(CheckpointFormatError, match=rf"index\.json.*{reason}"):
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
    with pytest.raises(
        CheckpointMismatchError, match=r"'a\.safetensors' .* lacks 1 of its tensors \(model\.layers\.0\.mlp\.up"
    ):
        load_weights(meta(), tmp_path)


def test_C04_tensor_in_a_shard_the_index_does_not_name(tmp_path, state):
    head = {HEAD: state[HEAD]}
    write_shards(tmp_path, {"a.safetensors": state, "b.safetensors": head})
    with pytest.raises(CheckpointMismatchError, match=r"'a\.safetensors' .*has 1 .* not put there \(lm_head\.weight\)"):
        load_weights(meta(), tmp_path)


def test_C07_a_wrong_total_size_is_a_warning(tmp_path, state, caplog):
    for total_size in (7, -1, "many", None, sum(tensor.nbytes for tensor in state.values())):
        write_shards(tmp_path, {"a.safetensors": state})
        index = json.loads((tmp_path / INDEX).read_text())
        index["metadata"] = {"total_size": total_size}
        (tmp_path / INDEX).write_text(json.dumps(index))
        load_weights(meta(), tmp_path)
    assert caplog.text.count("metadata.total_size is wrong") == 3


def test_C08_shards_that_no_index_lists(tmp_path, state, caplog):
    write_shards(tmp_path, {"model-00001-of-00001.safetensors": state})
    write(tmp_path, state, "adapter.safetensors")
    load_weights(meta(), tmp_path)
    assert not caplog.text
    write(tmp_path, state, "model-00001-of-00002.safetensors")
    load_weights(meta(), tmp_path)
    assert "not loaded are 1 shards that no index lists: model-00001-of-00002.safetensors" in caplog.text
    (tmp_path / INDEX).unlink()
    with pytest.raises(
        CheckpointPathError, match=r"no model\.safetensors\.index\.json for adapter\.safetensors, model-0"
    ):
        load_weights(meta(), tmp_path)
