"""What a puzzle compiles to: canvases painted in order with rectangular tiles. `sslr1.ops.render` says what tables mean."""

import math
from dataclasses import dataclass, field

import torch

from sslr1.ops.render import IDENTITY_COLOUR


@dataclass
class Plan:
    """A growing plan; image numbers are positions in the list that it will be rendered from."""

    sources: list = field(default_factory=list)  # (image, mip level, blur sigma)
    sizes: list = field(default_factory=list)  # (height, width) of each canvas
    tiles: list = field(default_factory=list)  # (7 ints, 22 floats)

    def source(self, image: int, level: int = 0, blur: float = 0.0) -> int:
        """Number of the source that is `image` at mip `level`, blurred by `blur` of that level's px; made once."""
        key = (image, level, blur)
        if key not in self.sources:
            self.sources.append(key)
        return self.sources.index(key)

    def canvas(self, height: int, width: int) -> int:
        self.sizes.append((height, width))
        return len(self.sizes) - 1

    def tile(self, canvas, top, left, height, width, source, matrix, *, bilinear, colour=IDENTITY_COLOUR, alpha=1.0):
        """Paint a rectangle of `canvas` through the inverse map `matrix` (9 numbers, tile px to source px)."""
        self.tiles.append(((canvas, top, left, height, width, source, int(bilinear)), (*matrix, *colour, alpha)))

    def view(self, canvas, top, left, height, width, image, affine, *, colour=IDENTITY_COLOUR, blur=0.0, exact=False):
        """Paint a rectangle through `affine` (a, b, c, d, e, f): image x = a*x + b*y + c, y = d*x + e*y + f, in px of the
        full image. `exact`: nearest, for crops, shuffles and quarter turns. Otherwise bilinear from the largest mip level
        that is not coarser than the map; `blur` is in px of the canvas."""
        a, b, c, d, e, f = affine
        step = min(math.hypot(a, d), math.hypot(b, e))  # image px per canvas px along the finer axis
        level = 0 if exact else max(0, math.floor(math.log2(step) + 1e-6))
        s = 0.5**level
        sigma = blur * step * s
        matrix = (a * s, b * s, c * s, d * s, e * s, f * s, 0.0, 0.0, 1.0)
        self.tile(
            canvas,
            top,
            left,
            height,
            width,
            self.source(image, level, sigma),
            matrix,
            bilinear=not exact,
            colour=colour,
        )

    def extend(self, other: "Plan", image_offset: int) -> None:
        """Append another plan whose images start at `image_offset` of this plan's list."""
        sources, canvases = len(self.sources), len(self.sizes)
        self.sources += [(image + image_offset, level, blur) for image, level, blur in other.sources]
        self.sizes += other.sizes
        self.tiles += [
            ((ints[0] + canvases, *ints[1:5], ints[5] + sources, ints[6]), numbers) for ints, numbers in other.tiles
        ]

    @property
    def sources_int(self):
        return torch.tensor([s[:2] for s in self.sources], dtype=torch.int64).view(-1, 2)

    @property
    def sources_float(self):
        return torch.tensor([s[2] for s in self.sources], dtype=torch.float32)

    @property
    def canvases(self):
        return torch.tensor(self.sizes, dtype=torch.int64).view(-1, 2)

    @property
    def tiles_int(self):
        return torch.tensor([t[0] for t in self.tiles], dtype=torch.int64).view(-1, 7)

    @property
    def tiles_float(self):
        return torch.tensor([t[1] for t in self.tiles], dtype=torch.float32).view(-1, 22)


@dataclass
class Puzzle:
    """One puzzle, drawn but not yet worded or rendered.

    readings: the ways in which it may be asked about, each (slots for the prompt's template, answer), the plainest first;
    others: pool images it also shows, which stand behind its own image (number 0) in the plan.
    """

    plan: Plan
    readings: list
    chance: float
    decidable: bool
    others: list = field(default_factory=list)


def thumbnail(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Area means of a uint8 [H, W, 3] image, float32 [height, width, 3]; for comparing pictures cheaply.

    Large images are sampled on a grid of at most 8 pixels a cell and axis, so that the cost doesn't grow with them.
    """
    H, W = image.shape[:2]
    image = image[:: max(1, H // (8 * height)), :: max(1, W // (8 * width))]
    return torch.nn.functional.adaptive_avg_pool2d(image.permute(2, 0, 1).float(), (height, width)).permute(1, 2, 0)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean absolute difference of two thumbnails, in 8-bit grey levels."""
    return (a - b).abs().mean().item()


# Below this mean difference (8-bit levels) two pictures are taken for the same one, and a picture for a flat one.
SAME = 4.0
