"""One run of bench_latency.py or bench_throughput.py, from its arguments to its line of JSON."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from energy import EnergyMeter
from serving_bounds import Rates, Work, decode_weight_bytes, measure_rates
from serving_peers import Peers
from shapes import SHAPES, build_model
from timing import environment, json_line
from tqdm import tqdm

from llama_fast import LlamaForCausalLM, demo
from llama_fast.config import LlamaConfig
from llama_fast.engine.engine import Engine
from llama_fast.errors import LlamaFastError, OutOfMemoryError
from llama_fast.model.kv_cache import PAGE_SIZE, PagedKVCache
from llama_fast.model.llama import LlamaLM
from llama_fast.model.loading import load_model, pick_device, pick_dtype
from llama_fast.ops import select_backend
from llama_fast.ops.device_memory import free_bytes


class Refused(Exception):
    """A check failed: nothing is timed."""


@dataclass
class Session:
    """One run of a bench.

    Attributes:
        label: the model's name in results.
        rows: what was measured so far, as the line of JSON has it.
        skipped: settings that do not fit, and why.
        stats: how the engine's counts grew while it was timed, by setting.
    """

    args: Any
    label: str
    model: LlamaForCausalLM
    rates: Rates
    meter: EnergyMeter
    peers: Peers
    checks: dict[str, str] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    stats: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """The GPU's name, or the CPU's and its threads."""
        found = environment(self.rates.name)
        threads = f"{found['num_threads']} thread{'s' * (found['num_threads'] > 1)}"
        return found["device"] if self.rates.name else f"{found['device']}, {threads}"

    def prompts(self, count: int, length: int) -> list[list[int]]:
        """Random ids from the seed."""
        generator = torch.Generator().manual_seed(self.args.seed)
        return torch.randint(self.model.config.vocab_size, (count, length), generator=generator).tolist()

    def engine(self, batch_size: int, seq_len: int, graphs: bool | None = None) -> Engine:
        """Ready to run, with a cache that holds the whole batch.

        Without prefix caching: repeats would be answered from the cache.

        Raises:
            OutOfMemoryError: there is no room for that.
        """
        model, graphs = self.model, self.args.graphs if graphs is None else graphs
        pages = batch_size * -(-seq_len // PAGE_SIZE)
        cache_bytes = pages * PagedKVCache.page_bytes(model.config, PAGE_SIZE, model.dtype)
        free = free_bytes(model.device, 0)
        # A tenth is left for a step's buffers.
        if cache_bytes > 0.9 * free:
            raise OutOfMemoryError(f"its cache takes {cache_bytes / 1e9:.1f} GB and {free / 1e9:.1f} GB are free")
        sizes = {"max_batch": batch_size, "max_seq_len": seq_len, "cache_bytes": cache_bytes}
        engine = Engine(model, backend=self.args.backend, graphs=graphs, prefix_caching=False, **sizes)
        engine.make_ready()
        if engine.max_batch < batch_size:
            raise OutOfMemoryError(f"steps of {engine.max_batch} sequences were captured, for more there is no memory")
        return engine


def open_session(args: Any, stack: ExitStack) -> Session:
    """The model, the machine's rates and the peers, ended by `stack`.

    Raises:
        LlamaFastError: the model cannot be loaded or does not fit.
    """
    device = pick_device(args.device)
    select_backend(args.backend, device)
    if args.shape is None:
        folder, label = args.model or demo.PATH, "demo" if args.model is None else str(args.model)
        model = load_model(LlamaForCausalLM, folder, dtype=args.dtype, device=device)
    else:
        folder, label = None, args.shape
        model = _random_model(args.shape, args.dtype, device, args.seed)
    model.backend = args.backend
    rates = measure_rates(model.device, model.dtype, args.smoke)
    meter = EnergyMeter(model.device)
    if meter.problem and model.device.type == "cuda":
        tqdm.write(f"energy   {meter.problem}")
    return Session(args, label, model, rates, meter, Peers(args, model, folder, stack))


def _random_model(shape: str, dtype: str, device: torch.device, seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(**SHAPES[shape], dtype="bfloat16")
    picked = pick_dtype(dtype, config)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in LlamaLM(config).parameters())
    needed, free = count * picked.itemsize, free_bytes(device, 0)
    if needed > free:
        raise OutOfMemoryError(f"--shape {shape} in {picked} takes {needed / 1e9:.1f} GB; {free / 1e9:.1f} GB are free")
    return build_model(config, device, picked, seed, LlamaForCausalLM)


def run_bench(args: Any, run: Callable[[Session], int]) -> int:
    """Open a session and run; the exit status. What stops it is said on stderr."""
    try:
        with ExitStack() as stack:
            return run(open_session(args, stack))
    except Refused as error:
        print(f"refusing to time: {error}", file=sys.stderr)
    except LlamaFastError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 1


def terms(session: Session, name: str, work: Work) -> None:
    """Print one line of a bound."""
    tqdm.write(f"bound    {name}: {1e3 * session.rates.seconds(work):.3f} ms ({session.rates.terms(work)})")


def result_json(session: Session, bench: str, sizes: dict[str, Any]) -> int:
    """Print the line of JSON; the exit status, which is 1 where an engine that was ready went on to prepare."""
    args, model, rates = session.args, session.model, session.rates
    found = new_in_steady_state(session.stats)
    session.checks["nothing_new_while_timed"] = "; ".join(found) or "passed"
    result = {
        "bench": bench,
        "model": session.label,
        "dtype": str(model.dtype).removeprefix("torch."),
        "backend": select_backend(args.backend, model.device, model.dtype).__name__.rpartition(".")[2],
        "graphs": args.graphs and model.device.type == "cuda",
        **sizes,
        **{name: getattr(args, name) for name in ("batch_sizes", "repeats", "seed")},
        "checks": session.checks,
        "bytes_per_s": rates.bytes_per_s,
        "flops_per_s": rates.flops_per_s,
        "weight_bytes": decode_weight_bytes(model),
        "energy": session.meter.problem or "NVML",
        "rows": session.rows,
        "skipped": session.skipped,
        "peers": session.peers.versions,
        "peer_checks": session.peers.checks,
        "peers_left_out": session.peers.left_out,
        "engine_stats_grown": session.stats,
        "config": model.config.to_diff_dict(),
    }
    print(json_line(result, rates.name))
    if found:
        print(f"prepared anew while it was timed: {'; '.join(found)}", file=sys.stderr)
    return int(bool(found))


def new_in_steady_state(stats: dict[str, dict[str, Any]]) -> list[str]:
    """Allocations, compilations and captures that happened while an engine that was ready was timed."""
    words = ("alloc", "compil", "captur")
    return [
        f"{setting}: {name} +{value}"
        for setting, counts in stats.items()
        for name, value in counts.items()
        if value and any(word in name for word in words)
    ]
