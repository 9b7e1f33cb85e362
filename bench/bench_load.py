"""Time and memory of loading a checkpoint on the CPU, against reading its bytes once.

Bound    file bytes / measured read bandwidth. The page cache is warm, so no disk is timed.
Timed    building the model and mapping its weights ("load"), then reading every weight byte once ("touch"): what the
         first step pays, page faults included. Repeated in one process; "first" is once in a new one.
Memory   its peak above imported torch in a fresh process: anonymous (copied) and file-backed (shared with the page
         cache, so reclaimable) apart, and what was written to the mapped pages.
Checked  every loaded parameter equals the file's bytes; nothing is timed otherwise.
"""

import argparse
import json
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from shapes import SHAPES, write_checkpoint
from timing import Summary, print_json, read_bandwidth, read_every_byte, seconds
from torch import nn

# llama_fast is imported inside the functions: the memory is measured above imported torch alone.

_CHUNK = 2**24

_EXAMPLES = """examples:
  python bench/bench_load.py                          the shape of Llama 3.2 1B, written to a temporary folder
  python bench/bench_load.py --model ~/Llama-3.2-1B   a checkpoint that is there
  python bench/bench_load.py --smoke                  a small one in seconds: does the bench work"""


def load(folder: Path) -> nn.Module:
    """The model as users get it."""
    from llama_fast.model.llama import LlamaLM
    from llama_fast.model.loading import load_model

    return load_model(LlamaLM, folder, dtype=None, device="cpu")


