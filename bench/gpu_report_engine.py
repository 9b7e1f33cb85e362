"""Sections of gpu_report.py about bits of whole engines: captured steps beside eager ones, prompt beside generated."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

import torch
from gpu_report_section import NotHere, Section, has_gpu
from shapes import SHAPES, build_model

from llama_fast.config import LlamaConfig
from llama_fast.engine.engine import Engine
from llama_fast.engine.request import Request
from llama_fast.engine.sampling import GenerationDefaults, SamplingParams
from llama_fast.model.llama import LlamaLM
from llama_fast.ops.int4 import Int4Linear

SHAPE_OF = {"1b": "llama-3.2-1b", "8b": "llama-3.1-8b"}
# Widths of a real model, but few layers: bits depend on widths.
_LAYERS = 3
_SEED = 0
# (prompt tokens, new tokens, sampling): beside pages and splits, of lengths that end one after the other.
_SPECS: list[tuple[int, int, dict[str, Any]]] = [
    (3, 40, {"temperature": 0.0}),
    (64, 7, {"temperature": 1.0, "seed": 5, "top_k": 40}),
    (250, 24, {"temperature": 0.0}),
    (300, 33, {"temperature": 1.2, "seed": 7, "top_p": 0.9, "repetition_penalty": 1.1}),
    (65, 1, {"temperature": 0.0}),
    (1000, 12, {"temperature": 0.8, "seed": 9, "min_p": 0.05}),
    (511, 20, {"temperature": 0.0, "presence_penalty": 0.5}),
    (129, 28, {"temperature": 0.7, "seed": 11}),
    (17, 16, {"temperature": 0.0}),
]
_LONGEST = 1100


def config_of(name: str, **changes: Any) -> LlamaConfig:
    """Of "1b" or "8b"."""
    return LlamaConfig(**{**SHAPES[SHAPE_OF[name]], **changes}, dtype="bfloat16")


def empty_model(name: str) -> LlamaLM:
    """Shapes without memory, for bounds."""
    with torch.device("meta"):
        return LlamaLM(config_of(name)).to(torch.bfloat16)


def random_model(name: str, **changes: Any) -> LlamaLM:
    """On the GPU, weights drawn there."""
    model: LlamaLM = build_model(config_of(name, **changes), torch.device("cuda"), torch.bfloat16, _SEED)
    return model


def quantize(model: LlamaLM, group_size: int = 128) -> LlamaLM:
    """The model, its projections replaced by random ones of 4 bits on the same device; the head stays."""
    for layer in model.model.layers:
        for owner in (layer.self_attn, layer.mlp):
            for name, linear in list(owner.named_children()):
                outs, ins = linear.weight.shape
                with torch.device("meta"):
                    part = Int4Linear(ins, outs, group_size=group_size).to(linear.weight.dtype)
                setattr(owner, name, part.to_empty(device=linear.weight.device))
                if linear.weight.device.type != "meta":
                    part.weight_packed.data.random_(-(2**31), 2**31)
                    # Integers from -8 to 7 have a spread of about 4.6; that of the weights as it was.
                    part.weight_scale.data.fill_(model.config.initializer_range / 4.6)
    model.refresh()
    return model


def make_engine(model: LlamaLM, *, graphs: bool = True, **sizes: Any) -> Engine:
    """An engine on the kernels. Without prefix caching: what is timed or compared has to run."""
    return Engine(model, backend="gpu", graphs=graphs, prefix_caching=False, **sizes)


def make_request(
    model: LlamaLM, prompt: Sequence[int], index: int, max_seq_len: int, max_tokens: int, **params: Any
) -> Request:
    """One that ends at its length alone."""
    given = SamplingParams(max_tokens=max_tokens, ignore_eos=True, **params)
    size = {"prompt_len": len(prompt), "max_seq_len": max_seq_len, "vocab_size": model.config.vocab_size}
    return Request(None, list(prompt), given.resolve(GenerationDefaults(), None, **size), None, index)


def random_prompt(model: LlamaLM, length: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(model.config.vocab_size) for _ in range(length)]


def stats_of(engine: Engine) -> dict[str, Any]:
    """Engine.stats() as JSON has it."""
    return dataclasses.asdict(engine.stats())


def make_ready(engine: Engine) -> None:
    """Warm up and capture."""
    engine.make_ready()
    torch.cuda.synchronize()


def _run(engine: Engine, order: Sequence[int]) -> dict[int, tuple[list[int], Any]]:
    """Tokens and log probabilities of each request, by its number; fp32 numbers that are compared exactly."""
    requests = []
    for index in order:
        length, max_tokens, params = _SPECS[index]
        prompt = random_prompt(engine.model, length, index)
        requests.append(make_request(engine.model, prompt, index, _LONGEST, max_tokens, logprobs=5, **params))
    for _ in engine.run(requests):
        pass
    for request in requests:
        if request.error is not None:
            raise request.error
    return {r.index: (list(r.samples[0].token_ids), r.samples[0].logprobs) for r in requests}


def _difference(ours: dict[int, Any], theirs: dict[int, Any]) -> str | None:
    """Which requests have other tokens, or only other log probabilities."""
    found = []
    for index, (tokens, logprobs) in ours.items():
        if tokens != theirs[index][0]:
            at = next(
                (i for i, pair in enumerate(zip(tokens, theirs[index][0], strict=False)) if pair[0] != pair[1]), -1
            )
            found.append(f"request {index}: token {at} differs")
        elif logprobs != theirs[index][1]:
            found.append(f"request {index}: log probabilities differ")
    return "; ".join(found) or None


def graphs(section: Section) -> None:
    """Captured steps, eager steps and each request alone: the same tokens and log probabilities, and nothing allocated.

    There are more requests than places, and they end at different times, so rows join and leave while others run.
    """
    if not has_gpu():
        raise NotHere("no GPU")
    order = list(range(len(_SPECS)))
    for name in ["8b"] if section.quick else ["8b", "1b", "1b int4"]:
        if not section.has(10, f"the engine of {name}"):
            return
        if not section.attempt("an engine runs", f"engine {name}", lambda name=name: _graphs_of(section, name, order)):
            return
        torch.cuda.empty_cache()


def _graphs_of(section: Section, name: str, order: list[int]) -> None:
    """The checks of one model."""
    subject, model = f"engine {name}", random_model(name.removesuffix(" int4"), num_hidden_layers=_LAYERS)
    if name.endswith(" int4"):
        quantize(model)
    sizes = {"max_batch": 4, "max_seq_len": _LONGEST}
    captured = make_engine(model, **sizes)
    make_ready(captured)
    before = stats_of(captured)
    # Without a captured step the comparison with eager ones would say nothing.
    section.check("steps are captured", subject, None if before.get("captured") else f"none is: {before}")
    together = _run(captured, order)
    again = _run(captured, order[::-1])
    section.results.setdefault("stats", {})[name] = after = stats_of(captured)
    section.check("one answer, another order of arrival", subject, _difference(again, together))
    section.check("nothing allocated or compiled after ready", subject, _growth(before, after))
    alone: dict[int, Any] = {}
    for index in order:
        alone |= _run(captured, [index])
    section.check("one answer, alone and in a batch", subject, _difference(alone, together))
    del captured
    eager = _run(make_engine(model, graphs=False, **sizes), order)
    section.check("one answer, graph and eager", subject, _difference(eager, together))
    _prompt_or_generated(section, model, subject)


def _growth(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """Counters that grew over a run of requests like those before, of those that a ready engine must not move."""
    watched = [name for name in after if "alloc" in name or "compil" in name]
    moved = [f"{name}: {before.get(name)} -> {after[name]}" for name in watched if before.get(name) != after[name]]
    return "; ".join(moved) or (None if watched else "Engine.stats() has no such counters")


def _prompt_or_generated(section: Section, model: LlamaLM, subject: str) -> None:
    """Whether a generated token's log probabilities are those of the same token in a prompt: found, not demanded."""
    engine = make_engine(model, max_batch=1, max_seq_len=_LONGEST)
    equal, total = 0, 0
    for length in (3, 64, 250, 511):
        prompt = random_prompt(model, length, length)
        params: dict[str, Any] = {"temperature": 0.0, "logprobs": 5}
        first = make_request(model, prompt, 0, _LONGEST, 6, **params)
        for _ in engine.run([first]):
            pass
        tokens, scored = first.samples[0].token_ids, first.samples[0].logprobs or []
        for count in range(1, len(tokens)):
            longer = make_request(model, [*prompt, *tokens[:count]], 0, _LONGEST, 1, **params)
            for _ in engine.run([longer]):
                pass
            equal += (longer.samples[0].logprobs or [None])[0] == scored[count]
            total += 1
    section.report("prompt and generated", subject, f"{equal} of {total} tokens have equal log probabilities")
