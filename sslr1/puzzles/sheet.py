"""Composed rendering: all canvases of a puzzle on one, with gaps and with each one's mark drawn above it."""

import math
from dataclasses import replace

from sslr1.puzzles.plan import Plan

MOST = 9  # pictures a puzzle
GAP, MARK = 8, 24  # px between pictures, and of a mark's height
PAPER = (255.0, 255.0, 255.0)


def cells(spec):
    """The spec that a puzzle is built for, so that a sheet of its pictures stays within `spec`'s bounds."""
    return replace(spec, max_pixels=max(spec.unit**2, spec.max_pixels // (2 * MOST)), min_pixels=spec.unit**2)


def compose(puzzle, spec) -> Plan:
    """One canvas that shows the puzzle's canvases in the rows of `puzzle.sheet`, its sides multiples of the spec's unit.
    Raises ValueError where the spec allows none that is large enough."""
    sizes = puzzle.plan.sizes
    rows = [row for row in puzzle.sheet if row]
    heights = [max(sizes[i][0] for i in row) + MARK + GAP for row in rows]
    widths = [sum(sizes[i][1] + GAP for i in row) for row in rows]
    height, width = (math.ceil((n + GAP) / spec.unit) * spec.unit for n in (sum(heights), max(widths)))
    while height * width < spec.min_pixels:
        height, width = (height + spec.unit, width) if height < width else (height, width + spec.unit)
    if height * width > spec.max_pixels:
        raise ValueError(
            f"a sheet of {height}x{width} px is over max_pixels = {spec.max_pixels}: raise it, or don't compose"
        )
    plan = Plan()
    canvas = plan.canvas(height, width)
    plan.fill(canvas, 0, 0, height, width, PAPER)
    corner, y = {}, GAP
    for row, tall in zip(rows, heights):
        x = GAP
        for i in row:
            corner[i] = (canvas, y + MARK, x)
            size = MARK * (1.6 if puzzle.marks[i] == "REF" else 1)  # three letters in one cell
            plan.stamp(canvas, puzzle.marks[i], y + MARK / 2, x + size / 2, size)
            x += sizes[i][1] + GAP
        y += tall
    plan.paint(puzzle.plan, [corner[i] for i in range(len(sizes))])
    return plan
