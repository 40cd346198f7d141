"""Fuzz of `puzzles.make`: images of any shape between bounds of any width make puzzles that keep them, or it says why
none can."""

from functools import cache

import numpy as np
import torch
from hypothesis import strategies as st

from sslr1 import ops, puzzles
from sslr1.data.scenes import scene
from sslr1.errors import UserError
from sslr1.puzzles.series import check as check_bounds
from sslr1.puzzles.series import kinds


@cache
def images():
    return [torch.from_numpy(scene(i)) for i in range(16)]


def of_shape(number, height, width):
    """Scene `number`, twice as large and repeated to fill so many px."""
    image = images()[number]
    rows, columns = (np.arange(n) // 2 % side for n, side in zip((height, width), image.shape))
    return image[rows][:, columns]


def check(image, name, level, spec, composed, seed):
    """It is made, of pieces no longer than 3 to 1, and each canvas is legal."""
    made = puzzles.make([image], name, level=level, spec=spec, pool=images(), composed=composed, seed=seed)
    (canvases,) = made.render()
    for canvas in canvases:
        h, w = canvas.shape[:2]
        assert h % spec.unit == w % spec.unit == 0 and spec.min_pixels <= h * w <= spec.max_pixels, (h, w)
    assert len(canvases) == made.questions[0].count("<image>") and (not composed or len(canvases) == 1)
    assert all(max(i.shape[:2]) <= 3 * min(i.shape[:2]) for i in made.images)


def check_any(case):
    """A kind of puzzle that the bounds leave room for takes every image."""
    number, short, ratio, upright, kind, patch, fewest, more, composed, seed = case
    unit = (2 * patch) ** 2
    spec = ops.PatchSpec(patch=patch, min_pixels=fewest * unit, max_pixels=(fewest + more) * unit)
    try:
        check_bounds([kind], spec, composed)
    except UserError as error:
        assert "no square canvas" in str(error) or "a sheet of" in str(error)
        return
    sides = (short, round(short * ratio))
    check(of_shape(number, *(sides[::-1] if upright else sides)), *kind, spec, composed, seed)


CASES = st.tuples(
    st.integers(0, 15),
    st.integers(28, 700),
    st.one_of(st.floats(1, 3), st.floats(1, 60)),
    st.booleans(),
    st.sampled_from(kinds(level=[1, 2, 3, 4])),
    st.sampled_from([14, 16]),
    st.integers(1, 300),
    st.one_of(st.integers(0, 8), st.integers(0, 2000)),
    st.booleans(),
    st.integers(0, 2**31 - 1),
)
CHECKS = [(CASES, check_any)]
