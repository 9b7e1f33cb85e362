"""A pytest plugin for gpu_report.py: an even selection of tests, a line for each as it ends, and an end in time.

REPORT_LINES   file that gets one line of JSON a test: {test, outcome, seconds, why}
REPORT_EVERY   take every n-th test of each file (default 1: all). The rest of the order is spread too, so that a run
               that is cut off has tested something of everything.
REPORT_END     seconds since the epoch after which no test starts: further ones are skipped
"""

import json
import os
import time
from collections import defaultdict

import pytest

LATE = "the time is up"
# Shares no factor with usual numbers of parameters, so that every stride meets all of them.
_STRIDE = 7


def pytest_configure(config):
    # In the controller alone, where there are several processes: their reports arrive there.
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Reporter())


def pytest_collection_modifyitems(config, items):
    every = int(os.environ.get("REPORT_EVERY", "1"))
    by_file = defaultdict(list)
    for item in items:
        by_file[item.nodeid.partition("::")[0]].append(item)
    placed = []
    for tests in by_file.values():
        chosen = tests[::every]
        spread = [test for first in range(_STRIDE) for test in chosen[first::_STRIDE]]
        # A file's n-th share of its tests runs beside the n-th shares of all other files.
        placed += [((index + 0.5) / len(spread), test) for index, test in enumerate(spread)]
    kept = [test for _, test in sorted(placed, key=lambda pair: pair[0])]
    left_out = set(items) - set(kept)
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
    items[:] = kept


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if time.time() > float(os.environ.get("REPORT_END", "inf")):
        pytest.skip(LATE)


class _Reporter:
    def __init__(self):
        self.lines = open(os.environ["REPORT_LINES"], "w", encoding="utf-8")  # noqa: SIM115 - open until the end

    def pytest_collectreport(self, report):
        # A file that cannot be imported has no tests, and must not look as if all passed.
        if report.failed:
            self._write(report, 0.0, str(report.longrepr)[-300:])

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self._write(report, report.duration, "" if report.outcome == "passed" else _reason(report))

    def _write(self, report, seconds, why):
        line = {"test": report.nodeid, "outcome": report.outcome, "seconds": seconds, "why": why}
        self.lines.write(json.dumps(line) + "\n")
        self.lines.flush()

    def pytest_unconfigure(self):
        self.lines.close()


def _reason(report):
    if isinstance(report.longrepr, tuple):  # of a skip: file, line, reason
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(report.longrepr)
    return " ".join(text.split())[:300]
