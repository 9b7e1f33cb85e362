"""A file of requests, answered line by line: the output's bytes depend on the input, the model and the settings alone.

Not on max_batch, on the order in which requests end, or on how often the process was killed: lines are written in the
input's order, a seed that is not given follows from the line's index, and a run that goes on checks that the lines that
are there were written for these lines and with these settings.

A few requests wait behind those that run, so that neither the input nor the output is ever in memory as a whole. What
ends early waits for its turn; behind a long request at most LINES_AHEAD * max_batch lines are read.

Beyond this are a chat template that asks for today's date, which gives another prompt tomorrow; a line whose `n` is
more than max_batch, which is refused; and a request that fails for want of memory.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from llama_fast import __version__
from llama_fast.engine.llm import LLM
from llama_fast.engine.request import Request
from llama_fast.errors import EngineDeadError, GenerationInterrupted, LlamaFastError
from llama_fast.model.progress import ProgressBar
from llama_fast.ops import describe_backend
from llama_fast.serving.batch_files import BatchFiles, InputLine
from llama_fast.serving.batch_lines import CustomIds, Job, custom_id_of, job_of, parse
from llama_fast.serving.batch_records import Record, TokenTexts
from llama_fast.serving.batch_resume import check_written

REQUESTS_ALIVE = 2  # times max_batch: running, and waiting for a row
LINES_AHEAD = 64  # times max_batch: from the oldest line that has no answer yet

# A file of more bytes stands for itself by some from all over it.
_MAX_HASHED_BYTES = 32 << 20
_SAMPLES, _SAMPLE_BYTES = 256, 4096


@dataclass
class BatchReport:
    """Counts of a batch.

    Attributes:
        lines: of the input that are not blank.
        written: lines of the output.
        resumed: of these, those that were there when the run began.
        errors: of these, those that tell an error.
        prompt_tokens, generated_tokens: of the requests that ended in this run, without those that failed.
        seconds: of this run.
    """

    lines: int = 0
    written: int = 0
    resumed: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Generated ones."""
        return self.generated_tokens / self.seconds if self.seconds > 0 else 0.0


def fingerprint(llm: LLM, folder: Path, name: str, seed: int) -> str:
    """What has a say in the answers besides the lines: "fp_", and 8 hexadecimal digits for each part (batch_resume.py).

    Of large files it takes the size and some bytes: to read all would take as long as to load the model.

    Args:
        folder: the model's.
        name: what answers call the model.
        seed: of the batch.
    """
    engine, model = llm.engine, llm.model
    files = hashlib.sha256(name.encode())
    for path in sorted(path for kind in ("json", "jinja", "model", "safetensors") for path in folder.glob(f"*.{kind}")):
        files.update(f"\n{path.name} {path.stat().st_size}\n".encode())
        for content in _contents(path):
            files.update(content)
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else describe_backend(model.device)
    weights = [f"{name} {weight.shape} {weight.dtype}" for name, weight in model.state_dict().items()]
    setup = (
        __version__,
        torch.__version__,
        device,
        engine.ops.__name__,
        engine.cache.split_size,
        model.dtype,
        *weights,
    )
    parts = (files.hexdigest(), _digest(*setup), _digest(seed, engine.max_seq_len))
    return "_".join(["fp", *(part[:8] for part in parts)])


def run_batch(
    llm: LLM,
    files: BatchFiles,
    *,
    name: str,
    fingerprint: str,
    seed: int = 0,
    show_progress: bool | None = None,
) -> BatchReport:
    """Answer the lines of the input that the output does not answer yet.

    Args:
        llm: generates nothing else meanwhile.
        files: where they were opened to be resumed, the output may hold lines.
        name: what answers call the model where their line does not say.
        fingerprint: of the model and its settings, see `fingerprint`; it stands in every line.
        seed: for the lines that have none.
        show_progress: None shows a bar on a terminal.

    Raises:
        RequestError: the output's lines were not written for this input and with these settings; it is unchanged then.
        OSError: the output cannot be written. What stands in it is whole.
        GenerationInterrupted: Ctrl-C. All answers whose turn had come are written; `outputs` is a BatchReport.
        EngineDeadError: the device failed; likewise.
    """
    return _Batch(llm, files, name, fingerprint, seed).run(show_progress)


