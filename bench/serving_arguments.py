"""The arguments that bench_latency.py and bench_throughput.py have in common, and what is wrong with them."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from serving_peers import INSTALL
from serving_report import plot_problem
from shapes import SHAPES

from llama_fast import demo
from llama_fast.config import LlamaConfig
from llama_fast.errors import LlamaFastError
from llama_fast.model.loading import pick_device, pick_dtype
from llama_fast.ops import BACKENDS, select_backend


def make_parser(doc: str | None, examples: str, batch_sizes: list[int], repeats: int) -> argparse.ArgumentParser:
    """With every argument but those that say how long prompts and outputs are."""
    parser = argparse.ArgumentParser(
        description=doc, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, peers = parser.add_argument, list(INSTALL)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", type=Path, metavar="FOLDER", help="a local checkpoint (default: the demo model)")
    what.add_argument("--shape", choices=sorted(SHAPES), help="random weights of this shape, made on the device")
    what.add_argument("--smoke", action="store_true", help="shape tiny and little of it: only checks the bench")
    listed = " ".join(map(str, batch_sizes))
    add("--batch-sizes", type=int, nargs="+", default=batch_sizes, metavar="N", help=f"default: {listed}")
    add("--repeats", type=int, default=repeats, metavar="N", help="timed runs (default: %(default)s)")
    add("--dtype", default="auto", help="of weights and activations (default: the model's)")
    add("--backend", default="auto", help=f"{', '.join(BACKENDS)} (default: %(default)s)")
    add("--device", help="cpu, cuda or cuda:N (default: the first GPU, else the CPU)")
    add("--threads", type=int, metavar="N", help="of PyTorch (default: its choice)")
    add("--seed", type=int, default=0, help="of random weights and prompts (default: %(default)s)")
    add(
        "--graphs", action=argparse.BooleanOptionalAction, default=True, help="on a GPU: captured graphs (default: yes)"
    )
    add("--peers", nargs="+", metavar="NAME", help=f"of {', '.join(peers)}, or none (default: those installed)")
    add("--peers-python", default=sys.executable, metavar="PATH", help="interpreter with the peers (default: this one)")
    add("--plot", type=Path, metavar="FILE.png", help="draw the results there, with matplotlib")
    return parser


def settle(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fill in what depends on other arguments; what cannot be is an error of the parser."""
    if args.smoke:
        args.shape, args.batch_sizes, args.repeats = "tiny", [1, 3], 2
    known = list(INSTALL)
    if args.peers is None:
        args.peers = [] if args.smoke else known
    elif args.peers == ["none"]:
        args.peers = []
    for name in args.peers:
        if name not in known:
            parser.error(f"--peers {name}: give some of {', '.join(known)}, or none alone")
    at_least_one(parser, args, "repeats", "batch_sizes", "threads")
    if shutil.which(args.peers_python) is None:
        parser.error(f"--peers-python {args.peers_python}: no such program")
    if args.plot is not None:
        if args.plot.suffix != ".png":
            parser.error(f"--plot {args.plot}: give a name that ends in .png")
        if not args.plot.absolute().parent.is_dir():
            parser.error(f"--plot {args.plot}: there is no folder {args.plot.absolute().parent}")
        if problem := plot_problem():
            parser.error(f"--plot {args.plot}: {problem}")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        device, config = pick_device(args.device), model_config(args)
        select_backend(args.backend, device, pick_dtype(args.dtype, config))
    except LlamaFastError as error:
        parser.error(str(error))
    if device.type not in ("cpu", "cuda"):
        parser.error(f"--device {args.device}: give cpu, cuda or cuda:N")


def at_least_one(parser: argparse.ArgumentParser, args: argparse.Namespace, *names: str) -> None:
    for name in names:
        value = getattr(args, name)
        for one in value if isinstance(value, list) else [value]:
            if one is not None and one < 1:
                parser.error(f"--{name.replace('_', '-')} {one}: give at least 1")


def model_config(args: Any) -> LlamaConfig:
    """Of the model that will run.

    Raises:
        ConfigError: config.json is wrong.
    """
    if args.shape is not None:
        return LlamaConfig(**SHAPES[args.shape])
    return LlamaConfig.from_pretrained(args.model or demo.PATH)


def fitting(
    parser: argparse.ArgumentParser, option: str, given: Sequence[Any] | None, default: Sequence[Any], sizes: Any
) -> list[Any]:
    """Those given, all of which must fit the model's context, or those of the default that do.

    Args:
        sizes: (what one of them needs, what the model is made for) in tokens.
    """
    for one in given or ():
        needed, limit = sizes(one)
        if needed > limit:
            shown = f"{one[0]}/{one[1]}" if isinstance(one, tuple) else one
            parser.error(f"{option} {shown}: takes up to {needed} tokens and the model is made for {limit}")
    chosen = list(given) if given else [one for one in default if sizes(one)[0] <= sizes(one)[1]]
    if not chosen:
        parser.error(f"{option}: none of the default fits the model's context of {sizes(default[0])[1]} tokens")
    return chosen
