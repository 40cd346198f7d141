"""`python -m tests.fuzz TARGET [--minutes 10] [--seed N]`"""

import argparse
import random

from tests.fuzz import config, reward, run, shape, tar

TARGETS = {"config": config, "reward": reward, "shape": shape, "tar": tar}

parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz one target.")
parser.add_argument("target", choices=TARGETS)
parser.add_argument("--minutes", type=float, default=10)
parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
arguments = parser.parse_args()
print(f"{arguments.target}, seed {arguments.seed}", flush=True)
tried = run(TARGETS[arguments.target].CHECKS, 60 * arguments.minutes, arguments.seed)
print(f"{tried:,} inputs in {arguments.minutes:g} minutes, nothing wrong")
