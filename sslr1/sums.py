"""Sums of floats that come out the same under every Python: from 3.12 on the built-in `sum` compensates for rounding,
before it doesn't."""


def plain_sum(values) -> float:
    """Sum of floats, added from left to right; 0.0 of none."""
    found = 0.0
    for value in values:
        found += value
    return found
