"""The equality matrix of the Triton kernels, run in Triton's interpreter on the CPU: a certificate without a GPU.

    python bench/certify_interpreted.py --out certificate.json        the demo model, half an hour on a core
    python bench/certify_interpreted.py --break                       the negative control

What it shows is that the kernels' programs sum in an order that no neighbour changes, as the engine drives them. What
it does not show is the machine code of a GPU, captured steps, or other tiles than the interpreter's: for these
`llama-fast certify` runs on the GPU itself. The interpreter needs the corrections of tests/kernels/interpreter.py; with
`exact_dot` a tl.dot has the sums of an MMA, whatever its tile.
"""

import argparse
import json
import os
import sys
from pathlib import Path

# Before Triton is imported: a kernel is interpreted for good.
os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from triton.language.semantic import TritonSemantic

from llama_fast import demo
from llama_fast.cli.certify import table
from llama_fast.engine.certificate import certificate
from llama_fast.engine.certify import Certification
from llama_fast.engine.certify_loading import load
from llama_fast.engine.certify_requests import Size
from llama_fast.files import written_whole
from tests.kernels.interpreter import exact_dot, patch_bf16, patch_fma
from tests.kernels.nested_calls import patch_nested_calls

# A launch takes milliseconds: few tokens, and a page and a split that these cross.
SIZE = Size(
    name="interpreted",
    short=(1, 3, 2),
    borders=((0, 1, 1),),
    growing=2,
    prefix=2,
    looping=1,
    text=0,
    new_tokens=4,
    most_rows=4,
    mixed=1,
    everywhere=False,
)
PAGE, SPLIT = 16, 32


def main() -> int:
    """Run the matrix; 0 if every path passed that the interpreter has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, default=Path(demo.PATH), help="checkpoint folder (default: the demo model)"
    )
    parser.add_argument("--out", type=Path, help="write the certificate there")
    parser.add_argument("--only", nargs="+", help="names of paths; the certificate is not complete then")
    parser.add_argument("--break", dest="planted", action="store_true", help="plant a fault, which must be found")
    args = parser.parse_args()
    patch_bf16()
    patch_fma()
    patch_nested_calls()
    # A quarter of the time, for what tests/kernels looks at.
    TritonSemantic.binary_op_sanitize_overflow_impl = lambda *_: None
    model, tokenizer = load(args.model, device="cpu", dtype=None)
    certification = Certification(
        model, tokenizer, backend="gpu", planted=args.planted, size=SIZE, page_size=PAGE, split_size=SPLIT
    )
    # Masked lanes hold what nobody reads.
    with exact_dot(), np.errstate(all="ignore"):
        certification.run(only=args.only)
    name = args.model.resolve().name
    print(table(name, certification))
    if args.out is not None:
        with written_whole(args.out) as path:
            path.write_text(json.dumps(certificate(certification, args.model, name), indent=1) + "\n", encoding="utf-8")
    return 0 if certification.passed else 1


if __name__ == "__main__":
    sys.exit(main())
