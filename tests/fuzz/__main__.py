"""`python -m tests.fuzz`: malformed input until the time is up. See --help."""

import argparse
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

from tqdm import tqdm

from tests.fuzz import pool, target
from tests.fuzz.attempt import Outcome

_EXAMPLES = """\
Every input is a function of target and number, so a case can be repeated exactly. Findings are errors that are no
LlamaFastError of the expected kind, crashes, hangs, memory, unreadable messages and results that an oracle contradicts.

examples:
  python -m tests.fuzz --minutes 10                                    all targets, two worker processes
  python -m tests.fuzz --cases 100000 --target config --target index   two of them
  python -m tests.fuzz --target config --case 12345                    one case: what it is and what comes of it
  python -m tests.fuzz --target safetensors --case 7 --save bad.input

exit status: 0 nothing found, 1 findings, 130 interrupted
"""


class Count:
    """What came of one target's cases."""

    def __init__(self) -> None:
        self.accepted = 0
        self.refused: Counter[str] = Counter()
        self.findings: dict[tuple[str, str, str], dict[str, object]] = {}
        self.seconds = 0.0

    def add(self, case: int, outcome: Outcome) -> None:
        if outcome.kind == "accepted":
            self.accepted += 1
        elif outcome.kind == "refused":
            self.refused[outcome.what] += 1
        else:
            key = (outcome.kind, outcome.what, outcome.where)
            found = self.findings.setdefault(key, {**outcome._asdict(), "case": case, "count": 0})
            found["count"] += 1

    @property
    def runs(self) -> int:
        return self.accepted + self.refused.total() + sum(found["count"] for found in self.findings.values())

    def report(self) -> dict[str, object]:
        return {
            "runs": self.runs,
            "seconds": round(self.seconds, 1),
            "accepted": self.accepted,
            "refused": dict(self.refused.most_common()),
            "findings": list(self.findings.values()),
        }


def main() -> int:
    args = _arguments()
    tqdm.monitor_interval = 0  # its thread would be there at the next fork
    if args.case is not None:
        return _repeat(args.target[0], args.case, args.save)
    counts: dict[str, Count] = {}
    interrupted = False
    try:
        for name in args.target:
            counts[name] = Count()
            _run(name, args, counts[name])
    except KeyboardInterrupt:
        interrupted = True
    for name, count in counts.items():
        _print(name, count)
    if args.json:
        args.json.write_text(json.dumps({name: count.report() for name, count in counts.items()}, indent=2) + "\n")
    return 1 if any(count.findings for count in counts.values()) else 130 if interrupted else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, help="in all, shared equally by the targets (default 1)")
    parser.add_argument("--cases", type=int, help="most cases of each target")
    parser.add_argument("--target", action="append", choices=(*target.NAMES, "broken"), help="default: all but broken")
    parser.add_argument("--seed-start", type=int, default=0, help="number of the first case (default 0)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write counts and findings there")
    parser.add_argument("--case", type=int, help="repeat this case of the one target")
    parser.add_argument("--save", type=Path, metavar="FILE", help="with --case: write its input there")
    args = parser.parse_args()
    if args.case is not None and len(args.target or ()) != 1:
        parser.error("--case needs exactly one --target")
    if args.minutes is None and args.cases is None:
        args.minutes = 1.0
    args.target = args.target or list(target.NAMES)
    return args


def _run(name: str, args: argparse.Namespace, count: Count) -> None:
    loaded = target.load(name)
    cases = range(args.seed_start, args.seed_start + (1 << 40 if args.cases is None else args.cases))
    start = time.monotonic()
    end = start + args.minutes * 60 / len(args.target) if args.minutes else float("inf")
    try:
        with tqdm(total=args.cases, desc=name, unit="case", disable=None) as bar:
            for case, outcome in pool.campaign(loaded, cases, workers=args.workers, end=end):
                count.add(case, outcome)
                bar.update()
                if outcome.is_finding:
                    bar.set_postfix(findings=len(count.findings))
    finally:
        count.seconds = time.monotonic() - start


def _print(name: str, count: Count) -> None:
    refused = ", ".join(f"{number} {kind}" for kind, number in count.refused.most_common())
    rate = count.runs / max(count.seconds, 1e-9)
    print(f"{name}: {count.runs} cases, {rate:.0f}/s, {count.accepted} accepted; refused: {refused or 'none'}")
    for found in count.findings.values():
        print(f"  {found['kind']} {found['what']} at {found['where'] or '?'}, {found['count']} cases")
        print(f"    {found['detail']!r:.300}")
        print(f"    python -m tests.fuzz --target {name} --case {found['case']}")


def _repeat(name: str, case: int, save: Path | None) -> int:
    loaded = target.load(name)
    shown = loaded.show(target.make(loaded, case))
    if save is not None:
        save.write_bytes(shown)
    sys.stdout.buffer.write(shown if len(shown) < 8000 else shown[:4000] + b"\n[...]\n" + shown[-4000:])
    [(_, outcome)] = pool.campaign(loaded, range(case, case + 1))
    print(f"\n{' '.join(text for text in outcome[:3] if text)}: {outcome.detail}")
    return int(outcome.is_finding)


if __name__ == "__main__":
    sys.exit(main())
