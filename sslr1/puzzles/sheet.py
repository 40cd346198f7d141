"""Composed rendering: all canvases of a puzzle on one, with gaps and with each one's mark drawn above it."""

import math
from dataclasses import replace

from sslr1.puzzles.plan import Plan, largest_canvas

MOST = 9  # pictures a puzzle
GAP, MARK = 8, 24  # px between pictures, and of a mark's height
PAPER = (255.0, 255.0, 255.0)


def cells(spec):
    """The specs to build a puzzle for so that a sheet of its pictures stays within `spec`'s bounds: the first whose
    sheet does."""
    area = spec.max_pixels // (2 * MOST)
    while area > spec.unit**2:
        yield replace(spec, max_pixels=area, min_pixels=spec.unit**2)
        area = area * 3 // 4
    yield replace(spec, max_pixels=spec.unit**2, min_pixels=spec.unit**2)


def _size(heights, widths, counts, spec):
    """Sides of a legal canvas that holds rows of pictures and the gaps around them, the squarest where there has to be
    more room than that; ValueError if there is none."""
    height = sum(heights) + GAP * (len(heights) + 1)
    width = max(w + GAP * (n + 1) for w, n in zip(widths, counts))
    unit = spec.unit
    tall, wide = math.ceil(height / unit), math.ceil(width / unit)
    lowest, highest = math.ceil(spec.min_pixels / unit**2), spec.max_pixels // unit**2
    if tall * wide >= lowest:
        legal = [(tall, wide)]
    else:
        legal = [(n, max(wide, math.ceil(lowest / n))) for n in range(tall, lowest + 1)]
    legal = [(abs(n - m), n * m, n, m) for n, m in legal if n * m <= highest]
    if not legal:
        raise ValueError(
            f"a sheet of {tall * unit}x{wide * unit} px doesn't fit between min_pixels = {spec.min_pixels} and "
            f"max_pixels = {spec.max_pixels}: change them, or don't compose"
        )
    return tuple(n * unit for n in min(legal)[2:])


def largest(rows, spec) -> int:
    """px that a sheet of rows of `plan.Extent`s has at most: one unit more a side for rounding, or what
    `largest_canvas` says where that is too little."""
    height = sum(max(extent.height for extent in row) + MARK for row in rows) + GAP * (len(rows) + 1) + spec.unit
    width = max(sum(extent.width for extent in row) + GAP * (len(row) + 1) for row in rows) + spec.unit
    return largest_canvas(height * width, spec)


def compose(pictures, marks, sheet, spec) -> Plan:
    """One canvas that shows a plan's canvases in the rows of a `sheet`, each under its mark, its sides multiples of the
    spec's unit. Raises ValueError where the spec allows none that is large enough."""
    sizes = pictures.sizes
    rows = [row for row in sheet if row]
    heights = [max(sizes[i][0] for i in row) + MARK for row in rows]
    height, width = _size(heights, [sum(sizes[i][1] for i in row) for row in rows], [len(row) for row in rows], spec)
    plan = Plan()
    canvas = plan.canvas(height, width)
    plan.fill(canvas, 0, 0, height, width, PAPER)
    corner, y = {}, GAP
    for row, tall in zip(rows, heights):
        x = GAP
        for i in row:
            corner[i] = (canvas, y + MARK, x)
            size = MARK * (1.6 if marks[i] == "REF" else 1)  # three letters in one cell
            plan.stamp(canvas, marks[i], y + MARK / 2, x + size / 2, size)
            x += sizes[i][1] + GAP
        y += tall + GAP
    plan.paint(pictures, [corner[i] for i in range(len(sizes))])
    return plan
