"""Microseconds of each Triton kernel on the shapes of Llama 3.2 1B and 3.1 8B, in bf16, against what the GPU could do.

Bound    the larger of bytes / bandwidth and FLOPs / bf16 matmul rate, both measured on this GPU in the same run (a
         large device-to-device copy, read and written bytes; an 8192^3 matmul on random data). What the run itself
         beats is raised at its end (bounds.py): the line of JSON has the final bounds and shares. No kernel in a graph
         takes less than a launch, which is measured too and stands beside the bounds, not in them.
Timed    CUDA events around replays of a graph of many calls, which take sets of inputs in turn that together are eight
         times the L2 cache; median, p10 and p90 of at least 20 replays. Pages of the cache are shuffled.
Checked  before it is timed: every kernel on every shape, on the inputs that are timed, against fp64 (bench/checks.py).
         What fails is refused, and the exit status is 1.
Beside   PyTorch's own op in the same run, and Liger-Kernel, FlashInfer and torchao where they are installed.

Without a GPU it prints the bounds for assumed rates and measures nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from bounds import settle
from gpu_timing import Gpu
from kernel_cases import INSTALL, KERNELS, MODELS, Case, Setup, cases
from sources import source_hash
from timing import Summary, json_line
from tqdm import tqdm

# NVIDIA's datasheet of the H100 SXM: for bounds where nothing can be measured.
_ASSUMED_TB_S, _ASSUMED_TFLOP_S = 3.35, 989.0

_EXAMPLES = """examples:
  python bench/bench_kernels.py                                     everything, in under three minutes on an H100
  python bench/bench_kernels.py --models 8b --kernels linear,attention --rows 1,8
  python bench/bench_kernels.py --smoke                             in seconds: does every kernel run and pass
  python bench/bench_kernels.py --json bench/results/nvidia-h100-80gb-hbm3/kernels.json
  python bench/bench_kernels.py --bandwidth 4.8 --flops 989         without a GPU: bounds of an H200"""

_HEADER = f"{'kernel, shape':58} {'bound us':>9} {'us':>9} {'p10 - p90':>17} {'share':>7} {'rate':>12}  others (us)"


def measure(case: Case, gpu: Any) -> dict[str, Any]:
    """One case on the GPU: checked, then timed, then the others; or why not."""
    bound_us = case.bound_us(gpu.bandwidth, gpu.flops)
    result: dict[str, Any] = {"bound_us": bound_us}
    try:
        setup = case.build(gpu.device, gpu.l2_bytes)
    except ImportError as error:
        return result | {"skipped": f"{case.kernel} is not here: {error}"}
    except Exception as error:
        return result | {"refused": _reason(error)}
    try:
        problem = setup.check()
        if problem is not None:
            return result | {"refused": problem}
        us = gpu.time(setup.ours, setup.sets)
    # One broken kernel must not cost the numbers of the others.
    except Exception as error:
        return result | {"refused": _reason(error)}
    result |= {"us": us, "share": bound_us / us.median, "sets": len(setup.sets)}
    return result | _measure_others(setup, gpu)


def _measure_others(setup: Setup, gpu: Any) -> dict[str, Any]:
    others: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name, make in setup.peers.items():
        try:
            function, sets = make()
            others[name] = gpu.time(function, sets).median
        except ImportError:
            failed[name] = "not installed"
        except Exception as error:
            failed[name] = _reason(error)
    return {"torch_us": others.pop("torch", None), "others_us": others, "others_failed": failed}


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def _line(case: Case, result: dict[str, Any]) -> str:
    start = f"{case.name:58} {result['bound_us']:9.2f}"
    if "refused" in result:
        return f"{start} refusing to time: {result['refused']}"
    if "skipped" in result:
        return f"{start} not run"
    us = result["us"]
    if case.num_bytes and result["memory_bound"]:
        rate = f"{case.num_bytes / us.median / 1e3:,.0f} GB/s"
    else:
        rate = f"{case.flops / us.median / 1e6:,.1f} TFLOP/s"
    others = {"torch": result["torch_us"], **result["others_us"]}
    beside = ", ".join(f"{name} {value:.2f}" for name, value in others.items() if value is not None)
    failed = {name: why for name, why in result["others_failed"].items() if why != "not installed"}
    beside += "".join(f"; {name} failed: {why}" for name, why in failed.items())
    spread = f"{us.p10:.2f} - {us.p90:.2f}"
    return f"{start} {us.median:9.2f} {spread:>17} {result['share']:7.1%} {rate:>12}  {beside}"


def compile_ahead(chosen: list[Case], gpu: Any, jobs: int) -> None:
    """Call each kernel once on each shape in threads: what Triton compiles, it compiles outside Python's lock."""

    def warm(case: Case) -> None:
        try:
            setup = case.build(gpu.device, 0)
            setup.ours(*setup.sets[0])
        # The case itself will say what is wrong.
        except Exception:
            return

    # The number of slots that attention sees is no part of what is compiled.
    seen: dict[tuple[Any, ...], Case] = {}
    for case in chosen:
        seen.setdefault((case.kernel, case.op, case.model, case.rows), case)
    first, *rest = seen.values()
    # Alone: it also starts Triton's driver.
    warm(first)
    with ThreadPoolExecutor(jobs) as pool:
        list(tqdm(pool.map(warm, rest), total=len(rest), desc="compiling", unit="case", disable=None))


