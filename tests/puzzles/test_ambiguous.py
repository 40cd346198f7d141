"""What a person can't tell apart isn't asked, and what a person can is: on cases of which that is known."""

import collections

import pytest
import torch

from sslr1 import puzzles
from sslr1.puzzles.similarity import near_copy
from tests.puzzles import cases

CELLS = [(name, level, clear) for name in cases.BUILDERS for level in (1, 2, 3, 4) for clear in (False, True)]


def passed(name, level, clear, count):
    """{kind: (decidable, all)} of the first `count` odd cases, by which no threshold was set."""
    found = collections.defaultdict(list)
    for number in range(1, 2 * count, 2):
        case = cases.case(name, level, number, clear)
        found[case.kind].append(case.passes())
    return {kind: (sum(each), len(each)) for kind, each in found.items()}


def share(found):
    return sum(passes for passes, _ in found.values()) / sum(of for _, of in found.values())


@pytest.mark.parametrize("name, level, clear", CELLS)
def test_a_sample(name, level, clear):
    found = passed(name, level, clear, 8)
    assert share(found) > 0.8 if clear else share(found) < 0.2, found


@pytest.mark.slow
@pytest.mark.parametrize("name, level, clear", CELLS)
def test_rates(name, level, clear):
    found = passed(name, level, clear, 400)
    print(f"\n{name} {level} {'clear' if clear else 'ambiguous'}: {share(found):.1%}", found)
    assert share(found) >= 0.95 if clear else share(found) <= 0.05, found


def test_near_copies_are_told_from_other_pictures(photographs, gallery):
    pictures = [puzzles.Picture(image) for image in gallery]
    rng = cases.keys.generator("copies")
    for i, image in enumerate(photographs):
        for kind in cases.COPIES:
            copy = puzzles.Picture(torch.tensor(cases.copied(rng, image.numpy(), kind)))
            assert near_copy(copy, [pictures[i]]) and near_copy(pictures[i], [copy]), kind
        assert not near_copy(pictures[i], [each for j, each in enumerate(pictures) if j != i])
