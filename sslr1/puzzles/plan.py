"""What a puzzle compiles to: canvases painted in order with rectangular tiles. `sslr1.ops.render` says what tables
mean."""

import math
from typing import NamedTuple

import numpy as np
import torch

from sslr1.ops.atlas import CELL, CELLS
from sslr1.ops.render import ATLAS, BILINEAR, IDENTITY_COLOUR, NEAREST, STENCIL, mip, render

_PLACE = {name: place for place, name in enumerate(CELLS)}
SOFTEST = 2.0  # largest blur in px of its mip level; beyond it a coarser level does


class Plan:
    """A growing plan; image numbers are positions in the list that it will be rendered from."""

    def __init__(self):
        self.sizes = []  # (height, width) of each canvas
        self.tiles = []  # (7 ints, 22 floats)
        self._sources = {}  # (image, mip level, blur sigma) -> number

    def source(self, image: int, level: int = 0, blur: float = 0.0) -> int:
        """Number of the source that is `image` at mip `level`, blurred by `blur` of that level's px; made once."""
        return self._sources.setdefault((image, level, blur), len(self._sources))

    def canvas(self, height: int, width: int) -> int:
        self.sizes.append((height, width))
        return len(self.sizes) - 1

    def tile(
        self,
        canvas,
        top,
        left,
        height,
        width,
        source,
        matrix,
        *,
        bilinear,
        colour=IDENTITY_COLOUR,
        alpha=1.0,
        stencil=False,
    ):
        """Paint a rectangle of `canvas` through the inverse map `matrix` (9 numbers, tile px to source px)."""
        mode = (BILINEAR if bilinear else NEAREST) + (STENCIL if stencil else 0)
        self.tiles.append(((canvas, top, left, height, width, source, mode), (*matrix, *colour, alpha)))

    def view(self, canvas, image, matrix, *, colour=IDENTITY_COLOUR, alpha=1.0, blur=0.0, exact=False, level=None):
        """Paint a whole canvas through `matrix`, its inverse map to px of the full image: 6 numbers (affine: image x =
        a*x + b*y + c, y = d*x + e*y + f) or 9 (projective).

        exact: nearest, for crops, shuffles and quarter turns. Otherwise bilinear from the largest mip level that is not
        coarser than the map, unless `level` names one; `blur` is in px of the canvas.
        """
        if len(matrix) == 6:
            matrix = (*matrix, 0.0, 0.0, 1.0)
        (height, width), sigma = self.sizes[canvas], 0.0
        if exact:
            level = 0
        elif level is None:
            level, sigma = sampling(matrix, height, width, blur)
        if level:
            s = 0.5**level
            matrix = (*(s * v for v in matrix[:6]), *matrix[6:])
        source = self.source(image, level, sigma)
        self.tile(canvas, 0, 0, height, width, source, matrix, bilinear=not exact, colour=colour, alpha=alpha)

    def fill(self, canvas, top, left, height, width, rgb=(127.0, 127.0, 127.0)):
        """Paint a rectangle in one colour (0..255)."""
        colour = tuple(v for c in rgb for v in (0.0, 0.0, 0.0, c))
        anywhere = (0.0, 0.0, 0.5, 0.0, 0.0, 0.5, 0.0, 0.0, 1.0)
        self.tile(canvas, top, left, height, width, self.source(ATLAS), anywhere, bilinear=False, colour=colour)

    def stamp(self, canvas, name, y, x, size, rgb=(255.0, 255.0, 255.0)):
        """Draw cell `name` of the atlas, `size` px high and wide, centred on canvas point (y, x), in colour `rgb` with
        a dark outline. What would lie outside the canvas is cut off."""
        H, W = self.sizes[canvas]
        top, left = max(0, math.floor(y - size / 2)), max(0, math.floor(x - size / 2))
        bottom, right = min(H, math.ceil(y + size / 2)), min(W, math.ceil(x + size / 2))
        if bottom <= top or right <= left:
            return
        level = max(0, math.floor(math.log2(CELL / size) + 1e-6))
        cell = CELL >> level  # of the level's px
        step = cell / size
        at_x, at_y = (left - (x - size / 2)) * step + _PLACE[name] * cell, (top - (y - size / 2)) * step
        matrix = (step, 0.0, at_x, 0.0, step, at_y, 0.0, 0.0, 1.0)
        colour = tuple(v for c in rgb for v in (0.0, c / 255, 0.0, 0.0))
        place = (canvas, top, left, bottom - top, right - left)
        self.tile(*place, self.source(ATLAS, level), matrix, bilinear=True, colour=colour, stencil=True)

    def extend(self, other: "Plan", images: list | None = None) -> None:
        """Append another plan. images: the number here of each of its images, by default the same one."""
        canvases = len(self.sizes)
        self.sizes += other.sizes
        self.paint(other, [(canvases + i, 0, 0) for i in range(len(other.sizes))], images)

    def paint(self, other: "Plan", places: list, images: list | None = None) -> None:
        """Paint the tiles of another plan, each of its canvases at a place (canvas, top, left) of this one's."""
        numbers = [
            self.source(image if image == ATLAS or images is None else images[image], level, blur)
            for image, level, blur in other._sources
        ]
        for (canvas, top, left, height, width, source, mode), floats in other.tiles:
            onto, y, x = places[canvas]
            self.tiles.append(((onto, y + top, x + left, height, width, numbers[source], mode), floats))

    def reduced(self, images: list) -> tuple[list, "Plan"]:
        """(images, a plan that paints the same from them): of each only the mip level that all its sources are made
        from. What no source is made of becomes one pixel."""
        finest = {}
        for image, level, _ in self._sources:
            finest[image] = min(level, finest.get(image, level))
        finest[ATLAS] = 0
        plan = Plan()
        plan.sizes, plan.tiles = self.sizes, self.tiles
        plan._sources = {(image, level - finest[image], blur): n for (image, level, blur), n in self._sources.items()}
        return [mip(x, finest[n]) if n in finest else x[:1, :1] for n, x in enumerate(images)], plan

    @property
    def sources_int(self):
        return torch.tensor([s[:2] for s in self._sources], dtype=torch.int64).view(-1, 2)

    @property
    def sources_float(self):
        return torch.tensor([s[2] for s in self._sources], dtype=torch.float32)

    @property
    def canvases(self):
        return torch.tensor(self.sizes, dtype=torch.int64).view(-1, 2)

    @property
    def tiles_int(self):
        return torch.from_numpy(np.array([t[0] for t in self.tiles], np.int64).reshape(-1, 7))

    @property
    def tiles_float(self):
        return torch.from_numpy(np.array([t[1] for t in self.tiles], np.float32).reshape(-1, 22))


