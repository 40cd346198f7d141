"""How many processors a process may use, and how its threads wait for each other."""

import gc
import math
import os
from pathlib import Path

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
COLLECTED_AT = gc.get_threshold()


def collect_rarely() -> None:
    """While modules are imported, whose objects stay, hardly ever look for garbage among them: a fifth of a start."""
    gc.set_threshold(1_000_000, *COLLECTED_AT[1:])


def collect_as_usual() -> None:
    """After `collect_rarely`: what is there by now stays, and is not gone through again."""
    if gc.get_threshold() != COLLECTED_AT:
        gc.freeze()
        gc.set_threshold(*COLLECTED_AT)


def wait_briefly() -> None:
    """Have OpenMP's threads spin for a moment and then sleep while they wait, unless the environment says how they
    wait. Before torch is imported, since OpenMP reads it once.

    By default they spin on: of a processor that others want too, a waiting thread takes what the one that it waits for
    needs. Asleep at once, they are woken late on a machine that does nothing else. A thousand rounds cost neither
    (bench/waiting.py)."""
    if not any(name in os.environ for name in WAITING):
        os.environ["GOMP_SPINCOUNT"] = "1000"


def threads(asked=0) -> int:
    """How many threads to compute with: as many as are asked for, or as OMP_NUM_THREADS says, or this rank's share."""
    return asked or _told() or share()


def share() -> int:
    """This rank's share of the processors that the processes of its machine may use."""
    ranks, own = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), _affinity(0)
    whole = own
    if "TORCHELASTIC_RUN_ID" in os.environ:  # a rank that torchrun has bound to some processors has those of its share
        whole = max(own, _affinity(os.getppid()))
    return max(1, min(own, whole // ranks, math.floor(min(quota() / ranks, own))))


def quota(groups="/proc/self/cgroup", root="/sys/fs/cgroup") -> float:
    """How many processors' time the control groups of this process grant, those around them included; infinity where
    all. Both versions: cpu.max, and cpu.cfs_quota_us over cpu.cfs_period_us."""
    grants = [math.inf]
    for line in _words(groups).splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        for top in (Path(root, controllers), Path(root, "cpu")) if controllers else (Path(root),):
            inner = top / path.strip("/")
            for folder in (inner, *inner.parents):
                if not folder.is_relative_to(top):
                    break
                if controllers:
                    found = _words(folder / "cpu.cfs_quota_us").split() + _words(folder / "cpu.cfs_period_us").split()
                else:
                    found = _words(folder / "cpu.max").split()
                if len(found) == 2 and found[0] not in ("max", "-1"):
                    grants.append(int(found[0]) / int(found[1]))
    return min(grants)


def _told():
    """What OMP_NUM_THREADS says, if the user has set it: torchrun sets it to 1 for several ranks where nobody has."""
    value = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if value == "1" and "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
        began_with = _words(f"/proc/{os.getppid()}/environ").split("\0")
        if began_with != [""] and not any(entry.startswith("OMP_NUM_THREADS=") for entry in began_with):
            return None
    return int(value) if value.isdecimal() and int(value) else None


def _affinity(process) -> int:
    try:
        return len(os.sched_getaffinity(process))
    except (AttributeError, OSError):  # not Linux, or the process is gone
        return os.cpu_count() or 1 if process == 0 else 0


def _words(path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
