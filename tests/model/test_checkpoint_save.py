"""Saving: read back by transformers, by safetensors and by us; whole whatever ends it."""

import itertools
import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from llama_fast.errors import CheckpointIOError, ConfigError
from llama_fast.model import checkpoint_save
from llama_fast.model.checkpoint import load_weights, save_weights
from tests.model.checkpoint_samples import SINGLE, assert_same_state, meta, same_bits, transformers_lm, write


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


def test_F11_a_full_disk_leaves_the_old_checkpoint(folder, monkeypatch):
    ours = meta()
    load_weights(ours, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    calls = []

    def disk_full(tensors, path, metadata):
        Path(path).write_bytes(b"half a file")
        calls.append(path)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_save, "save_file", disk_full)
    with pytest.raises(CheckpointIOError, match=r"saving weights to .*No space left on device"):
        save_weights(ours, folder, max_shard_size=20_000)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# What ends a save: at the n-th time that Python opens, renames or removes a file, for every n. An audit hook can not be
# taken back, so each save runs in a process of its own.

SAVED_AS = {"single": "5GB", "sharded": 150_000}


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt():
    raise KeyboardInterrupt


def fail():
    raise OSError(28, "No space left on device")


def save_until(step, ending, module, folder, max_shard_size):
    """Save in a child process, where `ending` is called at the `step`-th step; whether the save came to its end."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1] == 0
    status, steps = 1, itertools.count(1)

    def hook(event, arguments):
        if event in ("open", "os.rename", "os.remove") and next(steps) == step:
            ending()

    try:
        sys.addaudithook(hook)
        save_weights(module, folder, max_shard_size=max_shard_size)
        status = 0
    except (CheckpointIOError, KeyboardInterrupt):
        pass
    finally:
        os._exit(status)


@pytest.mark.parametrize("ending", [die, interrupt, fail])
@pytest.mark.parametrize("old", SAVED_AS)
@pytest.mark.parametrize("new", SAVED_AS)
def test_L07_a_save_that_ends_early_leaves_the_old_or_the_new_checkpoint(tmp_path, state, old, new, ending):
    old_module, new_module = meta(), meta()
    load_weights(old_module, write(tmp_path / "old", state))
    load_weights(new_module, write(tmp_path / "new", {name: tensor + 1 for name, tensor in state.items()}))
    outcomes, left_behind = [], 0
    for step in itertools.count(1):
        folder = tmp_path / f"{step}"
        save_weights(old_module, folder, max_shard_size=SAVED_AS[old])
        before = {path.name for path in folder.iterdir()}
        finished = save_until(step, ending, new_module, folder, SAVED_AS[new])
        loaded = meta()
        load_weights(loaded, folder)
        expected = new_module if same_bits(loaded.lm_head.weight, new_module.lm_head.weight) else old_module
        assert_same_state(loaded.state_dict(), expected.state_dict())
        outcomes.append(expected is new_module)
        left_behind += {path.name for path in folder.iterdir()} - before != set() and expected is old_module
        # What is left behind is in nobody's way and goes with the next save.
        save_weights(new_module, folder, max_shard_size=SAVED_AS[new])
        again = meta()
        load_weights(again, folder)
        assert_same_state(again.state_dict(), new_module.state_dict())
        assert not list(folder.glob("*.tmp"))
        if finished:
            break
    assert len(outcomes) > 3
    assert outcomes == sorted(outcomes)  # old, old, ..., new: there is one moment
    assert (outcomes[0], outcomes[-1]) == (False, True)
    # An error removes the new shards, but not from the renaming of the index to the removal of an old file.
    assert ending is die or left_behind <= 3


def test_L07_shards_get_names_that_are_not_there(folder):
    ours = meta()
    load_weights(ours, folder)
    names = []
    for _ in range(3):
        written = save_weights(ours, folder, max_shard_size=60_000)
        names.append(written[0].name)
        assert sorted(written) == sorted(folder.iterdir())
    assert names[0] == names[2] != names[1]
    assert names[0].startswith("model-00001-of-0")
    assert names[1] == names[0].replace("model-", "model-2-")


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


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_saved_files_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        (path,) = save_weights(torch.nn.Linear(3, 2), tmp_path / "saved")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
