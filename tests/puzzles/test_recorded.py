"""Puzzles are what they were: at recorded addresses nothing has moved, whatever runs them."""

import collections
import json

import pytest

from tests.puzzles.recorded import COUNT, KINDS, LENGTH, PARTS, RECORD, digests


def check(numbers):
    record = json.loads(RECORD.read_text())
    assert len(record) == COUNT
    moved, of = [], collections.Counter()
    for number in numbers:
        for place, (part, digest) in enumerate(zip(PARTS, digests(number))):
            if record[number][LENGTH * place :][:LENGTH] != digest:
                moved.append((number, part))
                of[(*KINDS[number % len(KINDS)], part)] += 1
    assert not moved, f"{len(moved)} of {len(PARTS) * len(numbers)} digests: {dict(of)}; first: {moved[:5]}"


def test_puzzles_are_the_recorded_ones():
    check(range(0, COUNT, 7))  # 7: every puzzle at every level


@pytest.mark.slow
def test_all_puzzles_are_the_recorded_ones():
    check(range(COUNT))
