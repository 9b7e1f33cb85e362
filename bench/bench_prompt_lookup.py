"""How much sooner one sequence ends with prompt lookup: where its text repeats itself, and where it does not.

Repeating   greedy: what a model of random weights says soon runs in a circle. What was guessed and what of it was right
            is printed beside the time.
Elsewhere   drawn at temperature 1: hardly any token is guessed rightly, so that the time shows what guessing costs.
Bound       decode steps at the measured bandwidth, one token each: prompt lookup may beat it, as several tokens share a
            step's bytes.
Timed       from the first token to the last, with and without in turns, medians.
Checked     the tokens with and without are the same, in every round; else nothing is reported.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from serving_arguments import at_least_one, make_parser, model_config, settle
from serving_bounds import decode_work
from serving_common import greedy_request
from serving_report import print_table
from serving_session import Refused, Session, result_json, run_bench, terms
from timing import Summary
from tqdm import tqdm

from llama_fast.engine.engine import Engine
from llama_fast.engine.request import Request

_EXAMPLES = """examples:
  python bench/bench_prompt_lookup.py                                       the bundled demo model
  python bench/bench_prompt_lookup.py --shape llama-1b-32k --device cpu --threads 2 --output-len 96 --repeats 3"""

_PATHS = ("plain", "prompt lookup")


def make_request(engine: Engine, prompt: list[int], args: Any, kind: str, guesses: int) -> Request:
    """One that ends at its length alone."""
    request = greedy_request(engine, prompt, args.output_len)
    sampling = replace(request.sampling, prompt_lookup_num_tokens=guesses)
    if kind == "elsewhere":
        sampling = replace(sampling, temperature=1.0, seed=args.seed)
    return Request(None, prompt, sampling, None)


def timed(engine: Engine, request: Request) -> tuple[float, list[int], Request]:
    """Seconds from the first token to the last, and the tokens."""
    for _ in engine.run([request]):
        pass
    if request.error is not None:
        raise request.error
    seconds = request.metrics.decode_time
    assert seconds is not None
    return seconds, request.samples[0].token_ids, request


def measure_kind(session: Session, engine: Engine, kind: str) -> list[dict[str, Any]]:
    """Both paths in turns.

    Raises:
        Refused: they gave different tokens.
    """
    args = session.args
    (prompt,) = session.prompts(1, args.prompt_len)
    seconds: dict[str, list[float]] = {path: [] for path in _PATHS}
    expected: list[int] | None = None
    last: dict[str, Request] = {}
    for turn in tqdm(range(args.repeats + 1), desc=kind, unit="round", disable=None):
        for path in _PATHS if turn % 2 else reversed(_PATHS):
            request = make_request(engine, prompt, args, kind, args.guesses if path == _PATHS[1] else 0)
            took, token_ids, last[path] = timed(engine, request)
            if token_ids != (expected or token_ids):
                raise Refused(f"{kind}: {path} gave other tokens than the run before it")
            expected = token_ids
            if turn:  # the first warms up
                seconds[path].append(took)
    bound = session.rates.seconds(decode_work(session.model, 1, args.prompt_len + args.output_len / 2))
    plain = Summary.of(seconds[_PATHS[0]]).median
    return [
        {
            "kind": kind,
            "path": path,
            "seconds": Summary.of(seconds[path]),
            "tokens_per_s": (args.output_len - 1) / Summary.of(seconds[path]).median,
            "bound_tokens_per_s": 1 / bound,
            "times_plain": plain / Summary.of(seconds[path]).median,
            "guessed": last[path].metrics.guessed,
            "guessed_right": last[path].metrics.guessed_right,
        }
        for path in _PATHS
    ]


def run(session: Session) -> int:
    args = session.args
    context = args.prompt_len + args.output_len
    engine = session.engine(args.rows, context)
    terms(session, f"decode step at context {context}", decode_work(session.model, 1, context))
    for kind in ("repeating", "elsewhere"):
        session.rows += measure_kind(session, engine, kind)
    session.checks["same_tokens"] = "passed"
    lines = [
        [
            f"{r['kind']}, {r['path']}",
            f"{r['bound_tokens_per_s']:,.1f}",
            f"{r['tokens_per_s']:,.1f}",
            f"{r['times_plain']:.2f}x",
            f"{r['guessed_right']} of {r['guessed']}",
        ]
        for r in session.rows
    ]
    print_table("prompt lookup: generated tokens per second", ["text", "bound", "result", "plain", "guessed"], lines)
    sizes = {name: getattr(args, name) for name in ("prompt_len", "output_len", "guesses", "rows")}
    return result_json(session, "prompt_lookup", sizes)


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__, _EXAMPLES, [1], 5)
    add = parser.add_argument
    add("--prompt-len", type=int, default=64, metavar="N", help="tokens (default: %(default)s)")
    add("--output-len", type=int, default=128, metavar="N", help="tokens (default: %(default)s)")
    add("--guesses", type=int, default=8, metavar="N", help="tokens guessed at once, at most (default: %(default)s)")
    add("--rows", type=int, default=16, metavar="N", help="of the engine; guesses take idle ones (default: 16)")
    args = parser.parse_args(argv)
    if args.smoke:
        args.prompt_len, args.output_len = 12, 24
    args.peers = ["none"]
    at_least_one(parser, args, "prompt_len", "guesses", "rows")
    if args.output_len < 2:
        parser.error(f"--output-len {args.output_len}: give at least 2, or there is no time between tokens")
    settle(parser, args)
    if args.smoke:
        args.batch_sizes = [1]
    limit = model_config(args).max_position_embeddings
    if args.prompt_len + args.output_len > limit:
        parser.error(f"--prompt-len and --output-len: the model is made for {limit} tokens together")
    return run_bench(args, run)


if __name__ == "__main__":
    sys.exit(main())
