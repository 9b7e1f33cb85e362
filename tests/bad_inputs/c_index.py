"""C: shards and their index."""

import hashlib
import json
import os
import resource
import shutil
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from llama_fast.errors import (
    CheckpointFormatError,
    CheckpointIOError,
    CheckpointMismatchError,
    CheckpointPathError,
    shown,
)
from llama_fast.model.checkpoint import CheckpointFiles, load_weights
from llama_fast.model.verify import verify_checkpoint
from tests.bad_inputs.b_safetensors import refused_load, warnings_of
from tests.bad_inputs.checkpoints import (
    HEAD,
    INDEX,
    LOADS,
    NORM,
    STATE,
    is_the_checkpoint,
    load,
    module,
    two_shards,
    write,
    write_index,
    write_shards,
)
from tests.bad_inputs.harness import accepted, check, refused


def C00_negative_control(folder: Path) -> None:
    write_shards(folder, two_shards())
    for how in LOADS:
        check(is_the_checkpoint(accepted(lambda how=how: load(folder, how))), "other bits")


def C01_malformed_index(folder: Path) -> None:
    shard = {HEAD: "a.safetensors"}
    for content, needle in (
        (b"", "the file is empty"),
        (b"{", "is not strict JSON"),
        (b"\xff{}", "is not UTF-8"),
        (b"[]", "it holds a list"),
        (b"null", "it holds null"),
        (b"<html>404</html>", "is not strict JSON"),
        (b'{"weight_map": {"a": "b", "a": "c"}}', "the key 'a' appears twice"),
        (b'{"weight_map": {}, "weight_map": {}}', "the key 'weight_map' appears twice"),
        (b"[" * 1_000_000, "more than max_tensors=20,000 tensors"),
        (b"[" * 50_000, "nested more than 64 deep"),
        (b'{"metadata":' + b"[" * 100 + b"]" * 100 + b"}", "nested more than 64 deep"),
        (b" " * 1_250_001, "has at most 1,250,000"),
        (json.dumps({"metadata": {}}).encode(), 'needs a "weight_map"'),
        (json.dumps({"weight_map": None}).encode(), 'needs a "weight_map"'),
        (json.dumps({"weight_map": {}}).encode(), 'needs a "weight_map"'),
        (json.dumps({"weight_map": list(shard)}).encode(), 'needs a "weight_map"'),
        (json.dumps({"weight_map": {HEAD: 1}}).encode(), 'needs a "weight_map"'),
        (json.dumps({"weight_map": {HEAD: ["a.safetensors"]}}).encode(), 'needs a "weight_map"'),
    ):
        (folder / INDEX).write_bytes(content)
        refused_load(CheckpointFormatError, folder, INDEX, needle, header_bytes=len(content))


