"""Pairs of views of an image, drawn in the compiled part. `sslr1.puzzles.similarity` has the same in Python, and its rules."""

import numpy as np

try:
    from sslr1 import _C
except ImportError:  # not built: the caller draws them
    _C = None


def pair(draw, sample, size, side, mean, terms, greyed, rules):
    """([(crop, flip, colour map, blur), …] of two views, whether both show something); None where it isn't built.

    draw: a NumPy generator, which is left where drawing them in Python would leave it; sample: uint8 [n, n, 3] of the image of
    `size` (height, width); side: px of a canvas; mean: the image's RGB; terms: float64 [9, 4] of colour maps; greyed: takes
    the colour out of one; rules: as in csrc/views.h.
    """
    if _C is None:
        return None
    out = np.empty((2, 18))
    image = sample.ctypes.data, len(sample), *size, side, mean
    told = _C.draw_views(draw.bit_generator.capsule, *image, terms.ctypes.data, greyed, *rules, out.ctypes.data)
    return [(tuple(v[:4]), v[4] > 0, tuple(v[6:]), v[5]) for v in out.tolist()], told
