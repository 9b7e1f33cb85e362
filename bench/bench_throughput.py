"""Tokens per second of many requests served offline, by sequences at once and by lengths of prompt and output.

Bound    the prefill of all prompts, then their decode steps with every place taken, each phase at its bytes / measured
         bandwidth or its FLOPs / measured matmul rate, whichever is more (serving_bounds.py), at the mean context.
Timed    from submitting all requests to the end of the last one, which includes the time in which places fall empty.
         One run warms up and is not timed.
Checked  before anything is timed: tokens and log probabilities of a batch are bitwise those of each prompt alone, and
         on a GPU captured graphs give the tokens of eager steps. Every repeat must give the first run's tokens.
Energy   of the GPU from start to end of a run, a generated token; of our own runs only.
Beside   transformers, vLLM and llama.cpp where they are installed, with the same weights and in turns with ours; their
         tokens must be as good as ours but for roundings. A program without continuous batching serves batch after
         batch, which costs it nothing here: all requests have one length.
Mixed    with --mixed: requests of many lengths instead, one by one and all at once, beside an ideal schedule and
         programs with continuous batching (serving_mixed.py).

Nothing is answered from the cache: our engines run without prefix caching, as vLLM's does. Weights and prompts may be
random: neither changes the work.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import serving_mixed
from serving_arguments import at_least_one, fitting, make_parser, model_config, settle
from serving_bounds import Work, decode_work, prefill_work
from serving_common import Setting, check, measure
from serving_peers import Answer
from serving_report import energy, plot_roofline, print_table
from serving_requests import MIXES, Mix
from serving_session import Session, result_json, run_bench, terms
from timing import Summary
from tqdm import tqdm

from llama_fast.errors import LlamaFastError

_LENGTHS = [(128, 128), (1024, 128), (128, 1024)]

_EXAMPLES = """examples:
  python bench/bench_throughput.py                                          the bundled demo model
  python bench/bench_throughput.py --shape llama-3.1-8b --batch-sizes 16 64 --lengths 128/128 1024/128
  python bench/bench_throughput.py --model ~/Llama-3.2-1B --peers none --plot roofline.png
  python bench/bench_throughput.py --device cpu --threads 2 --shape llama-1b-32k --lengths 32/32 --requests 8
  python bench/bench_throughput.py --mixed 32-512/16-128 --requests 64 --shape llama-1b-32k --batch-sizes 16
  python bench/bench_throughput.py --smoke                                  in seconds: does the bench work"""


def phases(session: Session, setting: Setting) -> tuple[Work, Work]:
    """Of all prefills and of all decode steps.

    Places become free no sooner than their requests end, so that prompts run in as many groups as batches are needed;
    a step gives each place at most one token.
    """
    count, size = setting.num_requests, min(setting.batch_size, setting.num_requests)
    weights_again = -(-count // size) - 1
    prefill = prefill_work(session.model, count, setting.prompt_len)
    one, two = (prefill_work(session.model, n, setting.prompt_len) for n in (1, 2))
    weights = 2 * one.num_bytes - two.num_bytes
    prefill += Work(weights_again * weights, 0)
    steps = count * (setting.output_len - 1) / size
    return prefill, decode_work(session.model, size, setting.prompt_len + setting.output_len / 2) * steps


def row(session: Session, setting: Setting, program: str, answers: list[Answer]) -> dict[str, Any]:
    """What the answers of one program to one setting say."""
    prefill, decode = phases(session, setting)
    work, bound = prefill + decode, session.rates.seconds(prefill) + session.rates.seconds(decode)
    seconds = Summary.of([answer.seconds for answer in answers])
    generated, prompts = setting.num_requests * setting.output_len, setting.num_requests * setting.prompt_len
    joules = [answer.joules / generated for answer in answers if answer.joules is not None]
    return {
        "program": program,
        "batch_size": setting.batch_size,
        "prompt_len": setting.prompt_len,
        "output_len": setting.output_len,
        "num_requests": setting.num_requests,
        "bound_s": bound,
        "prefill_bound_s": session.rates.seconds(prefill),
        "decode_bound_s": session.rates.seconds(decode),
        "seconds": seconds,
        "share_of_bound": bound / seconds.median,
        "output_tokens_per_s": Summary.of([generated / answer.seconds for answer in answers]),
        "total_tokens_per_s": Summary.of([(prompts + generated) / answer.seconds for answer in answers]),
        "num_bytes": work.num_bytes,
        "flops": work.flops,
        "flops_per_byte": work.flops / work.num_bytes,
        "flops_per_s": work.flops / seconds.median,
        "joules_per_token": sum(joules) / len(joules) if joules else None,
    }


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    lines = []
    for r in rows:
        rate, generated = r["output_tokens_per_s"], r["num_requests"] * r["output_len"]
        setting = f"batch {r['batch_size']}, {r['prompt_len']}/{r['output_len']}, {r['num_requests']} requests"
        cells = [f"{generated / r['bound_s']:,.1f}", f"{rate.median:,.1f}", f"{rate.p10:,.1f} - {rate.p90:,.1f}"]
        cells += [f"{r['total_tokens_per_s'].median:,.1f}", f"{r['share_of_bound']:.1%}", energy(r["joules_per_token"])]
        lines.append([setting, r["program"], *cells])
    columns = ["setting", "program", "bound", "result", "p10 - p90", "with prompts", "share", "energy"]
    print_table("throughput: generated tokens per second", columns, lines)


def run(session: Session) -> int:
    args = session.args
    settings = [
        Setting(size, prompt_len, output_len, args.requests or 2 * size)
        for size in args.batch_sizes
        for prompt_len, output_len in args.lengths
    ]
    check(session, max(args.batch_sizes), max(prompt_len for prompt_len, _ in args.lengths))
    for setting in settings:
        name = (
            f"batch {setting.batch_size:<3} {setting.prompt_len}/{setting.output_len}, {setting.num_requests} requests"
        )
        for phase, work in zip(("prefill", "decode"), phases(session, setting), strict=True):
            terms(session, f"{name}, {phase}", work)
    try:
        measure(session, settings, lambda *of: row(session, *of))
    except (KeyboardInterrupt, LlamaFastError):
        print_rows(session.rows)
        raise
    print_rows(session.rows)
    if args.plot and session.rows:
        plot_roofline(args.plot, f"{session.label} on {session.where}", session.rates, session.rows)
        tqdm.write(f"wrote {args.plot}")
    return result_json(session, "throughput", {"lengths": args.lengths})


def lengths(text: str) -> tuple[int, int]:
    """Of "prompt/output"."""
    parts = text.split("/")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts) or int(parts[1]) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not prompt/output like 1024/128, of 1 and 2 tokens at least")
    return int(parts[0]), int(parts[1])


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__, _EXAMPLES, [1, 4, 16], 3)
    default = " ".join(f"{prompt_len}/{output_len}" for prompt_len, output_len in _LENGTHS)
    add = parser.add_argument
    add("--lengths", type=lengths, nargs="+", metavar="P/O", help=f"tokens (default: those of {default} that fit)")
    mixes = " ".join(map(str, MIXES))
    help_mixed = f"requests of lengths from and to, by the seed (default: the first of {mixes} that fits)"
    add("--mixed", type=Mix.parse, nargs="?", const=(), metavar="P-P/O-O", help=help_mixed)
    default = f"twice the sequences at once, {serving_mixed.NUM_REQUESTS} with --mixed"
    add("--requests", type=int, metavar="N", help=f"in all (default: {default})")
    slots = [4, 8, 16]
    add("--slots", type=int, nargs="+", default=slots, metavar="N", help="of llama.cpp, with --mixed (default: 4 8 16)")
    add("--all-slots", action="store_true", help="time every number of slots, not only the best of a trial")
    args = parser.parse_args(argv)
    is_mixed = args.mixed is not None
    if args.smoke:
        args.lengths, args.requests, args.slots = [(24, 8), (8, 16)], 4, [2, 3]
        args.mixed = Mix((40, 100), (4, 40)) if is_mixed else None
    elif is_mixed and args.lengths:
        parser.error("--lengths and --mixed: give one of them")
    at_least_one(parser, args, "requests", "slots")
    settle(parser, args)
    limit = model_config(args).max_position_embeddings
    if is_mixed:
        given = [args.mixed] if args.mixed else None
        args.mixed = fitting(parser, "--mixed", given, MIXES, lambda of: (of.longest, limit))[0]
        args.requests = args.requests or serving_mixed.NUM_REQUESTS
        args.left_out = [name for name in args.peers if name in serving_mixed.LEFT_OUT]
        args.peers = [name for name in args.peers if name not in serving_mixed.LEFT_OUT]
        return run_bench(args, serving_mixed.run)
    args.lengths = fitting(parser, "--lengths", args.lengths, _LENGTHS, lambda of: (sum(of), limit))
    return run_bench(args, run)


if __name__ == "__main__":
    sys.exit(main())
