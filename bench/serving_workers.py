"""The peers of the serving benches, one in each process: requests come in on stdin, answers go out on stdout.

{"do": "versions"}                  of its packages; after `load` also how it runs
{"do": "load", "path": "folder"}    of the checkpoint, or llama.cpp's file
{"do": "serve", "prompts": [[1, 2]], "output_len": 3, "max_batch": 8}
    greedy: each request's tokens, when each token was handed out, and seconds until all had ended
{"do": "serve_mixed", "prompts": [[1, 2]], "output_lens": [3], "max_batch": 8}
    the same for requests of several lengths, of a program with continuous batching; llama.cpp also takes `unified`
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import compare_workers
from compare_workers import Program, answer_requests, fill
from serving_slots import Slots

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
        # Of serve_mixed: only the last one is kept.
        self._mixed: tuple[tuple[int, int, bool], Any] | None = None

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

    def serve_mixed(
        self, prompts: Prompts, output_lens: Sequence[int], max_batch: int, unified: bool = False
    ) -> dict[str, Any]:
        """Continuous batching: `max_batch` slots, each of which is filled again as soon as its request has ended.

        Args:
            unified: the sequences' keys and values stand in one buffer, not in one for each.
        """
        np, lib = self.np, self.lib
        longest = max(len(prompt) + length for prompt, length in zip(prompts, output_lens, strict=True))
        context = self._mixed_context(max_batch, -(-longest // 256) * 256, unified)
        memory, batch_size = lib.llama_get_memory(context), lib.llama_n_batch(context)
        lib.llama_memory_clear(memory, False)
        batch = lib.llama_batch_init(batch_size, 0, 1)
        slots = Slots(prompts, output_lens, max_batch, batch_size)
        start = time.perf_counter()
        while tokens := slots.next_batch():
            for place, token in enumerate(tokens):
                fill(batch, place, *token)
            batch.n_tokens = len(tokens)
            status = lib.llama_decode(context, batch)
            if status:
                raise RuntimeError(f"llama_decode ended with status {status}")
            chosen: list[int] = []
            if slots.num_wanted:
                shape = (slots.num_wanted, self.vocab_size)
                chosen = np.ctypeslib.as_array(lib.llama_get_logits(context), shape).argmax(axis=1).tolist()
            else:
                lib.llama_synchronize(context)
            for sequence in slots.take(chosen, time.perf_counter() - start):
                lib.llama_memory_seq_rm(memory, sequence, -1, -1)
        seconds = time.perf_counter() - start
        lib.llama_batch_free(batch)
        return {"token_ids": slots.token_ids, "times": slots.times, "seconds": seconds}

    def _mixed_context(self, num_slots: int, seq_len: int, unified: bool) -> Any:
        key = (num_slots, seq_len, unified)
        if self._mixed is None or self._mixed[0] != key:
            if self._mixed is not None:
                self.lib.llama_free(self._mixed[1])
                self._mixed = None
            self._mixed = key, self.new_context(num_slots, seq_len, kv_unified=unified)
        return self._mixed[1]


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
        return self.serve_mixed(prompts, [output_len] * len(prompts), max_batch)

    def serve_mixed(self, prompts: Prompts, output_lens: Sequence[int], max_batch: int) -> dict[str, Any]:
        pairs = list(zip(prompts, output_lens, strict=True))
        engine = self.engine(max_batch, max(len(prompt) + length for prompt, length in pairs))
        options = {"temperature": 0.0, "ignore_eos": True, "detokenize": False}
        token_ids: list[list[int]] = [[] for _ in prompts]
        times: list[list[float]] = [[] for _ in prompts]
        start = time.perf_counter()
        for index, (prompt, length) in enumerate(pairs):
            params = self.vllm.SamplingParams(max_tokens=length, **options)
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
