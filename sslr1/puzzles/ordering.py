"""Ordering: numbered tiles of one image in shuffled order; which tile belongs to each place, in reading order?"""

import math

import numpy as np

from sslr1.ops.render import IDENTITY_COLOUR
from sslr1.puzzles.colour import jitter
from sslr1.puzzles.picture import grain, halved, told_apart
from sslr1.puzzles.plan import Extent, Plan, canvas_size, largest_canvas
from sslr1.puzzles.puzzle import Puzzle
from sslr1.puzzles.reward import Answer

LEVELS = {
    1: "1x2, 2x1, 2x2",
    2: "1x3, 3x1, 2x3, 3x2",
    3: "3x3",
    4: "3x3, brightness and colour of each tile changed",
}
QUESTIONS = dict.fromkeys(
    LEVELS,
    (
        "{tiles}\nThese tiles were cut from one picture of {rows} rows and {columns} columns. For each place in "
        "reading order, give the number of its tile.",
        "{tiles}\nOne image was cut into a {rows} by {columns} grid (rows by columns) and shuffled. List the tile "
        "numbers in reading order.",
        "A picture was cut into {count} tiles.\n{tiles}\nIt had {rows} rows and {columns} columns. Which tile goes "
        "where? List tile numbers, left to right, top to bottom.",
        "{tiles}\nPut the tiles back into {rows} rows and {columns} columns. Give the tile numbers row by row.",
        "Solve the jigsaw: {rows} rows, {columns} columns.\n{tiles}\nAnswer with the tile numbers in reading order.",
        "{tiles}\nThe {count} tiles form a {rows} by {columns} picture. Name the tile of each place, from the top "
        "left to the bottom right.",
    ),
)
GRIDS = {1: ((1, 2), (2, 1), (2, 2)), 2: ((1, 3), (3, 1), (2, 3), (3, 2)), 3: ((3, 3),), 4: ((3, 3),)}
START_LEVEL = 2
POOLED = ()  # levels that show other images too
SHARE = 0.30
CELLS = 16  # a side of a tile, whose means it is told from the others by
RIM = 0.03  # trimmed off each side of a tile, as a share of its visible side, so that edges don't simply continue


def build(rng, image, level, spec, pool) -> Puzzle:
    """All K! orders are equally likely. Tile sides are multiples of the spec's unit; the image is cropped (or, where
    its tiles would break the spec's bounds on canvas area, resized) to whole pitches."""
    H, W = image.height, image.width
    rows, columns = GRIDS[level][int(rng.integers(0, len(GRIDS[level])))]
    K = rows * columns
    height, width, step = canvas_size(H / rows, W / columns, spec, RIM)
    pitch_y, pitch_x = (side + 2 * round(RIM * side) for side in (height, width))
    exact = step == 1.0
    top = int(rng.integers(0, math.floor(H - rows * pitch_y * step) + 1))
    left = int(rng.integers(0, math.floor(W - columns * pitch_x * step) + 1))
    order = rng.permutation(K).tolist()  # order[i] = the place whose content is shown as tile i + 1
    extent = rows * pitch_y * step, columns * pitch_x * step
    cells = image.means(top, left, *extent, rows * CELLS, columns * CELLS)
    cells = cells.reshape(rows, CELLS, columns, CELLS, 3).swapaxes(1, 2).reshape(K, CELLS, CELLS, 3)
    plan = Plan()
    for place in order:
        row, column = divmod(place, columns)
        y = top + (row * pitch_y + round(RIM * height)) * step
        x = left + (column * pitch_x + round(RIM * width)) * step
        colour = IDENTITY_COLOUR
        if level == 4:
            colour = jitter(rng, cells[place].reshape(-1, 3).mean(0).tolist(), 0.3, 0.3, 0.4, 0.05)
        plan.view(plan.canvas(height, width), 0, (step, 0.0, x, 0.0, step, y), exact=exact, colour=colour)
    tile_at = [0] * K
    for tile, place in enumerate(order):
        tile_at[place] = tile + 1
    fields = {"rows": rows, "columns": columns, "count": K}
    return Puzzle(
        plan=plan,
        readings=[(fields, Answer("sequence", tuple(tile_at)))],
        chance=1 / math.factorial(K),
        decidable=all_differ(cells, recoloured=level == 4),
        marks=[str(tile + 1) for tile in range(K)],
        sheet=[list(range(row * columns, (row + 1) * columns)) for row in range(rows)],
    )


def extents(level, spec, side) -> list:
    """Rows of the Extents of its canvases, of images whose sides are `side` px at most, in the grid that has most."""
    found = []
    for rows, columns in GRIDS[level]:
        tile = largest_canvas(side * side / (rows * columns), spec)
        longest = max(side, math.isqrt(tile))
        found.append([[Extent(-(-longest // rows), -(-longest // columns), tile)] * columns] * rows)
    return max(found, key=lambda rows: len(rows) * len(rows[0]) * rows[0][0].area)


def all_differ(cells, recoloured) -> bool:
    """Whether every two tiles (means, [K, n, n, 3], 8-bit levels) can be told apart, mirrored or not: a picture that is
    its own mirror image can be put together either way. Of recoloured tiles only what a change of brightness and colour
    leaves counts: grey patterns of zero mean."""
    if recoloured:
        cells = cells.mean(3, keepdims=True)
        cells = cells - cells.mean((1, 2), keepdims=True)
    own, looks = np.array([grain(tile) for tile in cells]), halved(cells)
    mirrored = np.stack([looks, looks[:, ::-1], looks[:, :, ::-1], looks[:, ::-1, ::-1]])
    apart = np.abs(mirrored[:, :, None] - looks).mean((3, 4, 5)).min(0)
    return bool((told_apart(apart, (own[:, None] + own) / 2) | np.eye(len(cells), dtype=bool)).all())
