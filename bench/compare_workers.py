"""The programs that compare_cpu.py compares, one in each process: requests come in on stdin, answers go out on stdout.

    {"do": "load"}
    {"do": "generate", "prompts": [[1, 2]], "output_len": 3, "scored": false}
        greedy: tokens, seconds of the prefill and of each step after it; their log probabilities if scored, not timed
    {"do": "fresh", "prompt": [1, 2], "output_len": 3}     instead of load: what a new process needs to start
    {"do": "score", "prompt": [1, 2], "token_ids": [3]}    in this program's dtype: how good these tokens are
    {"do": "overhead"}, {"do": "profile"}                  llama_fast only, see compare_ours.py

A peer may live in another environment: nothing is imported here but the standard library, and by each program what it
needs. llama.cpp needs no torch.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

Prompts = Sequence[Sequence[int]]


class Program:
    """What `main` calls; a program's constructor imports and its `load` reads the model."""

    args: argparse.Namespace
    base_bytes: int  # resident when what is not the program's own (torch) was imported

    def load(self) -> object:
        raise NotImplementedError

    def generate(self, prompts: Prompts, output_len: int, scored: bool = False) -> dict[str, Any]:
        raise NotImplementedError

    def weight_file(self) -> Path:
        return self.args.model / "model.safetensors"

    def fresh(self, prompt: Sequence[int], output_len: int) -> dict[str, float]:
        """Seconds to the first token from here, where all is imported, beside those of its parts; peak memory."""
        read_s = min(read_file(self.weight_file()) for _ in range(3))  # the first may wait for the disk
        reset_peak()
        start = time.perf_counter()
        self.load()
        self.generate([prompt], 1)
        first_token_s = time.perf_counter() - start
        prefill_s = statistics.median(self.generate([prompt], 1)["prefill_s"] for _ in range(3))
        self.generate([prompt], output_len)
        peak = resident_bytes("VmHWM")
        memory = {} if peak is None else {"peak_bytes": peak - self.base_bytes}
        return {"first_token_s": first_token_s, "read_s": read_s, "prefill_s": prefill_s, **memory}


class Transformers(Program):
    """Hugging Face's LlamaForCausalLM in a plain greedy loop."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch

        self.base_bytes = resident_bytes("VmRSS") or 0
        import transformers

        torch.set_num_threads(args.threads)
        transformers.utils.logging.disable_progress_bar()
        self.args, self.torch, self.model_class = args, torch, transformers.LlamaForCausalLM
        self.versions = {"transformers": transformers.__version__, "torch": torch.__version__}

    def load(self) -> None:
        dtype = getattr(self.torch, self.args.dtype)
        self.model = self.model_class.from_pretrained(self.args.model, dtype=dtype).eval()

    def generate(self, prompts: Prompts, output_len: int, scored: bool = False) -> dict[str, Any]:
        tokens, logprobs, times = [], [], []
        with self.torch.inference_mode():
            input_ids, cache = self.torch.tensor(prompts), None
            for _ in range(output_len):
                start = time.perf_counter()
                output = self.model(input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache, logits = output.past_key_values, output.logits[:, -1]
                input_ids = logits.argmax(dim=-1, keepdim=True)
                tokens.append(input_ids[:, 0].tolist())
                times.append(time.perf_counter() - start)
                if scored:
                    logprobs.append(logits.float().log_softmax(dim=-1).gather(1, input_ids)[:, 0].tolist())
        return answer(tokens, logprobs, times)

    def score(self, prompt: list[int], token_ids: list[int]) -> dict[str, Any]:
        with self.torch.inference_mode():
            logits = self.model(self.torch.tensor([prompt + token_ids]), logits_to_keep=len(token_ids) + 1).logits
        return score(logits[0, :-1], token_ids)


class LlamaCpp(Program):
    """llama.cpp through llama-cpp-python's low-level functions: batches of several sequences, as its server makes them.

    Its own defaults but for threads and sizes; the argmax is numpy's, which costs less than its greedy sampler.
    """

    gpu_layers = 0

    def __init__(self, args: argparse.Namespace) -> None:
        import llama_cpp
        import numpy as np

        self.base_bytes = resident_bytes("VmRSS") or 0
        self.args, self.lib, self.np = args, llama_cpp, np
        self.versions = {"llama-cpp-python": llama_cpp.__version__, "numpy": np.__version__}
        self.versions["built for"] = llama_cpp.llama_print_system_info().decode().strip(" |")
        self._log = llama_cpp.llama_log_callback(lambda level, text, data: None)  # llama.cpp keeps no reference to it
        llama_cpp.llama_log_set(self._log, None)
        self.contexts: dict[tuple[int, int], Any] = {}

    def weight_file(self) -> Path:
        return self.args.model

    def load(self) -> None:
        lib = self.lib
        lib.llama_backend_init()
        params = lib.llama_model_default_params()
        params.n_gpu_layers = self.gpu_layers
        self.model = lib.llama_model_load_from_file(os.fsencode(self.args.model), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {self.args.model}")
        self.vocab_size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))

    def context(self, num_sequences: int, seq_len: int) -> Any:
        """A context for that many sequences, kept for the next time, with nothing in its cache."""
        seq_len = -(-seq_len // 256) * 256  # as llama.cpp rounds it up
        lib, key = self.lib, (num_sequences, seq_len)
        if key not in self.contexts:
            # All prompts are handed over at once.
            n_batch = max(lib.llama_context_default_params().n_batch, num_sequences * seq_len)
            self.contexts[key] = self.new_context(num_sequences, seq_len, n_batch=n_batch)
        lib.llama_memory_clear(lib.llama_get_memory(self.contexts[key]), False)
        return self.contexts[key]

    def new_context(self, num_sequences: int, seq_len: int, **changes: Any) -> Any:
        """A context with llama.cpp's own parameters but for sizes, threads and `changes`."""
        lib, params = self.lib, self.lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max = num_sequences * seq_len, num_sequences
        params.n_threads = params.n_threads_batch = self.args.threads
        for name, value in changes.items():
            setattr(params, name, value)
        context = lib.llama_init_from_model(self.model, params)
        if not context:
            raise RuntimeError(f"llama.cpp makes no context for {num_sequences} sequences of {seq_len} tokens")
        return context

    def generate(self, prompts: Prompts, output_len: int, scored: bool = False) -> dict[str, Any]:
        np, lib = self.np, self.lib
        context = self.context(len(prompts), len(prompts[0]) + output_len)
        batch = lib.llama_batch_init(sum(map(len, prompts)), 0, 1)
        tokens, logprobs, times = [], [], []
        for step in range(output_len):
            start = time.perf_counter()
            if step == 0:
                place = 0
                for sequence, prompt in enumerate(prompts):
                    for position, token_id in enumerate(prompt):
                        fill(batch, place, token_id, position, sequence, position == len(prompt) - 1)
                        place += 1
                batch.n_tokens = place
            else:
                for sequence, token_id in enumerate(tokens[-1]):
                    fill(batch, sequence, token_id, len(prompts[sequence]) + step - 1, sequence, True)
                batch.n_tokens = len(prompts)
            status = lib.llama_decode(context, batch)
            if status:
                raise RuntimeError(f"llama_decode ended with status {status}")
            shape = (len(prompts), self.vocab_size)
            logits = np.ctypeslib.as_array(lib.llama_get_logits(context), shape)
            chosen = logits.argmax(axis=1)
            tokens.append(chosen.tolist())
            times.append(time.perf_counter() - start)
            if scored:
                best = logits.max(axis=1)
                logprobs.append((-np.log(np.exp(logits - best[:, None]).sum(axis=1))).tolist())
        lib.llama_batch_free(batch)
        return answer(tokens, logprobs, times)


