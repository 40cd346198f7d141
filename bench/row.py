"""A row of the tables: what it says before anything is measured, and its measurement, in which a failure costs no other
row.

A benchmark is a file with rows(mode), a list of Rows in the order they are measured in. mode: "cpu" and "cuda" are what
such a machine measures; "dry" are cuda's rows at small shapes on a CPU, to see that everything after them runs.
"""

import contextlib
import gc
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch

MODES = ("cpu", "cuda", "dry")


def device_of(mode) -> str:
    return "cuda" if mode == "cuda" else "cpu"


@dataclass(frozen=True, kw_only=True)
class Row:
    """what, against, goal (peer / ours): as tables have them. make: a function of nothing that sets up and returns
    `Sides`."""

    what: str
    make: Callable
    against: str = ""
    goal: str = ""


@dataclass(kw_only=True)
class Sides:
    """What is timed: functions of nothing. peer: may fail, which costs ours nothing. check(what ours returned, what the
    peer returned or None): raises where they are wrong. memory(one of them): MB that a call of it adds. facts(what ours
    returned): what the row says besides. bytes, flops: that a call of ours has to move and to compute, at least, if its
    facts don't tell. once: ours is timed at its first and only call. alone: ours is timed where the peer fails, too."""

    ours: Callable
    peer: Callable | None = None
    check: Callable = lambda mine, theirs: None
    memory: Callable | None = None
    facts: Callable = lambda mine: {}
    bytes: float = 0
    flops: float = 0
    once: bool = False
    alone: bool = True


class Overdue(Exception):
    pass


@contextlib.contextmanager
def within(seconds):
    """Raises Overdue in the block after so long, as soon as Python gets its turn; 0: never."""

    def ring(*_):
        raise Overdue(f"not done within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def finish():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def clock(run):
    """(what run returns, seconds)"""
    begin = time.perf_counter()
    out = run()
    finish()
    return out, time.perf_counter() - begin


def interleaved(runs, seconds, rounds, limit_s=0):
    """(medians of each, in seconds a call, rounds made): in turn until `seconds` have gone by, at least so many rounds,
    unless limit_s comes first."""
    times, start = [], time.perf_counter()
    try:
        with within(limit_s):
            while len(times) < rounds or time.perf_counter() - start < seconds:
                times.append([clock(run)[1] for run in runs])
    except Overdue:
        if not times:
            raise
    return [statistics.median(found) for found in zip(*times)], len(times)


def reason(problem) -> str:
    if isinstance(problem, ModuleNotFoundError):  # importlib.metadata's PackageNotFoundError is one
        return f"needs {problem.name.split('.')[0]}"
    lines = str(problem).strip().splitlines() or [""]
    return f"{type(problem).__name__}: {lines[0][:160]}".removesuffix(": ")


def told(problem) -> str:
    """Its reason; and all of it to the log, but for packages that are not there."""
    if not isinstance(problem, ModuleNotFoundError):
        traceback.print_exception(problem, file=sys.stderr)
    return reason(problem)


def measure(row, device, ceilings, *, seconds, rounds, limit_s=0) -> dict:
    """What the results file says of a row: ours_s, peer_s (medians, seconds a call), ratio (peer_s / ours_s), rounds;
    extra_mb; its facts; the share of what bounds it; `why_not` where the peer can't run or a package is not there,
    `failed` where ours did or the check found it wrong. limit_s: for each of setting up, the peer's first call, and the
    rounds; 0 for none."""
    found = {"what": row.what, "against": row.against, "goal": row.goal, "device": device}
    try:
        with within(limit_s):
            sides = row.make()
            mine, first = clock(sides.ours)
            work = {"bytes": sides.bytes, "flops": sides.flops}
            found |= sides.facts(mine)
            work |= {key: found.pop(key) for key in work if key in found}
    except ModuleNotFoundError as problem:
        return found | {"why_not": reason(problem)}
    except Exception as problem:
        return found | {"failed": told(problem)}
    runs, theirs = {"ours_s": sides.ours}, None
    if sides.peer:
        try:
            with within(limit_s):
                theirs, _ = clock(sides.peer)
            runs["peer_s"] = sides.peer
        except Exception as problem:
            found["why_not"] = told(problem)
            if not sides.alone:
                return found
    try:
        with within(limit_s):
            sides.check(mine, theirs)
            del mine, theirs
            if sides.memory:
                found["extra_mb"] = [round(sides.memory(run)) for run in runs.values()]
    except Exception as problem:
        found["failed"] = told(problem)
    try:
        medians, made = ([first], 1) if sides.once else interleaved([*runs.values()], seconds, rounds, limit_s)
    except Exception as problem:
        return found | {"failed": told(problem)}
    found |= dict(zip(runs, medians)) | {"rounds": made}
    if "peer_s" in found:
        found["ratio"] = found["peer_s"] / found["ours_s"]
    return found | shares(**work, seconds=found["ours_s"], device=device, ceilings=ceilings)


def let_go():
    """Give back what the last row left."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def shares(bytes, flops, seconds, device, ceilings) -> dict:
    """How near a call comes to what bounds it: the bytes that it has to move at the rate of a copy, its operations at
    that of a matrix product (bfloat16's, on a GPU only)."""
    out = {}
    if bytes:
        out["share_of_copy"] = bytes / seconds / 1e9 / ceilings["copy_gb_s"]
    if flops and device == "cuda":
        out["share_of_products"] = flops / seconds / 1e9 / ceilings["matrix_gflop_s"]
    return out


def rate(run, amount):
    """amount per second, in 1e9: the median of half a second's calls, the first ones left out."""
    for _ in range(2):
        run()
    (seconds,), _ = interleaved([run], 0.5, 5)
    return amount / seconds / 1e9


def ceilings_of(device) -> dict:
    """copy_gb_s of a large copy, read and write counted; matrix_gflop_s of a large product, bfloat16 on a GPU, float32
    on a CPU."""
    a = torch.randint(0, 256, (1 << 28,), dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    found = {"copy_gb_s": rate(lambda: b.copy_(a), 2 * len(a))}
    n, dtype = (8192, torch.bfloat16) if device == "cuda" else (1536, torch.float32)
    x, y = torch.randn(2, n, n, device=device).to(dtype)
    return found | {"matrix_gflop_s": rate(lambda: x @ y, 2 * n**3)}
