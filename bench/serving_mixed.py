"""bench_throughput.py --mixed: requests of many lengths, all there at once.

Programs     llama_fast with N places and with one, which is serving one by one; llama.cpp with continuous batching and
             the number of slots that was best in a trial on some of the requests; vLLM with the most places. All serve
             the same requests in turns. Lengths and ids come from the seed; every request generates its whole length.
Bound        bytes and FLOPs of the whole mix, whichever takes longer. Weights are read once for each step, of which
             there are at least as many as the decoded tokens fill, or the longest output has, and a prompt before them.
             One by one, no step holds a prompt and a generated token: the prompts' and the other tokens' bounds add up.
Ideal        the least time in which full steps, as long as the engine's own are by measurement in each turn, do this
             work: formula and meaning in serving_ideal.py. The share of it that a run reaches says what scheduling,
             places that fall empty and the order of arrival cost.
Host         the share of a step in which nothing computes, and of that the scheduler's, in a run that is not timed.
First token  and time between tokens: percentiles over all requests and runs; from the moment when all were there.
Checked      beforehand as ever, with requests of the mix, shortened; a peer's first tokens of three requests. Every run
             must give each request the same tokens, so that one by one and all at once are compared bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from serving_bounds import Work
from serving_common import CHECKED_PROMPT, CHECKED_TOKENS, check_requests, grown, release, serve
from serving_ideal import Ideal, ideal_schedule
from serving_peers import OURS, Answer
from serving_report import all_gaps, percentiles, plot_mixed, print_mixed
from serving_requests import Requests, phases, shortened
from serving_session import Refused, Session, result_json, terms
from serving_steps import StepClock, StepTimes
from timing import Summary
from tqdm import tqdm

from llama_fast.engine.engine import Engine
from llama_fast.errors import LlamaFastError, OutOfMemoryError

NUM_REQUESTS = 64
LLAMA_CPP = "llama.cpp"
# Programs that are not asked, and why.
LEFT_OUT = {"transformers": "its generate has no continuous batching: prompts of several lengths would be padded"}
TARGETS = {"times_one_by_one": 4.0, "share_of_ideal": 0.9, "host_share": 0.02}


@dataclass(frozen=True)
class Contender:
    """A program, how many sequences it may run at once, and options of its own."""

    program: str
    places: int
    unified: bool | None = None

    @property
    def options(self) -> dict[str, Any]:
        return {} if self.unified is None else {"unified": self.unified}


class Rounds:
    """Every contender serves the same requests in turn; the one that starts changes from round to round.

    Attributes:
        engines: ours by places, ready; those that fit.
        clocks: of each, a run that is not timed.
        trials: llama.cpp's numbers of slots, and the tokens per second of some requests.
        answers: of each contender, in the order of rounds.
    """

    def __init__(self, session: Session, requests: Requests, places: Sequence[int]) -> None:
        self.session, self.requests = session, requests
        mean = round(requests.prompt_tokens / len(requests.prompts))
        chunks = sorted({max(1, mean // 4), mean, max(requests.prompt_lens)})
        of_steps = {"chunks": chunks, "attended": round(requests.attended), "context": round(requests.context)}
        seq_len = max(requests.longest, StepTimes.seq_len(**of_steps))
        self.engines: dict[int, Engine] = {}
        self.clocks: dict[int, StepClock] = {}
        for count in places:
            try:
                self.engines[count] = engine = session.engine(count, seq_len)
                self.clocks[count] = self._warm_up(engine)
            except (OutOfMemoryError, torch.OutOfMemoryError) as error:
                self.engines.pop(count, None)
                session.skipped[f"{count} at once"] = str(error).partition("\n")[0]
                tqdm.write(f"not run  {count} at once: {session.skipped[f'{count} at once']}")
        if 1 not in self.engines:
            raise OutOfMemoryError(f"one request at once: {session.skipped['1 at once']}")
        most = max(self.engines)
        self.steps = StepTimes(self.engines[most], list(self.engines), **of_steps, seed=session.args.seed)
        self.trials: list[dict[str, Any]] = []
        self.answers: dict[Contender, list[Answer]] = {Contender(OURS, count): [] for count in self.engines}
        for name in list(session.peers.running):
            with session.peers.guarded(name):
                contenders = self._try_slots() if name == LLAMA_CPP else [self._try(Contender(name, most))[0]]
                self.answers |= {contender: [] for contender in contenders}

    def _warm_up(self, engine: Engine) -> StepClock:
        """Serve enough of the requests for places to be filled anew, and see who takes the time."""
        some = self.requests.first(engine.max_batch + engine.max_batch // 2 + 1)
        with StepClock(engine) as clock:
            serve(engine, some.prompts, some.output_lens)
        return clock

    def _try(self, contender: Contender) -> tuple[Contender, float]:
        """Some of the requests, not timed but for its own sake: tokens per second; the tokens are judged."""
        most = max([*self.engines, *self.session.args.slots])
        some, peers = self.requests.first(most + most // 2), self.session.peers
        answer = peers.serve_mixed(
            contender.program, some.prompts, some.output_lens, contender.places, **contender.options
        )
        for index in sorted({0, len(some.prompts) // 2, len(some.prompts) - 1}):
            peers.judge(contender.program, some.prompts[index], answer.token_ids[index], self.session.model)
        return contender, some.generated / answer.seconds

    def _try_slots(self) -> list[Contender]:
        """llama.cpp as it is fastest: how many slots, then whether their cache is one buffer. Perhaps every number."""
        args = self.session.args
        tried = [self._try(Contender(LLAMA_CPP, slots, unified=False)) for slots in args.slots]
        best = max(tried, key=lambda one: one[1])[0]
        tried.append(self._try(dataclasses.replace(best, unified=True)))
        best = max(tried, key=lambda one: one[1])[0]
        self.trials = [{"slots": c.places, "unified": c.unified, "output_tokens_per_s": rate} for c, rate in tried]
        for contender, rate in tried:
            cache = "one cache" if contender.unified else "a cache each"
            tqdm.write(f"trial    {LLAMA_CPP}, {contender.places} slots, {cache}: {rate:,.1f} tokens/s")
        return [dataclasses.replace(best, places=slots) for slots in args.slots] if args.all_slots else [best]

    def turn(self) -> None:
        """One round.

        Raises:
            Refused: one of our answers differs from the first one.
        """
        peers, number = self.session.peers, len(self.answers[Contender(OURS, 1)])
        contenders = [c for c in self.answers if c.program == OURS or c.program in peers.running]
        for index in range(len(contenders)):
            contender = contenders[(number + index) % len(contenders)]
            if contender.program == OURS:
                self.answers[contender].append(self._serve(contender.places))
            elif contender.program in peers.running:
                with peers.guarded(contender.program):
                    requests = self.requests
                    answer = peers.serve_mixed(
                        contender.program,
                        requests.prompts,
                        requests.output_lens,
                        contender.places,
                        **contender.options,
                    )
                    self.answers[contender].append(answer)
        self.steps.sample()

    def _serve(self, places: int) -> Answer:
        meter, requests, engine = self.session.meter, self.requests, self.engines[places]
        before, joules = dataclasses.asdict(engine.stats()), meter.joules()
        answer = serve(engine, requests.prompts, requests.output_lens)
        answer.joules = meter.since(joules)
        counts = self.session.stats.setdefault(f"{places} at once", {})
        for name, count in grown(before, dataclasses.asdict(engine.stats())).items():
            counts[name] = counts.get(name, 0) + count
        ours = (answers for contender, answers in self.answers.items() if contender.program == OURS)
        first = next((answers[0] for answers in ours if answers), answer)
        if answer.token_ids != first.token_ids:
            raise Refused(f"{places} at once gave other tokens than the first run")
        return answer

    def rows(self) -> list[dict[str, Any]]:
        """What the complete rounds say; a peer that failed in one of them has none."""
        rounds = min(len(answers) for contender, answers in self.answers.items() if contender.program == OURS)
        kinds = self.steps.kinds()
        complete = {c: answers[:rounds] for c, answers in self.answers.items() if rounds and len(answers) >= rounds}
        if not complete or not kinds:
            return []
        requests = self.requests
        work = requests.prompt_tokens, requests.decoded, max(requests.output_lens)
        ours = {c: answers for c, answers in complete.items() if c.program == OURS}
        best = min(ours, key=lambda c: Summary.of([answer.seconds for answer in ours[c]]).median)
        made = []
        for contender, answers in complete.items():
            if contender.program == OURS:
                ideal = ideal_schedule(kinds, contender.places, *work)
                others = self._of_ours(contender, answers, complete[Contender(OURS, 1)], ideal)
            else:
                ratios = [b.seconds / a.seconds for a, b in zip(complete[best], answers, strict=True)]
                others = {"unified": contender.unified, "ours_at_once": best.places, "ours_to_it": Summary.of(ratios)}
            made.append(self._row(contender, answers) | others)
        return made

    def _row(self, contender: Contender, answers: Sequence[Answer]) -> dict[str, Any]:
        session, requests = self.session, self.requests
        parts = phases(session.model, requests, contender.places)
        work, bound = sum(parts.values(), Work(0, 0)), sum(session.rates.seconds(part) for part in parts.values())
        seconds = Summary.of([answer.seconds for answer in answers])
        total = requests.generated + requests.prompt_tokens
        joules = [answer.joules / requests.generated for answer in answers if answer.joules is not None]
        return {
            "program": contender.program,
            "batch_size": contender.places,
            "num_requests": len(requests.prompts),
            "prompt_tokens": requests.prompt_tokens,
            "output_tokens": requests.generated,
            "bound_s": bound,
            "seconds": seconds,
            "share_of_bound": bound / seconds.median,
            "output_tokens_per_s": Summary.of([requests.generated / answer.seconds for answer in answers]),
            "total_tokens_per_s": Summary.of([total / answer.seconds for answer in answers]),
            "ttft_s": percentiles([own[0] for answer in answers for own in answer.times]),
            "itl_s": percentiles([gap for answer in answers for gap in all_gaps(answer.times)]),
            "num_bytes": work.num_bytes,
            "flops": work.flops,
            "joules_per_token": sum(joules) / len(joules) if joules else None,
        }

    def _of_ours(
        self, contender: Contender, answers: Sequence[Answer], one_by_one: Sequence[Answer], ideal: Ideal
    ) -> dict[str, Any]:
        clock, median = self.clocks[contender.places], Summary.of([answer.seconds for answer in answers]).median
        ratios = [one.seconds / answer.seconds for one, answer in zip(one_by_one, answers, strict=True)]
        return {
            "times_one_by_one": Summary.of(ratios),
            "ideal_s": ideal.seconds,
            "ideal_tokens_per_s": self.requests.generated / ideal.seconds,
            "share_of_ideal": ideal.seconds / median,
            "num_steps": answers[0].num_steps,
            "ideal_num_steps": ideal.num_steps,
            "ideal_steps": [[kind.rows, kind.prompt_tokens, kind.seconds, count] for kind, count in ideal.steps],
            "host_share": clock.host_share,
            "scheduler_share": clock.scheduler_share,
        }


def run(session: Session) -> int:
    args, model = session.args, session.model
    for name in args.left_out:
        session.peers.left_out[name] = LEFT_OUT[name]
        tqdm.write(f"peer left out: {name}: {LEFT_OUT[name]}")
    requests = Requests.draw(args.mixed, args.requests, model.config.vocab_size, args.seed)
    places = sorted({1, *args.batch_sizes})
    most = max(2, *places)
    check_requests(session, most, shortened(requests, most, CHECKED_PROMPT[model.device.type], CHECKED_TOKENS))
    release(model.device.type)
    tqdm.write(
        f"requests {len(requests.prompts)}, prompts of {args.mixed.prompt_lens} tokens, outputs of "
        f"{args.mixed.output_lens}: {requests.prompt_tokens:,} prompt and {requests.generated:,} generated tokens"
    )
    for count in places:
        for phase, work in phases(model, requests, count).items():
            terms(session, f"{count:<3} at once, {phase}", work)
    rounds = Rounds(session, requests, places)
    try:
        for _ in tqdm(range(args.repeats), unit="round", disable=None):
            rounds.turn()
    except (KeyboardInterrupt, LlamaFastError):
        print_mixed(rounds.rows())
        raise
    session.rows = rounds.rows()
    print_mixed(session.rows)
    if args.plot and session.rows:
        plot_mixed(args.plot, f"{session.label} on {session.where}, {args.mixed} tokens", session.rows)
        tqdm.write(f"wrote {args.plot}")
    sizes = {"mix": str(args.mixed), "requests": len(requests.prompts), "targets": TARGETS}
    kinds = [dataclasses.asdict(kind) for kind in rounds.steps.kinds()]
    return result_json(session, "throughput_mixed", {**sizes, "slot_trials": rounds.trials, "steps": kinds})
