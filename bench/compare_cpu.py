"""llama_fast, llama.cpp and transformers on the CPU: the same weights in bf16, the same threads, in turns.

Bound    decode: bytes of all weights / measured read bandwidth, for each step of the batch. Prefill: FLOPs / the rate
         of PyTorch's F.linear in bf16 or fp32, whichever is faster. Both are measured before each piece of work, since
         the machine's speed drifts. Load to first token: reading the file in the page cache once, plus one prefill.
Timed    in each round all programs in turn, each alive in a process of its own and asleep while the others work; the
         first one changes from round to round. Greedy decoding at batches 1, 4, 8, 16 after a short prompt, its prefill
         not counted; prefill of a long prompt; from a new process, imports not counted, to its first token.
Ratios   ours to a peer's, and shares of a bound, are taken within a round; the median is that of the rounds.
Checked  before anything is timed, each program's greedy tokens in every batch size are judged by transformers in fp32
         (by our reference if it is not installed): the tokens' logits must be the best, and their log probabilities
         the same, within bf16's roundings. What fails is not timed. Quantized files are other weights: not checked.
Int4     with --weights int4 ours reads the same weights with the layers' projections rounded to 4-bit integers and the
         head in bf16; llama.cpp reads its Q4_0, whose head it rounds to Q6_K; transformers takes no part. The bytes of
         all files are told, since they differ. Ours is judged by our reference backend in fp32 on the rounded weights.
Memory   peak resident above imported torch (llama.cpp: above its library) of a new process that loads and generates;
         mapped weights count.
Overhead of the engine: what a decode step at batch 1 spends outside compiled functions, the backend's Python included;
         where the backend has none, outside its ops. Timed apart from all else, since the timers take time.

The weights are random, which changes none of the work; they are kept in --cache, with llama.cpp's files beside them.
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_generate
import torch
from compare_process import SETTLE_S
from compare_programs import Programs, check, checkpoint, int4_checkpoint
from compare_report import (
    LLAMA_CPP,
    OURS,
    TRANSFORMERS,
    overhead_lines,
    overhead_row,
    speed_rows,
    speed_table,
    start_rows,
    start_table,
    targets,
)
from shapes import SHAPES
from timing import Summary, json_line, linear_flops, read_bandwidth
from tqdm import tqdm

from llama_fast.model.llama import LlamaLM
from llama_fast.model.loading import load_model

_ISA = ("avx", "avx2", "fma", "f16c", "amx", "asimd", "bf16", "i8mm", "sve")

_EXAMPLES = """examples:
  python bench/compare_cpu.py --llama-cpp-python ~/peers/bin/python --out compare.json
  python bench/compare_cpu.py --programs llama_fast transformers --rounds 3
  python bench/compare_cpu.py --weights int4 --group-size 32 --llama-cpp-python ~/peers/bin/python
  python bench/compare_cpu.py --programs llama_fast --profile profile.txt     where a decode step's time goes
  python bench/compare_cpu.py --shape tiny --rounds 1                         in a minute: does the bench work"""


@dataclass(frozen=True)
class Work:
    """What every program does in turn."""

    name: str
    prompts: list[list[int]]
    output_len: int

    @property
    def is_prefill(self) -> bool:
        return self.output_len == 1

    def rate(self, answer: dict[str, Any]) -> float:
        """Tokens per second: of the prompts, or generated after the prefill."""
        if self.is_prefill:
            return sum(map(len, self.prompts)) / answer["prefill_s"]
        return len(self.prompts) * len(answer["step_s"]) / sum(answer["step_s"])


def make_works(args: argparse.Namespace, vocab_size: int) -> list[Work]:
    generator = torch.Generator().manual_seed(args.seed)
    shape = (max(args.batch_sizes), args.prompt_len)
    prompts = torch.randint(vocab_size, shape, generator=generator).tolist()
    works = [Work(f"decode batch {size}", prompts[:size], args.output_len + 1) for size in args.batch_sizes]
    long = torch.randint(vocab_size, (1, args.prefill_len), generator=generator).tolist()
    return [*works, Work("prefill", long, 1)]


class Bounds:
    """Bandwidth and FLOPs measured over and over, and what they allow."""

    def __init__(self, model: LlamaLM, served: LlamaLM | None = None) -> None:
        # A word of int4 holds eight weights: FLOPs are counted from the model before it is rounded.
        self.model, self.weight_bytes = model, bench_generate.decode_weight_bytes(served or model)
        small = self.weight_bytes < 2**27
        self._buffer_bytes, self._width = (2**26, 256) if small else (2**29, 1024)
        self.bandwidth: list[float] = []
        self.flops: list[float] = []

    def measure(self, work: Work) -> float:
        """Tokens per second of `work` at this moment."""
        self.bandwidth.append(read_bandwidth(self._buffer_bytes))
        self.flops.append(max(linear_flops(dtype, self._width) for dtype in (torch.bfloat16, torch.float32)))
        time.sleep(SETTLE_S)
        if work.is_prefill:
            needed = bench_generate.prefill_flops(self.model, len(work.prompts), len(work.prompts[0]))
            return sum(map(len, work.prompts)) * self.flops[-1] / needed
        return len(work.prompts) * self.bandwidth[-1] / self.weight_bytes

    def print(self, works: Sequence[Work]) -> None:
        for work in works:
            rate = self.measure(work)
            if work.is_prefill:
                source = f"the layers' FLOPs at {self.flops[-1] / 1e9:.1f} GFLOP/s"
            else:
                source = f"{self.weight_bytes / 1e6:,.1f} MB of weights at {self.bandwidth[-1] / 1e9:.1f} GB/s"
            tqdm.write(f"bound    {work.name:16} {rate:>10,.1f} tokens/s ({source})")


def cpu() -> dict[str, Any]:
    """Cores this process may use and the instruction sets that matter here."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    flags: set[str] = set()
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features")):
                flags = set(line.partition(":")[2].split())
                break
    return {"cores": cores, "isa": sorted(flag for flag in flags if flag.startswith(_ISA))}


