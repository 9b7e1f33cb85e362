"""Section of gpu_report.py: how long a program takes from its start to its first token, with a warm cache of files.

python bench/gpu_report_start.py FOLDER     a child: loads the checkpoint, generates a token, prints times as JSON
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_STARTED = time.perf_counter()


def starts(section: Any) -> None:
    """Checkpoints of random weights are written once; the second start is the one that counts."""
    from gpu_report_section import NotHere, has_gpu

    if not has_gpu():
        raise NotHere("no GPU")
    section.results["starts"] = []
    for name, file_bytes, needed_s in (("8b", 16.1e9, 35), ("1b", 2.5e9, 12)):
        place = _place(1.1 * file_bytes)
        if place is None:
            section.not_run("warm start", name, f"no folder has {file_bytes / 1e9:.0f} GB free")
            continue
        if not section.has(needed_s, f"warm start of {name}"):
            continue
        with tempfile.TemporaryDirectory(dir=place, prefix="gpu_report_") as folder:
            # Where the section is ended at its deadline, gpu_report.py removes it.
            section.results["temporary"] = folder
            section.save()
            start = time.perf_counter()
            _write(name, Path(folder))
            written_s = time.perf_counter() - start
            # The first start compiles what Triton has not in its cache, and reads the files.
            runs = [_start(folder, section.left()) for _ in range(2)]
        problem = next((run for run in runs if isinstance(run, str)), None)
        if problem is not None:
            section.check("warm start", name, problem)
            continue
        row = {"model": name, "written_s": written_s, "first": runs[0], "warm": runs[1], "folder": place}
        section.results["starts"].append(row)
        section.save()


def _place(num_bytes: float) -> str | None:
    """A folder with so much room; memory first."""
    for folder in ("/dev/shm", tempfile.gettempdir()):
        if os.path.isdir(folder) and shutil.disk_usage(folder).free > num_bytes:
            return folder
    return None


def _write(name: str, folder: Path) -> None:
    import torch
    from gpu_report_engine import random_model

    from llama_fast.model.checkpoint import save_weights

    model = random_model(name)
    model.config.save_pretrained(folder)
    save_weights(model, folder)
    del model
    torch.cuda.empty_cache()


def _start(folder: str, seconds: float) -> dict[str, float] | str:
    """Times of one start, or what went wrong."""
    start = time.perf_counter()
    command = [sys.executable, __file__, folder]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        return f"not done after {seconds:.0f} s"
    if done.returncode:
        return " ".join(done.stderr.split())[-400:]
    times: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    # The process's end is no part of it, its start is.
    return {**times, "process_s": time.perf_counter() - start}


def main(folder: str) -> int:
    import torch
    from gpu_report_engine import make_engine, make_ready, make_request, random_prompt

    from llama_fast.model.llama import LlamaLM
    from llama_fast.model.loading import load_model

    times = {"imports_s": time.perf_counter() - _STARTED}

    def lap(name: str) -> None:
        times[name] = time.perf_counter() - _STARTED - sum(times.values())

    model = load_model(LlamaLM, Path(folder), dtype="auto", device="cuda")
    torch.cuda.synchronize()
    lap("load_s")
    engine = make_engine(model, max_batch=16, max_seq_len=4096)
    make_ready(engine)
    lap("ready_s")
    request = make_request(model, random_prompt(model, 64, 0), 0, 4096, 1, temperature=0.0)
    for _ in engine.run([request]):
        pass
    lap("first_token_s")
    print(json.dumps({**times, "total_s": time.perf_counter() - _STARTED}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
