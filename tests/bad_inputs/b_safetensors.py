"""B: one safetensors file.

Every refusal is tried with load="mmap" and load="copy": the header is checked before either.
"""

import json
import logging
import os
import shutil
import signal
import struct
import sys
from pathlib import Path

import torch

import llama_fast
from llama_fast.api.modeling import LlamaForCausalLM
from llama_fast.errors import (
    CheckpointFormatError,
    CheckpointIOError,
    CheckpointMismatchError,
    CheckpointPathError,
    LlamaFastError,
    NonFiniteLogitsError,
    OutOfMemoryError,
    UnsupportedError,
)
from llama_fast.model.checkpoint import CheckpointFiles, load_weights
from llama_fast.model.safetensors_header import MAX_HEADER_BYTES, MAX_TENSORS
from llama_fast.model.verify import verify_checkpoint
from tests.bad_inputs.checkpoints import (
    CONFIG,
    HEAD,
    LOADS,
    NORM,
    SINGLE,
    STATE,
    UP,
    entry,
    is_the_checkpoint,
    load,
    raw,
    write,
)
from tests.bad_inputs.harness import accepted, check, check_message, limit_address_space, refused


def refused_load(error: type[LlamaFastError], folder: Path, *needles: str, header_bytes: int = 0) -> None:
    for how in LOADS:
        refused(error, lambda how=how: load(folder, how), *needles, header_bytes=header_bytes)


def warnings_of(call) -> str:
    """What `call` logs as warnings."""
    records = []

    class Keep(logging.Handler):
        def emit(self, record):
            records.append(record.getMessage())

    logger, keep = logging.getLogger("llama_fast"), Keep(logging.WARNING)
    logger.addHandler(keep)
    try:
        call()
    finally:
        logger.removeHandler(keep)
    return "\n".join(records)


def B00_negative_control(folder: Path) -> None:
    """The checkpoint that the entries damage loads, both ways, with its own bits."""
    write(folder)
    for how in LOADS:
        check(is_the_checkpoint(accepted(lambda how=how: load(folder, how))), "other bits")


def B01_shorter_than_a_header_size(folder: Path) -> None:
    for size in range(8):
        (folder / SINGLE).write_bytes(b"\x02\0\0\0\0\0\0"[:size])
        refused_load(CheckpointFormatError, folder, SINGLE, f"it has {size} bytes and no whole header size")


def B02_header_sizes(folder: Path) -> None:
    raw(folder, b"", header_bytes=0)
    refused_load(CheckpointFormatError, folder, SINGLE, "its header of 0 bytes does not begin with '{'")
    for size in (3, 2**31, 2**32, 2**63, 2**64 - 8, 2**64 - 1):
        raw(folder, b"{}", header_bytes=size)
        refused_load(CheckpointFormatError, folder, SINGLE, f"the file is 10 bytes, its header needs {8 + size:,}")


def B02_header_of_100_MB(folder: Path) -> None:
    for size in (MAX_HEADER_BYTES + 1, 100_000_000, 100_000_001):
        path = raw(folder, b"{", header_bytes=size)
        os.truncate(path, 8 + size)  # sparse: the rest is zeros
        refused_load(CheckpointFormatError, folder, SINGLE, f"its header has {size:,} bytes, more than the 2,500,000")


