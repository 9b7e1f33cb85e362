"""What bench_latency.py and bench_throughput.py do alike: runs through the engine, checks, and the rounds.

Every program serves the same requests in turn; the one that starts changes from round to round.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from serving_peers import OURS, Answer
from serving_session import Refused, Session
from tqdm import tqdm

from llama_fast.engine.engine import DEFAULT_PREFILL_CHUNK, Engine
from llama_fast.engine.request import Request
from llama_fast.engine.sampling import GenerationDefaults, SamplingParams
from llama_fast.errors import OutOfMemoryError

_CHECKED_TOKENS = 16
# A longer prompt would make the check on a CPU take longer than what it is for.
_CHECKED_PROMPT = {"cpu": 128, "cuda": 2048}


@dataclass(frozen=True)
class Setting:
    """Requests of one size, at most `batch_size` of them at once."""

    batch_size: int
    prompt_len: int
    output_len: int
    num_requests: int

    def __str__(self) -> str:
        return f"batch {self.batch_size}, {self.prompt_len} + {self.output_len} tokens"


def serve(engine: Engine, prompts: Sequence[list[int]], output_len: int, scored: bool = False) -> Answer:
    """Greedy decoding of `output_len` tokens for each prompt, as fast as the engine takes them; token by token timed.

    Raises:
        LlamaFastError: a request failed.
    """
    params = SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True, logprobs=0 if scored else None)
    size = {"max_seq_len": engine.max_seq_len, "vocab_size": engine.model.config.vocab_size}
    defaults = GenerationDefaults()
    requests = [
        Request(None, prompt, params.resolve(defaults, None, prompt_len=len(prompt), **size), None, index)
        for index, prompt in enumerate(prompts)
    ]
    times: list[list[float]] = [[] for _ in prompts]
    start = time.perf_counter()
    for samples in engine.run(requests):
        now = time.perf_counter() - start
        for sample in samples:
            own = times[sample.request.index]
            own += [now] * (len(sample.token_ids) - len(own))
    seconds = time.perf_counter() - start
    for request in requests:
        if request.error is not None:
            raise request.error
    samples = [request.samples[0] for request in requests]
    return Answer([s.token_ids for s in samples], times, seconds, [s.logprobs for s in samples])


def differs_from_alone(generate: Callable[[Sequence[list[int]]], Any], prompts: Sequence[list[int]]) -> str | None:
    """What differs between the batch and its first, middle and last prompt alone; None if nothing does.

    Args:
        generate: prompts -> an object with `token_ids` and `logprobs` of each.
    """
    together = generate(prompts)
    for index in sorted({0, len(prompts) // 2, len(prompts) - 1}):
        alone = generate(prompts[index : index + 1])
        if (alone.token_ids[0], alone.logprobs[0]) != (together.token_ids[index], together.logprobs[index]):
            return f"prompt {index} alone and in a batch of {len(prompts)} give different tokens or log probabilities"
    return None


def check(session: Session, batch_size: int, prompt_len: int) -> None:
    """Put into `session.checks` how each check went: "passed" or "not run: reason".

    Raises:
        Refused: one failed.
    """
    batch_size, device = max(2, batch_size), session.model.device.type
    prompt_len = min(prompt_len, _CHECKED_PROMPT[device])
    prompts = session.prompts(batch_size, prompt_len)
    uneven = [prompt[(7 * index) % prompt_len :] for index, prompt in enumerate(prompts)]
    engine = session.engine(batch_size, prompt_len + _CHECKED_TOKENS)
    failed = differs_from_alone(lambda some: serve(engine, some, _CHECKED_TOKENS, scored=True), uneven)
    session.checks["batch_equals_alone"] = failed or "passed"
    if failed is None and device != "cuda":
        session.checks["graphs_equal_eager"] = "not run: no GPU"
    elif failed is None and not session.args.graphs:
        session.checks["graphs_equal_eager"] = "not run: --no-graphs"
    elif failed is None:
        eager = session.engine(batch_size, prompt_len + _CHECKED_TOKENS, graphs=False)
        token_ids = [serve(one, uneven, _CHECKED_TOKENS).token_ids for one in (engine, eager)]
        failed = None if token_ids[0] == token_ids[1] else "captured graphs and eager steps give different tokens"
        session.checks["graphs_equal_eager"] = failed or "passed"
    if failed is not None:
        raise Refused(failed)


def measure(session: Session, settings: Sequence[Setting], row: Callable[[Setting, str, list[Answer]], Any]) -> None:
    """Serve every setting in rounds and append to `session.rows` what `row` makes of each program's answers.

    Raises:
        Refused: a repeat gave other tokens than the first run.
        EngineDeadError: the GPU failed.
    """
    repeats = session.args.repeats
    release(session.model.device.type)  # what the check had
    with tqdm(total=len(settings) * (repeats + 1), unit="round", disable=None) as bar:
        for setting in settings:
            bar.set_description(str(setting))
            try:
                answers = _rounds(session, setting, bar)
            except (OutOfMemoryError, torch.OutOfMemoryError) as error:
                session.skipped[str(setting)] = str(error).partition("\n")[0]
                tqdm.write(f"not run  {setting}: {session.skipped[str(setting)]}")
                continue
            finally:
                release(session.model.device.type)
            for program, of_program in answers.items():
                made = row(setting, program, of_program)
                session.rows += [] if made is None else [made]


def _rounds(session: Session, setting: Setting, bar: Any) -> dict[str, list[Answer]]:
    prompts, peers = session.prompts(setting.num_requests, setting.prompt_len), session.peers
    engine = session.engine(setting.batch_size, setting.prompt_len + setting.output_len)
    expected = serve(engine, prompts, setting.output_len).token_ids
    peers.warm_up(prompts, setting, session.model)
    before = dataclasses.asdict(engine.stats())
    bar.update()
    answers: dict[str, list[Answer]] = {OURS: [], **{name: [] for name in peers.running}}
    for turn in range(session.args.repeats):
        names = [name for name in answers if name == OURS or name in peers.running]
        for index in range(len(names)):
            name = names[(turn + index) % len(names)]
            if name != OURS:
                with peers.guarded(name):
                    answers[name].append(peers.serve(name, prompts, setting))
                continue
            joules = session.meter.joules()
            answer = serve(engine, prompts, setting.output_len)
            answer.joules = session.meter.since(joules)
            if answer.token_ids != expected:
                raise Refused(f"{setting}: repeat {turn + 1} gave other tokens than the first run")
            answers[OURS].append(answer)
        bar.update()
    session.stats[str(setting)] = grown(before, dataclasses.asdict(engine.stats()))
    return {name: of_program for name, of_program in answers.items() if len(of_program) == session.args.repeats}


def grown(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """By how much each count is larger."""
    return {
        name: value - before[name]
        for name, value in after.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def release(device: str) -> None:
    """Give a finished engine's cache and graphs back before the next one is made."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def prefill_steps(num_tokens: int) -> int:
    """Engine steps until prompts of that many tokens together have run."""
    return -(-num_tokens // DEFAULT_PREFILL_CHUNK)