def sampling(matrix, height, width, blur=0.0):
    """(mip level, sigma in its px) that a bilinear view of height x width px through a 9-number map is taken from: the
    largest level that is not coarser than the map, or a coarser one under a wide blur, of `blur` px of the view."""
    step = finest_step(matrix, height, width)
    level = max(0, math.floor(math.log2(step) + 1e-6))
    sigma = blur * step * 0.5**level
    while sigma > SOFTEST:
        level, sigma = level + 1, sigma / 2
    return level, sigma


def peek(pixels, matrix, side, blur=0.0, every=5):
    """Every `every`-th pixel along each axis of what `Plan.view` shows of an image (uint8 [H, W, 3]) through a 6-number
    map on a square of `side` px, before any colour map; float32 [n, 3] on the CPU. every: odd."""
    a, b, c, d, e, f = matrix
    level, sigma = sampling((*matrix, 0.0, 0.0, 1.0), side, side, blur)
    s, n = 0.5**level, max(side // every, 1)
    plan = Plan()
    sparse = (s * a * every, s * b * every, s * c, s * d * every, s * e * every, s * f, 0.0, 0.0, 1.0)
    plan.tile(plan.canvas(n, n), 0, 0, n, n, plan.source(0, level, sigma), sparse, bilinear=True)
    return render([pixels], plan)[0].reshape(-1, 3).cpu().numpy().astype(np.float32)


def finest_step(matrix, height, width) -> float:
    """Source px per tile px along the finer axis, where a tile of height x width is mapped finest."""
    a, b, c, d, e, f, g, h, i = matrix
    if g == h == 0.0:
        return min(math.hypot(a, d), math.hypot(b, e)) / i
    steps = []
    for y in (0.0, height):
        for x in (0.0, width):
            z = g * x + h * y + i
            u, v = (a * x + b * y + c) / z, (d * x + e * y + f) / z
            steps += [math.hypot(a - g * u, d - g * v) / z, math.hypot(b - h * u, e - h * v) / z]
    return min(steps)


def largest_canvas(pixels, spec) -> int:
    """px of what `canvas_size` gives at most for a cell of so many. Where that is too little for the spec, which wants
    m square units, it gives the first enlargement that isn't. The one before had n x k < m units; sides grow by 1/32 of
    an octave, 2.2 %, at a time, so this has less than 1.022^2 (n + 1)(k + 1), and (n + 1)(k + 1) <= 2m."""
    unit = spec.unit**2
    return int(min(spec.max_pixels // unit, max(pixels // unit, 2.1 * math.ceil(spec.min_pixels / unit)))) * unit


class Extent(NamedTuple):
    """What a canvas has at most: px of its sides, and of its area."""

    height: int
    width: int
    area: int

    @classmethod
    def square(cls, side):
        return cls(side, side, side * side)


def canvas_size(pitch_y, pitch_x, spec, rim=0.0):
    """(height, width, step): sides in px of the largest canvas that shows a cell of pitch_y x pitch_x image px but for
    a rim of round(rim * side) px on each side, and image px per canvas px: 1.0, or as near to it as the spec's bounds
    on area allow. Where none shows the whole cell, the one that shows most of it. Raises ValueError where no canvas
    keeps the bounds."""

    def sides(step):
        fitted = []
        for pitch in (pitch_y / step, pitch_x / step):
            side = max(int(pitch // spec.unit), 1) * spec.unit
            while side > spec.unit and side + 2 * round(rim * side) > pitch:
                side -= spec.unit
            fitted.append(side)
        return fitted

    def legal(step):
        h, w = sides(step)
        fits = h + 2 * round(rim * h) <= pitch_y / step and w + 2 * round(rim * w) <= pitch_x / step
        return fits and spec.min_pixels <= h * w <= spec.max_pixels

    if legal(1.0):
        return (*sides(1.0), 1.0)
    for i in range(1, 161):  # nearest scale first, up to 32 times larger or smaller
        for step in (2 ** (-i / 32), 2 ** (i / 32)):
            if legal(step):
                return (*sides(step), step)
    cropped, lowest, highest = [], math.ceil(spec.min_pixels / spec.unit**2), spec.max_pixels // spec.unit**2
    for rows in range(1, highest + 1):
        fewest, most = math.ceil(lowest / rows), highest // rows
        alike = rows * pitch_x / pitch_y  # columns for the cell's own shape
        for columns in {min(max(n, fewest), most) for n in (math.floor(alike), math.ceil(alike))}:
            if columns >= fewest:
                h, w = rows * spec.unit, columns * spec.unit
                tall, wide = (side + 2 * round(rim * side) for side in (h, w))
                step = min(pitch_y / tall, pitch_x / wide) * (1 - 1e-9)  # or rounding would lead out of the cell
                cropped.append((tall * wide * step**2, -abs(math.log(step)), h, w, step))
    if cropped:
        return max(cropped)[2:]
    bounds = f"between {spec.min_pixels} and {spec.max_pixels} pixels"
    raise ValueError(f"no canvas of multiples of {spec.unit} px lies {bounds}")


class PoolError(ValueError):
    """A pool has too few images that differ from the one shown and from each other."""