def B03_not_json(folder: Path) -> None:
    one = json.dumps({"a": entry(0, 4)}).encode()
    for header, needle in (
        (b'{"\xff\xfe": 1}', "is not UTF-8"),
        (one.decode().encode("utf-16-le"), "is not strict JSON"),
        (b"\xef\xbb\xbf" + one, "does not begin with '{'"),
        (b" " + one, "does not begin with '{'"),
        (b"\n" + one, "does not begin with '{'"),
        (b"[1, 2]", "does not begin with '{'"),
        (b"null", "does not begin with '{'"),
        (b"{", "is not strict JSON"),
        (b'{"a": }', "is not strict JSON"),
        (one + b"x", "is not strict JSON"),
        (one + b"\0", "is not strict JSON"),
        (one[:-1] + b",}", "is not strict JSON"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b'{"a":' * 100_000, "its header"),
        (b'{"a":' + b"[" * 1_000_000, "max_tensors"),
    ):
        raw(folder, header, bytes(4))
        refused_load(CheckpointFormatError, folder, SINGLE, needle, header_bytes=len(header))
    raw(folder, one + b" " * 100, bytes(4))
    check(CheckpointFiles.open(folder).shapes == {"a": (4,)}, "spaces at the end are the format's padding")


def B04_duplicate_names(folder: Path) -> None:
    """safetensors 0.8 takes the last of two."""
    first, second = json.dumps(entry(0, 4)).encode(), json.dumps(entry(4, 8)).encode()
    for header, name in (
        (b'{"a": ' + first + b', "a": ' + second + b"}", "a"),
        (b'{"a": ' + first + b', "\\u0061": ' + second + b"}", "a"),
        (b'{"a": {"dtype": "U8", "dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', "dtype"),
        (b'{"__metadata__": {"k": "1", "k": "2"}, "a": ' + first + b"}", "k"),
        (b'{"__metadata__": {}, "__metadata__": {}, "a": ' + first + b"}", "__metadata__"),
    ):
        raw(folder, header, bytes(8))
        refused_load(CheckpointFormatError, folder, SINGLE, f"the key '{name}' appears twice")


def B05_offsets(folder: Path) -> None:
    good = {"a": entry(0, 8), "b": entry(8, 12)}
    for changed, *needles in (
        ({"b": entry(4, 12)}, "tensor 'b' overlaps the tensor before it"),
        ({"b": entry(0, 12)}, "tensor 'b' overlaps the tensor before it"),
        ({"a": entry(1, 8)}, "tensor 'a' leaves a hole before it"),
        ({"b": entry(9, 12)}, "tensor 'b' leaves a hole before it"),
        ({"b": entry(8, 11)}, "1 bytes follow the last tensor"),
        ({"b": entry(8, 13)}, "its header needs", "tensor 'b': truncated"),
        ({"b": entry(8, 2**62)}, "its header needs", "tensor 'b': truncated"),
        ({"b": entry(12, 8, shape=[4])}, "tensor 'b' has data_offsets [12, 8]"),
        ({"a": entry(-8, 0, shape=[8])}, "tensor 'a' has data_offsets [-8, 0]"),
        ({"b": entry(8.0, 12.0, shape=[4])}, "tensor 'b' has data_offsets [8.0, 12.0]"),
        ({"b": entry(8, 12.5, shape=[4])}, "tensor 'b' has data_offsets [8, 12.5]"),
        ({"b": entry(8, 12) | {"data_offsets": ["8", "12"]}}, "tensor 'b' has data_offsets ['8', '12']"),
        ({"b": entry(8, 12) | {"data_offsets": [8, None]}}, "tensor 'b' has data_offsets [8, None]"),
        ({"b": entry(8, 12) | {"data_offsets": [8, 10, 12]}}, "tensor 'b' has data_offsets [8, 10, 12]"),
        ({"b": entry(8, 12) | {"data_offsets": 8}}, "tensor 'b' has data_offsets 8"),
        ({"b": {"dtype": "U8", "shape": [4]}}, "tensor 'b' needs exactly dtype, shape and data_offsets"),
        ({"b": [8, 12]}, "tensor 'b' needs exactly dtype, shape and data_offsets"),
    ):
        raw(folder, good | changed, bytes(12))
        refused_load(CheckpointFormatError, folder, SINGLE, *needles)


def B05_polyglot(folder: Path) -> None:
    """Another file hidden after, before or between the tensors."""
    path = write(folder)
    with path.open("ab") as file:
        file.write(b"PK\x03\x04 a zip archive")
    refused_load(CheckpointFormatError, folder, SINGLE, "18 bytes follow the last tensor")


