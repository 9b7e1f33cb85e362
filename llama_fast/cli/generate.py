"""llama-fast generate: continue one prompt."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from llama_fast.cli.common import (
    INTERRUPTED,
    add_command,
    add_sampling,
    add_where,
    positive,
    read_text,
    sampling_params,
    where,
)
from llama_fast.errors import GenerationInterrupted, LlamaFastError

if TYPE_CHECKING:
    from llama_fast.engine.llm import LLM
    from llama_fast.engine.outputs import FinishReason, RequestOutput
    from llama_fast.engine.sampling import SamplingParams

_EXAMPLES = """examples:
  llama-fast generate "Once upon a time"                a story from the bundled demo model
  llama-fast generate "The little dog" --temperature 0.8 --top-p 0.95 --seed 7 --max-tokens 100
  llama-fast generate --model ./Llama-3.2-1B --file prompt.txt --stop $'\\n\\n'
  echo "The capital of France is" | llama-fast generate --model ./Llama-3.2-1B --quiet
  llama-fast generate "Once upon a time" -n 3 --temperature 1 --json | jq -r '.outputs[].text'"""


def add(commands: Any) -> None:
    """Add the subcommand to the parser."""
    command = add_command(
        commands,
        "generate [PROMPT] [options]",
        "Continue a prompt. Text is printed as it becomes final; a last line on stderr tells tokens and times.\n"
        "A line break at the end of a prompt from a file or stdin is dropped.",
        _EXAMPLES,
    )
    command.set_defaults(run=run)
    add_where(command)
    command.add_argument("prompt", nargs="?", metavar="PROMPT", help="text; - or none: read stdin")
    command.add_argument("--file", help="file with the prompt; - is stdin")
    command.add_argument("--model", help="checkpoint folder or hub id owner/name (default: the bundled demo model)")
    command.add_argument("--max-seq-len", type=positive, metavar="N", help="most tokens of prompt and answer together")
    command.add_argument("--no-echo", action="store_true", help="print the continuation without its prompt")
    group = add_sampling(command)
    group.add_argument("-n", "--num-samples", dest="n", type=int, default=1, metavar="N", help="how many continuations")
    group.add_argument("--logprobs", type=int, metavar="N", help="with --json: log probabilities, also of the N best")


def run(args: argparse.Namespace) -> int:
    """Print the continuation."""
    given = (args.prompt is not None) + (args.file is not None)
    if given == 2 or (given == 0 and (sys.stdin is None or sys.stdin.isatty())):
        args.usage_error("give one prompt: as PROMPT, in --file FILE, or on stdin")
    if args.logprobs is not None and not args.json:
        args.usage_error("--logprobs is shown in JSON only; add --json")
    args.seed = secrets.randbits(32) if args.seed is None else args.seed
    params = sampling_params(args)
    if args.prompt in (None, "-"):
        prompt = read_text(args.file or "-").removesuffix("\n").removesuffix("\r")
    else:
        prompt = read_text("PROMPT", os.fsencode(args.prompt))

    from llama_fast.engine.llm import LLM

    if args.model is None:
        from llama_fast.demo import PATH

        args.model = str(PATH)
    llm = LLM(args.model, max_batch=params.n, max_seq_len=args.max_seq_len, **where(args))
    if args.json or params.n > 1:
        output, interrupted = _all_samples(llm, prompt, params)
        _print_output(args, output)
    else:
        output, interrupted = _stream(llm, prompt, params, echo=not args.no_echo)
    if not args.quiet:
        print(_last_line(output, args.seed, interrupted), file=sys.stderr)
    return INTERRUPTED if interrupted else 0


def _stream(llm: LLM, prompt: str, params: SamplingParams, echo: bool) -> tuple[RequestOutput, bool]:
    """Print the one continuation as it becomes final; returns it and whether Ctrl-C ended it."""
    from llama_fast.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput

    metrics = RequestMetrics(arrival=time.monotonic())
    prompt_ids = llm.tokenizer.encode(prompt)
    pieces: list[str] = []
    token_ids: list[int] = []
    finish_reason: FinishReason | None = None
    error: LlamaFastError | None = None
    head, interrupted = prompt if echo else "", False
    chunks = llm.stream(prompt, params)
    try:
        for chunk in chunks:
            metrics.first_token = metrics.first_token or time.monotonic()
            token_ids += chunk.token_ids
            finish_reason, error = chunk.finish_reason, chunk.error
            if chunk.text:
                pieces.append(chunk.text)
                text, head = head + chunk.text, ""
                print(text, end="", flush=True)  # last: Ctrl-C may strike while it waits
    except KeyboardInterrupt as interrupt:
        try:
            chunks.throw(interrupt)  # told with all that was generated, wherever Ctrl-C struck
        except GenerationInterrupted as told:
            known, interrupted = told.outputs[0].outputs[0], True  # type: ignore[index]
            head += known.text[sum(map(len, pieces)) :]
            pieces, token_ids, finish_reason = [known.text], known.token_ids, known.finish_reason
    metrics.finished = time.monotonic()
    print(head, flush=True)
    if error is not None:
        raise error
    sample = CompletionOutput(0, "".join(pieces), token_ids, None, finish_reason)
    return RequestOutput(prompt, prompt_ids, None, [sample], metrics), interrupted


def _all_samples(llm: LLM, prompt: str, params: SamplingParams) -> tuple[RequestOutput, bool]:
    """All samples, and whether Ctrl-C ended them."""
    try:
        output, interrupted = llm.generate([prompt], params, use_tqdm=False)[0], False
    except GenerationInterrupted as interrupt:
        output, interrupted = interrupt.outputs[0], True  # type: ignore[index]
    if output.error is not None:
        raise output.error
    return output, interrupted


def _print_output(args: argparse.Namespace, output: RequestOutput) -> None:
    """All samples, as JSON or one after the other."""
    if args.json:
        told = {"model": args.model, "seed": args.seed, **asdict(output), "metrics": _metrics(output)}
        print(json.dumps(told))
        return
    for sample in output.outputs:
        print(f"--- sample {sample.index + 1} of {len(output.outputs)} ({sample.finish_reason})")
        print(sample.text if args.no_echo else f"{output.prompt}{sample.text}")


def _metrics(output: RequestOutput) -> dict[str, Any]:
    """Counts and times; None for what did not happen."""
    times = output.metrics
    generated = sum(len(sample.token_ids) for sample in output.outputs)
    decoded = generated - len(output.outputs)  # the first token of each sample is the prompt's work
    seconds = (times.finished or 0.0) - (times.first_token or 0.0)
    return {
        "prompt_tokens": len(output.prompt_token_ids),
        "generated_tokens": generated,
        "time_to_first_token_s": times.time_to_first_token,
        "decode_tokens_per_s": decoded / seconds if seconds > 0 and decoded > 0 else None,
    }


def _last_line(output: RequestOutput, seed: int, interrupted: bool) -> str:
    units = ("{} prompt tokens", "{} generated", "first after {:.3f} s", "{:.1f} tokens/s")  # of _metrics, in order
    found = zip(units, _metrics(output).values(), strict=True)
    line = ", ".join(unit.format(value) for unit, value in found if value is not None)
    return f"llama-fast: {'interrupted: ' if interrupted else ''}{line}, seed {seed}"
