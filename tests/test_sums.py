"""Floats are added by `plain_sum`: from Python 3.12 on `sum` compensates, and would give other last bits."""

import pytest

from sslr1.report import charts
from sslr1.sums import plain_sum


def test_plain_sum_is_not_compensated():
    """A compensated sum of ten tenths is 1."""
    assert plain_sum([0.1] * 10) == 0.9999999999999999
    assert plain_sum([]) == 0.0 and plain_sum(iter((1, 2.5))) == 3.5


def test_our_modules_may_not_sum_floats():
    """What tests.conftest sees to in every test."""
    assert charts.sum([1, 2], 3) == 6
    with pytest.raises(AssertionError, match="plain_sum"):
        charts.sum(value for value in (1, 0.5))
