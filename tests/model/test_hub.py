"""The folder of a checkpoint, from a path or a hub id; the hub's cache is laid out by hand."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects

from llama_fast import LlamaConfig, LlamaTokenizer, demo
from llama_fast.errors import (
    CheckpointPathError,
)
from llama_fast.hub import find_folder
from llama_fast.model.checkpoint import load_weights
from tests.model.checkpoint_samples import (
    SINGLE,
    assert_same_state,
    meta,
    write_shards,
)


def test_an_existing_folder_wins_over_a_hub_id(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_folder("owner/name") == Path("owner/name")


@pytest.mark.parametrize(
    "name", ["absent", "./a/b/c", "/absent/folder", "a b/c", "owner/na--me", "", "~nobody/x", "a\0b", "x" * 300]
)
def test_neither_folder_nor_hub_id(name, tmp_path, monkeypatch):
    (tmp_path / "x").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointPathError, match=r"no folder .*give an existing folder, or a hub id"):
        find_folder(name)


def test_a_name_too_long_for_a_path_or_a_hub_id():
    with pytest.raises(CheckpointPathError, match="no folder") as caught:
        find_folder("a/" + "b" * 10**5)
    assert len(str(caught.value)) < 500


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


COMMIT = "0" * 40


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_F1_hub_id_from_the_cache(hub_cache, state, revision):
    found = find_folder("owner/name", cache_dir=hub_cache, local_files_only=True, revision=revision)
    assert found == hub_cache / "models--owner--name" / "snapshots" / COMMIT
    for load in ("mmap", "copy"):
        ours = meta()
        load_weights(ours, found, load=load)
        assert_same_state(ours.state_dict(), state)


def test_F1_a_link_out_of_the_cache_is_refused(hub_cache, tmp_path):
    shard = hub_cache / "models--owner--name" / "snapshots" / COMMIT / "model-00001-of-00001.safetensors"
    shard.resolve().rename(tmp_path / "elsewhere")
    shard.unlink()
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointPathError, match="is a symlink out of its folder"):
        load_weights(meta(), shard.parent)


def test_F1_offline(hub_cache, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # what HF_HUB_OFFLINE=1 sets at its import
    assert find_folder("owner/name", cache_dir=hub_cache).name == COMMIT
    for name, revision in (("owner/other", None), ("owner/name", "v2"), ("owner/name", "1" * 40)):
        with pytest.raises(CheckpointPathError, match=rf"revision {revision or 'main'}\).*or unset HF_HUB_OFFLINE"):
            find_folder(name, cache_dir=hub_cache, revision=revision)


def test_F1_progress_bars_are_the_hubs_own(tmp_path, monkeypatch):
    import huggingface_hub

    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **rest: asked.update(rest) or str(tmp_path))
    huggingface_hub.utils.enable_progress_bars()
    find_folder("owner/name")
    assert "tqdm_class" not in asked
    assert not huggingface_hub.utils.are_progress_bars_disabled()


def test_F1_hub_id_that_is_not_cached(hub_cache):
    with pytest.raises(
        CheckpointPathError, match=r"no complete cached copy of that hub id.*or pass local_files_only=False"
    ):
        find_folder("owner/other", cache_dir=hub_cache, local_files_only=True)


def test_F1_arguments_reach_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **rest: asked.update(rest) or str(tmp_path))
    assert find_folder("owner/name", revision="v1", cache_dir=tmp_path, token="t") == tmp_path
    assert (asked["revision"], asked["cache_dir"], asked["token"]) == ("v1", tmp_path, "t")
    offered = ["config.json", "model.safetensors.index.json", "chat_template.jinja", "tokenizer.model"]
    offered += ["model-1.safetensors", "pytorch_model.bin", "original/params.json", "consolidated.safetensors", "x.py"]
    for weights, wanted in ((True, offered[:5]), (False, offered[:4])):
        find_folder("owner/name", weights=weights)
        allowed, ignored = asked["allow_patterns"], asked["ignore_patterns"]
        assert list(filter_repo_objects(offered, allow_patterns=allowed, ignore_patterns=ignored)) == wanted


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


def test_F1_config_and_tokenizer_take_hub_ids(hub_cache):
    snapshot = hub_cache / "models--owner--name" / "snapshots" / COMMIT
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo.PATH / name, snapshot / name)
    where = {"cache_dir": hub_cache, "local_files_only": True}
    config = LlamaConfig.from_pretrained("owner/name", revision="main", num_hidden_layers=1, **where)
    assert (config.vocab_size, config.num_hidden_layers) == (LlamaConfig.from_pretrained(demo.PATH).vocab_size, 1)
    tokenizer = LlamaTokenizer.from_pretrained("owner/name", revision=COMMIT, **where)
    assert tokenizer.encode("Once upon") == LlamaTokenizer.from_pretrained(demo.PATH).encode("Once upon")
    assert config._name_or_path == tokenizer.name_or_path == "owner/name"
    for read in (LlamaConfig.from_pretrained, LlamaTokenizer.from_pretrained):
        with pytest.raises(CheckpointPathError, match="revision v2"):
            read("owner/name", revision="v2", **where)
