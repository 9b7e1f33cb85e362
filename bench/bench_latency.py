"""Time to first token by prompt length, and time between tokens by context and batch size, on a GPU or the CPU.

Bound    a phase's bytes / measured bandwidth or its FLOPs / measured matmul rate, whichever is more: serving_bounds.py.
         Of a full batch the k-th first token comes no earlier than the prefill of k prompts; the bound is the median
         over k. Between tokens: a decode step of the whole batch, at the mean context.
Timed    on the host, as the engine hands tokens out; all requests of a batch are submitted at once. Time between tokens
         counts where every request of the batch is decoding, each token of each request; gaps while others' prompts
         still run stand apart in the line of JSON. One run warms up and is not timed.
Checked  before anything is timed: tokens and log probabilities of a batch are bitwise those of each prompt alone, and
         on a GPU captured graphs give the tokens of eager steps. Every repeat must give the first run's tokens.
Energy   of the GPU from start to end of a run, prefill included, a generated token; of our own runs only.
Beside   transformers, vLLM and llama.cpp where they are installed, with the same weights and in turns with ours; their
         tokens must be as good as ours but for roundings. Their requests are those of ours.

Nothing is answered from the cache: our engines run without prefix caching, as vLLM's does. Weights and prompts may be
random: neither changes the work.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from serving_arguments import at_least_one, fitting, make_parser, model_config, settle
from serving_bounds import Work, decode_work, prefill_work
from serving_common import Setting, check, measure, prefill_steps
from serving_peers import Answer
from serving_report import all_gaps, energy, ms, percentiles, plot_latency, print_table
from serving_session import Session, result_json, run_bench, terms
from tqdm import tqdm

from llama_fast.errors import LlamaFastError

_CONTEXTS = [128, 1024, 4096]

_EXAMPLES = """examples:
  python bench/bench_latency.py                                             the bundled demo model
  python bench/bench_latency.py --shape llama-3.1-8b --batch-sizes 1 16 64 --contexts 128 1024 8192
  python bench/bench_latency.py --model ~/Llama-3.2-1B --peers none --plot latency.png
  python bench/bench_latency.py --device cpu --threads 2 --shape llama-1b-32k --contexts 128
  python bench/bench_latency.py --smoke                                     in seconds: does the bench work"""


def full_gaps(times: Sequence[Sequence[float]]) -> list[float]:
    """Seconds between tokens of each request, where all requests have their first token and none its last."""
    begin, end = max(own[0] for own in times), min(own[-1] for own in times)
    return [b - a for own in times for a, b in pairwise(own) if begin <= a and b <= end]


def bounds(session: Session, setting: Setting) -> tuple[float, float]:
    """Seconds to the first token (the median of the batch's requests) and between tokens, at least."""
    prefills = [prefill_work(session.model, k + 1, setting.prompt_len) for k in range(setting.batch_size)]
    first = percentiles([session.rates.seconds(work) for work in prefills])["p50"]
    return first, session.rates.seconds(step(session, setting))


def step(session: Session, setting: Setting) -> Work:
    """Of decoding one token of each request, halfway through their outputs."""
    return decode_work(session.model, setting.batch_size, setting.prompt_len + setting.output_len / 2)


def row(session: Session, setting: Setting, program: str, answers: list[Answer]) -> dict[str, Any] | None:
    """What the answers of one program to one setting say; None if they say nothing of a full batch."""
    first_bound, step_bound = bounds(session, setting)
    first = percentiles([own[0] for answer in answers for own in answer.times])
    gaps = [gap for answer in answers for gap in full_gaps(answer.times)]
    if not gaps:
        session.skipped[f"{setting}, {program}"] = "its whole batch never decoded at once"
        return None
    between = percentiles(gaps)
    joules = [answer.joules / answer.num_tokens for answer in answers if answer.joules is not None]
    return {
        "program": program,
        "batch_size": setting.batch_size,
        "context": setting.prompt_len,
        "tokens_per_request": setting.output_len,
        "ttft_bound_s": first_bound,
        "ttft_s": first,
        "ttft_share_of_bound": first_bound / first["p50"],
        "itl_bound_s": step_bound,
        "itl_s": between,
        "itl_share_of_bound": step_bound / between["p50"],
        "itl_all_s": percentiles([gap for answer in answers for gap in all_gaps(answer.times)]),
        "joules_per_token": sum(joules) / len(joules) if joules else None,
    }


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    lines = []
    for r in rows:
        for name, what in (("ttft", "first token"), ("itl", "between tokens")):
            result, bound, share = r[f"{name}_s"], r[f"{name}_bound_s"], r[f"{name}_share_of_bound"]
            setting = f"batch {r['batch_size']}, context {r['context']:,}, {what}"
            cells = [ms(bound), ms(result["p50"]), ms(result["p99"]), f"{share:.1%}"]
            lines.append([setting, r["program"], *cells, energy(r["joules_per_token"]) if name == "itl" else ""])
    print_table("latency", ["setting", "program", "bound", "result p50", "p99", "share", "energy"], lines)


def run(session: Session) -> int:
    args = session.args
    settings = [
        # The first requests decode while the last ones' prompts run: they need tokens left for the whole batch.
        Setting(size, context, args.output_len + prefill_steps(size * context), size)
        for size in args.batch_sizes
        for context in args.contexts
    ]
    check(session, max(args.batch_sizes), max(args.contexts))
    for setting in settings:
        name = f"batch {setting.batch_size:<3} context {setting.prompt_len:<6}"
        terms(session, f"{name} prefill", prefill_work(session.model, setting.batch_size, setting.prompt_len))
        terms(session, f"{name} decode step", step(session, setting))
    try:
        measure(session, settings, lambda *of: row(session, *of))
    except (KeyboardInterrupt, LlamaFastError):
        print_rows(session.rows)
        raise
    print_rows(session.rows)
    if args.plot and session.rows:
        plot_latency(args.plot, f"{session.label} on {session.where}", session.rows)
        tqdm.write(f"wrote {args.plot}")
    return result_json(session, "latency", {"output_len": args.output_len, "contexts": args.contexts})


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__, _EXAMPLES, [1, 4, 16], 5)
    default = " ".join(map(str, _CONTEXTS))
    add = parser.add_argument
    add(
        "--contexts",
        type=int,
        nargs="+",
        metavar="N",
        help=f"tokens of a prompt (default: those of {default} that fit)",
    )
    add("--output-len", type=int, default=64, metavar="N", help="tokens of the full batch (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.smoke:
        args.contexts, args.output_len = [24, 40], 6
    at_least_one(parser, args, "contexts")
    if args.output_len < 2:
        parser.error(f"--output-len {args.output_len}: give at least 2, or there is no time between tokens")
    settle(parser, args)
    limit = model_config(args).max_position_embeddings

    def sizes(context: int) -> tuple[int, int]:
        return context + args.output_len + prefill_steps(max(args.batch_sizes) * context), limit

    args.contexts = fitting(parser, "--contexts", args.contexts, _CONTEXTS, sizes)
    return run_bench(args, run)


if __name__ == "__main__":
    sys.exit(main())
