"""bench/bench_quantization.py runs, and what it tells of calibration is better than plain rounding on real text."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "bench_quantization.py"


def run(*arguments, status=0):
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stderr
    return done


def test_smoke():
    lines = run("--smoke").stdout.splitlines()
    result = json.loads(lines[-1])
    (row,) = result["rows"]
    assert row["original"]["kl"] == 0 and row["plain"]["kl"] > 0 and row["calibrated"]["kl"] > 0
    assert {"device", "commit", "versions", "num_threads"} <= result.keys()
    assert lines[1].startswith("demo                    128")


def test_texts_are_needed():
    assert "--texts is needed" in run(status=2).stderr
