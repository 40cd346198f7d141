"""Counters of the loss's row kernel at the 3B model's vocabulary, by NVIDIA's profiler `ncu`, as a row: how near it
comes to the memory's rate.

python bench/counters.py --keep FILE
"""

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

import journal
from machine import machine

ROOT = Path(__file__).parent.parent
SIZE = (4096, 151_936)
KEPT = ("Duration", "Throughput", "Occupancy", "Registers", "SM Frequency", "DRAM Frequency", "Elapsed Cycles")
ROW = {
    "bench": "counters",
    "what": "row kernel by ncu: {:,} rows, V={:,}".format(*SIZE),
    "against": "",
    "goal": "",
    "device": "cuda",
}
OPTIONS = ["--clock-control", "none", "--section", "SpeedOfLight", "--section", "Occupancy", "--section", "LaunchStats"]
LAUNCH = """
import torch, loss
sides = loss.row_kernel({0}, {1}, torch.bfloat16, "cuda")
sides.ours(), sides.ours(), torch.cuda.synchronize()
"""


def measure() -> dict:
    """{counter: value and unit} of the second launch; or why there are none."""
    if not shutil.which("ncu"):
        return {"why_not": "needs ncu"}
    launch = [sys.executable, "-c", "import sys; sys.path.insert(0, 'bench')" + LAUNCH.format(*SIZE)]
    command = ["ncu", *OPTIONS, "-k", "regex:clustered", "--launch-skip", "1", "-c", "1", *launch]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout, done.stderr, sep="\n")
    found = counters(done.stdout)
    errors = [line for line in done.stdout.splitlines() if "ERROR" in line] or [f"ncu: exit status {done.returncode}"]
    return {"counters": found} if found else {"failed": errors[0][:200]}


def counters(text) -> dict:
    """Lines "name  unit  value" of ncu's sections."""
    rows = re.findall(r"^ +(\S.*?) {2,}(\S+) +([\d.,]+)\s*$", text, re.M)
    return {name: f"{value} {unit}" for name, unit, value in rows if any(word in name for word in KEPT)}


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python bench/counters.py", description=__doc__)
    parser.add_argument("--keep", type=Path, required=True)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args(arguments)
    found = measure()
    if options.dry:
        found["dry"] = "needs a GPU"
    journal.add(options.keep, process={**machine(), "mode": "dry" if options.dry else "cuda"})
    journal.add(options.keep, row={**ROW, **found})
    return int("failed" in found)


if __name__ == "__main__":
    sys.exit(main())
