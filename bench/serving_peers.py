"""The other programs, each in a process of its own with the same weights, asked the same requests in turn.

What is not installed is named with the command that installs it; what fails is left out, with its reason. gpt-fast is
a script without a package and is not run: transformers with a static cache and torch.compile is built alike.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from compare_process import Absent, Failed, Process
from tqdm import tqdm

OURS = "llama_fast"
INSTALL = {
    "transformers": "pip install transformers",
    "vllm": "pip install vllm",
    "llama.cpp": "pip install llama-cpp-python gguf",
}
_CHECKED_TOKENS = 4


@dataclass
class Answer:
    """What a program made of some requests.

    Attributes:
        times: of each request, when each token was handed out, in seconds since all were submitted.
        seconds: until the last of them ended.
        logprobs: if they were asked for.
        joules: where something counts them.
        num_steps: of our engine.
    """

    token_ids: list[list[int]]
    times: list[list[float]]
    seconds: float
    logprobs: list[Any] = field(default_factory=list)
    joules: float | None = None
    num_steps: int | None = None

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.token_ids))


class ServingProcess(Process):
    worker = Path(__file__).resolve().with_name("serving_workers.py")


class Peers:
    """The peers that are here and hold the model.

    Args:
        args: the bench's: `peers`, `peers_python`, `threads`, `smoke`.
        model: whose weights they get.
        folder: its checkpoint; None: a temporary one is written if a peer needs it.
        stack: ends the processes and removes the files.
    """

    def __init__(self, args: Any, model: Any, folder: Path | None, stack: ExitStack) -> None:
        self.args, self.model, self.stack = args, model, stack
        self.running: dict[str, Process] = {}
        self.versions: dict[str, dict[str, str]] = {}
        self.checks: dict[str, str] = {}
        self.left_out: dict[str, str] = {}
        self._folder, self._temporary = folder, None
        for name in args.peers:
            with self.guarded(name):
                self._start(name)

    def _start(self, name: str) -> None:
        options = ["--dtype", str(self.model.dtype).removeprefix("torch."), "--device", str(self.model.device)]
        options += ["--no-compile"] if self.args.smoke else []
        process = ServingProcess(self.args.peers_python, name, Path("-"), torch.get_num_threads(), *options)
        self.stack.callback(process.close)
        self.running[name] = process
        process.ask("versions")  # its answer says that all is imported; only then are files made
        process.ask("load", path=str(self._gguf() if name == "llama.cpp" else self._checkpoint()))
        self.versions[name] = process.ask("versions")
        tqdm.write(f"peer     {name}: {', '.join(f'{key} {value}' for key, value in self.versions[name].items())}")

    def _files(self) -> Path:
        if self._temporary is None:
            self._temporary = Path(self.stack.enter_context(tempfile.TemporaryDirectory(prefix="llama_fast_peers_")))
        return self._temporary

    def _room(self, what: str) -> None:
        needed = sum(parameter.nbytes for parameter in self.model.parameters())
        free = shutil.disk_usage(self._files()).free
        if needed > 0.9 * free:
            raise Failed(f"{what} takes {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free in {self._files()}")

    def _checkpoint(self) -> Path:
        if self._folder is None:
            self._room("a checkpoint for the peers")
            folder = self._files() / "checkpoint"
            self.model.save_pretrained(folder)
            self._folder = folder
        return self._folder

    def _gguf(self) -> Path:
        checkpoint, path = self._checkpoint(), self._files() / "bf16.gguf"
        self._room("a GGUF file")
        script = Path(__file__).resolve().with_name("gguf_file.py")
        command = [self.args.peers_python, str(script), "convert", str(checkpoint), str(path)]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode:
            reason = " ".join(made.stderr.strip().splitlines()[-1:])
            raise (Absent if reason.startswith(("ImportError", "ModuleNotFoundError")) else Failed)(reason)
        return path

    @contextmanager
    def guarded(self, name: str) -> Iterator[None]:
        """Keeps an absent or failing peer from ending the run: it is left out."""
        try:
            yield
            return
        except Absent as error:
            self.left_out[name] = f"absent: {error}; {INSTALL[name]}"
            tqdm.write(f"peer absent: {INSTALL[name]} ({name}: {error})")
        except Failed as error:
            self.left_out[name] = str(error)
            tqdm.write(f"peer left out: {name}: {error}")
        if name in self.running:
            self.running.pop(name).close()

    def serve(self, name: str, prompts: Sequence[list[int]], setting: Any) -> Answer:
        """One round of a peer."""
        sizes = {"output_len": setting.output_len, "max_batch": setting.batch_size}
        answer = Answer(**self.running[name].ask("serve", prompts=prompts, **sizes))
        if answer.num_tokens != len(prompts) * setting.output_len:
            raise Failed(f"{answer.num_tokens} tokens came instead of {len(prompts) * setting.output_len}")
        return answer

    def serve_mixed(
        self, name: str, prompts: Sequence[list[int]], output_lens: Sequence[int], max_batch: int, **options: Any
    ) -> Answer:
        """The same for requests of several lengths; options are the peer's own."""
        sizes = {"output_lens": output_lens, "max_batch": max_batch}
        answer = Answer(**self.running[name].ask("serve_mixed", prompts=prompts, **sizes, **options))
        if list(map(len, answer.token_ids)) != list(output_lens):
            raise Failed(f"{answer.num_tokens} tokens came instead of {sum(output_lens)}, or from other requests")
        return answer

    def warm_up(self, prompts: Sequence[list[int]], setting: Any, model: Any) -> None:
        """One round of each that is not timed; what it says is judged by our model."""
        for name in list(self.running):
            with self.guarded(name):
                self.judge(name, prompts[-1], self.serve(name, prompts, setting).token_ids[-1], model)

    def judge(self, name: str, prompt: list[int], token_ids: Sequence[int], model: Any) -> None:
        """Let our model say whether a peer's first tokens are as good as its own but for roundings.

        Raises:
            Failed: they are not.
        """
        behind, allowed = how_far_behind(model, prompt, list(token_ids[:_CHECKED_TOKENS])), allowed_behind(model)
        found = f"{behind:.4f} of the logits' spread behind our best token, allowed {allowed:.4f}"
        if not behind <= allowed:
            self.checks[name] = f"refused: {found}"
            raise Failed(f"computes another model: {found}")
        self.checks[name] = f"passed: at most {allowed:.4f} of the logits' spread behind our best token"


@torch.no_grad()
def how_far_behind(model: Any, prompt: list[int], token_ids: list[int]) -> float:
    """The worst of a peer's greedy tokens: its logit behind the best one, as our model sees it, in units of spread."""
    input_ids = torch.tensor([prompt + token_ids], device=model.device)
    logits = model(input_ids, logits_to_keep=len(token_ids) + 1).logits[0, :-1].float()
    chosen = logits[torch.arange(len(token_ids)), torch.tensor(token_ids)]
    return ((logits.amax(dim=-1) - chosen).max() / logits.std()).item()


def allowed_behind(model: Any) -> float:
    """Twice compare_programs.check's allowance for roundings, since here both sides round."""
    return 2 * 4 * 2**-9 * math.sqrt(12 * model.config.num_hidden_layers)
