"""One answer, shown on the machine that runs it: a fixed set of requests by every path, compared bit for bit.

The baseline is each request alone, one step at a time, with nothing captured and nothing shared. A path (a row of the
matrix) is another way to the same answers. Compared are tokens, the fp32 logits that each was drawn from (by their
sha256), log probabilities, ends and texts. A path that was not really taken has not passed: it is told why not.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Collection, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Literal

from llama_fast.engine.certify_locate import Difference, Location, first_difference, locate, place_of
from llama_fast.engine.certify_paths import Path, paths_of
from llama_fast.engine.certify_requests import Size, make_requests, size_of
from llama_fast.engine.certify_runner import NotHere, NotTaken, Run, Runner
from llama_fast.engine.certify_watch import SplitSum
from llama_fast.errors import LlamaFastError
from llama_fast.model.kv_cache import PAGE_SIZE, SPLIT_SIZE
from llama_fast.model.llama import LlamaLM
from llama_fast.model.progress import ProgressBar
from llama_fast.ops import select_backend
from llama_fast.tokenizer import LlamaTokenizer

# Of the paths that fail, so many are run again to find the op: the first ones tell what there is to know.
MAX_LOCATED = 3
_ABOUT_ALONE = "the baseline: each request alone, a step at a time, nothing captured, nothing shared"


@dataclass(frozen=True)
class PathResult:
    """A row of the matrix.

    Attributes:
        path, about: its name, and what it does.
        requests, draws: that were compared with the baseline; up to the first difference.
        result: "skipped" where the device has no such path.
        reason: why it was skipped or what failed.
        location: the first difference, if there is one.
    """

    path: str
    about: str
    requests: int
    draws: int
    result: Literal["passed", "failed", "skipped"]
    seconds: float
    reason: str = ""
    location: Location | None = None


class Certification:
    """The matrix of one model.

    Args:
        model: its weights, device and dtype.
        tokenizer: adds texts to the requests; None leaves them out.
        backend: as `Engine`'s.
        quick: fewer and shorter requests.
        planted: whether one op is given a sum whose order depends on the number of rows: then paths must fail.
        size: of the requests; default what suits model and device.
        page_size, split_size: of every cache.

    Raises:
        BackendError, OutOfMemoryError: as `Engine`.
    """

    def __init__(
        self,
        model: LlamaLM,
        tokenizer: LlamaTokenizer | None = None,
        *,
        backend: str = "auto",
        quick: bool = False,
        planted: bool = False,
        size: Size | None = None,
        page_size: int = PAGE_SIZE,
        split_size: int = SPLIT_SIZE,
    ) -> None:
        name = select_backend(backend, model.device, model.dtype).__name__.rpartition(".")[2]
        requests = make_requests(model, tokenizer, size or size_of(model, name, quick), page_size, split_size)
        fault = SplitSum(model.config.num_hidden_layers // 2) if planted else None
        self.runner = Runner(model, name, requests, page_size, split_size, tokenizer, fault)
        self.planted = None if fault is None else fault.description
        self.results: list[PathResult] = []
        self.complete = False
        self._located = 0

    @property
    def passed(self) -> bool:
        """Whether every path that the device has gave the baseline's answers, and no fault was planted."""
        return self.complete and self.planted is None and all(one.result != "failed" for one in self.results)

    def run(self, show_progress: bool | None = None, only: Collection[str] | None = None) -> None:
        """Run the baseline, then every path; `results` grows meanwhile and stays if this is interrupted.

        Args:
            show_progress: a bar on stderr; None shows it on a terminal.
            only: names of paths; the others are left out, and the matrix is not complete.
        """
        paths = [path for path in paths_of(self.runner) if only is None or path.name in only]
        disable = None if show_progress is None else not show_progress
        with ProgressBar(total=len(self.runner.requests.specs) + 3 + len(paths), disable=disable) as bar:
            bar.set_description("baseline")
            self.results.append(self._baseline(bar))
            for path in paths if self.results[0].result == "passed" else ():
                bar.set_description(path.name)
                self.results.append(self._result(path))
                bar.update()
        self.complete = only is None

    def _baseline(self, bar: ProgressBar) -> PathResult:
        runner, requests, began = self.runner, self.runner.requests, time.perf_counter()
        for _ in self._alone(requests.of()):
            bar.update()
        answers = {place: outcome.samples[0].token_ids for place, outcome in runner.expected.items()}
        for _ in self._alone(requests.add_behind(answers, runner.model.model.rotary.context_len)):
            bar.update()
        seconds = time.perf_counter() - began
        draws = sum(sample.draws for one in runner.expected.values() for sample in one.samples)
        errors = []
        for place, one in runner.expected.items():
            seen = all(sample.digests is not None and b"" not in sample.digests for sample in one.samples)
            if one.error is not None or not seen:
                errors.append(f"request {place}: {one.error or 'logits of a token were not seen'}")
        result = PathResult("alone", _ABOUT_ALONE, len(requests.specs), draws, "passed", seconds)
        return replace(result, result="failed", reason=errors[0]) if errors else result

    def _alone(self, places: list[int]) -> Iterator[Run]:
        self.runner.begin()
        for run in self.runner.alone(places):
            self.runner.expected[run.group.places[0]] = run.outcomes[0]
            yield run

    def _result(self, path: Path) -> PathResult:
        began, requests, draws = time.perf_counter(), 0, 0

        def ended(result: Literal["passed", "failed", "skipped"], **more: Any) -> PathResult:
            return PathResult(path.name, path.about, requests, draws, result, time.perf_counter() - began, **more)

        self.runner.begin()
        try:
            with closing(path.function(self.runner)) as runs:
                for run in runs:
                    position, difference = self._compare(run)
                    count = len(run.outcomes) if difference is None else position + 1
                    requests += count
                    draws += sum(sample.draws for one in run.outcomes[:count] for sample in one.samples)
                    if difference is not None:
                        break
                else:
                    return ended("passed") if requests else ended("failed", reason="not taken: nothing was run")
        except NotHere as reason:
            return ended("skipped", reason=str(reason))
        except NotTaken as reason:
            return ended("failed", reason=f"not taken: {reason}")
        except LlamaFastError as error:
            return ended("failed", reason=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        location = self._locate(path, run, position, difference)
        return ended("failed", reason=str(location), location=location)

    def _compare(self, run: Run) -> tuple[int, Difference | None]:
        """The first request of a run that differs from the baseline, and how."""
        for position, (place, outcome) in enumerate(zip(run.group.places, run.outcomes, strict=True)):
            difference = first_difference(self.runner.expected[place], outcome)
            if difference is not None:
                return position, difference
        return 0, None

    def _locate(self, path: Path, run: Run, position: int, found: Difference) -> Location:
        self._located += 1
        if self._located > MAX_LOCATED:
            return place_of(self.runner, run, position, found)
        return locate(self.runner, path.function, run, position, found)

    def answers_sha256(self) -> str:
        """Of the baseline: equal on two machines where their answers are, bit for bit."""
        found = hashlib.sha256()
        for place in sorted(self.runner.expected):
            for sample in self.runner.expected[place].samples:
                found.update(repr(sample.token_ids).encode() + b"".join(sample.digests or ()))
        return found.hexdigest()
