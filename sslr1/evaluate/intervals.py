"""Confidence intervals of accuracies and of their differences.

They hold for units that are independent: several questions about one picture are not quite, and then the truth scatters
wider than what is stated here.
"""

from math import sqrt
from statistics import NormalDist

import numpy as np

from sslr1.ops import keys

LEVEL = 0.95
RESAMPLES = 10_000


def wilson(right, n, level=LEVEL) -> tuple[float, float]:
    """(low, high) of a share of which `right` of `n` independent draws were seen (Wilson 1927, without continuity
    correction): close to its nominal level near 0 and 1 too, where p ± z·s.e. is not."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    p, weight = right / n, z * z / n
    middle = (p + weight / 2) / (1 + weight)
    half = z / (1 + weight) * sqrt(p * (1 - p) / n + weight / (4 * n))
    return (0.0 if right == 0 else middle - half), (1.0 if right == n else middle + half)


def paired_bootstrap(differences, *address, level=LEVEL, resamples=RESAMPLES) -> tuple[float, float]:
    """(low, high) of the mean of `differences`, one for each unit that two models answered: percentiles of the means of
    as many units drawn with replacement. address: integers and strings that key the draws.

    A unit's difference takes few values, so how often each is drawn, which is multinomial, is all that is drawn. Where
    all units differ by the same, the interval has no width: the data then say nothing of how wide it should be.
    """
    values, counts = np.unique(np.asarray(differences, np.float64), return_counts=True)
    n = counts.sum()
    drawn = keys.generator("bootstrap", *address).multinomial(n, counts / n, size=resamples)
    low, high = np.quantile(drawn @ values / n, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