def fill(batch: Any, place: int, token_id: int, position: int, sequence: int, wanted: bool) -> None:
    """One token of a llama_batch."""
    batch.token[place] = token_id
    batch.pos[place] = position
    batch.n_seq_id[place] = 1
    batch.seq_id[place][0] = sequence
    batch.logits[place] = wanted


def answer(tokens: list[list[int]], logprobs: list[list[float]], times: list[float]) -> dict[str, Any]:
    """Steps of the whole batch, turned to sequences."""
    by_sequence = {"token_ids": list(zip(*tokens, strict=True)), "logprobs": list(zip(*logprobs, strict=True))}
    return {**by_sequence, "prefill_s": times[0], "step_s": times[1:]}


def score(logits: Any, token_ids: list[int]) -> dict[str, Any]:
    """Of logits [tokens, vocab_size]: how far each token's is behind the best, its log probability, their spread."""
    logits = logits.float()
    chosen = logits[range(len(token_ids)), token_ids]
    logprobs = chosen - logits.logsumexp(dim=-1)
    behind = logits.amax(dim=-1) - chosen
    return {"behind": behind.tolist(), "logprobs": logprobs.tolist(), "std": logits.std().item()}


def read_file(path: Path) -> float:
    """Seconds to read a file into one buffer that stays in the processor's cache."""
    buffer = bytearray(2**18)
    start = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - start


def resident_bytes(field: str) -> int | None:
    """VmRSS (now) or VmHWM (the most since `reset_peak`) of this process; None without Linux' /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def reset_peak() -> None:
    with suppress(OSError):  # not allowed everywhere; imports may then count as the peak
        Path("/proc/self/clear_refs").write_text("5")


def answer_requests(make_program: Callable[[], Program]) -> None:
    """Answer each line of stdin until it ends; the one answer of a program that cannot be imported is "absent"."""
    # What libraries print must not get between the answers.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        program = make_program()
    except ImportError as error:
        sys.stdin.readline()
        print(json.dumps({"absent": str(error)}), file=out)
        return
    for line in sys.stdin:
        request = json.loads(line)
        do = request.pop("do")
        try:
            result = program.versions if do == "versions" else getattr(program, do)(**request)
            print(json.dumps({"answer": result}), file=out)
        # Whatever a program raises is its own failure, told to the driver, who goes on with the others.
        except Exception as error:
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", choices=("llama_fast", "llama.cpp", "transformers"))
    parser.add_argument("--model", type=Path, required=True, help="folder, or llama.cpp's file")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--backend", default="auto", help="llama_fast's")
    args = parser.parse_args()

    def make_program() -> Program:
        if args.program == "llama_fast":
            from compare_ours import LlamaFast

            return LlamaFast(args)
        return {"llama.cpp": LlamaCpp, "transformers": Transformers}[args.program](args)

    answer_requests(make_program)


if __name__ == "__main__":
    main()