def C01_huge_index(folder: Path) -> None:
    with (folder / INDEX).open("wb") as file:
        file.write(b"{")
        file.truncate(1 << 30)  # sparse
    refused_load(CheckpointFormatError, folder, INDEX, "has at most 1,250,000")
    for unit, needle in (
        (b"[" * 60 + b"]" * 60 + b",", "more than max_tensors"),
        (b'{"":0},', "more than max_tensors"),
        (b'"a",', 'needs a "weight_map"'),
    ):
        (folder / INDEX).write_bytes(b'{"weight_map":[' + unit * (1_240_000 // len(unit)) + b"0]}")
        refused_load(CheckpointFormatError, folder, INDEX, needle, header_bytes=1_250_000)
    for count, error, needle in (
        (60_000, CheckpointFormatError, "its weight_map has 60,000 tensors, more than max_tensors=20,000"),
        (20_000, CheckpointIOError, "20000 of the 20000 shards"),
    ):
        write_index(folder, {"weight_map": {f"{i:x}": f"{i:x}" for i in range(count)}})
        refused_load(error, folder, INDEX, needle, header_bytes=1_250_000)


def C01_index_is_no_file(folder: Path) -> None:
    (folder / INDEX).mkdir()
    refused_load(CheckpointIOError, folder, INDEX, "not a regular file")
    (folder / INDEX).rmdir()
    os.mkfifo(folder / INDEX)
    refused_load(CheckpointIOError, folder, INDEX, "not a regular file")
    (folder / INDEX).unlink()
    (folder / INDEX).symlink_to("nowhere")
    refused_load(CheckpointIOError, folder, INDEX, "not a regular file")


def opened_files() -> list[str]:
    """A list that grows by every path that this process opens from now on."""
    opened: list[str] = []
    sys.addaudithook(lambda event, arguments: opened.append(os.fspath(arguments[0])) if event == "open" else None)
    return opened


def C02_shard_names(folder: Path) -> None:
    """Nothing but the index is opened: the names alone are refused. /proc is opened by the harness."""
    write(folder.parent, STATE, "outside.safetensors")
    home = folder / "model"
    names = ["/etc/passwd", str(folder.parent / "outside.safetensors"), "../../outside.safetensors", "..", ".", ""]
    names += ["sub//a.safetensors", "sub/a.safetensors", "./a.safetensors", "a.safetensors/", "a\0.safetensors"]
    names += ["..\\..\\outside.safetensors", "C:\\a.safetensors", "C:a.safetensors", "\\\\server\\share\\a", "\0"]
    names += ["\x1b[2Ja.safetensors", "a\n.safetensors", "\u202ea.safetensors"]
    write_shards(home / "sub", {"a.safetensors": STATE})
    shutil.copy(home / "sub" / "a.safetensors", home / "a.safetensors")
    shown("")  # imports its codec
    opened = opened_files()
    for name in names:
        write_index(home, {"weight_map": dict.fromkeys(STATE, "a.safetensors") | {HEAD: name}})
        opened.clear()
        refused_load(CheckpointPathError, home, INDEX, "is not a plain file name in that folder")
        read = {path for path in map(str, opened) if not path.startswith("/proc/")}
        check(read <= {str(home / INDEX)}, f"{name!r}: opened {sorted(read)}")
    write_index(home, {"weight_map": dict.fromkeys(STATE, "\ud800")})
    refused_load(CheckpointFormatError, home, INDEX, "half of a surrogate pair")


def C02_symlinks(folder: Path) -> None:
    home = folder / "model"
    write_shards(home, {"a.safetensors": STATE})
    outside = write(folder, STATE, "outside.safetensors")
    snapshot = folder / "snapshots" / "0" / "a.safetensors"  # not a hub's cache: no blobs there
    write(snapshot.parent, STATE, "a.safetensors")
    shown("")  # imports its codec
    opened = opened_files()
    for target in (outside, "../outside.safetensors", "/etc/passwd", "/dev/zero", "/proc/self/mem", snapshot, "."):
        (home / "a.safetensors").unlink()
        (home / "a.safetensors").symlink_to(target)
        opened.clear()
        refused_load(CheckpointPathError, home, "a.safetensors is a symlink out of its folder")
        read = {path for path in map(str, opened) if not path.startswith("/proc/self/")}
        check(read <= {str(home / INDEX)} and "/proc/self/mem" not in opened, f"{target}: opened {sorted(read)}")
    for target in ("nowhere", "a.safetensors"):  # dangling, and a circle
        (home / "a.safetensors").unlink()
        (home / "a.safetensors").symlink_to(target)
        refused_load(CheckpointIOError, home, "missing or not files: a.safetensors")
    (home / "a.safetensors").unlink()
    write(home, STATE, "b.safetensors")
    (home / "a.safetensors").symlink_to("b.safetensors")
    check(is_the_checkpoint(accepted(lambda: load(home))), "a link within the folder is legal")


def C02_the_hubs_cache(folder: Path) -> None:
    """snapshots/<revision>/<name> -> blobs/<hash> of the same repository is legal, of another one it is not."""
    snapshot = folder / "models--a--b" / "snapshots" / ("0" * 40)
    write_shards(snapshot, {"a.safetensors": STATE})
    for repository in ("models--a--b", "models--c--d"):
        (folder / repository / "blobs").mkdir(parents=True)
    blob = folder / "models--a--b" / "blobs" / "1"
    (snapshot / "a.safetensors").rename(blob)
    (snapshot / "a.safetensors").symlink_to("../../blobs/1")
    for how in LOADS:
        check(is_the_checkpoint(accepted(lambda how=how: load(snapshot, how))), "other bits")
    other = folder / "models--c--d" / "blobs" / "1"
    blob.rename(other)
    for target in (other, "../../../models--c--d/blobs/1", "../../blobs/../../models--c--d/blobs/1"):
        (snapshot / "a.safetensors").unlink()
        (snapshot / "a.safetensors").symlink_to(target)
        refused_load(CheckpointPathError, snapshot, "is a symlink out of its folder")


def C02_devices_and_pipes(folder: Path) -> None:
    write_shards(folder, {"a.safetensors": STATE})
    (folder / "a.safetensors").unlink()
    os.mkfifo(folder / "a.safetensors")
    refused_load(CheckpointPathError, folder, "a.safetensors is a device, pipe or socket")
    (folder / "a.safetensors").unlink()
    with suppress(PermissionError):  # only root makes devices
        os.mknod(folder / "a.safetensors", 0o20666, os.makedev(1, 5))  # /dev/zero
        refused_load(CheckpointPathError, folder, "a.safetensors is a device, pipe or socket")
        (folder / "a.safetensors").unlink()
    (folder / INDEX).unlink()
    os.mkfifo(folder / "model.safetensors")
    refused_load(CheckpointIOError, folder, "model.safetensors is not a regular file")


def C03_missing_shards(folder: Path) -> None:
    """Told before the first shard is opened: the other one would be a format error."""
    write_shards(folder, two_shards())
    (folder / "a.safetensors").write_bytes(b"not a safetensors file")
    (folder / "b.safetensors").unlink()
    refused_load(CheckpointIOError, folder, INDEX, "1 of the 2 shards", "missing or not files: b.safetensors")
    (folder / "b.safetensors").mkdir()
    refused_load(CheckpointIOError, folder, INDEX, "1 of the 2 shards", "missing or not files: b.safetensors")
    write_index(folder, {"weight_map": {name: f"{i}.safetensors" for i, name in enumerate(STATE)}})
    refused_load(CheckpointIOError, folder, INDEX, "21 of the 21 shards", "and 11 more")


def C03_unreadable_shard(folder: Path) -> None:
    """Root reads everything, so the system's refusal is put in where the shard is opened."""
    write_shards(folder, two_shards())
    path_open = Path.open

    def denied(self: Path, *args, **kwargs):
        if self.name == "b.safetensors":
            raise PermissionError(13, "Permission denied")
        return path_open(self, *args, **kwargs)

    Path.open = denied
    try:
        refused_load(CheckpointIOError, folder, "b.safetensors cannot be read: Permission denied")
    finally:
        Path.open = path_open


def C04_wrong_shard(folder: Path) -> None:
    write_shards(folder, two_shards(), **{HEAD: "a.safetensors", NORM: "b.safetensors"})
    refused_load(CheckpointMismatchError, folder, "'a.safetensors'", f"lacks 1 of its tensors ({HEAD})", f"({NORM})")


def C04_tensor_in_two_shards(folder: Path) -> None:
    for head in (STATE[HEAD] + 1, STATE[HEAD]):
        write_shards(folder, {"a.safetensors": STATE, "b.safetensors": {HEAD: head}})
        refused_load(CheckpointMismatchError, folder, "'a.safetensors'", f"the index does not put there ({HEAD})")


def C05_tensor_not_in_its_shard(folder: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight_scale"
    write_shards(folder, two_shards(), **{name: "a.safetensors"})
    refused_load(CheckpointMismatchError, folder, "'a.safetensors'", f"lacks 1 of its tensors ({name})")


def C05_shard_with_more_than_the_index(folder: Path) -> None:
    shards = two_shards()
    write_shards(folder, shards)
    write(folder, shards["b.safetensors"] | {"scale": torch.ones(1)}, "b.safetensors")
    refused_load(
        CheckpointMismatchError, folder, "'b.safetensors'", "it has 1 that the index does not put there (scale)"
    )


def C06_shard_of_another_model(folder: Path) -> None:
    """Same names and shapes: only digests tell. The check is optional: `llama-fast info --verify`."""
    write_shards(folder, two_shards())
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in folder.glob("*.safetensors")]
    (folder / "SHA256SUMS").write_text("".join(lines))
    report = accepted(lambda: verify_checkpoint(folder))
    check((report.problems, report.checked_sha256) == ([], 2), f"the right shards: {report}")
    write(folder, {HEAD: STATE[HEAD] + 1}, "b.safetensors")
    (problem,) = verify_checkpoint(folder).problems
    check("b.safetensors: its sha256 is" in problem and "SHA256SUMS says" in problem, problem)
    for line in ("../b.safetensors", "/etc/passwd", "sub/b.safetensors", "\x1b[2J"):
        (folder / "SHA256SUMS").write_text(f"{'0' * 64}  {line}\n")
        refused(CheckpointPathError, lambda: verify_checkpoint(folder), "SHA256SUMS", "is not a plain file name")
    (folder / "SHA256SUMS").write_text("not a digest\n")
    refused(CheckpointFormatError, lambda: verify_checkpoint(folder), "SHA256SUMS", "line 1, 'not a digest'")


def C07_wrong_total_size(folder: Path) -> None:
    for total_size in (0, -1, 2**70, 1.5, "many", [], {}, True):
        write_shards(folder, two_shards())
        index = json.loads((folder / INDEX).read_text())
        write_index(folder, index | {"metadata": {"total_size": total_size}})
        loaded = []
        text = warnings_of(lambda loaded=loaded: loaded.append(accepted(lambda: load(folder))))
        check(is_the_checkpoint(loaded[0]), "other bits")
        check(text.count("metadata.total_size is wrong") == 1, f"total_size={total_size}: {text!r}")
    for metadata in ({"total_size": sum(tensor.nbytes for tensor in STATE.values())}, {}, None, [], 1):
        write_index(folder, index | {"metadata": metadata})
        check(warnings_of(lambda: load(folder)) == "", "nothing is wrong")


def C08_single_file_and_index(folder: Path) -> None:
    other = {name: tensor + 1 for name, tensor in STATE.items()}
    write_shards(folder, {"model-00001-of-00001.safetensors": other})
    write(folder, STATE)
    loaded = []
    text = warnings_of(lambda: loaded.append(load(folder)))
    check(is_the_checkpoint(loaded[0]), "the single file is loaded")
    check("the first is loaded" in text, f"no warning: {text!r}")


def C08_old_shards(folder: Path) -> None:
    write_shards(folder, {"model-00001-of-00001.safetensors": STATE})
    write(folder, {name: tensor + 1 for name, tensor in STATE.items()}, "model-00001-of-00002.safetensors")
    loaded = []
    text = warnings_of(lambda: loaded.append(load(folder)))
    check(is_the_checkpoint(loaded[0]), "the index decides")
    check("1 shards that no index lists: model-00001-of-00002.safetensors" in text, f"no warning: {text!r}")


def _changes(folder: Path) -> list[Callable[[], None]]:
    path = folder / "b.safetensors"

    def download_goes_on() -> None:
        with path.open("ab") as file:
            file.write(b"more")

    def replaced() -> None:
        write(folder, {HEAD: STATE[HEAD] + 1}, "new")
        (folder / "new").replace(path)

    def same_size_in_place() -> None:
        write(folder, {HEAD: STATE[HEAD] + 1}, path.name)
        os.utime(path, ns=(1, 1))

    return [download_goes_on, replaced, same_size_in_place, path.unlink, lambda: os.truncate(path, 20)]


def C09_changed_after_planning(folder: Path) -> None:
    """Between the headers and the tensors, for both ways to read them: the module keeps what it had."""
    for how in LOADS:
        for number in range(len(_changes(folder))):
            write_shards(folder, two_shards())
            files, model = CheckpointFiles.open(folder), module()
            _changes(folder)[number]()
            refused(CheckpointIOError, lambda f=files, m=model, h=how: load_weights(m, f, load=h), "b.safetensors")
            check(all(parameter.is_meta for parameter in model.parameters()), "half a model was loaded")


def _many_shards(folder: Path, count: int) -> torch.nn.Module:
    header = b'{"%d":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    for i in range(count):
        content = header % i
        (folder / f"{i}.safetensors").write_bytes(struct.pack("<Q", len(content)) + content + struct.pack("<f", i))
    write_index(folder, {"weight_map": {f"{i}": f"{i}.safetensors" for i in range(count)}})
    return torch.nn.ParameterList(torch.empty(1, device="meta") for _ in range(count))


def C10_many_shards_few_descriptors(folder: Path, count: int = 1000) -> None:
    """No file stays open, so the number of shards does not matter; 10,000 load as well."""
    model = _many_shards(folder, count)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    for how in LOADS:
        accepted(lambda how=how: load_weights(model, folder, load=how), header_bytes=4096 * count, seconds=5.0)
        check([parameter.item() for parameter in model] == list(range(count)), "other values")
