"""Tokens per second of prefill and of greedy decoding on the CPU, against what the machine could do.

Bound    decode: (weight bytes + KV bytes a step reads) / measured read bandwidth, with the context half generated; the
         embedding counts only where it is the LM head too. A model that fits the cache may beat this bound.
         prefill: FLOPs of the layers, of attention under its causal mask and of the prompts' last logits / the rate
         of a large F.linear in the same dtype.
Timed    prefill: a batch of prompts until each has its first token. decode: every step in which the whole batch gets a
         further token, sampling included. Without prefix caching. Weights and prompts may be random: neither changes
         the work.
Checked  before anything is timed: greedy tokens and their log probabilities are bitwise those of each prompt alone,
         and in fp32 transformers (if it is installed) chooses the same tokens but for near-ties.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from serving_bounds import decode_kv_bytes, decode_weight_bytes, prefill_flops
from serving_common import differs_from_alone
from shapes import SHAPES, write_checkpoint
from timing import Summary, linear_flops, print_json, read_bandwidth
from tqdm import tqdm

from llama_fast import demo
from llama_fast.engine.engine import DEFAULT_PREFILL_CHUNK, Engine
from llama_fast.engine.outputs import PositionLogprobs
from llama_fast.engine.request import Request
from llama_fast.engine.sampling import GenerationDefaults, SamplingParams
from llama_fast.errors import LlamaFastError
from llama_fast.model.llama import LlamaLM
from llama_fast.model.loading import load_model
from llama_fast.ops import select_backend

_CHECKED_TOKENS = 16
# Twice the 1e-4 by which fp32 logits may differ from transformers'.
_NEAR_TIE = 2e-4

_EXAMPLES = """examples:
  python bench/bench_generate.py                                        the bundled demo model
  python bench/bench_generate.py --model ~/Llama-3.2-1B --batch-sizes 1 8
  python bench/bench_generate.py --shape llama-3.2-1b --prompt-len 32 --output-len 16
  python bench/bench_generate.py --smoke                                in seconds: does the bench work"""


@dataclass(frozen=True)
class Run:
    """One batch: tokens of each prompt, their log probabilities if asked for, and times in seconds."""

    token_ids: list[list[int]]
    logprobs: list[list[PositionLogprobs] | None]
    prefill_s: float
    decode_step_s: list[float]


def run_batch(model: LlamaLM, prompts: Sequence[list[int]], output_len: int, backend: str, scored: bool = False) -> Run:
    """Greedy decoding of `output_len` tokens for each prompt, through an engine without prefix caching."""
    longest = max(map(len, prompts)) + output_len
    engine = Engine(model, backend=backend, max_batch=len(prompts), max_seq_len=longest, prefix_caching=False)
    params = SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True, logprobs=0 if scored else None)
    requests = []
    for index, prompt in enumerate(prompts):
        size = {"prompt_len": len(prompt), "max_seq_len": longest, "vocab_size": model.config.vocab_size}
        requests.append(Request(None, prompt, params.resolve(GenerationDefaults(), None, **size), None, index))
    engine.make_ready()  # else the first step would
    samples = [request.samples[0] for request in requests]
    prefill_s, steps = 0.0, []
    start = last = time.perf_counter()
    for stepped in engine.run(requests):
        now = time.perf_counter()
        generated = min(len(sample.token_ids) for sample in samples)
        if generated >= 1 and not prefill_s:
            prefill_s = now - start
        elif generated >= 2 and len(stepped) == len(samples):
            steps.append(now - last)
        last = now
    for request in requests:
        if request.error is not None:
            raise request.error
    return Run([s.token_ids for s in samples], [s.logprobs for s in samples], prefill_s, steps)


def differs_in_a_batch(model: LlamaLM, prompts: Sequence[list[int]], output_len: int, backend: str) -> str | None:
    """What differs between the batch and its first, middle and last prompt alone; None if nothing does."""
    return differs_from_alone(lambda some: run_batch(model, some, output_len, backend, scored=True), prompts)


@torch.no_grad()
def differs_from_transformers(folder: Path, prompt: list[int], output_len: int, backend: str) -> str | None:
    """Where transformers, in fp32 and given our tokens so far, clearly prefers another one; None if nowhere.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    ours = load_model(LlamaLM, folder, dtype=torch.float32, device="cpu")
    token_ids = run_batch(ours, [prompt], output_len, backend).token_ids[0]
    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits = theirs(torch.tensor([prompt + token_ids])).logits[0, len(prompt) - 1 : -1]
    behind = logits.amax(dim=-1) - logits[torch.arange(output_len), token_ids]
    step = int(behind.argmax())
    if behind[step] <= _NEAR_TIE:
        return None
    return f"at token {step + 1} transformers' best logit is {behind[step]:.3g} above that of our token"