def run(args: argparse.Namespace) -> int:
    """Check, measure and print; the exit status."""
    torch.set_num_threads(args.threads)
    folder = checkpoint(args.cache.expanduser(), args.shape, args.seed)
    model = load_model(LlamaLM, folder, dtype=None, device="cpu")
    works = make_works(args, model.config.vocab_size)
    is_int4 = args.weights == "int4"
    served = int4_checkpoint(folder, args.group_size) if is_int4 else folder
    bounds = Bounds(model, load_model(LlamaLM, served, dtype=None, device="cpu") if is_int4 else None)
    load_average = os.getloadavg()[0]  # what else ran on the machine
    with ExitStack() as stack:
        programs = Programs(args, folder, stack, served)
        programs.start()
        checks = check(programs, works, model.config.num_hidden_layers)
        where = cpu()
        weights = f"int4 in groups of {args.group_size}" if is_int4 else "bfloat16"
        tqdm.write(f"{args.shape}, {weights}, {args.threads} threads, {where['cores']} cores: {' '.join(where['isa'])}")
        for name, result in checks.items():
            tqdm.write(f"check    {name:16} {result}")
        if not programs.running:
            print("nothing to time: no program is there that passed its check", file=sys.stderr)
            return 1
        weight_files = programs.weight_bytes()
        for name, size in weight_files.items() if is_int4 else ():
            tqdm.write(f"weights  {name:16} {size / 1e6:,.1f} MB on disk")
        bounds.print(works)
        rates, bound_rates, starts = measure(programs, works, bounds)
        overheads = measure_overhead(programs, works[0])
        idle = {name: process.idle.share for name, process in programs.running.items()}

    speed, start = speed_rows(rates, bound_rates), start_rows(starts)
    context = len(works[0].prompts[0]) + works[0].output_len
    cache_bytes = int(bench_generate.decode_kv_bytes(model, 1, context))
    wanted = targets(speed, start, overheads, bounds.weight_bytes + cache_bytes)
    for part in (speed_table(speed), start_table(start), overhead_lines(overheads), list(map(str, wanted))):
        if part:
            print(*part, sep="\n", end="\n\n")
    for name, share in idle.items():
        if share > 0.02:
            print(f"warning: {name} took {share:.0%} of a core while others were timed", file=sys.stderr)
    line = json_line(
        {
            "bench": "compare_cpu",
            "model": args.shape,
            "dtype": "bfloat16",
            "weights": args.weights,
            "group_size": args.group_size if is_int4 else None,
            **{key: getattr(args, key) for key in ("rounds", "prompt_len", "output_len", "prefill_len")},
            **where,
            "programs": programs.versions,
            "checks": checks,
            "left_out": programs.left_out,
            "weight_bytes": bounds.weight_bytes,
            "weight_file_bytes": weight_files,
            "cache_bytes": cache_bytes,
            "read_bytes_per_s": Summary.of(bounds.bandwidth),
            "linear_flops_per_s": Summary.of(bounds.flops),
            "speed": speed,
            "start": start,
            "overhead": overheads,
            "idle_cores": idle,
            "load_average_before": load_average,
            "targets": [target.as_json() for target in wanted],
            "config": model.config.to_diff_dict(),
        }
    )
    print(line)
    if args.out:
        args.out.write_text(line + "\n", encoding="utf-8")
    return int(programs.any_failed)


