"""What int4 weights cost in quality: perplexity and divergence from the original, by plain and by calibrated rounding.

Bound    the original model's own perplexity on the same text, with a divergence of 0.
Models   folders of float weights; each is rounded in every layout, plainly and by GPTQ on the first text's beginning.
Texts    the first one's end and the others' beginnings are compared on; nothing is calibrated and compared on.
Checked  the original's divergence from itself must be 0, or nothing is told.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from timing import print_json

from llama_fast.model.calibration import calibrate
from llama_fast.model.divergence import Divergence, divergences, windows_of
from llama_fast.model.llama import LlamaLM
from llama_fast.model.loading import load_model
from llama_fast.model.quantization import Int4Config
from llama_fast.ops import select_backend
from llama_fast.tokenizer import LlamaTokenizer

_LAYOUTS = {
    "128": Int4Config(),
    "128 asymmetric": Int4Config(symmetric=False),
    "32": Int4Config(32),
    "128 with head": Int4Config(lm_head="int4"),
}
_EXAMPLES = """examples:
  python bench/bench_quantization.py --models llama_fast/demo --texts stories.txt shakespeare.txt
  python bench/bench_quantization.py --smoke"""


def compare(
    folder: Path, config: Int4Config, calibrates: list[list[int]], texts: dict[str, list[list[int]]]
) -> dict[str, dict[str, Divergence]]:
    """text -> original, plain, calibrated -> what was found."""

    def load(quantization: Int4Config | None = None) -> LlamaLM:
        return load_model(LlamaLM, folder, dtype=None, device=None, quantization=quantization)

    models = {"original": load(), "plain": load(config), "calibrated": load()}
    ops = select_backend("auto", models["plain"].device, models["plain"].dtype)
    calibrate(models["calibrated"], config.scheme(), ops, calibrates, show_progress=None)
    pairs = []
    for model in models.values():
        model.prepare(ops)
        pairs.append((model, ops))
    found = {}
    for name, windows in texts.items():
        results = divergences(pairs[0], pairs, windows)
        if results[0].kl != 0:
            raise SystemExit(f"{folder}: the original diverges from itself by {results[0].kl}; nothing is told")
        found[name] = dict(zip(models, results, strict=True))
    return found


def rows_of(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a layout and text."""
    tokenizer = LlamaTokenizer.from_pretrained(folder)
    bos = tokenizer.encode("")[:1]
    ids = {
        path.stem: tokenizer.encode(
            path.read_text(encoding="utf-8")[: args.characters], add_special_tokens=False, verbose=False
        )
        for path in args.texts
    }
    first = next(iter(ids))
    texts = {first: ids[first][-args.compared :], **{n: t[: args.compared] for n, t in ids.items() if n != first}}
    calibrates = windows_of(ids[first][: -args.compared][: args.calibrated], args.window, bos)
    windows = {name: windows_of(text, args.window, bos) for name, text in texts.items()}
    rows = []
    for layout in args.layouts:
        for text, found in compare(folder, _LAYOUTS[layout], calibrates, windows).items():
            rows.append(
                {
                    "model": folder.name,
                    "layout": layout,
                    "text": text,
                    "calibrated_tokens": sum(len(window) for window in calibrates),
                    **{name: asdict(result) for name, result in found.items()},
                }
            )
            print(_line(rows[-1]), flush=True)
    return rows


def _line(row: dict[str, Any]) -> str:
    cells = [f"{row['model']:24}{row['layout']:16}{row['text']:20}{row['original']['perplexity']:10.3f}"]
    for name in ("plain", "calibrated"):
        cells.append(f"{row[name]['perplexity']:10.3f}{row[name]['kl']:10.5f}")
    return " ".join(cells)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", type=Path, metavar="FOLDER", help="default: the demo model")
    parser.add_argument("--texts", nargs="+", type=Path, metavar="FILE", help="UTF-8; needed but for --smoke")
    parser.add_argument("--layouts", nargs="+", choices=list(_LAYOUTS), default=list(_LAYOUTS))
    parser.add_argument("--window", type=int, default=256, metavar="N", help="tokens (default: %(default)s)")
    parser.add_argument("--calibrated", type=int, default=16_384, metavar="N", help="tokens (default: %(default)s)")
    parser.add_argument("--compared", type=int, default=8_192, metavar="N", help="of a text (default: %(default)s)")
    parser.add_argument("--characters", type=int, default=400_000, metavar="N", help="read (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="this file as the text, one layout: does it run?")
    args = parser.parse_args(argv)
    if args.smoke:
        args.texts, args.layouts = [Path(__file__)], ["128"]
        args.calibrated, args.compared = 512, 256
    if not args.texts:
        parser.error("--texts is needed: what to calibrate with and to compare on")
    if args.models is None:
        from llama_fast import demo

        args.models = [Path(demo.__path__[0])]
    print(f"{'model':24}{'layout':16}{'text':20}{'original':>10} {'plain':>10}{'KL':>10} {'calibrated':>10}{'KL':>10}")
    rows = [row for folder in args.models for row in rows_of(folder, args)]
    print_json({"bench": "quantization", "window": args.window, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
