"""Property-based fuzzing, for as long as is asked: `python -m tests.fuzz TARGET [--minutes 10] [--seed N]`.

A target is a file here with CHECKS: pairs of a strategy and what is to hold of each input. The ordinary tests run each
target for a second or so.
"""

import time

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings


def run(checks, seconds, seed) -> int:
    """Try checks in turn on generated inputs, each once at least and then for so long. Returns how many inputs were
    tried; raises what went wrong, with the smallest input that makes it go wrong."""
    tried, end = 0, time.monotonic() + seconds
    once = settings(
        max_examples=20 if seconds < 10 else 500,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )

    def counted(check):
        def one(data):
            nonlocal tried
            tried += 1
            check(data)

        return one

    while not tried or time.monotonic() < end:
        for inputs, check in checks:
            hypothesis.seed(seed + tried)(once(given(inputs)(counted(check))))()
    return tried