def B06_overflow(folder: Path) -> None:
    for dtype, shape, needle in (
        ("F32", [2**32, 2**32], "has 2**63 bytes or more"),
        ("F32", [2**62], "has 2**63 bytes or more"),
        ("U8", [2**63], "it must be a list of integers from 0 to 2**63-1"),
        ("U8", [2**64 + 4], "it must be a list of integers from 0 to 2**63-1"),
        ("F64", [2**61 + 1], "has 2**63 bytes or more"),  # times 8 is 8 in 64 bits
        ("U8", [2**62, 4, 0], "has 2**63 bytes or more"),
        ("U8", [int("9" * 300)], "it must be a list of integers"),
        ("U8", [-2, -4], "it must be a list of integers"),
        ("U8", [8.0], "it must be a list of integers"),
        ("U8", [True] * 3, "it must be a list of integers"),
        ("U8", "8", "it must be a list of integers"),
        ("U8", [[8]], "it must be a list of integers"),
        ("F32", [8], "has 32 bytes, but its data_offsets [0, 8] hold 8"),
        ("U8", [7], "has 7 bytes, but its data_offsets [0, 8] hold 8"),
        ("U8", [3] * 100_000, "has 2**63 bytes or more"),
        ("U8", [1] * 100_000, "has 1 bytes, but"),
    ):
        raw(folder, {"a": entry(0, 8, dtype, shape)}, bytes(8))
        refused_load(CheckpointFormatError, folder, SINGLE, "tensor 'a'", needle)


def _bloat(folder: Path, header: bytes) -> None:
    raw(folder, header)
    refused_load(CheckpointFormatError, folder, SINGLE, header_bytes=len(header))


def B07_100_000_tensors(folder: Path) -> None:
    names = b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(100_000))
    raw(folder, b"{" + names + b"}")
    refused_load(CheckpointFormatError, folder, SINGLE, f"max_tensors={MAX_TENSORS:,}", header_bytes=len(names))


def B07_more_tensors_than_are_read(folder: Path) -> None:
    for count in (1_000_000, 10_000_000):
        path = raw(folder, b"{", header_bytes=10 * count)
        os.truncate(path, 8 + 10 * count)
        refused_load(CheckpointFormatError, folder, SINGLE, f"max_tensors={MAX_TENSORS:,}")