def measure(programs: Programs, works: Sequence[Work], bounds: Bounds) -> tuple[Any, Any, Any]:
    """Samples by round: tokens/s of each work and program, the bound of each work, and what new processes told.

    The check has warmed every program up, on the same work.
    """
    rounds = programs.args.rounds
    rates: dict[str, dict[str, list[float]]] = {work.name: {name: [] for name in programs.running} for work in works}
    bound_rates: dict[str, list[float]] = {work.name: [] for work in works}
    starts: dict[str, list[dict[str, float]]] = {name: [] for name in programs.running}
    first = works[0]
    with tqdm(total=rounds * (len(works) + 1), unit="part", disable=None) as bar:
        for turn in range(rounds):
            for work in works:
                bar.set_description(f"round {turn + 1} of {rounds}, {work.name}")
                bound_rates[work.name].append(bounds.measure(work))
                for name, process in programs.turns(turn):
                    with programs.guarded(name):
                        answer = process.ask("generate", prompts=work.prompts, output_len=work.output_len)
                        rates[work.name][name].append(work.rate(answer))
                bar.update()
            bar.set_description(f"round {turn + 1} of {rounds}, load to first token")
            for name, _ in programs.turns(turn):
                with programs.guarded(name), programs.new(name) as process:
                    process.ask("versions")  # its answer says that all is imported
                    request = {"prompt": first.prompts[0], "output_len": first.output_len}
                    starts[name].append(process.ask("fresh", **request))
            bar.update()
    left = set(programs.running)
    rates = {work: {name: values for name, values in by.items() if name in left} for work, by in rates.items()}
    return rates, bound_rates, {name: values for name, values in starts.items() if name in left}


def measure_overhead(programs: Programs, work: Work) -> list[dict[str, Any]]:
    """Of the model and of the demo model, which the process has loaded afterwards; on the way the profile, if asked."""
    rows: list[dict[str, Any]] = []
    if OURS not in programs.running:
        return rows
    args, process = programs.args, programs.running[OURS]
    request: dict[str, Any] = {"prompt": work.prompts[0], "output_len": work.output_len}

    def measure_one(model: str) -> dict[str, Any]:
        # Apart, since the timers of one would count as the other's overhead.
        return overhead_row(model, *(process.ask("overhead", **request, native=native) for native in (False, True)))

    with programs.guarded(OURS):
        rows.append(measure_one(args.shape))
        if args.profile:
            process.ask("profile", **request, path=str(args.profile.absolute()))
        vocab_size = process.ask("load", demo_model=True)
        request["prompt"] = [token_id % vocab_size for token_id in request["prompt"]]
        process.ask("generate", prompts=[request["prompt"]], output_len=request["output_len"])  # warms up
        rows.append(measure_one("demo"))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [OURS, LLAMA_CPP, TRANSFORMERS]
    cores = cpu()["cores"] or 1
    home = Path("~/.cache/llama_fast/compare")
    add = parser.add_argument
    add("--shape", choices=sorted(SHAPES), default="llama-1b-32k", help="of the model (default: %(default)s)")
    add("--programs", choices=names, nargs="+", default=names, metavar="NAME", help=f"default: {' '.join(names)}")
    add("--llama-cpp-python", default=sys.executable, metavar="PATH", help="interpreter with llama-cpp-python and gguf")
    add("--transformers-python", default=sys.executable, metavar="PATH", help="interpreter with transformers")
    add("--backend", default="auto", help="of llama_fast (default: %(default)s)")
    add("--threads", type=int, default=cores, metavar="N", help="of every program (default: usable cores, %(default)s)")
    add("--rounds", type=int, default=5, metavar="N", help="default: %(default)s")
    add(
        "--batch-sizes", type=int, nargs="+", default=[1, 4, 8, 16], metavar="N", help="of decoding (default: 1 4 8 16)"
    )
    add("--prompt-len", type=int, default=32, metavar="N", help="tokens before decoding (default: %(default)s)")
    add("--output-len", type=int, default=32, metavar="N", help="timed decode steps (default: %(default)s)")
    add("--prefill-len", type=int, default=512, metavar="N", help="tokens of the long prompt (default: %(default)s)")
    add("--quantized", action="store_true", help="time llama.cpp's Q8_0 and Q4_0 of the weights too, for information")
    add(
        "--weights", choices=("bf16", "int4"), default="bf16", help="of llama_fast and its peers (default: %(default)s)"
    )
    add("--group-size", type=int, choices=(32, 64, 128), default=128, help="of int4 (default: %(default)s)")
    add("--profile", type=Path, metavar="FILE", help="write a cProfile of one run of llama_fast at batch 1")
    add("--cache", type=Path, default=home, metavar="FOLDER", help="of the model's files (default: %(default)s)")
    add("--out", type=Path, metavar="FILE", help="write the JSON line there too")
    add("--seed", type=int, default=0, help="of random weights and prompts (default: %(default)s)")
    args = parser.parse_args(argv)
    for name in ("threads", "rounds", "prompt_len", "output_len", "prefill_len"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: give at least 1")
    if min(args.batch_sizes) < 1:
        parser.error(f"--batch-sizes {min(args.batch_sizes)}: give at least 1")
    for name in ("llama_cpp_python", "transformers_python"):
        if shutil.which(getattr(args, name)) is None:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: no such program")
    try:
        return run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
