"""One command for a machine with an NVIDIA GPU: builds, checks everything, then times it, within its minutes.

    python bench/gpu_report.py --out DIR                       eight minutes
    python bench/gpu_report.py --out DIR --quick --minutes 4   less of everything
    python bench/gpu_report.py --out DIR --only graphs model_8b
    python bench/gpu_report.py --out DIR --assume h200         without a GPU: checks on tiny shapes, and bounds

Every section is a process of its own with a deadline taken from what is left, so that a crash, a hang or a broken GPU
ends that section alone. What its time does not allow is left out by name. Exit status 1 if a section failed.

DIR/report.json, written anew after every section:
    bench, schema    "gpu_report", 1
    measured         whether a GPU ran this; without one nothing in the file is a measurement
    device, commit, versions, num_threads, minutes, quick, seconds
    sources          kernel -> hash of its sources (sources.py); cuda_extension -> hash of the built module's, or null
    rates            bytes_per_s, flops_per_s, launch_us, source: where they are from. Bounds take the best rates that
                     the run reached before, which can be above a copy's
    sections         name -> group, status, reason, seconds, limit_s, results
                     status: passed, failed, timed out, skipped (no time), not run (what it needs is not here)
                     results: checks [{check, subject, status, detail}], left_out [text], and what a section measured:
                       compile       kernels, compiled, seconds
                       ceilings      bytes_per_s (of a copy), read_bytes_per_s, flops_per_s, launch_us, l2_bytes
                       kernel_tests  kernels {kernel: {passed, failed, skipped, left_out, failing [{test, why}]}}
                       kernel_times  kernels: what bench_kernels.py writes; refused {kernel: why}
                       extension     all_passed, entry: for llama_fast/ops/cuda_checked.json
                       extension_times  rows [{model, op, rows, bound_us, us, share, triton_us, and at some rows bf16_us
                                     (Triton's linear) and torch_us (its int4 product)}]
                       model_1b, model_8b  ready_s (capture_s of it), first_ready_s, stats, steps [{model, kind, batch,
                                     context, variant, num_bytes, flops, bound_ms, ms, share}]; variant: null, or what
                                     else the engine ran on
                       starts        starts [{model, first, warm: {imports_s, load_s, ready_s, first_token_s, total_s}}]
    targets          [{name, wanted, reached, met}]; reached and met are null where it was not measured
DIR/report.md has the same as tables, DIR/*.png as pictures (with matplotlib), DIR/sections/*.log what sections printed.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_report_checks import nvidia_smi
from gpu_report_section import ROOT, has_gpu, read_results, results_path
from gpu_report_write import RATES, TABLE, assumed_rates, record, write_report
from sources import source_hash

_BENCH = ROOT / "bench"
_KERNELS = ("rms_norm", "rope_and_cache", "silu_mul", "linear", "int4_linear", "attention", "sample", "log_probs")
# The report's own end: the last tables and pictures.
_RESERVE_S = 8.0
_DEFAULT_MINUTES = 8.0


@dataclass(frozen=True)
class SectionPlan:
    """A section and its share of the time.

    Attributes:
        function: MODULE:FUNCTION of what it runs.
        limit_s: the most that it takes of the default minutes.
        minimum_s: below this it is not worth a start; kept free for it while earlier sections run.
        extension: how its process uses the CUDA extension: "auto", "on", or "checked" (on if its checks passed).
        runs_without_gpu: whether it has something to say there; kernels of `interpreted` ones run interpreted.
    """

    name: str
    group: str
    function: str
    limit_s: float
    minimum_s: float
    extension: str = "auto"
    runs_without_gpu: bool = False
    interpreted: bool = False


# Checks first: what is wrong is not timed. The limits together are above the default minutes: a section that needs less
# leaves the rest to those behind it.
SECTIONS = (
    SectionPlan("build", "build", "gpu_report_checks:build", 120, 10),
    SectionPlan("compile", "build", "gpu_report_compile:compile_models", 60, 10),
    SectionPlan("ceilings", "ceilings", "gpu_report_times:ceilings", 30, 8),
    SectionPlan("rows", "checks", "gpu_report_bits:rows", 40, 8, runs_without_gpu=True, interpreted=True),
    SectionPlan("extension", "checks", "gpu_report_extension:checks", 40, 8, extension="on"),
    SectionPlan("graphs", "checks", "gpu_report_engine:graphs", 50, 15, extension="checked"),
    SectionPlan("kernel_tests", "checks", "gpu_report_checks:kernel_tests", 110, 30),
    SectionPlan("roles", "checks", "gpu_report_bits:roles", 15, 6, extension="on"),
    SectionPlan("repeats", "checks", "gpu_report_bits:repeats", 20, 6),
    SectionPlan("kernel_times", "timing", "gpu_report_times:kernel_times", 70, 15, runs_without_gpu=True),
    SectionPlan("extension_times", "timing", "gpu_report_extension:times", 30, 6, extension="on"),
    SectionPlan("model_8b", "timing", "gpu_report_models:model_8b", 75, 45, "checked", runs_without_gpu=True),
    SectionPlan("model_1b", "timing", "gpu_report_models:model_1b", 45, 20, "checked", runs_without_gpu=True),
    SectionPlan("starts", "timing", "gpu_report_start:starts", 75, 45, extension="checked"),
    SectionPlan("sanitizer", "checks", "gpu_report_checks:sanitizer", 75, 20, extension="on"),
)


def allot(plan: SectionPlan, left_s: float, later: Sequence[SectionPlan], scale: float = 1.0) -> float | None:
    """Seconds that a section may take, so that later ones get their least too; None if that is below its own least.

    Args:
        left_s: until the report's end.
        scale: of all seconds: the minutes asked for over the default ones.
    """
    free = left_s - _RESERVE_S * min(1.0, scale) - scale * sum(other.minimum_s for other in later)
    seconds = min(scale * plan.limit_s, free)
    return seconds if seconds >= scale * plan.minimum_s else None


def run_section(plan: SectionPlan, seconds: float, args: argparse.Namespace, options: dict[str, Any]) -> dict[str, Any]:
    """Run a section in a process of its own, ended at its deadline; its entry of the report."""
    results_path(args.out, plan.name).unlink(missing_ok=True)
    log = args.out / "sections" / f"{plan.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(_BENCH / "gpu_report_section.py"), plan.function, "--name", plan.name]
    command += ["--out", str(args.out), "--seconds", f"{seconds:.2f}", "--options", json.dumps(options)]
    command += ["--quick"] if args.quick else []
    start = time.monotonic()
    with log.open("wb") as output:
        # A process group of its own: at the end nothing that the section started may still run.
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=_environment(plan, args),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        late = False
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            # Children too, also where the command is interrupted.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    results = read_results(args.out, plan.name)
    entry = {"group": plan.group, "seconds": time.monotonic() - start, "limit_s": seconds, "results": results}
    return {**entry, **_outcome(results, late, process.returncode, log)}


def _outcome(results: dict[str, Any], late: bool, status: int, log: Path) -> dict[str, Any]:
    """Status of a section and why."""
    failed = [check for check in results.get("checks", []) if check["status"] == "failed"]
    subjects = ", ".join(dict.fromkeys(f"{check['subject']} ({check['check']})" for check in failed))
    if late:
        return {"status": "timed out", "reason": f"ended at its deadline{'; failed: ' + subjects if failed else ''}"}
    if status != 0:
        last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""])[-1]
        return {"status": "failed", "reason": results.get("error") or f"exit status {status}: {last[:300]}"}
    if failed:
        return {"status": "failed", "reason": f"{len(failed)} checks: {subjects}"[:600]}
    if "not_here" in results:
        return {"status": "not run", "reason": results["not_here"]}
    return {"status": "passed", "reason": None}


def _environment(plan: SectionPlan, args: argparse.Namespace) -> dict[str, str]:
    extension = plan.extension
    if extension == "checked":
        extension = "on" if read_results(args.out, "extension").get("all_passed") else "off"
    path = [str(_BENCH), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "LLAMA_FAST_CUDA_EXTENSION": extension}
    environment.pop("TRITON_INTERPRET", None)
    if plan.interpreted and not args.gpu:
        environment["TRITON_INTERPRET"] = "1"
    return environment


def run(args: argparse.Namespace, plans: Sequence[SectionPlan]) -> int:
    """Run the sections one after the other and write the report after each; the exit status."""
    from timing import environment

    for plan in plans:  # of an earlier run into the same folder
        results_path(args.out, plan.name).unlink(missing_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    start, scale = time.monotonic(), args.minutes / _DEFAULT_MINUTES
    smi = nvidia_smi()
    rates = None if args.gpu else assumed_rates(args.assume)
    report: dict[str, Any] = {
        "bench": "gpu_report",
        "schema": 1,
        "measured": args.gpu,
        **environment((smi or {}).get("name", "a GPU") if args.gpu else None),
        "minutes": args.minutes,
        "quick": args.quick,
        "gpu": smi,
        "sources": {kernel: source_hash(kernel) for kernel in (*_KERNELS, "advance")},
        "rates": rates,
        "sections": {},
    }
    if args.commit:
        report["commit"] = args.commit
    options = {"rates": rates, "report": args.report_name, "despite_failed_tests": args.despite_failed_tests}
    for index, plan in enumerate(plans):
        left = 60 * args.minutes - (time.monotonic() - start)
        seconds = allot(plan, left, plans[index + 1 :], scale)
        nothing = {"group": plan.group, "seconds": 0.0, "limit_s": 0.0, "results": {}}
        if not args.gpu and not plan.runs_without_gpu:
            entry = {**nothing, "status": "not run", "reason": "no GPU"}
        elif seconds is None:
            entry = {**nothing, "status": "skipped", "reason": f"{max(0.0, left):.0f} s were left of the report's time"}
        else:
            print(f"{plan.name}: up to {seconds:.0f} s", flush=True)
            extra = {"interpreted": True} if plan.interpreted and not args.gpu else {}
            entry = run_section(plan, seconds, args, {**options, **extra})
        report["sections"][plan.name] = entry
        print(f"{plan.name}: {entry['status']}{'; ' if entry['reason'] else ''}{entry['reason'] or ''}", flush=True)
        report["seconds"] = time.monotonic() - start
        _after(plan, entry, report, args)
        write_report(report, args.out, pictures=index == len(plans) - 1)
    print(f"{args.out / 'report.md'} says what was found, in {report['seconds']:.0f} s")
    return int(any(entry["status"] in ("failed", "timed out") for entry in report["sections"].values()))


def _after(plan: SectionPlan, entry: dict[str, Any], report: dict[str, Any], args: argparse.Namespace) -> None:
    """What a section's results change outside of its own entry."""
    results = entry["results"]
    if "temporary" in results:  # of a process that was killed
        shutil.rmtree(results["temporary"], ignore_errors=True)
    if plan.name == "ceilings" and "bytes_per_s" in results:
        report["device"] = results["name"]
        report["rates"] = {name: results[name] for name in RATES} | {"source": "measured in this run"}
    if "entry" in results and entry["status"] == "passed":
        report["sources"]["cuda_extension"] = next(iter(results["entry"]))
        record(results["entry"], args.out / "cuda_checked.json")
        if args.record:
            record(results["entry"], args.table or TABLE)