def run(args: argparse.Namespace, gpu: Any | None) -> tuple[int, dict[str, Any]]:
    """Print the table; the exit status and what the line of JSON says."""
    chosen = cases(args.models, args.kernels, args.rows, args.prefill, args.contexts)
    if gpu is None:
        bandwidth, flops = 1e12 * args.bandwidth, 1e12 * args.flops
        rates = f"assumed, not measured: {args.bandwidth} TB/s, {args.flops} TFLOP/s in bf16"
    else:
        bandwidth, flops = gpu.bandwidth, gpu.flops
        rates = f"measured: {bandwidth / 1e12:.3f} TB/s, {flops / 1e12:.1f} TFLOP/s in bf16; "
        rates += f"a launch {gpu.launch_us:.2f} us"
    print(f"{gpu.name if gpu else 'no GPU'}, bf16; rates {rates}")
    rows: list[dict[str, Any]] = []
    start = time.perf_counter()
    if gpu is None:
        print(f"{'kernel, shape':58} {'bound us':>9}")
        for case in chosen:
            result = {"bound_us": case.bound_us(bandwidth, flops)}
            print(f"{case.name:58} {result['bound_us']:9.2f}")
            rows.append(_record(case, result, bandwidth, flops))
        print("nothing was measured: PyTorch finds no GPU here")
    else:
        if gpu.device.type == "cuda":
            compile_ahead(chosen, gpu, args.jobs)
            gpu.release()
            print(f"compiled in {time.perf_counter() - start:.1f} s")
        print(_HEADER)
        for case in tqdm(chosen, unit="case", disable=None):
            if args.seconds and time.perf_counter() - start > args.seconds:
                late = f"--seconds {args.seconds:g} were over"
                result = {"bound_us": case.bound_us(bandwidth, flops), "skipped": late}
                rows.append(_record(case, result, bandwidth, flops))
                continue
            # Each case has its own inputs, whichever cases are chosen.
            torch.manual_seed(args.seed)
            rows.append(_record(case, measure(case, gpu), bandwidth, flops))
            tqdm.write(_line(case, rows[-1]))
            gpu.release()
            if _is_broken(gpu):
                print("the GPU no longer answers after that case: the rest is not run", file=sys.stderr)
                break
    refused = [row for row in rows if "refused" in row]
    skipped = [row["skipped"] for row in rows if "skipped" in row]
    _print_notes(rows)
    for why in sorted(set(skipped)):
        print(f"{skipped.count(why)} of {len(rows)} cases not run: {why}")
    if gpu is not None:
        timed = len(rows) - len(refused) - len(skipped)
        print(f"{timed} cases timed, {len(refused)} refused, {time.perf_counter() - start:.0f} s")
    machine = {"bytes_per_s": bandwidth, "flops_per_s": flops, "launch_us": gpu.launch_us if gpu else None}
    sources = {kernel: source_hash(kernel) for kernel in args.kernels}
    about = {"bench": "kernels", "dtype": "bfloat16", "measured": gpu is not None, **machine, "sources": sources}
    result = {**about, "seed": args.seed, "rows": rows}
    if gpu is not None:
        for row in rows:
            if isinstance(row.get("us"), Summary):
                row["us"] = asdict(row["us"])
        result = settle(result)
        if result["bytes_per_s"] > bandwidth:
            print(f"the run read {result['bytes_per_s'] / 1e12:.3f} TB/s: bounds and shares in the JSON follow that")
    return int(bool(refused) or len(rows) < len(chosen)), result


