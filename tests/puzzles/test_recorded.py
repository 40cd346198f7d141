"""Puzzles are what they were: at recorded addresses nothing has moved, whatever runs them."""

import collections
import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
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


@pytest.mark.slow
def test_they_do_not_depend_on_the_processor():
    """With OpenBLAS's oldest kernels and PyTorch's plain loops, which neither fuse nor reorder what newer ones do."""
    environment = {**os.environ, "OPENBLAS_CORETYPE": "Prescott", "ATEN_CPU_CAPABILITY": "default"}
    code = "from tests.puzzles.test_recorded import check, COUNT; check(range(0, COUNT, 7))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-2000:]