def B07_bloat_within_the_size(folder: Path) -> None:
    """What costs most memory or time per byte of JSON."""
    size = MAX_HEADER_BYTES - 100
    for unit in (
        b"[],",
        b"{},",
        b'{"":0},',
        b"[" * 60 + b"]" * 60 + b",",
        b"0.1,",
        b"1,",
        b'"a",',
        b'"\xf0\x9f\x98\x80",',
    ):
        _bloat(folder, b'{"a":[' + unit * (size // len(unit)) + b"0]}")
    _bloat(folder, b"{" + b",".join(b'"%d":0' % i for i in range(size // 10)) + b"}")
    _bloat(folder, b'{"' + "\U0001f600".encode() * (size // 4) + b'":0}')
    _bloat(folder, b'{"a":' + b"9" * size + b"}")


def B07_the_largest_header_loads(folder: Path) -> None:
    """A file of as many tensors as one may have is read, and quickly."""
    names = (f"model.layers.{i}.self_attn.qkv.w" for i in range(MAX_TENSORS))
    raw(folder, {name: entry(i, i + 1) for i, name in enumerate(names)}, bytes(MAX_TENSORS))
    files = accepted(lambda: CheckpointFiles.open(folder), header_bytes=(folder / SINGLE).stat().st_size)
    check(len(files.shapes) == MAX_TENSORS, "tensors are missing")


def B08_dtypes(folder: Path) -> None:
    """Sub-byte dtypes are refused whole, aligned or not."""
    for dtype in ("F4", "F6_E2M3", "F8_E8M0", "C64", "I2", "f32", "FLOAT", "", "x" * 1000, None, 1, ["F32"], {}):
        raw(folder, {"a": entry(0, 3, "U8") | {"dtype": dtype}}, bytes(3))
        refused_load(CheckpointFormatError, folder, SINGLE, "tensor 'a' has dtype", "accepted are F64, F32")


def B09_metadata(folder: Path) -> None:
    tensor = {"a": entry(0, 4)}
    for metadata in (1, None, [], "pt", {"format": 1}, {"a": None}, {"a": {"b": "c"}}, {"a": ["b"]}, {"a": True}):
        raw(folder, {"__metadata__": metadata, **tensor}, bytes(4))
        refused_load(CheckpointFormatError, folder, SINGLE, "__metadata__ must map strings to strings")
    raw(folder, {"__metadata__": {"a": "x" * 50_000_000}, **tensor}, bytes(4))
    refused_load(CheckpointFormatError, folder, SINGLE, "its header has 50,0", header_bytes=50_000_000)
    for metadata in ({"format": "tf"}, {}, {"a": "x" * 2_000_000}, {"a": "{" * 10_000}, {"\x1b[2J": "\0"}):
        raw(folder, {"__metadata__": metadata, **tensor}, bytes(4))
        files = accepted(lambda: CheckpointFiles.open(folder), header_bytes=2_000_000)
        check(set(files.shapes) == {"a"}, "metadata is not a tensor")


def B10_truncated(folder: Path) -> None:
    path = write(folder)
    content = path.read_bytes()
    last = STATE[NORM].nbytes
    for size in (len(content) - 1, len(content) - last, len(content) // 2, len(content) // 10, 100, 9):
        path.write_bytes(content[:size])
        refused_load(CheckpointFormatError, folder, SINGLE, f"the file is {size:,} bytes, its header needs ")


def B11_changed_while_it_is_copied(folder: Path) -> None:
    """Promised for load="copy"; what a mapping does is in checkpoint_files.py's docstring."""

    def cut(path: Path) -> None:
        os.truncate(path, 1000)

    def grow(path: Path) -> None:
        with path.open("ab") as file:
            file.write(b"more")

    def replace(path: Path) -> None:
        shutil.copy(path, folder / "new")
        (folder / "new").replace(path)

    def rewrite(path: Path) -> None:
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"x")
        os.utime(path, ns=(1, 1))

    def fifo(path: Path) -> None:
        path.unlink()
        path.mkdir()

    copy = CheckpointFiles.copy
    for change in (cut, grow, replace, rewrite, Path.unlink, fifo):
        for moment in (1, 2, len(STATE)):
            shutil.rmtree(folder)
            path = write(folder)
            seen = []

            def changing(self, name, change=change, moment=moment, path=path, seen=seen):
                seen.append(name)
                if len(seen) == moment:
                    change(path)
                return copy(self, name)

            CheckpointFiles.copy = changing
            refused(CheckpointIOError, lambda: load(folder, "copy"), SINGLE)
            CheckpointFiles.copy = copy
    write(folder / "again")
    check(is_the_checkpoint(accepted(lambda: load(folder / "again", "copy"))), "the process goes on")


def B11_written_by_another_process(folder: Path) -> None:
    """Cut and written again all the time: each load gives the whole checkpoint or an error, and nothing faults."""
    path = write(folder)
    content = path.read_bytes()
    reader, writer = os.getpid(), os.fork()
    if writer == 0:
        while os.getppid() == reader:
            path.write_bytes(content)
        os._exit(0)
    try:
        for _ in range(100):
            try:
                model = load(folder, "copy")
            except (CheckpointIOError, CheckpointFormatError) as error:
                check_message(error)
            else:
                check(is_the_checkpoint(model), "other bits")
    finally:
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)


def B12_other_formats(folder: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4976698672\n"
    torch.save(STATE, folder / "saved.pt")
    torch.save(STATE, folder / "old.pt", _use_new_zipfile_serialization=False)
    for content, needle in (
        (pointer, "a git-lfs pointer, not the file itself: run `git lfs pull`"),
        ((folder / "saved.pt").read_bytes(), "a zip or torch.save archive; pickles are refused"),
        ((folder / "old.pt").read_bytes(), "a Python pickle; pickles are refused"),
        (b"\x80\x04\x95" + bytes(100), "a Python pickle; pickles are refused"),
        (b"GGUF\x03\0\0\0" + bytes(100), "a GGUF file"),
        (b"<!DOCTYPE html><html>404</html>", "the download returned an error page"),
        (b'\n\n <?xml version="1.0"?><Error/>', "the download returned an error page"),
        (bytes(1000), "does not begin with '{'"),
        (b"Repository not found", "does not begin with '{'"),
    ):
        (folder / SINGLE).write_bytes(content)
        refused_load(CheckpointFormatError, folder, SINGLE, "is not a whole safetensors file", needle)


EVENTS = ("open", "pickle.find_class", "os.system")


def B13_only_pickles(folder: Path) -> None:
    names = ("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "consolidated.00.pth")
    for name in names:
        (folder / name).write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    opened = []
    sys.addaudithook(lambda event, arguments: opened.append((event, arguments[0])) if event in EVENTS else None)
    for name in names:
        refused_load(CheckpointPathError, folder, name, "can run code and are refused; convert", "save_pretrained")
        (folder / name).unlink()
    check(not (folder / "owned").exists(), "a pickle ran")
    check(not [o for o in opened if o[0] != "open" or str(o[1]).endswith(("bin", "pt", "pth"))], f"opened: {opened}")


def B13_no_pickle_in_the_package(folder: Path) -> None:
    for path in Path(llama_fast.__file__).parent.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        for word in ("torch.load(", "import pickle", "pickle.load", "marshal.load", "import dill", "import joblib"):
            check(word not in source, f"{path.name} has {word}")


def _non_finite(value: float) -> dict[str, torch.Tensor]:
    wrong = {name: tensor.clone() for name, tensor in STATE.items()}
    wrong[NORM][3], wrong[UP][5, 7] = value, value
    return wrong


def B14_nan_and_infinity(folder: Path) -> None:
    CONFIG.save_pretrained(folder)
    for value in (float("nan"), float("inf"), float("-inf")):
        write(folder, _non_finite(value))
        for options in ({"how": "copy"}, {"dtype": torch.bfloat16}):
            text = warnings_of(lambda options=options: load(folder, **options))
            check(f"2 tensors hold NaN or infinity: {UP}, {NORM}" in text, f"not named: {text!r}")
        check(warnings_of(lambda: load(folder)) == "", "a mapped tensor is not read")
        problems = verify_checkpoint(folder).problems
        check(len(problems) == 2 and NORM in problems[1], f"not found: {problems}")
        for how in LOADS:
            model = LlamaForCausalLM.from_pretrained(folder, device="cpu", load=how)
            refused(NonFiniteLogitsError, lambda model=model: model.generate(torch.tensor([[1, 2]]), max_new_tokens=2))
    text = warnings_of(lambda: load(folder, dtype=torch.float16))
    check("NaN or infinity" in text, "a cast is read, so searched")


def B14_overflow_in_a_cast(folder: Path) -> None:
    write(folder, STATE | {NORM: torch.full_like(STATE[NORM], 1e5)})
    text = warnings_of(lambda: load(folder, dtype=torch.float16))
    check(f"1 tensors hold NaN or infinity: {NORM}" in text, f"not named: {text!r}")


def B14_denormals(folder: Path) -> None:
    denormal = torch.full_like(STATE[NORM], 1e-40)
    write(folder, STATE | {NORM: denormal})
    for how in LOADS:
        model = load(folder, how)
        check(torch.equal(model.model.norm.weight, denormal), "denormals are weights like others")
    problems = verify_checkpoint(folder).problems
    check(len(problems) == 1 and f"{NORM}: all values are subnormal" in problems[0], f"not told: {problems}")


def B15_dtypes(folder: Path) -> None:
    """Another float dtype is cast, and a mixture told; what is no float of 16 bits or more is a mismatch."""
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        write(folder, {name: tensor.to(dtype) for name, tensor in STATE.items()})
        for how in LOADS:
            model = accepted(lambda how=how: load(folder, how, dtype=torch.float32))
            expected = {name: tensor.to(dtype).float() for name, tensor in STATE.items()}
            check(all(torch.equal(model.state_dict()[n], expected[n]) for n in STATE), f"{dtype}: other values")
    write(folder, STATE | {NORM: STATE[NORM].double()})
    text = warnings_of(lambda: load(folder))
    check(f"mixed dtypes; 1 tensors are cast to torch.float32: {NORM}" in text, f"not told: {text!r}")
    for dtype in (torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2):
        write(folder, STATE | {NORM: torch.ones_like(STATE[NORM]).to(dtype)})
        refused_load(CheckpointMismatchError, folder, NORM, f"has dtype {dtype}, expected a float of 16 bits or more")


def B15_no_memory_for_a_cast_or_copy(folder: Path) -> None:
    """The allocator's refusal is told with the bytes that are needed; the file is sparse, and nothing is read."""
    header = json.dumps({"0": entry(0, 1 << 28, "F16", [1 << 27])}).encode()
    path = raw(folder, header + b" " * (-len(header) % 8))
    os.truncate(path, path.stat().st_size + (1 << 28))
    model = torch.nn.ParameterList([torch.empty(1 << 27, device="meta")])
    limit_address_space(768 << 20)  # the file is mapped twice, by the library and by torch
    refused(
        OutOfMemoryError, lambda: load_weights(model, folder, dtype=torch.float64), "need 1,073,741,824 bytes on cpu"
    )
    limit_address_space(128 << 20)
    refused(OutOfMemoryError, lambda: load_weights(model, folder, load="copy"), "need 268,435,456 bytes on cpu")
    refused(CheckpointIOError, lambda: load_weights(model, folder), SINGLE, "cannot be mapped")
    check(model[0].is_meta, "half a model was loaded")


def B16_names_and_shapes(folder: Path) -> None:
    without = {name: tensor for name, tensor in STATE.items() if name != NORM}
    q, k, v = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv")
    fused = {n: t for n, t in STATE.items() if n not in (q, k, v)}
    fused["model.layers.0.self_attn.qkv_proj.weight"] = torch.cat([STATE[q], STATE[k], STATE[v]])
    for tensors, *needles in (
        (without, f"1 missing: {NORM}"),
        (STATE | {"model.extra.weight": torch.ones(2)}, "1 unexpected: model.extra.weight"),
        (STATE | {UP: STATE[UP].reshape(48, 8)}, f"{UP} [48, 8], expected [24, 16]"),
        (STATE | {UP: STATE[UP].T.contiguous()}, f"{UP} [16, 24], expected [24, 16]", "1 are transposed"),
        (fused, "3 missing: ", "1 unexpected: ", "projections are stored fused; split them into q_proj, k_proj"),
        ({f"module.{n}": t for n, t in STATE.items()}, "the names have the prefix module. of another program"),
        ({n.replace("layers", "layer"): t for n, t in STATE.items()}, "18 missing", "and 8 more", "18 unexpected"),
        (without | {"x": torch.ones(1), UP: torch.ones(3)}, "1 missing", "1 unexpected", "1 of another shape or dtype"),
        (STATE | {"model.embed_tokens.weight": torch.ones(33, 16)}, "embed_tokens.weight [33, 16], expected [32, 16]"),
        (STATE | {"norm.weight": STATE[NORM].clone()}, "1 unexpected: "),
        ({}, "21 missing: ", "and 11 more"),
    ):
        write(folder, tensors)
        refused_load(CheckpointMismatchError, folder, str(folder), *needles)
    inv_freq = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(2) for i in range(2)}
    write(folder, STATE | inv_freq)
    check(
        is_the_checkpoint(accepted(lambda: load(folder))), "old checkpoints' inv_freq is the one extra that is allowed"
    )


def B17_tensor_names(folder: Path) -> None:
    before = sorted(os.listdir(folder.parent))
    data = bytes(4)
    for name in (
        "../../owned",
        "/etc/passwd",
        "..",
        "a/b",
        "a\0b",
        "\x1b[2J\x1b[31m",
        "a\nb",
        "x" * 1_000_000,
        "\u202e",
        "",
    ):
        raw(folder, {name: entry(0, 4)}, data)
        refused_load(CheckpointMismatchError, folder, "1 unexpected", header_bytes=2_000_000)
        raw(folder, {name: entry(0, 5)}, data)
        refused_load(CheckpointFormatError, folder, SINGLE, "truncated", header_bytes=2_000_000)
    raw(folder, {"\ud800": entry(0, 4)}, data)  # a lone surrogate, which JSON can write and UTF-8 can not
    refused_load((CheckpointMismatchError, CheckpointFormatError), folder, r"\ud800")
    check(sorted(os.listdir(folder)) == [SINGLE] and sorted(os.listdir(folder.parent)) == before, "a file was made")


def B18_ranks_and_empty_tensors(folder: Path) -> None:
    for shape in ((0,), (0, 16), (16, 0), (), (1,) * 7 + (16,), (1,) * 70 + (16,)):
        data = b"".join(t.numpy().tobytes() for n, t in STATE.items() if n != NORM)
        header, begin = {}, 0
        for name, tensor in STATE.items():
            if name != NORM:
                header[name] = entry(begin, begin + tensor.nbytes, "F32", list(tensor.shape))
                begin += tensor.nbytes
        num_bytes = 4 * torch.Size(shape).numel()
        header[NORM] = entry(begin, begin + num_bytes, "F32", list(shape))
        raw(folder, header, data + bytes(num_bytes))
        refused_load(CheckpointMismatchError, folder, f"{NORM} [", "expected [16]")


def B19_big_endian(folder: Path) -> None:
    write(folder)
    byteorder = sys.byteorder
    sys.byteorder = "big"
    try:
        refused_load(UnsupportedError, folder, SINGLE, "little-endian", "big-endian")
    finally:
        sys.byteorder = byteorder


def B20_misaligned_data(folder: Path) -> None:
    content = write(folder).read_bytes()
    (header_bytes,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + header_bytes].rstrip(b" "), content[8 + header_bytes :]
    for pad in range(8):
        raw(folder, header + b" " * pad, data)
        for how in LOADS:
            model = accepted(lambda how=how: load(folder, how))
            check(is_the_checkpoint(model), f"{how}, {pad} bytes of padding: other bits")
            check(all(p.data_ptr() % p.element_size() == 0 for p in model.parameters()), "a misaligned parameter")


def B20_misaligned_within_the_data(folder: Path) -> None:
    head = STATE[HEAD].numpy().tobytes()
    header, data = {"odd": entry(0, 1)}, b"x"
    header[HEAD] = entry(1, 1 + len(head), "F32", [32, 16])
    raw(folder, header, data + head)
    files = CheckpointFiles.open(folder)
    for tensor in (files.tensor(HEAD), files.copy(HEAD)):
        check(torch.equal(tensor, STATE[HEAD]) and tensor.data_ptr() % 4 == 0, "other bits")