def check(model: LlamaLM, folder: Path, prompts: Sequence[list[int]], output_len: int, backend: str) -> dict[str, str]:
    """Names of the checks and how they went: "passed", "not run: reason", or what is wrong."""
    results = {"batch_equals_alone": differs_in_a_batch(model, prompts, output_len, backend) or "passed"}
    try:
        found = differs_from_transformers(folder, prompts[0], output_len, backend)
        results["equals_transformers_in_fp32"] = found or "passed"
    except ImportError as error:
        results["equals_transformers_in_fp32"] = f"not run: {error}"
    return results


def measure(
    model: LlamaLM, prompts: Sequence[list[int]], output_len: int, backend: str, repeats: int
) -> tuple[Summary, Summary]:
    """Tokens per second of prefill and decoding over `repeats` runs after one that warms up."""
    prefill: list[float] = []
    decode: list[float] = []
    for repeat in range(repeats + 1):
        run = run_batch(model, prompts, output_len, backend)
        if repeat:
            prefill.append(sum(map(len, prompts)) / run.prefill_s)
            decode += [len(prompts) / step_s for step_s in run.decode_step_s]
    return Summary.of(prefill), Summary.of(decode)


def run(args: argparse.Namespace, folder: Path, label: str) -> int:
    """Check, measure and print; the exit status."""
    model = load_model(LlamaLM, folder, dtype=args.dtype, device="cpu")
    config, dtype = model.config, str(model.dtype).removeprefix("torch.")
    generator = torch.Generator().manual_seed(args.seed)
    shape = (max(args.batch_sizes), args.prompt_len)
    prompts = torch.randint(config.vocab_size, shape, generator=generator).tolist()

    with tqdm(total=1 + len(args.batch_sizes), unit="part", disable=None) as bar:
        bar.set_description("checking")
        uneven = [prompt[(7 * index) % args.prompt_len :] for index, prompt in enumerate(prompts)]
        checks = check(model, folder, uneven, min(args.output_len, _CHECKED_TOKENS), args.backend)
        for name, result in checks.items():
            if result != "passed" and not result.startswith("not run"):
                print(f"refusing to time: {name}: {result}", file=sys.stderr)
                return 1
        bar.update()

        bandwidth = read_bandwidth(2**26 if args.smoke else 2**29)
        flops = linear_flops(model.dtype, 256 if args.smoke else 1024)
        weight_bytes = decode_weight_bytes(model)
        tqdm.write(f"{label}, {dtype}, backend {args.backend}, {torch.get_num_threads()} threads; checks: {checks}")
        bounds = []
        for batch_size in args.batch_sizes:
            kv_bytes = decode_kv_bytes(model, batch_size, args.prompt_len + args.output_len / 2)
            work = prefill_flops(model, batch_size, args.prompt_len)
            decode = batch_size * bandwidth / (weight_bytes + kv_bytes)
            prefill = batch_size * args.prompt_len * flops / work
            bounds.append({"batch_size": batch_size, "prefill_bound": prefill, "decode_bound": decode})
            tqdm.write(
                f"bound    batch {batch_size:<3} prefill {prefill:,.1f} tokens/s ({work / 1e9:.3f} GFLOP at "
                f"{flops / 1e9:.1f} GFLOP/s), decode {decode:,.1f} tokens/s ({weight_bytes / 1e6:.2f} MB weights + "
                f"{kv_bytes / 1e6:.2f} MB KV at {bandwidth / 1e9:.1f} GB/s)"
            )

        results: list[dict[str, Any]] = []
        for bound in bounds:
            batch_size = int(bound["batch_size"])
            bar.set_description(f"batch {batch_size}")
            rates = measure(model, prompts[:batch_size], args.output_len, args.backend, args.repeats)
            results.append(dict(bound))
            for kind, rate in zip(("prefill", "decode"), rates, strict=True):
                share = rate.median / bound[f"{kind}_bound"]
                results[-1] |= {kind: rate, f"{kind}_share_of_bound": share}
                tqdm.write(
                    f"{kind:8} batch {batch_size:<3} {rate.median:,.1f} tokens/s (p10 {rate.p10:,.1f}, "
                    f"p90 {rate.p90:,.1f}), {100 * share:.1f}% of the bound"
                )
            bar.update()
    asked = {name: getattr(args, name) for name in ("prompt_len", "output_len", "repeats")}
    asked["backend"] = select_backend(args.backend, model.device).__name__.rpartition(".")[2]
    machine = {"read_bytes_per_s": bandwidth, "linear_flops_per_s": flops}
    measured = {"checks": checks, "weight_bytes": weight_bytes, **machine, "tokens_per_s": results}
    print_json(
        {"bench": "generate", "model": label, "dtype": dtype, **asked, **measured, "config": config.to_diff_dict()}
    )
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", type=Path, metavar="FOLDER", help="a local checkpoint (default: the demo model)")
    what.add_argument("--shape", choices=sorted(SHAPES), help="random weights of this shape")
    what.add_argument("--smoke", action="store_true", help="shape tiny and little of it: only checks the bench")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16], metavar="N", help="default: 1 4 16")
    parser.add_argument("--prompt-len", type=int, default=128, metavar="N", help="tokens (default: %(default)s)")
    parser.add_argument("--output-len", type=int, default=64, metavar="N", help="tokens (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="timed runs (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="of weights and activations (default: the model's)")
    parser.add_argument("--backend", default="auto", help="default: %(default)s")
    parser.add_argument("--threads", type=int, metavar="N", help="of PyTorch (default: its choice)")
    parser.add_argument("--seed", type=int, default=0, help="of random weights and prompts (default: %(default)s)")
    args = parser.parse_args()
    if args.smoke:
        args.batch_sizes, args.prompt_len, args.output_len, args.repeats = [1, 3], 24, 8, 1
    for name in ("prompt_len", "repeats"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: give at least 1")
    if min(args.batch_sizes) < 1:
        parser.error(f"--batch-sizes {min(args.batch_sizes)}: give at least 1")
    # The first prompts of a batch get tokens while its last ones wait for their chunk.
    prefill_steps = -(-max(args.batch_sizes) * args.prompt_len // DEFAULT_PREFILL_CHUNK)
    if args.output_len <= prefill_steps:
        parser.error(f"--output-len {args.output_len}: give at least {prefill_steps + 1}, or no step is all decode")
    if args.threads is not None:
        if args.threads < 1:
            parser.error(f"--threads {args.threads}: give at least 1")
        torch.set_num_threads(args.threads)
    try:
        if args.shape is None and not args.smoke:
            folder = args.model or demo.PATH
            return run(args, folder, "demo" if args.model is None else str(folder))
        shape = args.shape or "tiny"
        with tempfile.TemporaryDirectory(prefix="bench_generate_") as folder:
            write_checkpoint(Path(folder), shape, args.seed)
            return run(args, Path(folder), shape)
    except LlamaFastError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
