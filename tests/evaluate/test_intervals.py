"""Intervals against SciPy's, and that they cover what they say they cover."""

import numpy as np
import pytest
from scipy import stats

from sslr1.evaluate import intervals


def test_wilson_is_scipys(draw):
    for n in (1, 2, 7, 191, 6000):
        for right in {0, 1, n // 3, n - 1, n, int(draw.integers(0, n + 1))}:
            for level in (0.95, 0.8):
                theirs = stats.binomtest(right, n).proportion_ci(level, "wilson")
                assert intervals.wilson(right, n, level) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert intervals.wilson(0, 10)[0] == 0.0 and intervals.wilson(10, 10)[1] == 1.0


def test_the_bootstrap_is_scipys(draw):
    """The same distribution of means, from other draws."""
    differences = draw.choice([-1.0, 0.0, 1.0], 300, p=[0.1, 0.6, 0.3])
    ours = intervals.paired_bootstrap(differences, 1)
    theirs = stats.bootstrap((differences,), np.mean, n_resamples=9999, method="percentile", rng=draw, batch=500)
    assert ours == pytest.approx((theirs.confidence_interval.low, theirs.confidence_interval.high), abs=0.02)


def test_draws_have_an_address():
    differences = [1, 0, 0, -1, 1, 1, 0, 0.5] * 10
    assert intervals.paired_bootstrap(differences, "a", 1) == intervals.paired_bootstrap(differences[::-1], "a", 1)
    assert intervals.paired_bootstrap([0.3] * 9, 1) == pytest.approx((0.3, 0.3))
    several = {intervals.paired_bootstrap(differences, "a", k, resamples=200) for k in range(8)}
    assert len(several) > 1


def between(count, n, low, high):
    """Whether `count` of n can be of a share within [low, high]: p > 1e-6 on either side."""
    return stats.binom.cdf(count, n, low) > 1e-6 and stats.binom.sf(count - 1, n, high) > 1e-6


@pytest.mark.parametrize(
    "p, n, nominal", [(0.5, 100, 0.95), (0.25, 400, 0.95), (0.02, 150, 0.95), (0.95, 191, 0.95), (0.7, 40, 0.8)]
)
def test_wilson_covers(draw, p, n, nominal):
    """As often as it must: its coverage for this p and n can be added up exactly. And that is about what it says."""
    counts = np.arange(n + 1)
    holds = np.array([low <= p <= high for low, high in (intervals.wilson(k, n, nominal) for k in counts)])
    exact = (stats.binom.pmf(counts, n, p) * holds).sum()
    assert abs(exact - nominal) < 0.04
    seen = holds[draw.binomial(n, p, 4000)].sum()
    assert between(seen, 4000, exact, exact)


def test_the_paired_bootstrap_covers(draw, seed):
    """Two models, right together more often than by chance, compared on 200 questions: 95 % intervals hold the true
    difference in 93 to 96.5 % of the cases. (A percentile interval of n units is about as wide as one by the normal law
    with n for n - 1.)"""
    table = np.array([0.5, 0.2, 0.1, 0.2])  # both right, only ours, only theirs, none
    truth, trials, seen, wrong = 0.1, 1000, 0, 0
    for k in range(trials):
        both = draw.choice(4, 200, p=table)
        ours, theirs = np.isin(both, (0, 1)), np.isin(both, (0, 2))
        low, high = intervals.paired_bootstrap(ours.astype(float) - theirs, seed, k, resamples=1000)
        seen += low <= truth <= high
        low, high = intervals.paired_bootstrap(
            ours.astype(float) - theirs[draw.permutation(200)], seed, k, resamples=1000
        )
        wrong += low <= truth <= high
    assert between(seen, trials, 0.93, 0.965), seen
    assert wrong > seen  # unpaired, they would be too wide
