"""Rotation: by how many degrees has this image been turned?"""

import math
from functools import lru_cache

import numpy as np

from sslr1.puzzles.picture import LEAST, grain
from sslr1.puzzles.plan import Extent, Plan
from sslr1.puzzles.puzzle import Puzzle
from sslr1.puzzles.reward import Answer

LEVELS = {
    1: "upright and turned image together, quarter turns",
    2: "one image, quarter turns",
    3: "one image, steps of 45 degrees",
    4: "one image, steps of 30 degrees",
}
ALONE = (
    "{image}\nThis picture was turned {direction} by {angles} degrees. By how many?",
    "{image}\nBy how many degrees ({angles}) has this photo been rotated {direction}?",
    "Look at the picture. {image}\nSomebody rotated it {direction}. Was it by {angles} degrees?",
    "{image}\nStarting upright, this image was rotated {direction}: by {angles} degrees?",
    "An upright photo was turned {direction} and became this: {image}\nName the angle: {angles}.",
    "{image}\nWhich turn {direction} leads from the upright scene to this view: {angles} degrees?",
)
PAIR = (
    "{image}{image}\nThe second picture is the first one turned {direction} by {angles} degrees. By how many?",
    "Upright: {image} Turned: {image}\nBy how many degrees {direction}: {angles}?",
    "{image}\nThat picture was rotated {direction} and became this one:\n{image}\nBy {angles} degrees?",
    "{image}{image}\nHow far {direction} must the first image be turned to give the second: {angles} degrees?",
    "Compare the two pictures. {image}{image}\nThe second was rotated {direction} by {angles} degrees; which?",
    "{image} was rotated {direction} into {image}\nName the angle: {angles}.",
)
QUESTIONS = {1: PAIR, 2: ALONE, 3: ALONE, 4: ALONE}
STEP = {1: 90, 2: 90, 3: 45, 4: 30}
START_LEVEL = 2
POOLED = ()  # levels that show other images too
SHARE = 0.25
COARSEST = 1.25  # source px per canvas px at least where angles are resampled
# Bilinear interpolation softens by where between two pixels it falls, and that pattern's direction would tell the angle
# modulo 90. The mean of samples a third of a pixel apart along both axes cancels it and its first overtone.
OFFSETS = tuple((y / 3, x / 3) for y in (-1, 0, 1) for x in (-1, 0, 1))
GRAINS = 1.05  # of its grain, how much a texture may differ by from itself turned
ROOM = 0.96  # share of the short side that the turned square's circle takes: the rest is where it may lie


def build(rng, image, level, spec, pool) -> Puzzle:
    """A square at a keyed place, turned clockwise by an angle drawn uniformly.

    Levels 1 and 2 move pixels, and resample none unless the canvas has to be smaller or larger than the square. Levels
    3 and 4 sample every angle, 0 included, at one common scale around a keyed sub-pixel centre, from the square that
    the circle around it inscribes: no angle maps grid to grid, shows a border or is sharper than another; and the pixel
    grid leaves no pattern.
    """
    angles = tuple(range(0, 360, STEP[level]))
    turn = int(rng.integers(0, len(angles)))
    short = min(image.height, image.width)
    plan, honest = Plan(), True
    if STEP[level] == 90:
        side = spec.square(short)
        exact = side <= short < side + spec.unit
        extent = side if exact else short
        top, left = (int(rng.integers(0, n - extent + 1)) for n in (image.height, image.width))
        y, x = top + extent / 2, left + extent / 2
        for quarter in ([0] if level == 1 else []) + [turn]:
            matrix = turned(90 * quarter, side, extent / side, y, x)
            plan.view(plan.canvas(side, side), 0, matrix, exact=exact)
    else:
        extent = ROOM * short / math.sqrt(2)
        side = spec.square(extent / COARSEST)
        step = extent / side
        honest = step >= COARSEST
        radius = ROOM * short / 2
        y, x = (rng.uniform(radius, n - radius) for n in (image.height, image.width))
        canvas = plan.canvas(side, side)
        for i, (dy, dx) in enumerate(OFFSETS):  # their mean
            matrix = turned(angles[turn], side, step, y + dy, x + dx)
            plan.view(canvas, 0, matrix, alpha=1 / (i + 1))
    names = f"{', '.join(map(str, angles[:-1]))} or {angles[-1]}"
    readings = [
        ({"direction": way, "angles": names}, Answer("number", sign * angles[turn] % 360, angles, way))
        for way, sign in (("clockwise", 1), ("counter-clockwise", -1))
    ]
    decidable = honest and not _symmetric(image.means(y - extent / 2, x - extent / 2, extent, extent, 16, 16), angles)
    marks = ["1", "2"] if level == 1 else ["1"]
    return Puzzle(
        plan=plan,
        readings=readings,
        chance=1 / len(angles),
        decidable=decidable,
        marks=marks,
        sheet=[list(range(len(marks)))],
    )


def extents(level, spec, side) -> list:
    """Rows of the Extents of its canvases, of images whose sides are `side` px at most."""
    reach = side if STEP[level] == 90 else ROOM * side / math.sqrt(2) / COARSEST
    return [[Extent.square(spec.square(reach))] * (2 if level == 1 else 1)]


def turned(degrees, side, step, y, x):
    """Inverse map of a square canvas that shows the image turned clockwise around image point (y, x), `step` image px a
    canvas px. Quarter turns are exact."""
    cos, sin = ((1, 0), (0, 1), (-1, 0), (0, -1))[degrees // 90] if degrees % 90 == 0 else _cos_sin(degrees)
    c, s = cos * step, sin * step
    return c, s, x - (c + s) * side / 2, -s, c, y - (c - s) * side / 2


def _cos_sin(degrees):
    return math.cos(math.radians(degrees)), math.sin(math.radians(degrees))


def _symmetric(small, angles):
    """Whether a [16, 16, 3] picture, turned by any of the angles, is the same within its disc, but for its texture."""
    disc, turned = _turned_disc(angles)
    apart = np.abs(small.reshape(256, 3)[disc] - small.reshape(256, 3)[turned]).mean((1, 2))
    return bool((apart <= LEAST + GRAINS * grain(small)).any())


@lru_cache
def _turned_disc(angles):
    """(numbers [n] of the pixels of a 16 x 16 picture's disc, numbers [m, n] of those that come there when it is turned
    by each angle up to a half turn: turning back is as far as turning)."""
    centre = np.arange(16) - 7.5
    dy, dx = centre[:, None], centre[None, :]
    disc = np.flatnonzero(np.hypot(dy, dx) < 8)
    turned = []
    for angle in angles[1 : len(angles) // 2 + 1]:
        cos, sin = _cos_sin(angle)
        y = np.rint(7.5 - sin * dx + cos * dy).astype(int).clip(0, 15)
        x = np.rint(7.5 + cos * dx + sin * dy).astype(int).clip(0, 15)
        turned.append((16 * y + x).ravel()[disc])
    return disc, np.array(turned)
