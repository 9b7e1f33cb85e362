"""The programs of compare_cpu.py: the files that each reads, its process, and the check that all compute one model."""

import argparse
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from compare_process import Absent, Failed, Process
from compare_report import LLAMA_CPP, OURS, TRANSFORMERS
from shapes import SHAPES, write_checkpoint
from tqdm import tqdm

from llama_fast.model.llama import LlamaLM
from llama_fast.model.loading import load_model
from llama_fast.model.quantization import Int4Config
from llama_fast.model.saving import save_model

CHECKED_TOKENS = 4
INSTALL = {LLAMA_CPP: "pip install llama-cpp-python gguf", TRANSFORMERS: "pip install transformers"}
_GGUF = Path(__file__).resolve().with_name("gguf_file.py")
_GGUF_VERSION = 1  # of what gguf_file.py writes: raise it when that changes
_INT4_VERSION = 1  # of how weights are rounded


def note(text: str) -> None:
    """Tell what takes a while, apart from the results."""
    tqdm.write(text, file=sys.stderr)


def checkpoint(cache: Path, shape: str, seed: int) -> Path:
    """The cached folder of that shape and seed, made if it is not there whole; llama.cpp's files stand beside it."""
    home, record = cache / f"{shape}-seed{seed}", {"shape": SHAPES[shape], "seed": seed}
    made = home / "made.json"
    if not made.exists() or json.loads(made.read_text(encoding="utf-8")) != record:
        note(f"writing random weights to {home}")
        shutil.rmtree(home, ignore_errors=True)
        (home / "checkpoint").mkdir(parents=True)
        write_checkpoint(home / "checkpoint", shape, seed)
        made.write_text(json.dumps(record), encoding="utf-8")  # last: what has no record is not whole
    return home / "checkpoint"


def gguf_file(python: str, folder: Path, kind: str = "bf16") -> Path:
    """llama.cpp's file beside the checkpoint, made by the peer's interpreter if it is not there.

    Raises:
        Absent: gguf or llama-cpp-python is not installed there.
        Failed: the file could not be made.
    """
    path = folder.with_name(f"{kind}-v{_GGUF_VERSION}.gguf")
    if not path.exists():
        if kind == "bf16":
            arguments = ["convert", str(folder), str(path)]
        else:
            arguments = ["quantize", str(gguf_file(python, folder)), str(path), "--type", kind]
        note(f"writing {path}")
        made = subprocess.run([python, str(_GGUF), *arguments], capture_output=True, text=True, check=False)
        if made.returncode:
            reason = " ".join(made.stderr.strip().splitlines()[-1:])
            raise (Absent if reason.startswith(("ImportError", "ModuleNotFoundError")) else Failed)(reason)
    return path


def int4_checkpoint(folder: Path, group_size: int) -> Path:
    """The checkpoint's projections rounded to 4-bit integers, in a folder beside it, made if it is not there whole."""
    path = folder.with_name(f"int4-group{group_size}-v{_INT4_VERSION}")
    if not path.exists():
        note(f"writing {path}")
        partial = path.with_name(path.name + ".tmp")
        shutil.rmtree(partial, ignore_errors=True)
        config = Int4Config(group_size)
        save_model(load_model(LlamaLM, folder, dtype=None, device="cpu", quantization=config), partial)
        partial.rename(path)
    return path


def file_bytes(path: Path) -> int:
    """Of a program's weights: a GGUF file, or a folder's safetensors."""
    return sum(file.stat().st_size for file in (path.glob("*.safetensors") if path.is_dir() else [path]))


