"""The peers of the serving benches, one in each process: requests come in on stdin, answers go out on stdout.

{"do": "versions"}                  of its packages; after `load` also how it runs
{"do": "load", "path": "folder"}    of the checkpoint, or llama.cpp's file
{"do": "serve", "prompts": [[1, 2]], "output_len": 3, "max_batch": 8}
    greedy: each request's tokens, when each token was handed out, and seconds until all had ended
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import compare_workers
from compare_workers import Program, answer_requests

Prompts = Sequence[Sequence[int]]


class Clock:
    """In the place of transformers' streamer: notes when each step's tokens reach the host."""

    def __init__(self) -> None:
        self.steps: list[list[int]] = []
        self.times: list[float] = []
        self._is_prompt = True

    def put(self, value: Any) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        self.times.append(time.perf_counter())
        self.steps.append(value.tolist())

    def end(self) -> None:
        pass


def in_waves(prompts: Prompts, max_batch: int, wave: Any) -> dict[str, Any]:
    """Serve batch after batch: what a program without continuous batching does with more requests than fit.

    Args:
        wave: prompts -> tokens of each step, time.perf_counter() of each step.
    """
    token_ids: list[Sequence[int]] = []
    times: list[list[float]] = []
    start = time.perf_counter()
    for first in range(0, len(prompts), max_batch):
        steps, ended = wave(prompts[first : first + max_batch])
        by_request = list(zip(*steps, strict=True))
        token_ids += by_request
        times += [[one - start for one in ended]] * len(by_request)
    return {"token_ids": token_ids, "times": times, "seconds": time.perf_counter() - start}


class Transformers(Program):
    """Hugging Face's generate with a static cache; its decode step compiled, where a compiler works."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch
        import torch._dynamo
        import transformers

        torch.set_num_threads(args.threads)
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.args, self.torch, self.transformers = args, torch, transformers
        self.versions = {"transformers": transformers.__version__, "torch": torch.__version__}

    def load(self, path: str) -> None:
        torch, transformers = self.torch, self.transformers
        dtype = getattr(torch, self.args.dtype)
        self.model = transformers.LlamaForCausalLM.from_pretrained(path, dtype=dtype).to(self.args.device).eval()
        # The checkpoint's own would end some requests early, or sample.
        self.model.generation_config = transformers.GenerationConfig(pad_token_id=0)
        self._sizes = (0, 0)
        problem = self._compiler_problem()
        self.options: dict[str, Any] = {"cache_implementation": "static", "disable_compile": problem is not None}
        how = "not compiled: " + problem if problem else "torch.compile"
        if problem is None and self.args.device == "cpu":
            config = transformers.CompileConfig(mode="default")
            config._compile_all_devices = True  # generate compiles on accelerators alone unless this says otherwise
            self.options["compile_config"] = config
        self.versions["mode"] = f"generate with a static cache, {how}"

    def _compiler_problem(self) -> str | None:
        """Why torch.compile does not work here; None if it does."""
        if not self.args.compile:
            return "--no-compile"
        try:
            self.torch.compile(lambda x: x + 1)(self.torch.ones(2, device=self.args.device))
        # Anything can come out of a compiler run.
        except Exception as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return None

    def serve(self, prompts: Prompts, output_len: int, max_batch: int) -> dict[str, Any]:
        sizes = (max_batch, len(prompts[0]) + output_len)
        if sizes != self._sizes:
            # Else a second size would be compiled for sizes of all kinds, and after some further ones none at all.
            self.torch._dynamo.reset()
            self._sizes = sizes

        def wave(some: Prompts) -> tuple[list[list[int]], list[float]]:
            input_ids = self.torch.tensor(some, device=self.args.device)
            clock = Clock()
            given = {"attention_mask": self.torch.ones_like(input_ids), "max_new_tokens": output_len}
            self.model.generate(input_ids, do_sample=False, streamer=clock, **given, **self.options)
            return clock.steps, clock.times

        return in_waves(prompts, max_batch, wave)


class LlamaCpp(compare_workers.LlamaCpp):
    """llama.cpp in batches of several sequences, all of its layers on the GPU if there is one."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.gpu_layers = 0 if args.device == "cpu" else 1 << 16

    def load(self, path: str) -> None:
        self.args.model = Path(path)
        super().load()
        self.versions["mode"] = "low-level decode, greedy by numpy"

    def serve(self, prompts: Prompts, output_len: int, max_batch: int) -> dict[str, Any]:
        def wave(some: Prompts) -> tuple[list[list[int]], list[float]]:
            start = time.perf_counter()
            made = self.generate(some, output_len)
            ended = [start + made["prefill_s"]]
            for step_s in made["step_s"]:
                ended.append(ended[-1] + step_s)
            return list(zip(*made["token_ids"], strict=True)), ended

        return in_waves(prompts, max_batch, wave)


class Vllm(Program):
    """vLLM's engine with its own defaults but for sizes, prefix caching off: repeats would be answered from it."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch
        import vllm

        self.args, self.torch, self.vllm = args, torch, vllm
        self.versions = {"vllm": vllm.__version__, "torch": torch.__version__}
        self._engine: Any = None
        self._sizes = (0, 0)

    def load(self, path: str) -> None:
        self.path = path
        self.versions["mode"] = "LLMEngine, prefix caching off"

    def engine(self, max_batch: int, seq_len: int) -> Any:
        """For that many sequences of that length; made anew only when the last one is too small."""
        if self._sizes[0] != max_batch or self._sizes[1] < seq_len:
            self._engine, self._sizes = None, (max_batch, seq_len)
            options: dict[str, Any] = {"max_num_seqs": max_batch, "max_model_len": seq_len}
            if self.args.device != "cpu":
                free, total = self.torch.cuda.mem_get_info()
                options["gpu_memory_utilization"] = 0.8 * free / total  # our model is on the same GPU
            self._engine = self.vllm.LLM(
                self.path,
                dtype=self.args.dtype,
                skip_tokenizer_init=True,
                enable_prefix_caching=False,
                **options,
            ).llm_engine
        return self._engine

    def serve(self, prompts: Prompts, output_len: int, max_batch: int) -> dict[str, Any]:
        engine = self.engine(max_batch, len(prompts[0]) + output_len)
        options = {"max_tokens": output_len, "temperature": 0.0, "ignore_eos": True, "detokenize": False}
        token_ids: list[list[int]] = [[] for _ in prompts]
        times: list[list[float]] = [[] for _ in prompts]
        start = time.perf_counter()
        for index, prompt in enumerate(prompts):
            params = self.vllm.SamplingParams(**options)
            engine.add_request(str(index), {"prompt_token_ids": list(prompt)}, params)
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter() - start
            for output in outputs:
                index, so_far = int(output.request_id), list(output.outputs[0].token_ids)
                times[index] += [now] * (len(so_far) - len(token_ids[index]))
                token_ids[index] = so_far
        return {"token_ids": token_ids, "times": times, "seconds": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    programs = {"transformers": Transformers, "vllm": Vllm, "llama.cpp": LlamaCpp}
    parser.add_argument("program", choices=programs)
    parser.add_argument("--model", help="not used: `load` names the path")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    answer_requests(lambda: programs[args.program](args))


if __name__ == "__main__":
    main()
