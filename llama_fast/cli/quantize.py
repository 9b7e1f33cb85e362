"""llama-fast quantize: int4 weights from a float model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_fast.cli.common import add_command, positive, read_text

if TYPE_CHECKING:
    from llama_fast.engine.quantize import QuantizeReport

_EXAMPLES = """examples:
  llama-fast quantize ./Llama-3.2-1B ./Llama-3.2-1B-int4
  llama-fast quantize ./Llama-3.2-1B ./Llama-3.2-1B-int4 --calibrate text.txt
  llama-fast quantize ./Llama-3.2-1B ./small --group-size 32 --asymmetric --calibrate a.txt --held-out b.txt
  llama-fast info ./Llama-3.2-1B-int4 --verify      replays the canary that the files carry"""


def add(commands: Any) -> None:
    """Add the subcommand to the parser."""
    command = add_command(
        commands,
        "quantize MODEL OUT [options]",
        "Write a model with int4 weights.\n"
        "The files are compressed-tensors' and load in transformers and vLLM too. With --calibrate the rounding knows\n"
        "a text: better than plain rounding, and slower to make. Perplexity and the divergence (KL) from the original\n"
        "are told for plain and calibrated rounding, on text that was not calibrated with.",
        _EXAMPLES,
    )
    command.set_defaults(run=run)
    command.add_argument("model", metavar="MODEL", help="checkpoint folder or hub id owner/name, of float weights")
    command.add_argument("out", metavar="OUT", type=Path, help="new folder")
    sizes = (128, 64, 32)
    command.add_argument("--group-size", type=int, choices=sizes, default=128, help="default: %(default)s")
    command.add_argument("--asymmetric", action="store_true", help="a zero for each group as well")
    command.add_argument("--skip", action="append", metavar="NAME", help="leave projections of this name; repeatable")
    command.add_argument("--lm-head", choices=("keep", "int4"), default="keep", help="default: %(default)s")
    command.add_argument("--calibrate", metavar="TEXT_FILE", help="UTF-8 text; - is stdin")
    command.add_argument("--held-out", metavar="TEXT_FILE", help="to compare on (default: the calibration text's end)")
    command.add_argument("--tokens", type=positive, metavar="N", help="most tokens to calibrate with (default: 32768)")
    command.add_argument("--device", help="cpu, cuda or cuda:N (default: the first GPU, else the CPU)")
    command.add_argument("--backend", choices=("auto", "reference", "cpu", "gpu"), default="auto", help="default: auto")


def run(args: argparse.Namespace) -> int:
    """Quantize, write, verify; 0 if the written files compute what was written."""
    text = None if args.calibrate is None else read_text(args.calibrate)
    held_out = None if args.held_out is None else read_text(args.held_out)

    from llama_fast.engine.quantize import CALIBRATION_TOKENS, quantize
    from llama_fast.hub import find_folder
    from llama_fast.model.quantization import Int4Config

    config = Int4Config(
        args.group_size,
        symmetric=not args.asymmetric,
        skip=["lm_head", *(args.skip or [])],
        lm_head=args.lm_head,
    )
    report = quantize(
        find_folder(args.model, revision=args.revision),
        args.out,
        config,
        text=text,
        held_out=held_out,
        calibration_tokens=args.tokens or CALIBRATION_TOKENS,
        device=args.device,
        backend=args.backend,
        show_progress=False if args.quiet else None,
    )
    print(json.dumps({"model": args.model, "out": str(args.out), **report.as_json()}) if args.json else _table(report))
    return 1 if report.verified.problems else 0


def _table(report: QuantizeReport) -> str:
    lines = []
    rows = {"original": report.original, "plain": report.plain, "calibrated": report.calibrated}
    if report.original is not None:
        lines.append(f"{'held-out text':16}{'perplexity':>12}{'KL':>12}{'same top':>10}")
        for name, found in rows.items():
            if found is not None:
                lines.append(f"{name:16}{found.perplexity:12.4f}{found.kl:12.6f}{found.same_top:10.1%}")
    share = report.bytes / report.stored_bytes
    lines.append(f"{report.stored_bytes:,} bytes before, {report.bytes:,} after ({share:.0%})")
    told = "; ".join(report.verified.problems) or f"agrees, off by {report.verified.canary_deviation or 0:.3g} at most"
    lines.append(f"loaded again: canary {told}")
    return "\n".join(lines)
