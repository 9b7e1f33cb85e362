"""verify_checkpoint: what is wrong inside the files, with sha256sum as the writer of the digests."""

import hashlib
import shutil
import subprocess

import pytest
import torch

from llama_fast.errors import CheckpointFormatError, CheckpointIOError, CheckpointPathError
from llama_fast.model import verify
from llama_fast.model.verify import verify_checkpoint
from tests.model.checkpoint_samples import HEAD, SINGLE, raw_file, write, write_shards


@pytest.fixture
def shards(tmp_path, state):
    body = {name: tensor for name, tensor in state.items() if name != HEAD}
    return write_shards(tmp_path / "shards", {"a.safetensors": body, "b.safetensors": {HEAD: state[HEAD]}})


def sha256sums(folder):
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum here")
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    done = subprocess.run(["sha256sum", *names], cwd=folder, capture_output=True, text=True, check=True)
    (folder / "SHA256SUMS").write_text(done.stdout)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def test_a_good_checkpoint(shards, state):
    report = verify_checkpoint(shards)
    assert (report.problems, report.num_tensors, report.checked_sha256) == ([], len(state), 0)
    assert report.num_bytes == sum(tensor.nbytes for tensor in state.values())


def test_C06_L10_a_flipped_bit_is_found_by_its_digest(shards):
    sha256sums(shards)
    assert verify_checkpoint(shards).problems == []
    assert verify_checkpoint(shards).checked_sha256 == 2
    flip_a_bit(shards / "b.safetensors")
    actual = hashlib.sha256((shards / "b.safetensors").read_bytes()).hexdigest()
    (problem,) = verify_checkpoint(shards).problems
    assert problem.startswith(f"b.safetensors: its sha256 is {actual}, but SHA256SUMS says ")


def test_files_that_are_missing_or_not_listed(shards):
    lines = f"# comment\n\n{'0' * 64} *c.safetensors\n"
    (shards / "SHA256SUMS").write_text(lines)
    assert verify_checkpoint(shards).problems == [
        "a.safetensors: not in SHA256SUMS",
        "b.safetensors: not in SHA256SUMS",
        "c.safetensors: listed in SHA256SUMS, but missing",
    ]


@pytest.mark.parametrize(
    ("content", "error", "reason"),
    [
        ("nonsense", CheckpointFormatError, "line 1, 'nonsense', is not as sha256sum writes it"),
        (f"{'0' * 63} a", CheckpointFormatError, "line 1, "),
        (f"\n{'g' * 64}  a", CheckpointFormatError, "line 2, "),
        ("\x1b[2J", CheckpointFormatError, r"line 1, '\\x1b\[2J'"),
        ("x" * (2**20 + 1), CheckpointFormatError, "has at most 1,048,576"),
        (f"{'0' * 64}  ../a.safetensors", CheckpointPathError, "'../a.safetensors' is not a plain file name"),
        (f"{'0' * 64}  /etc/hostname", CheckpointPathError, "is not a plain file name"),
        (f"{'0' * 64}  a\x1b", CheckpointPathError, r"'a\\x1b' is not a plain file name"),
    ],
)
def test_a_malformed_manifest(shards, content, error, reason):
    (shards / "SHA256SUMS").write_text(content)
    with pytest.raises(error, match=f"SHA256SUMS.*{reason}"):
        verify_checkpoint(shards)


def test_a_folder_in_place_of_the_manifest(shards):
    (shards / "SHA256SUMS").mkdir()
    with pytest.raises(CheckpointIOError, match="SHA256SUMS: is a folder and not"):
        verify_checkpoint(shards)


def test_the_hubs_cache_names_its_files_by_their_digest(tmp_path, shards):
    snapshot = tmp_path / "models--owner--name" / "snapshots" / ("0" * 40)
    blobs = snapshot.parents[1] / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in shards.iterdir():
        blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
        path.rename(blob)
        (snapshot / path.name).symlink_to(blob)
    report = verify_checkpoint(snapshot)
    assert (report.problems, report.checked_sha256) == ([], 2)
    flip_a_bit((snapshot / "a.safetensors").resolve())
    (problem,) = verify_checkpoint(snapshot).problems
    assert "a.safetensors: its sha256 is " in problem
    assert ", but the hub says " in problem


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_B14_values_in_any_chunk(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(verify, "_CHUNK_BYTES", 64)
    clean = torch.ones(3, 50)
    for row, column, value in ((0, 0, torch.nan), (2, 49, torch.inf), (1, 7, -torch.inf)):
        wrong = clean.clone()
        wrong[row, column] = value
        tensors = {"clean": clean.to(dtype), "wrong": wrong.to(dtype), "integers": torch.ones(9, dtype=torch.int8)}
        assert verify_checkpoint(write(tmp_path, tensors)).problems == [
            "wrong: 1 of (3, 50) values are NaN or infinite"
        ]
    zero_size = {"empty": torch.ones(0, 3, dtype=dtype), "scalar": torch.ones((), dtype=dtype)}
    assert verify_checkpoint(write(tmp_path, zero_size)).problems == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_B14_nothing_but_subnormals(tmp_path, dtype):
    tiny = torch.finfo(dtype).tiny
    tensors = {
        "subnormal": torch.tensor([-tiny / 2, 0.0], dtype=dtype),
        "zeros": torch.zeros(2, dtype=dtype),
        "normal": torch.tensor([-tiny, 0.0], dtype=dtype),
    }
    (problem,) = verify_checkpoint(write(tmp_path, tensors)).problems
    assert problem.startswith("subnormal: all values are subnormal, at most ")


def test_a_folder_that_cannot_be_loaded_is_an_error(tmp_path):
    raw_file(tmp_path / SINGLE, b"{", b"")
    with pytest.raises(CheckpointFormatError, match="not strict JSON"):
        verify_checkpoint(tmp_path)


def test_the_bar_counts_every_byte(shards, capsys):
    sha256sums(shards)
    verify_checkpoint(shards, show_progress=True)
    assert "verifying: 100%" in capsys.readouterr().err
    verify_checkpoint(shards, show_progress=False)
    assert capsys.readouterr().err == ""