def main(argv: Sequence[str] | None = None, sections: Sequence[SectionPlan] = SECTIONS) -> int:
    """The command.

    Args:
        sections: in the place of its own, for tests.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [plan.name for plan in sections]
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the report")
    parser.add_argument("--minutes", type=float, default=_DEFAULT_MINUTES, help="its end (default: %(default)g)")
    parser.add_argument("--only", nargs="+", choices=names, metavar="SECTION", help=f"some of {', '.join(names)}")
    parser.add_argument("--quick", action="store_true", help="a quarter of the tests, fewer shapes")
    parser.add_argument(
        "--record", action="store_true", help="if all its checks pass: allow the CUDA extension on GPUs like this one"
    )
    parser.add_argument(
        "--despite-failed-tests", action="store_true", help="time kernels whose tests failed; the report still says so"
    )
    parser.add_argument("--assume", choices=["h200", "h100"], default="h200", help="without a GPU: whose rates")
    parser.add_argument("--commit", help="to write down where the copy that runs has no .git")
    parser.add_argument("--report-name", default="", help="where the report will be, for the table of --record")
    parser.add_argument("--table", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.minutes <= 0:
        parser.error(f"--minutes {args.minutes:g}: give more than 0")
    args.out = args.out.resolve()
    args.gpu = has_gpu()
    return run(args, _chosen(sections, args.only))


def _chosen(sections: Sequence[SectionPlan], only: Sequence[str] | None) -> list[SectionPlan]:
    """The sections asked for, and those that they build on."""
    if not only:
        return list(sections)
    wanted = set(only)
    for plan in sections:
        if plan.name in only:
            wanted |= {"ceilings"} if plan.group == "timing" else set()
            wanted |= {"extension"} if plan.extension == "checked" or plan.name == "extension_times" else set()
    return [plan for plan in sections if plan.name in wanted]


if __name__ == "__main__":
    # The section that runs ends too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