class Programs:
    """The processes to compare; what is absent or fails is named in `left_out` and takes no further part.

    Args:
        args: compare_cpu.py's.
        folder: of the checkpoint in bf16.
        served: what llama_fast reads: that, or the same in int4.
        stack: ends the processes.
    """

    def __init__(self, args: argparse.Namespace, folder: Path, stack: ExitStack, served: Path | None = None) -> None:
        self.args, self.folder, self.served, self.stack = args, folder, served or folder, stack
        self.running: dict[str, Process] = {}
        self.versions: dict[str, dict[str, str]] = {}
        self.left_out: dict[str, str] = {}
        self.any_failed = False
        self.models: dict[str, tuple[str, str]] = {}  # name -> program of compare_workers.py, kind of GGUF file
        for program in args.programs:
            if args.weights == "bf16" or program == OURS:
                self.models[program] = (program, "bf16" if program == LLAMA_CPP else "")
            kinds = ("q8_0", "q4_0") if args.quantized else ("q4_0",) if args.weights == "int4" else ()
            if program == LLAMA_CPP:
                self.models |= {f"{program} {kind}": (program, kind) for kind in kinds}

    def new(self, name: str) -> Process:
        """One more process of that program, with nothing loaded.

        Raises:
            Absent, Failed: see `gguf_file`.
        """
        program, _ = self.models[name]
        python = self._python(program)
        return Process(python, program, self._model(name), self.args.threads, "--backend", self.args.backend)

    def weight_bytes(self) -> dict[str, int]:
        """Of the file or files that each running program has loaded."""
        return {name: file_bytes(self._model(name)) for name in self.running}

    def _python(self, program: str) -> str:
        pythons = {LLAMA_CPP: self.args.llama_cpp_python, TRANSFORMERS: self.args.transformers_python}
        return pythons.get(program, sys.executable)

    def _model(self, name: str) -> Path:
        program, kind = self.models[name]
        return gguf_file(self._python(program), self.folder, kind) if kind else self.served

    def start(self) -> None:
        for name in self.models:
            with self.guarded(name):
                process = self.stack.enter_context(self.new(name))
                self.versions[name] = process.ask("versions")
                process.ask("load")
                self.running[name] = process

    @contextmanager
    def guarded(self, name: str) -> Iterator[None]:
        """Keeps an absent or failing program from ending the comparison of the others: it is left out."""
        try:
            yield
        except Absent as error:
            tqdm.write(f"peer absent: {INSTALL.get(self.models[name][0], 'pip install -e .')} ({name}: {error})")
            self.left_out[name] = f"absent: {error}"
        except Failed as error:
            note(f"not timed: {name}: {error}")
            self.left_out[name], self.any_failed = str(error), True
        else:
            return
        if name in self.running:
            self.running.pop(name).close()

    def turns(self, first: int) -> Iterator[tuple[str, Process]]:
        """All programs, from another one on each round."""
        names = list(self.running)
        for index in range(len(names)):
            name = names[(first + index) % len(names)]
            if name in self.running:
                yield name, self.running[name]


@contextmanager
def judge(programs: Programs) -> Iterator[tuple[str, Process]]:
    """A program in fp32 that judges the others, and what it is; of int4 weights it is our reference backend."""
    args, folder = programs.args, programs.served
    options = ["--dtype", "float32", "--backend", "reference"]
    if args.weights == "bf16":
        with Process(args.transformers_python, TRANSFORMERS, folder, args.threads, *options) as process:
            try:
                process.ask("load")
            except Absent:
                pass
            else:
                yield "transformers in float32", process
                return
    with Process(sys.executable, OURS, folder, args.threads, *options) as process:
        yield "llama_fast's reference in float32", process


def check(programs: Programs, works: Sequence[Any], num_layers: int) -> dict[str, str]:
    """How each program's check went; what fails is left out. It warms all of them up.

    A bf16 rounding is off by 2^-9 at most, and a layer has about 12 one after another. Independent errors of that
    size would leave the logits off by sqrt(12 * layers) * 2^-9 of their spread; four times that is allowed.
    """
    allowed = 4 * 2**-9 * math.sqrt(12 * num_layers)
    scores: dict[str, dict[str, Any]] = {}
    results = {}
    with judge(programs) as (judge_name, judging):
        for name, process in list(programs.running.items()):
            note(f"checking {name}")
            same_weights = name == programs.models[name][0]
            with programs.guarded(name):
                worst = 0.0
                for work in works:
                    answer = process.ask("generate", prompts=work.prompts, output_len=CHECKED_TOKENS, scored=True)
                    for index in {0, len(work.prompts) - 1} if same_weights else ():
                        asked = {"prompt": work.prompts[index], "token_ids": answer["token_ids"][index]}
                        key = json.dumps(asked)
                        if key not in scores:
                            scores[key] = judging.ask("score", **asked)
                        off = how_far_off(answer["logprobs"][index], scores[key])
                        worst = off if math.isnan(off) else max(worst, off)  # in this order NaN stays
                found = f"off by {worst:.4f} of the logits' spread, allowed {allowed:.4f}, judged by {judge_name}"
                if not worst <= allowed:
                    results[name] = f"refused: {found}"
                    raise Failed(f"computes another model: {found}")
                results[name] = f"passed: {found}" if same_weights else "not checked: other weights"
    return results


def how_far_off(logprobs: Sequence[float], score: dict[str, Any]) -> float:
    """The worst of a sequence's tokens: behind the best logit, or log probability off; in units of logits' spread."""
    differences = [abs(ours - theirs) for ours, theirs in zip(logprobs, score["logprobs"], strict=True)]
    off = [*score["behind"], *differences]
    return math.nan if any(map(math.isnan, off)) else max(off) / score["std"]
