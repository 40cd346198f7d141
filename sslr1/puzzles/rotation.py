"""Rotation: by how many degrees has this image been turned?"""

from sslr1.puzzles.plan import SAME, Plan, Puzzle, difference, thumbnail
from sslr1.puzzles.reward import Answer

LEVELS = {1: "upright and turned image together, quarter turns", 2: "one image, quarter turns"}
START_LEVEL = 2
SHARE = 0.25
ANGLES = (0, 90, 180, 270)


def build(draw, image, level, spec, pool) -> Puzzle:
    """A square crop at a keyed place, turned by a quarter turn drawn uniformly: pixels move, none is resampled unless the
    canvas has to be smaller or larger than the crop. `draw` is the puzzle's own random generator."""
    H, W = image.shape[:2]
    side = spec.square(min(H, W))
    exact = side <= min(H, W) < side + spec.unit
    crop = side if exact else min(H, W)
    top, left = (int(draw.integers(0, n - crop + 1)) for n in (H, W))
    turns = int(draw.integers(0, 4))
    plan = Plan()
    shown = ([0] if level == 1 else []) + [turns]
    for quarter in shown:
        canvas = plan.canvas(side, side)
        plan.view(canvas, 0, 0, side, side, 0, turned(quarter, side, crop / side, top, left), exact=exact)
    small = thumbnail(image[top : top + crop, left : left + crop], 16, 16)
    decidable = all(difference(small, small.rot90(k)) > SAME for k in (1, 2))
    readings = [
        ({"direction": "clockwise"}, Answer("number", 90 * turns, ANGLES)),
        ({"direction": "counter-clockwise"}, Answer("number", -90 * turns % 360, ANGLES)),
    ]
    return Puzzle(plan, readings, 1 / len(ANGLES), decidable)


def turned(quarter, side, step, top, left):
    """Inverse map of a canvas that shows a square turned clockwise by `quarter` quarter turns."""
    end = side * step
    return {
        0: (step, 0, left, 0, step, top),
        1: (0, step, left, -step, 0, top + end),
        2: (-step, 0, left + end, 0, -step, top + end),
        3: (0, -step, left + end, step, 0, top),
    }[quarter]
