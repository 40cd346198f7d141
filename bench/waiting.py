"""How OpenMP's threads should wait for each other: sixty small parallel operations, as a wider model's decode step has
them, and steps of configs/tiny.yaml (whose operations are too small to be shared out), under each policy in turn, with
and without other load.

    python bench/waiting.py [--rounds 3] [--steps 6] [--load 0 2] [--keep]

load: processes that only count, beside; --steps 0: operations alone; --keep: into bench/results.

Prints medians, of steps over all but each run's first two. Only on a machine that does nothing else does load 0 say
what a policy costs there; `sslr1.setup.processors.wait_briefly` is what the outcome decides.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import journal
from machine import machine, results_file

ROOT = Path(__file__).parent.parent
POLICIES = {
    "spinning (OpenMP's default)": {"GOMP_SPINCOUNT": "300000"},
    "spinning briefly (ours)": {"GOMP_SPINCOUNT": "1000"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
}
BUSY = "while True: pass"


def operations(seconds=2.0):
    """(seconds, CPU seconds) of every sixty operations."""
    import torch

    a, w, long = torch.randn(128, 256), torch.randn(256, 256), torch.randn(200_000)
    marks = [(time.perf_counter(), time.process_time())]
    while len(marks) < 4 or marks[-1][0] < marks[0][0] + seconds:
        for _ in range(20):
            torch.nn.functional.gelu(a @ w)
            long * 2.0
        marks.append((time.perf_counter(), time.process_time()))
    return marks[1:]


def steps(folder, count):
    """The same of each step."""
    from sslr1 import train
    from sslr1.run import Run

    marks, record = [], Run.record

    def mark(self, *arguments):
        record(self, *arguments)
        marks.append((time.perf_counter(), time.process_time()))

    Run.record = mark
    options = [f"train.steps={count}", "train.warmup.steps=0", "eval.count=4", "eval.every=1000", "log.samples=0"]
    options += ["checkpoint.every=1000", "log.tensorboard=false", f"log.dir={folder}", "log.name=waiting"]
    sys.argv = ["sslr1.train", str(ROOT / "configs" / "tiny.yaml"), *options]
    train.main()
    return marks[1:]


def measured(policy, count, builtin):
    """What a process finds that has a policy from its environment: {"operations", "steps": (seconds, CPU seconds)
    each}."""
    kept = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "builtin").symlink_to(builtin)
        line = [sys.executable, __file__, "--child", folder, "--steps", str(count)]
        done = subprocess.run(line, env=kept | policy, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.rpartition("found ")[2])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="of a run; four at least, or none")
    parser.add_argument("--load", type=int, nargs="+", default=[0, os.cpu_count()])
    parser.add_argument("--keep", action="store_true", help="in bench/results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        marks = {"operations": operations()}
        if arguments.steps:
            marks["steps"] = steps(arguments.child, arguments.steps)
        took = {what: [[b - a for a, b in zip(*two)] for two in pairwise(found)] for what, found in marks.items()}
        return print("found", json.dumps(took))
    kept = []
    print(f"{'load':>4}  {'policy':30}{'of':12}{'ms':>10}{'CPU ms':>10}{'times':>7}")
    with tempfile.TemporaryDirectory() as builtin:
        if arguments.steps:
            measured({}, 4, builtin)  # draws the scenes
        for load in arguments.load:
            busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(load)]
            try:
                found, rounds = ({name: {"operations": [], "steps": []} for name in POLICIES} for _ in range(2))
                for _ in range(arguments.rounds):
                    for name, policy in POLICIES.items():
                        for what, rows in measured(policy, arguments.steps, builtin).items():
                            found[name][what] += rows
                            rounds[name][what].append(rows)
            finally:
                for process in busy:
                    process.kill()
                    process.wait()
            for what in ("operations", "steps")[: 1 + bool(arguments.steps)]:
                for name in POLICIES:
                    rows = found[name][what]
                    wall, cpu = (1e3 * statistics.median(column) for column in zip(*rows))
                    print(f"{load:4}  {name:30}{what:12}{wall:10.1f}{cpu:10.1f}{len(rows):7}", flush=True)
                    own = [1e3 * statistics.median(row[0] for row in round_) for round_ in rounds[name][what]]
                    row = {
                        "load": load,
                        "policy": POLICIES[name],
                        "of": what,
                        "ms": wall,
                        "cpu_ms": cpu,
                        "times": len(rows),
                    }
                    kept.append(row | {"ms_of_each_round": own})
    if arguments.keep:
        journal.write(results_file("waiting", machine()), {**machine(), "rows": kept})


if __name__ == "__main__":
    main()
