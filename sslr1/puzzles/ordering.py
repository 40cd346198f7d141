"""Ordering: numbered tiles of one image in shuffled order; which tile belongs to each place, in reading order?"""

import math

from sslr1.puzzles.plan import SAME, Plan, Puzzle, difference, thumbnail
from sslr1.puzzles.reward import Answer

LEVELS = {1: "1x2, 2x1, 2x2", 2: "1x3, 3x1, 2x3, 3x2"}
GRIDS = {1: ((1, 2), (2, 1), (2, 2)), 2: ((1, 3), (3, 1), (2, 3), (3, 2))}
START_LEVEL = 2
SHARE = 0.30
RIM = 0.03  # trimmed off each side of a tile, as a share of its visible side, so that edges don't simply continue


def build(draw, image, level, spec, pool) -> Puzzle:
    """All K! orders are equally likely. Tile sides are multiples of the spec's unit; the image is cropped (or, where its
    tiles would break the spec's bounds on canvas area, resized) to whole pitches."""
    H, W = image.shape[:2]
    rows, columns = GRIDS[level][int(draw.integers(0, len(GRIDS[level])))]
    K = rows * columns
    height, width, step = tile_size(H / rows, W / columns, spec)
    pitch_y, pitch_x = (side + 2 * round(RIM * side) for side in (height, width))
    exact = step == 1.0
    top = draw.integers(0, math.floor(H - rows * pitch_y * step) + 1)
    left = draw.integers(0, math.floor(W - columns * pitch_x * step) + 1)
    order = draw.permutation(K)  # order[i] = the place whose content is shown as tile i + 1
    plan = Plan()
    for place in order:
        row, column = divmod(int(place), columns)
        y = top + (row * pitch_y + round(RIM * height)) * step
        x = left + (column * pitch_x + round(RIM * width)) * step
        canvas = plan.canvas(height, width)
        plan.view(canvas, 0, 0, height, width, 0, (step, 0, float(x), 0, step, float(y)), exact=exact)
    bottom, right = int(top + rows * pitch_y * step), int(left + columns * pitch_x * step)
    cells = thumbnail(image[top:bottom, left:right], rows * 8, columns * 8)
    cells = cells.view(rows, 8, columns, 8, 3).transpose(1, 2).reshape(K, 8, 8, 3)
    decidable = all(difference(cells[i], cells[j]) > SAME for i in range(K) for j in range(i))
    tile_at = [0] * K
    for tile, place in enumerate(order):
        tile_at[int(place)] = tile + 1
    slots = {"rows": rows, "columns": columns, "count": K}
    return Puzzle(plan, [(slots, Answer("sequence", tuple(tile_at)))], 1 / math.factorial(K), decidable)


def tile_size(pitch_y, pitch_x, spec):
    """(height, width, step): visible tile sides in canvas px for cells of pitch_y x pitch_x image px, and image px per
    canvas px (one for both axes, 1.0 where the image need not be resized)."""

    def sides(step):
        fitted = []
        for pitch in (pitch_y / step, pitch_x / step):
            side = max(int(pitch // spec.unit), 1) * spec.unit
            while side > spec.unit and side + 2 * round(RIM * side) > pitch:
                side -= spec.unit
            fitted.append(side)
        return fitted

    def legal(step):
        h, w = sides(step)
        fits = h + 2 * round(RIM * h) <= pitch_y / step and w + 2 * round(RIM * w) <= pitch_x / step
        return fits and spec.min_pixels <= h * w <= spec.max_pixels

    tries = [1.0]
    for i in range(1, 161):  # nearest scale first, up to 32 times larger or smaller
        tries += [2 ** (-i / 32), 2 ** (i / 32)]
    for step in tries:
        if legal(step):
            return (*sides(step), step)
    raise ValueError(
        f"no tile of multiples of {spec.unit} px lies between {spec.min_pixels} and {spec.max_pixels} pixels"
    )
