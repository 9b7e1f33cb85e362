"""llama_fast as compare_cpu.py runs it: through its engine, and once more to see what the engine itself takes.

The engine is bench_generate.run_batch's, without prefix caching: repeats would be answered from the cache.
"""

import argparse
import cProfile
import io
import pstats
import time
import types
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from compare_workers import Program, Prompts, resident_bytes, score

_TORCH_BYTES = resident_bytes("VmRSS") or 0  # before llama_fast is imported, whose memory counts

import bench_generate  # noqa: E402

import llama_fast  # noqa: E402
from llama_fast import LlamaForCausalLM, demo  # noqa: E402
from llama_fast.engine.engine import Engine  # noqa: E402
from llama_fast.model.llama import LlamaLM  # noqa: E402
from llama_fast.model.loading import load_model  # noqa: E402
from llama_fast.ops import select_backend  # noqa: E402


class LlamaFast(Program):
    def __init__(self, args: argparse.Namespace) -> None:
        torch.set_num_threads(args.threads)
        self.args, self.base_bytes = args, _TORCH_BYTES
        self.judge: LlamaForCausalLM | None = None
        backend = select_backend(args.backend, torch.device("cpu"), getattr(torch, args.dtype)).__name__
        self.versions = {
            "llama_fast": llama_fast.__version__,
            "torch": torch.__version__,
            "backend": backend.rpartition(".")[2],
        }

    def load(self, demo_model: bool = False) -> int:
        """The model given, or the bundled one; how many tokens it knows."""
        folder = demo.PATH if demo_model else self.args.model
        self.model = load_model(LlamaLM, folder, dtype=self.args.dtype, device="cpu")
        return self.model.config.vocab_size

    def generate(self, prompts: Prompts, output_len: int, scored: bool = False) -> dict[str, Any]:
        run = bench_generate.run_batch(self.model, prompts, output_len, self.args.backend, scored)
        logprobs: list[list[float]] = []
        for token_ids, positions in zip(run.token_ids, run.logprobs, strict=True):
            if positions is not None:
                logprobs.append([at[token_id].logprob for at, token_id in zip(positions, token_ids, strict=True)])
        times = {"prefill_s": run.prefill_s, "step_s": run.decode_step_s}
        return {"token_ids": run.token_ids, "logprobs": logprobs, **times}

    def score(self, prompt: list[int], token_ids: list[int]) -> dict[str, Any]:
        """Through the public class, which is loaded here on the first call."""
        if self.judge is None:
            options = {"dtype": self.args.dtype, "device": "cpu", "backend": self.args.backend}
            self.judge = LlamaForCausalLM.from_pretrained(self.args.model, **options)
        with torch.no_grad():
            logits = self.judge(torch.tensor([prompt + token_ids]), logits_to_keep=len(token_ids) + 1).logits
        return score(logits[0, :-1], token_ids)

    def overhead(self, prompt: list[int], output_len: int, native: bool) -> dict[str, list[float]] | None:
        """Seconds of each decode step at batch 1 and, of them, those in the functions that do the work.

        Args:
            native: these are the compiled ones, so that the backend's Python counts as overhead; None if there are
                none. Else they are the backend's ops.
        """
        step_s: list[float] = []
        inside_s: list[float] = []
        spent = [0.0]
        ops = select_backend(self.args.backend, torch.device("cpu"), self.model.dtype)
        compiled = getattr(ops, "_C", None)
        if native and compiled is None:
            return None

        class TimedEngine(Engine):
            def __init__(self, *args: Any, **options: Any) -> None:
                super().__init__(*args, **options)
                if not native:
                    self.ops = timed(self.ops, spent)

            def step(self) -> list[Any]:
                spent[0], start = 0.0, time.perf_counter()
                samples = super().step()
                step_s.append(time.perf_counter() - start)
                inside_s.append(spent[0])
                return samples

        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(bench_generate, "Engine", TimedEngine))
            if native:
                stack.enter_context(mock.patch.object(ops, "_C", timed(compiled, spent)))
            self.generate([prompt], output_len)
        return {"step_s": step_s[1:], "inside_s": inside_s[1:]}  # without the prefill

    def profile(self, prompt: list[int], output_len: int, path: str) -> None:
        """Write cProfile's table of one run at batch 1, prefill included, by own time."""
        self.generate([prompt], output_len)
        profiler = cProfile.Profile()
        profiler.runcall(self.generate, [prompt], output_len)
        text = io.StringIO()
        pstats.Stats(profiler, stream=text).strip_dirs().sort_stats("tottime").print_stats()
        Path(path).write_text(text.getvalue(), encoding="utf-8")


def timed(module: types.ModuleType, spent: list[float]) -> types.ModuleType:
    """A copy of a module whose functions add the seconds that they take to spent[0].

    What they call of their own module is not wrapped, so that nothing counts twice.
    """

    def wrap(function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                spent[0] += time.perf_counter() - start

        return call

    copy = types.ModuleType(module.__name__)
    for name, value in vars(module).items():
        is_function = isinstance(value, types.FunctionType | types.BuiltinFunctionType)
        setattr(copy, name, wrap(value) if is_function else value)
    return copy
