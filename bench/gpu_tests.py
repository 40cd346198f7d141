"""A plugin of pytest for bench/gpu.py: outcomes are kept as they come, and a process whose GPU answers no more makes
way for a new one."""

import os
import sys

import journal
import pytest

ROWS, DRY = os.environ["SSLR1_BENCH_ROWS"], os.environ.get("SSLR1_BENCH_DRY")
WORKER = os.environ.get("PYTEST_XDIST_WORKER")


def pytest_collection_finish(session):
    if WORKER in (None, "gw0") and session.items:
        journal.add(ROWS, tests=[item.nodeid for item in session.items])
    for item in session.items if DRY else ():
        item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_runtest_logreport(report):
    """A test's outcome once: of its call, or of what went wrong around it."""
    if WORKER or (report.when != "call" and report.outcome == "passed"):
        return
    journal.add(
        ROWS, test=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 2), reason=reason(report)
    )


def reason(report) -> str:
    if report.outcome == "skipped":
        return report.longrepr[2]
    lines = [line[1:].strip() for line in report.longreprtext.splitlines() if line.startswith("E ")]
    return (lines or report.longreprtext.splitlines() or [""])[0][:200]


def pytest_runtest_logfinish(nodeid):
    """An illegal address ends all work of its process on the GPU; xdist starts another process for the tests that are
    left."""
    torch = sys.modules.get("torch") if WORKER else None
    if torch and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)
