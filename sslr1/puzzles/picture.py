"""An image and what puzzles ask about it: cheap means of its regions, its colours, its corners."""

import math
from functools import cached_property

import numpy as np
import torch

from sslr1.puzzles import look

GRAIN = 40.0  # grey levels squared a px: what noise of a standard deviation of 7 levels doesn't reach
SAMPLES = 96  # px sampled along each axis for it

# Below this mean difference (8-bit levels) two pictures are taken for the same one, and a picture for a flat one.
SAME = 4.0
LEAST, GRAINS = 2.0, 0.6  # of `told_apart`: 8-bit levels, and share of the pictures' own grain

MIN_SIDE, MAX_SIDE = (
    252,
    768,
)  # px of an image's sides, unless asked otherwise: smaller ones are passed over, larger reduced
LONGEST = 3  # times its short side: of a longer picture a puzzle is cut from a piece


class Picture:
    """pixels: uint8 [H, W, 3] on any device; on_device: the same on the device that renders, where it has been decoded
    there, or None. What is asked of it comes from a sample that doesn't grow with it, lies on
    the CPU and is kept, KEPT bytes at most: `puzzles.make` takes Pictures where images are shown more than once."""

    KEPT = SAMPLES * SAMPLES * 3 + 2 * 16 * 16 * 3 * 4

    def __init__(self, pixels: torch.Tensor, on_device: torch.Tensor | None = None):
        self.pixels, self.on_device = pixels, on_device
        self.height, self.width = pixels.shape[:2]

    @cached_property
    def sample(self) -> np.ndarray:
        """Single pixels on a grid over the image, uint8 [SAMPLES, SAMPLES, 3]."""
        return look.sample(self.pixels, SAMPLES)

    def means(self, top, left, height, width, rows, columns) -> np.ndarray:
        """Mean RGB of each cell of a grid over a rectangle of the image (px), float32 [rows, columns, 3]."""
        return look.cell_means(self.sample, (self.height, self.width), top, left, height, width, rows, columns)

    def contrast(self, top, left, height, width, colour) -> float:
        """Standard deviation of luma, in 8-bit levels, of a rectangle (px) after a colour map has clipped it: of single
        pixels on a grid, 24 to 47 a side where there are as many."""
        ends = []
        for start, extent, n in ((top, height, self.height), (left, width, self.width)):
            first, last = math.floor(start * SAMPLES / n), math.floor((start + extent) * SAMPLES / n)
            first = min(max(first, 0), SAMPLES - 1)
            ends.append((first, min(max(last, first + 1), SAMPLES), max((last - first) // 24, 1)))
        return look.contrast(self.sample, *ends, colour)

    def piece(self, rng) -> "Picture":
        """The picture, or of one longer than LONGEST times its short side so much, at a place drawn uniformly: views of
        nearly square shape would have no room in it, or share too little of it."""
        reach = LONGEST * min(self.height, self.width)
        if max(self.height, self.width) <= reach:
            return self
        start = int(rng.integers(0, max(self.height, self.width) - reach + 1))
        axis = 0 if self.height > self.width else 1
        copies = (self.pixels, self.on_device)
        return Picture(*(x if x is None else x.narrow(axis, start, reach).contiguous() for x in copies))

    @cached_property
    def look(self) -> np.ndarray:
        """16 x 16 means of the whole image, float32 [16, 16, 3]."""
        return self.means(0, 0, self.height, self.width, 16, 16)

    @cached_property
    def evened(self) -> np.ndarray:
        """`look` of zero mean and unit deviation, unless it is flat."""
        look = self.look - self.look.mean()
        return look / max(look.std(), SAME / 2)

    @cached_property
    def mean(self) -> list:
        """Mean red, green and blue of the image."""
        return self.look.mean((0, 1)).tolist()

    @cached_property
    def flat(self) -> bool:
        """Almost no texture."""
        return difference(self.look, self.look.mean((0, 1))) < SAME / 2

    def grey(self) -> tuple[np.ndarray, int]:
        """(float32 [h, w] of mean grey, px of the image per px of it): a power-of-two reduction to at most 192 px a
        side, in which four of the step * step px stand for all."""
        step = 1 << max(0, math.ceil(math.log2(max(self.height, self.width) / 192)))
        return look.reduced_grey(self.pixels, step), step


def corners(grey, step) -> np.ndarray:
    """Textured corners (`ops.look.corners`) of what `Picture.grey` returned, the 128 strongest at most, strongest
    first, float64 [n, 2] of (y, x) in px of the image."""
    return (look.corners(grey, GRAIN, 1 / 300, 128) + 0.5) * step


class Pictures:
    """A pool of images, or of Pictures, (len, [i]) as Pictures."""

    def __init__(self, images):
        self.images, self._made = images, {}

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i) -> Picture:
        if i not in self._made:
            image = self.images[i]
            self._made[i] = image if isinstance(image, Picture) else Picture(image)
        return self._made[i]


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute difference, in the units of the arrays."""
    return float(np.add.reduce(np.abs(a - b), None)) / a.size


def grain(cells: np.ndarray) -> float:
    """Mean absolute difference of neighbours among the cells of a picture, [n, n, channels]: what noise and the finest
    texture leave in a cell's mean."""
    return (difference(cells[1:], cells[:-1]) + difference(cells[:, 1:], cells[:, :-1])) / 2


def halved(cells: np.ndarray) -> np.ndarray:
    """Means of 2 x 2 cells each: [..., n, n, channels] to [..., n / 2, n / 2, channels]."""
    rows = cells[..., ::2, :, :] + cells[..., 1::2, :, :]
    return (rows[..., ::2, :] + rows[..., 1::2, :]) / 4


def told_apart(apart, grain):
    """Whether two pictures do more than chance to differ by a mean of `apart` between means of 2 x 2 cells each, where
    the mean `grain` of their cells is such: half of it is left between independent pictures of one texture."""
    return apart > LEAST + GRAINS * grain
