"""The atlas: the glyphs and rings that plans may stamp, one picture drawn from strokes, the same on every machine.

Cells of CELL x CELL px in one row, in the order of CELLS. Of each pixel the first channel is the coverage, the second
the ink: 255 for the body, 0 for the dark outline around it, so that a mark is legible on anything. The third repeats
the second.
"""

from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch

CELL = 64
CELLS = (*"ABCDEFGH", *"123456789", "REF", "ring", "disc")

_C = [(0.95, 0.2), (0.7, 0), (0.3, 0), (0, 0.25), (0, 0.75), (0.3, 1), (0.7, 1), (0.95, 0.8)]
_E = [[(0.9, 0), (0, 0), (0, 1), (0.9, 1)], [(0, 0.48), (0.7, 0.48)]]
_F = [[(0.9, 0), (0, 0), (0, 1)], [(0, 0.48), (0.7, 0.48)]]
_SIX = [
    (0.85, 0.08),
    (0.5, 0),
    (0.15, 0.25),
    (0.02, 0.65),
    (0.2, 0.95),
    (0.5, 1),
    (0.85, 0.92),
    (0.95, 0.68),
    (0.8, 0.48),
    (0.45, 0.44),
    (0.08, 0.6),
]
_R = [[(0, 1), (0, 0), (0.6, 0), (0.9, 0.14), (0.9, 0.38), (0.6, 0.5), (0, 0.5)], [(0.45, 0.5), (0.95, 1)]]

# strokes in a unit box, x to the right, y down
_STROKES = {
    "A": [[(0, 1), (0.5, 0), (1, 1)], [(0.2, 0.62), (0.8, 0.62)]],
    "B": [
        [(0, 0.48), (0, 0), (0.6, 0), (0.88, 0.12), (0.88, 0.36), (0.6, 0.48), (0, 0.48), (0, 1), (0.65, 1)],
        [(0.65, 1), (0.95, 0.87), (0.95, 0.62), (0.6, 0.48)],
    ],
    "C": [_C],
    "D": [[(0, 0), (0, 1), (0.55, 1), (0.95, 0.72), (0.95, 0.28), (0.55, 0), (0, 0)]],
    "E": _E,
    "F": _F,
    "G": [[*_C, (0.95, 0.55), (0.55, 0.55)]],
    "H": [[(0, 0), (0, 1)], [(1, 0), (1, 1)], [(0, 0.5), (1, 0.5)]],
    "1": [[(0.2, 0.2), (0.55, 0), (0.55, 1)], [(0.2, 1), (0.9, 1)]],
    "2": [[(0.05, 0.22), (0.3, 0), (0.7, 0), (0.95, 0.25), (0.85, 0.45), (0.05, 1), (0.95, 1)]],
    "3": [
        [(0.05, 0.1), (0.35, 0), (0.7, 0), (0.9, 0.2), (0.85, 0.4), (0.45, 0.48)],
        [(0.45, 0.48), (0.88, 0.58), (0.95, 0.78), (0.7, 1), (0.3, 1), (0.05, 0.88)],
    ],
    "4": [[(0.7, 1), (0.7, 0), (0, 0.7), (0.98, 0.7)]],
    "5": [
        [(0.9, 0), (0.15, 0), (0.08, 0.45), (0.6, 0.4), (0.95, 0.6), (0.92, 0.82), (0.65, 1), (0.3, 1), (0.05, 0.88)]
    ],
    "6": [_SIX],
    "7": [[(0.05, 0), (0.95, 0), (0.4, 1)]],
    "8": [
        [(0.5, 0.47), (0.15, 0.35), (0.12, 0.15), (0.35, 0), (0.65, 0), (0.88, 0.15), (0.85, 0.35), (0.5, 0.47)],
        [(0.5, 0.47), (0.9, 0.62), (0.95, 0.82), (0.68, 1), (0.32, 1), (0.05, 0.82), (0.1, 0.62), (0.5, 0.47)],
    ],
    "9": [[(1 - x, 1 - y) for x, y in _SIX]],
}


def _glyph(strokes, left, top, width, height):
    return [[(left + x * width, top + y * height) for x, y in stroke] for stroke in strokes]


def _distance(lines):
    """Distance of every pixel centre of a cell to the nearest of the lines' segments, float64 [CELL, CELL]."""
    y, x = np.mgrid[0:CELL, 0:CELL] + 0.5
    nearest = np.full((CELL, CELL), np.inf)
    for line in lines:
        for (x0, y0), (x1, y1) in pairwise(line):
            dx, dy = x1 - x0, y1 - y0
            t = (((x - x0) * dx + (y - y0) * dy) / max(dx * dx + dy * dy, 1e-9)).clip(0, 1)
            nearest = np.minimum(nearest, np.hypot(x - x0 - t * dx, y - y0 - t * dy))
    return nearest


def _cell(name):
    if name in ("ring", "disc"):
        y, x = np.mgrid[0:CELL, 0:CELL] + 0.5 - CELL / 2
        radius = np.hypot(x, y)
        away, half = (abs(radius - 24.0), 3.0) if name == "ring" else (radius, 20.0)
    elif name == "REF":
        glyphs = [_glyph(s, left, 22, 11, 20) for s, left in ((_R, 7), (_E, 26), (_F, 46))]
        away, half = _distance([line for glyph in glyphs for line in glyph]), 2.4
    else:
        away, half = _distance(_glyph(_STROKES[name], 20, 13, 24, 38)), 3.6
    outline = 3.2
    ink = (half - away + 0.5).clip(0, 1)
    coverage = (half + outline - away + 0.5).clip(0, 1)
    return np.stack([coverage, ink, ink], -1)


@lru_cache
def atlas() -> torch.Tensor:
    """The picture, uint8 [CELL, CELL * len(CELLS), 3], on the CPU."""
    cells = np.concatenate([_cell(name) for name in CELLS], 1)
    return torch.from_numpy((255 * cells + 0.5).astype(np.uint8))
