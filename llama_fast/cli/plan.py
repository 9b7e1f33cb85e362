"""llama-fast plan: what a model needs in memory and what fits, before anything is loaded."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from llama_fast.cli.common import add_command, add_where, positive

if TYPE_CHECKING:
    from llama_fast.engine.plan import MemoryPlan

_EXAMPLES = """examples:
  llama-fast plan ./Llama-3.2-1B
  llama-fast plan ./Llama-3.2-1B --max-batch 8 --max-seq-len 4096 --dtype float32
  llama-fast plan ./Llama-3.2-1B --max-batch 32 --json | jq .largest_max_seq_len"""


def add(commands: Any) -> None:
    """Add the subcommand to the parser."""
    command = add_command(
        commands,
        "plan MODEL [options]",
        "Memory of a model at a batch size and length, and what fits. Only headers are read, nothing is allocated.\n"
        "Exit status 1 when it does not fit; the largest settings that do are told.",
        _EXAMPLES,
    )
    command.set_defaults(run=run)
    add_where(command)
    command.add_argument("model", metavar="MODEL", help="checkpoint folder or hub id owner/name")
    command.add_argument("--max-batch", type=positive, metavar="N", help="sequences at once (default: the engine's)")
    command.add_argument(
        "--max-seq-len", type=positive, metavar="N", help="tokens of each (default: what the model is made for)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the plan; 0 if it fits."""
    from llama_fast.engine.engine import DEFAULT_MAX_BATCH
    from llama_fast.engine.plan import MemoryPlan
    from llama_fast.hub import find_folder
    from llama_fast.model.loading import open_checkpoint
    from llama_fast.ops import select_backend

    folder = find_folder(args.model, revision=args.revision)
    checkpoint = open_checkpoint(folder, dtype=args.dtype, device=args.device, quantization=args.quantization)
    select_backend(args.backend, checkpoint.device, checkpoint.dtype)
    plan = MemoryPlan.of(checkpoint, args.max_batch or DEFAULT_MAX_BATCH, args.max_seq_len)
    print(json.dumps(_as_json(args.model, plan)) if args.json else _table(args.model, plan))
    return 0 if plan.fits else 1


def _as_json(model: str, plan: MemoryPlan) -> dict[str, Any]:
    return {
        "model": model,
        "device": str(plan.checkpoint.device),
        "dtype": _dtype(plan),
        "max_batch": plan.max_batch,
        "max_seq_len": plan.max_seq_len,
        "rows": [asdict(row) for row in plan.rows],
        "needed_bytes": plan.needed_bytes,
        "available_bytes": plan.available_bytes,
        "cache_budget_bytes": plan.cache_budget,
        "cache_bytes_per_token": plan.page_bytes // plan.page_size,
        "cache_bytes_per_page": plan.page_bytes,
        "fits": plan.fits,
        "largest_max_seq_len": plan.largest_max_seq_len,
        "largest_max_batch": plan.largest_max_batch,
    }


def _table(model: str, plan: MemoryPlan) -> str:
    where = f"{plan.checkpoint.device} in {_dtype(plan)}"
    lines = [
        f"{model} on {where}: {plan.max_batch:,} sequences of {plan.max_seq_len:,} tokens",
        "",
        f"{'':8}{'':15}{'loaded':>10}  {'stored':>10}",
    ]
    for row in plan.rows:
        stored = "" if row.stored_bytes is None else _size(row.stored_bytes)
        lines.append(f"{row.part:8}{row.name:15}{_size(row.bytes):>10}  {stored:>10}  {row.note}".rstrip())
    needs = f"{'needed':23}{_size(plan.needed_bytes):>10}"
    has = f"{'available':23}{_size(plan.available_bytes):>10}  {'':10}  of which the cache may take "
    lines += [needs, f"{has}{_size(plan.cache_budget)}", "", f"fits: {'yes' if plan.fits else 'no'}"]
    lines.append(f"largest max_seq_len with max_batch={plan.max_batch}: {_number(plan.largest_max_seq_len)}")
    lines.append(f"largest max_batch with max_seq_len={plan.max_seq_len}: {_number(plan.largest_max_batch)}")
    return "\n".join(lines)


def _dtype(plan: MemoryPlan) -> str:
    return str(plan.checkpoint.dtype).removeprefix("torch.")


def _number(count: int) -> str:
    return str(count) if count else "none fits"


def _size(count: int) -> str:
    """Bytes with a decimal unit, as disks and model cards have them."""
    if count < 1000:
        return f"{count} B"
    units = ("kB", "MB", "GB", "TB")
    power = min(len(units), (len(str(count)) - 1) // 3)
    return f"{count / 1000**power:.2f} {units[power - 1]}"