def _record(case: Case, result: dict[str, Any], bandwidth: float, flops: float) -> dict[str, Any]:
    names = ("kernel", "op", "model", "rows", "context", "num_bytes", "flops")
    memory_bound = case.num_bytes / bandwidth >= case.flops / flops
    return {**{name: getattr(case, name) for name in names}, "memory_bound": memory_bound, **result}


def _is_broken(gpu: Any) -> bool:
    """Whether a kernel has left the GPU in a state in which nothing runs (an illegal address, say)."""
    if gpu.device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(gpu.device)
    except RuntimeError:
        return True
    return False


def _print_notes(rows: list[dict[str, Any]]) -> None:
    missing = {name for row in rows for name, why in row.get("others_failed", {}).items() if why == "not installed"}
    for name in sorted(missing):
        print(f"{name} is not installed: pip install {INSTALL.get(name, name)}")


def _names(known: Any) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is unknown; use {', '.join(known)}")
        return names

    return parse


def _counts(text: str) -> list[int]:
    """Positive numbers between commas; "" for none."""
    try:
        counts = [int(part) for part in text.split(",") if part]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list like 1,8,64") from None
    if any(count < 1 for count in counts):
        raise argparse.ArgumentTypeError(f"{text!r}: give numbers of at least 1")
    return counts


def main(argv: list[str] | None = None, gpu: Any | None = None) -> int:
    """The command.

    Args:
        gpu: in the place of the machine's GPU, for tests.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    jobs = min(8, os.cpu_count() or 1)
    parser.add_argument("--models", type=_names(MODELS), default=["1b", "8b"], help="default: 1b,8b")
    parser.add_argument("--kernels", type=_names(KERNELS), default=list(KERNELS), help=f"default: {','.join(KERNELS)}")
    parser.add_argument("--rows", type=_counts, default=[1, 8, 64], help="generated tokens (default: 1,8,64)")
    parser.add_argument("--prefill", type=_counts, default=[512, 4096], help="prompt tokens (default: 512,4096)")
    parser.add_argument(
        "--contexts", type=_counts, default=[1024, 4096, 32768], help="of generated tokens (default: 1024,4096,32768)"
    )
    parser.add_argument("--smoke", action="store_true", help="a tiny model and few rows: only checks kernels and bench")
    parser.add_argument("--seconds", type=float, default=0.0, metavar="N", help="start no case after N seconds")
    parser.add_argument(
        "--jobs", type=int, default=jobs, metavar="N", help="threads that compile (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (default: %(default)s)")
    parser.add_argument("--commit", help="to write down where the copy that runs has no .git")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the line of JSON there instead of printing it")
    parser.add_argument(
        "--bandwidth", type=float, metavar="TB/S", help=f"assumed without a GPU (default: {_ASSUMED_TB_S}, an H100 SXM)"
    )
    parser.add_argument(
        "--flops", type=float, metavar="TFLOP/S", help=f"assumed without a GPU (default: {_ASSUMED_TFLOP_S:g})"
    )
    args = parser.parse_args(argv)
    has_gpu = gpu is not None or torch.cuda.is_available()
    if has_gpu and (args.bandwidth or args.flops):
        parser.error("--bandwidth and --flops are for machines without a GPU; here both are measured")
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: give at least 1")
    args.bandwidth, args.flops = args.bandwidth or _ASSUMED_TB_S, args.flops or _ASSUMED_TFLOP_S
    if args.smoke:
        args.models, args.rows, args.prefill, args.contexts = ["smoke"], [1, 3], [40], [300]
    if gpu is None and has_gpu:
        gpu = Gpu(seconds_per_case=0.01 if args.smoke else 0.05)
    with torch.no_grad():
        status, result = run(args, gpu)
    line = json_line(result, gpu.name if gpu else None, args.commit)
    if args.json is None:
        print(line)
    else:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(line + "\n", encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
