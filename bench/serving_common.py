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

CHECKED_TOKENS = 16
# A longer prompt would make the check on a CPU take longer than what it is for.
CHECKED_PROMPT = {"cpu": 128, "cuda": 2048}


@dataclass(frozen=True)
class Setting:
    """Requests of one size, at most `batch_size` of them at once."""

    batch_size: int
    prompt_len: int
    output_len: int
    num_requests: int

    def __str__(self) -> str:
        return f"batch {self.batch_size}, {self.prompt_len} + {self.output_len} tokens"


def greedy_request(
    engine: Engine, prompt: list[int], output_len: int, index: int = 0, logprobs: int | None = None
) -> Request:
    """One that ends at its length alone."""
    params = SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True, logprobs=logprobs)
    size = {"max_seq_len": engine.max_seq_len, "vocab_size": engine.model.config.vocab_size}
    sampling = params.resolve(GenerationDefaults(), None, prompt_len=len(prompt), **size)
    return Request(None, prompt, sampling, None, index)


def serve(
    engine: Engine, prompts: Sequence[list[int]], output_len: int | Sequence[int], scored: bool = False
) -> Answer:
    """Greedy decoding of so many tokens for each prompt, as fast as the engine takes them; token by token timed.

    Args:
        output_len: of all requests, or of each.

    Raises:
        LlamaFastError: a request failed.
    """
    lengths = [output_len] * len(prompts) if isinstance(output_len, int) else output_len
    requests = [
        greedy_request(engine, prompt, length, index, 0 if scored else None)
        for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    ]
    times: list[list[float]] = [[] for _ in prompts]
    num_steps = 0
    start = time.perf_counter()
    for samples in engine.run(requests):
        num_steps += 1
        now = time.perf_counter() - start
        for sample in samples:
            own = times[sample.request.index]
            own += [now] * (len(sample.token_ids) - len(own))
    seconds = time.perf_counter() - start
    for request in requests:
        if request.error is not None:
            raise request.error
    samples = [request.samples[0] for request in requests]
    return Answer([s.token_ids for s in samples], times, seconds, [s.logprobs for s in samples], num_steps=num_steps)


def differs_from_alone(generate: Callable[[Sequence[Any]], Any], prompts: Sequence[Any]) -> str | None:
    """What differs between the batch and its first, middle and last prompt alone; None if nothing does.

    Args:
        generate: prompts -> an object with `token_ids` and `logprobs` of each.
        prompts: or whatever else `generate` takes.
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
    batch_size, prompt_len = max(2, batch_size), min(prompt_len, CHECKED_PROMPT[session.model.device.type])
    prompts = session.prompts(batch_size, prompt_len)
    uneven = [prompt[(7 * index) % prompt_len :] for index, prompt in enumerate(prompts)]
    check_requests(session, batch_size, [(prompt, CHECKED_TOKENS) for prompt in uneven])


def check_requests(session: Session, batch_size: int, requests: Sequence[tuple[list[int], int]]) -> None:
    """The same for prompts and numbers of tokens, at most `batch_size` requests at once.

    Raises:
        Refused: a check failed.
    """

    def serve_on(one: Engine, some: Sequence[tuple[list[int], int]], scored: bool = False) -> Answer:
        return serve(one, [prompt for prompt, _ in some], [length for _, length in some], scored)

    seq_len, device = max(len(prompt) + length for prompt, length in requests), session.model.device.type
    engine = session.engine(batch_size, seq_len)
    failed = differs_from_alone(lambda some: serve_on(engine, some, scored=True), requests)
    session.checks["batch_equals_alone"] = failed or "passed"
    if failed is None and device != "cuda":
        session.checks["graphs_equal_eager"] = "not run: no GPU"
    elif failed is None and not session.args.graphs:
        session.checks["graphs_equal_eager"] = "not run: --no-graphs"
    elif failed is None:
        eager = session.engine(batch_size, seq_len, graphs=False)
        token_ids = [serve_on(one, requests).token_ids for one in (engine, eager)]
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
