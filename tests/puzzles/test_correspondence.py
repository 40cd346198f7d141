"""Correspondence: its marks are legible at any size of canvas, and never hide each other."""

import numpy as np
import pytest
import torch

from sslr1 import ops, puzzles
from sslr1.ops.render import ATLAS, render
from sslr1.puzzles import correspondence
from sslr1.puzzles.plan import Plan


def square(side):
    return ops.PatchSpec(min_pixels=side**2, max_pixels=side**2)


@pytest.fixture(scope="module")
def made(photographs):
    """make(level, side): a decidable puzzle whose canvases have that side."""

    def make(level, side):
        for index in range(50):
            puzzle = puzzles.make(photographs[:1], "correspondence", level=level, index=[index], spec=square(side))[0]
            if puzzle.decidable:
                return puzzle
        raise AssertionError("none was decidable")

    return make


def covered(puzzle, canvas):
    """What each mark covers of a canvas, by at least half: bool [marks, side, side]."""
    sources = list(puzzle.plan._sources)
    for ints, floats in puzzle.plan.tiles:
        if ints[0] == canvas and sources[ints[5]][0] == ATLAS:
            alone = Plan()
            alone.fill(alone.canvas(*puzzle.plan.sizes[canvas]), 0, 0, *puzzle.plan.sizes[canvas])
            where = *ints[1:5], alone.source(*sources[ints[5]]), floats[:9]
            alone.tile(0, *where, bilinear=True, colour=floats[9:21], alpha=floats[21], stencil=True)
            yield (render([], alone)[0].int() - 127).abs().amax(2) > 63


@pytest.mark.parametrize(
    "level, side",
    [(1, 84), (2, 84), *((level, side) for level in (1, 2, 3, 4) for side in (112, 224)), (4, 448), (4, 1036)],
)
def test_marks_are_a_tenth_of_a_canvas_and_stand_apart(made, level, side):
    puzzle = made(level, side)
    for canvas, count in enumerate((1, correspondence.POINTS[level])):
        masks = torch.stack(list(covered(puzzle, canvas)))
        assert len(masks) == 2 * count
        for mask in masks:
            rows = mask.any(1).nonzero()
            assert rows.max() - rows.min() + 1 >= 0.1 * side - 1.5  # edges are soft
        assert masks.sum(0).max() <= 1
        rings, labels = masks[::2], masks[1::2]  # nearest to a label is its own ring
        middles = [np.argwhere(ring.numpy()).mean(0) for ring in rings]
        for number, label in enumerate(labels):
            away = [np.linalg.norm(np.argwhere(label.numpy()) - middle, axis=1).min() for middle in middles]
            assert np.argmin(away) == number and np.sort(away)[:2][-1] >= (1.2 * away[number] if count > 1 else 0)


def test_a_colour_map_s_clipping_and_gain_are_known():
    darkest, lightest, gain = correspondence._tones((0.5, 0, 0, 51, 0, 0.5, 0, 51, 0, 0, 0.5, 51))
    np.testing.assert_allclose((darkest, lightest, gain), (-102, 408, 0.5))
    darkest, lightest, gain = correspondence._tones((2, 0, 0, -51, 0, 2, 0, -51, 0, 0, 2, -51))
    np.testing.assert_allclose((darkest, lightest, gain), (25.5, 153, 1))