class _Batch:
    """A run of `run_batch`."""

    def __init__(self, llm: LLM, files: BatchFiles, name: str, fingerprint: str, seed: int) -> None:
        self._llm, self._files = llm, files
        self._name, self._fingerprint, self._seed = name, fingerprint, seed
        self._tokens = TokenTexts(llm.tokenizer)
        self._custom_ids = CustomIds()
        # Answers whose turn has not come, by index, and what runs.
        self._answers: dict[int, bytes] = {}
        self._running: dict[int, tuple[Record, Job, Request]] = {}
        self._read = 0
        self._begun = 0.0
        self.report = BatchReport()

    def run(self, show_progress: bool | None) -> BatchReport:
        self._begun = time.monotonic()
        self.report.lines = self._files.count_lines()
        lines, total = self._files.lines(), self.report.lines
        resumed, self.report.errors = check_written(self._files, lines, total, self._custom_ids, self._fingerprint)
        self._read = self.report.resumed = resumed
        disable = None if show_progress is None else not show_progress
        try:
            with ProgressBar(total=total, initial=resumed, desc="lines", unit="line", disable=disable) as bar:
                self._run(lines, bar)
        except OSError:
            raise  # the output's: it cannot be written
        except BaseException as error:
            self._finish()
            if isinstance(error, KeyboardInterrupt):
                raise GenerationInterrupted(self.report) from error
            raise
        self._finish()
        return self.report

    def _finish(self) -> None:
        self._write()
        self._files.sync()
        self._count()

    def _count(self) -> None:
        self.report.written, self.report.seconds = self._files.count, time.monotonic() - self._begun

    def _run(self, lines: Iterator[InputLine], bar: ProgressBar) -> None:
        engine = self._llm.engine
        with engine.session():
            engine.make_ready()
            more = True
            while more or self._running:
                while more and self._may_read():
                    line = next(lines, None)
                    more = line is not None
                    if line is not None:
                        self._begin(line)
                if self._running:
                    engine.step()
                    self._end()
                self._write()
                done = self._read - len(self._running)
                if done > bar.n:
                    self._count()
                    bar.set_postfix_str(f"{self.report.tokens_per_s:.1f} tokens/s", refresh=False)
                    bar.update(done - bar.n)

    def _may_read(self) -> bool:
        max_batch = self._llm.engine.max_batch
        ahead = self._read - self._files.count
        return len(self._running) < REQUESTS_ALIVE * max_batch and ahead < LINES_AHEAD * max_batch

    def _begin(self, line: InputLine) -> None:
        """Queue what a line asks for; a line that is wrong has its answer."""
        record = Record(line, self._fingerprint)
        try:
            content = parse(line)
            record.custom_id = custom_id_of(content)
            if record.custom_id is not None:
                self._custom_ids.take(record.custom_id, line)
            job = job_of(content, line.index, self._seed)
            request = self._llm.request(job.prompt, job.params, line.index)
            self._llm.engine.add(request)
        except EngineDeadError:
            raise
        except LlamaFastError as error:
            self._fail(record, error)
        else:
            self._running[line.index] = (record, job, request)
        self._read = line.index + 1

    def _end(self) -> None:
        """Take the answers of the requests that ended."""
        for index, (record, job, request) in list(self._running.items()):
            if not request.finished:
                continue
            if request.error is not None:
                self._fail(record, request.error)
            else:
                self._answers[index] = record.answered(job, request, self._name, self._tokens)
                self.report.prompt_tokens += len(request.prompt_token_ids)
                self.report.generated_tokens += sum(len(sample.token_ids) for sample in request.samples)
            del self._running[index]

    def _fail(self, record: Record, error: LlamaFastError) -> None:
        self._answers[record.line.index] = record.failed(error)
        self.report.errors += 1

    def _write(self) -> None:
        """Write the answers whose turn it is; called again after an interrupt it goes on where that one struck."""
        ready: list[bytes] = []
        while (answer := self._answers.get(self._files.count + len(ready))) is not None:
            ready.append(answer)
        if ready:
            self._files.append(ready)
            for index in [index for index in self._answers if index < self._files.count]:
                del self._answers[index]


def _contents(path: Path) -> Iterator[bytes]:
    """All bytes of a file, or samples of a large one; its beginning is among them, which names the tensors."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _MAX_HASHED_BYTES:
            yield file.read()
            return
        for place in range(_SAMPLES):
            file.seek(size * place // _SAMPLES)
            yield file.read(_SAMPLE_BYTES)


def _digest(*values: object) -> str:
    return hashlib.sha256("\n".join(map(str, values)).encode()).hexdigest()
