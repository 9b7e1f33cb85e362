"""`python -m tests.serving.batch_kills MODEL INPUT FOLDER`: `llama-fast batch`, killed and resumed; prints what it saw.

Each run is forked from this process, which has torch loaded and no threads: 20 of them take seconds.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from llama_fast import LLM, cli
from llama_fast.serving import batch  # noqa: F401, before the forks

KILLS = 20


def start(*args):
    """The command in a process of its own; returns its id."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            status = cli.main(["batch", *map(str, args), "--quiet"])
        finally:
            os._exit(status)
    return pid


def end(pid):
    """Its exit status; negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _size(path):
    return path.stat().st_size if path.exists() else 0


def main(model, source, folder):
    whole, killed = Path(folder) / "whole.jsonl", Path(folder) / "killed.jsonl"
    options = ["--model", model, "--max-batch", "4"]
    # What is loaded with the first use, too.
    LLM(model).generate("abc")
    began = time.monotonic()
    status = end(start(source, whole, *options))
    seconds = time.monotonic() - began
    expected = whole.read_bytes()
    moments = random.Random(0)
    sizes = []
    for number in range(KILLS):
        before = _size(killed)
        pid = start(source, killed, *options, "--resume")
        # Every third kill may come before anything is written, the others do not: else the runs would get nowhere.
        while number % 3 and _size(killed) <= before and time.monotonic() < began + 200:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, seconds / KILLS * 2))
        os.kill(pid, signal.SIGKILL)
        if end(pid) != -signal.SIGKILL:
            raise SystemExit("a run ended before its kill: give it more lines")
        content = killed.read_bytes() if killed.exists() else b""
        if not expected.startswith(content):
            raise SystemExit(f"behind kill {len(sizes) + 1} the output is no beginning of the whole one")
        sizes.append(len(content))
        # A kill rarely hits the middle of a write. Cutting the file there gives what it would have left.
        if len(sizes) % 2 and content:
            os.truncate(killed, max(0, len(content) - moments.randrange(500)))
    last = end(start(source, killed, *options, "--resume"))
    counts = {"statuses": [status, last], "sizes": sizes, "equal": killed.read_bytes() == expected, "seconds": seconds}
    print(json.dumps({**counts, "size": len(expected)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