def stored_tensors(folder: Path) -> Iterator[tuple[str, Path, int, int]]:
    """Name, file, first byte and number of bytes of every tensor, read from the headers by this bench itself."""
    for path in weight_files(folder):
        with path.open("rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(header_bytes))
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                yield name, path, 8 + header_bytes + start, end - start


def weight_files(folder: Path) -> tuple[Path, ...]:
    from llama_fast.model.checkpoint import CheckpointFiles

    return CheckpointFiles.open(folder).paths


def differing_tensors(model: nn.Module, folder: Path) -> list[str]:
    """Names of the model whose bytes are not those of the files, or not in them."""
    state = model.state_dict()
    stored_name = {name.removeprefix("model."): name for name in state}
    equal_at: dict[int, bool] = {}  # data pointer -> equal; tied parameters may be stored once
    for name, path, start, num_bytes in stored_tensors(folder):
        tensor = state.get(stored_name.get(name.removeprefix("model."), ""))
        if tensor is None:
            continue
        data = tensor.contiguous().view(torch.uint8).view(-1)
        equal = data.numel() == num_bytes
        with path.open("rb") as file:
            file.seek(start)
            for offset in range(0, num_bytes if equal else 0, _CHUNK):
                chunk = bytearray(file.read(min(_CHUNK, num_bytes - offset)))
                equal &= torch.equal(torch.frombuffer(chunk, dtype=torch.uint8), data[offset : offset + len(chunk)])
        equal_at[tensor.data_ptr()] = equal_at.get(tensor.data_ptr(), True) and equal
    return [name for name, tensor in state.items() if not equal_at.get(tensor.data_ptr(), False)]


def time_load(folder: Path, repeats: int) -> dict[str, Summary]:
    """Milliseconds of load, touch and both, in `repeats` loads after one that warms the page cache."""
    samples: dict[str, list[float]] = {"load_ms": [], "touch_ms": [], "total_ms": []}
    for repeat in range(repeats + 1):
        start = time.perf_counter()
        model = load(folder)
        loaded = time.perf_counter()
        touch(model)
        touched = time.perf_counter()
        del model
        if repeat:
            samples["load_ms"].append(1e3 * (loaded - start))
            samples["touch_ms"].append(1e3 * (touched - loaded))
            samples["total_ms"].append(1e3 * (touched - start))
    return {name: Summary.of(values) for name, values in samples.items()}


def touch(model: nn.Module) -> None:
    for parameter in model.parameters():  # tied ones once
        read_every_byte(parameter)


def resident_bytes() -> dict[str, int]:
    """This process's resident memory by kind, from Linux' /proc."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {kind: 1024 * int(status[field].split()[0]) for kind, field in (("anon", "RssAnon"), ("file", "RssFile"))}


@contextmanager
def peak_bytes(peak: dict[str, int]) -> Iterator[None]:
    """Raise `peak` to the largest resident memory seen while the block runs, sampled every millisecond."""
    done = threading.Event()

    def sample() -> None:
        while True:
            for kind, value in resident_bytes().items():
                peak[kind] = max(peak.get(kind, 0), value)
            if done.wait(1e-3):
                return

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield
    finally:
        done.set()
        sampler.join()


def dirty_bytes(paths: tuple[Path, ...]) -> int:
    """Bytes of the mapped files that this process has written to, and so holds as copies of its own."""
    wanted, total, inside = {str(path.resolve()) for path in paths}, 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, *values = line.split(maxsplit=5)
        if not key.endswith(":"):
            inside = len(values) == 5 and values[4] in wanted
        elif inside and key == "Anonymous:":
            total += 1024 * int(values[0])
    return total


def measure_memory(folder: Path) -> dict[str, int]:
    """Peak bytes above imported torch of one load and touch; for a process that has imported nothing more yet."""
    if not Path("/proc/self/smaps").exists():
        return {}
    torch.ones(1).add_(1)  # torch's own first-use allocations
    before = resident_bytes()
    peak: dict[str, int] = {}
    with peak_bytes(peak):
        model = load(folder)
        touch(model)
    return {
        "peak_anon_bytes": peak["anon"] - before["anon"],
        "peak_file_bytes": peak["file"] - before["file"],
        "written_mapped_bytes": dirty_bytes(weight_files(folder)),
    }


def measure_first(folder: Path) -> dict[str, float]:
    """Milliseconds of a process's first load and touch, llama_fast's import included, torch's not."""
    return {"first_ms": 1e3 * seconds(lambda: touch(load(folder)))}


_FRESH = {"memory": measure_memory, "first": measure_first}


def in_new_process(name: str, folder: Path) -> dict[str, float]:
    """What the measurement `name` of _FRESH returns in a new process."""
    command = [sys.executable, __file__, "--model", str(folder), "--fresh", name]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def run(folder: Path, label: str, repeats: int, bandwidth_bytes: int) -> int:
    """Check, measure and print; the exit status."""
    model = load(folder)
    differing = differing_tensors(model, folder)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    del model
    if differing:
        print(f"refusing to time: {len(differing)} tensors differ from the file: {differing[:10]}", file=sys.stderr)
        return 1

    file_bytes = sum(path.stat().st_size for path in weight_files(folder))
    bandwidth = read_bandwidth(bandwidth_bytes)
    bound_ms = 1e3 * file_bytes / bandwidth
    print(f"{label}, {dtype}, on the CPU")
    print(f"bound   {file_bytes / 1e9:.3f} GB / {bandwidth / 1e9:.1f} GB/s measured = {bound_ms:.2f} ms")
    times = time_load(folder, repeats)
    for name, summary in times.items():
        spread = f"(p10 {summary.p10:.2f}, p90 {summary.p90:.2f})"
        share = f"{file_bytes / summary.median / 1e6:.1f} GB/s, {100 * bound_ms / summary.median:.1f}% of the bound"
        print(f"{name[:-3]:8}{summary.median:.2f} ms {spread}{'' if name == 'load_ms' else ', ' + share}")
    first = in_new_process("first", folder)
    print(f"first   {first['first_ms']:.2f} ms in a new process, imports of llama_fast included")
    memory = in_new_process("memory", folder)
    if not memory:
        print("memory  not measured: this system has no /proc")
    else:
        print(
            f"memory  peak above imported torch: {memory['peak_anon_bytes'] / 1e6:.1f} MB anonymous, "
            f"{memory['peak_file_bytes'] / 1e6:.1f} MB of mapped files; "
            f"{memory['written_mapped_bytes']:,} mapped bytes written"
        )
    print_json(
        {
            "bench": "load",
            "model": label,
            "dtype": dtype,
            "file_bytes": file_bytes,
            "read_bytes_per_s": bandwidth,
            "bound_ms": bound_ms,
            **times,
            **first,
            "share_of_bound": bound_ms / times["total_ms"].median,
            "repeats": repeats,
            **memory,
        }
    )
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", type=Path, metavar="FOLDER", help="a local checkpoint folder")
    what.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.2-1b", help="random weights of this shape")
    what.add_argument("--smoke", action="store_true", help="a small shape and few repeats: only checks the bench")
    parser.add_argument("--repeats", type=int, default=9, help="timed loads (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default: %(default)s)")
    parser.add_argument("--fresh", choices=_FRESH, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats}: give at least 1")

    if args.model and not args.model.is_dir():
        parser.error(f"--model {args.model} is not a folder")

    if args.fresh:
        print(json.dumps(_FRESH[args.fresh](args.model)))
        return 0
    repeats, bandwidth_bytes = (min(args.repeats, 2), 2**26) if args.smoke else (args.repeats, 2**29)
    if args.model:
        return run(args.model, str(args.model), repeats, bandwidth_bytes)
    shape = "tiny" if args.smoke else args.shape
    with tempfile.TemporaryDirectory(prefix="bench_load_") as folder:
        write_checkpoint(Path(folder), shape, args.seed)
        return run(Path(folder), shape, repeats, bandwidth_bytes)


if __name__ == "__main__":
    sys.exit(main())
