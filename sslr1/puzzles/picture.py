"""An image and what puzzles ask about it: cheap means of its regions, its colours, its corners."""

import math
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

try:
    from sslr1 import _C
except ImportError:  # not built: the same, slower
    _C = None

GRAIN = 40.0  # grey levels squared a px: what noise of a standard deviation of 7 levels doesn't reach
SAMPLES = 96  # px sampled along each axis for it

# Below this mean difference (8-bit levels) two pictures are taken for the same one, and a picture for a flat one.
SAME = 4.0


class Picture:
    """pixels: uint8 [H, W, 3] on any device. What is asked of it is computed once, from a sample that doesn't grow with it, and
    lies on the CPU."""

    def __init__(self, pixels: torch.Tensor):
        self.pixels = pixels
        self.height, self.width = pixels.shape[:2]

    @cached_property
    def sample(self) -> np.ndarray:
        """Every pixel on a grid of at most SAMPLES x SAMPLES, uint8 [SAMPLES, SAMPLES, 3]."""
        y, x = ((2 * np.arange(SAMPLES) + 1) * n // (2 * SAMPLES) for n in (self.height, self.width))
        if self.pixels.device.type == "cpu":
            return self.pixels.numpy()[y].take(x, 1)
        y, x = (torch.from_numpy(v).to(self.pixels.device) for v in (y, x))
        return self.pixels.index_select(0, y).index_select(1, x).cpu().numpy()

    @cached_property
    def _sums(self):
        """Integral image of `sample`, int32 [SAMPLES + 1, SAMPLES + 1, 3]."""
        sums = np.empty((SAMPLES + 1, SAMPLES + 1, 3), np.int32)
        if _C is not None and self.pixels.device.type == "cpu":
            self.pixels = self.pixels.contiguous()
            _C.sample_sums(self.pixels.data_ptr(), self.height, self.width, SAMPLES, sums.ctypes.data)
        else:
            sums[0], sums[:, 0] = 0, 0
            sums[1:, 1:] = self.sample.cumsum(0, dtype=np.int32).cumsum(1, dtype=np.int32)
        return sums

    def means(self, top, left, height, width, rows, columns) -> np.ndarray:
        """Mean RGB of each cell of a grid over a rectangle of the image (px), float32 [rows, columns, 3]."""
        if _C is not None:
            out, place = np.empty((rows, columns, 3), np.float32), (top, left, height, width, rows, columns)
            _C.cell_means(self._sums.ctypes.data, SAMPLES, self.height, self.width, *place, out.ctypes.data)
            return out
        y = (np.arange(rows + 1) * (height / rows) + top) * (SAMPLES / self.height) + 0.5
        x = (np.arange(columns + 1) * (width / columns) + left) * (SAMPLES / self.width) + 0.5
        y = np.minimum(np.maximum(y.astype(np.int64), 0), SAMPLES)
        x = np.minimum(np.maximum(x.astype(np.int64), 0), SAMPLES)
        y0, x0 = np.minimum(y[:-1], SAMPLES - 1), np.minimum(x[:-1], SAMPLES - 1)
        y1, x1 = np.maximum(y[1:], y0 + 1), np.maximum(x[1:], x0 + 1)  # a cell is one sample at least
        rows_of = self._sums[y1] - self._sums[y0]
        total = rows_of.take(x1, 1) - rows_of.take(x0, 1)
        return (total / ((y1 - y0)[:, None, None] * (x1 - x0)[None, :, None])).astype(np.float32)

    def pixels_of(self, top, left, height, width) -> np.ndarray:
        """Single pixels on a grid, 24 to 47 a side where there are as many, over a rectangle of the image (px), float32 [rows, columns, 3]."""
        y0, y1 = (math.floor(v * SAMPLES / self.height) for v in (top, top + height))
        x0, x1 = (math.floor(v * SAMPLES / self.width) for v in (left, left + width))
        every = (
            slice(max(y0, 0), max(y1, y0 + 1), max((y1 - y0) // 24, 1)),
            slice(max(x0, 0), max(x1, x0 + 1), max((x1 - x0) // 24, 1)),
        )
        return self.sample[every].astype(np.float32)

    @cached_property
    def look(self) -> np.ndarray:
        """16 x 16 means of the whole image, float32 [16, 16, 3]."""
        return self.means(0, 0, self.height, self.width, 16, 16)

    @cached_property
    def flat(self) -> bool:
        """Almost no texture."""
        return difference(self.look, self.look.mean((0, 1))) < SAME / 2

    @cached_property
    def grey(self) -> tuple[np.ndarray, int]:
        """(float32 [h, w] of mean grey, px of the image per px of it): a power-of-two reduction to at most 192 px a side, in
        which four of the step * step px stand for all."""
        step = 1 << max(0, math.ceil(math.log2(max(self.height, self.width) / 192)))
        h, w = self.height // step, self.width // step
        if _C is not None and self.pixels.device.type == "cpu":
            self.pixels, grey = self.pixels.contiguous(), np.empty((h, w), np.float32)
            _C.reduced_grey(self.pixels.data_ptr(), self.height, self.width, step, grey.ctypes.data)
            return grey, step
        part = self.pixels[: h * step, : w * step].sum(2, dtype=torch.int32).float() / 3
        if step > 1:
            part = part.view(h, step, w, step)[:, :: step // 2, :, :: step // 2].mean((1, 3))
        return part.cpu().numpy(), step

    @cached_property
    def corners(self) -> np.ndarray:
        """Textured corners, the 128 strongest at most, strongest first, float64 [n, 2] of (y, x) in px of the image.

        Shi and Tomasi's measure (1994): the smaller eigenvalue of the gradient's 5 x 5 structure tensor; peaks among 7 x 7
        neighbours of the reduced grey image, a three-hundredth as strong as the strongest and stronger than grain.
        """
        grey, step = self.grey
        if _C is not None:
            found = [place for _, *place in _C.corners(grey.ctypes.data, *grey.shape, GRAIN, 1 / 300)]
        else:
            found = _corners(torch.from_numpy(grey)[None, None])
        return (np.array(found[:128], float).reshape(-1, 2) + 0.5) * step

    def patches(self, points, radius=5) -> np.ndarray:
        """Grey patches of (2 * radius + 1)^2 reduced px around points ([n, 2], px of the image), each of zero mean and unit
        norm, float32 [n, (2 * radius + 1)^2]: their products are correlations."""
        grey, step = self.grey
        reach = np.arange(-radius, radius + 1)
        y = (np.floor(points[:, 0] / step).astype(np.int64)[:, None] + reach).clip(0, grey.shape[0] - 1)
        x = (np.floor(points[:, 1] / step).astype(np.int64)[:, None] + reach).clip(0, grey.shape[1] - 1)
        patches = grey[y[:, :, None], x[:, None, :]].reshape(len(points), -1)
        patches = patches - patches.mean(1, keepdims=True)
        return patches / np.maximum(np.linalg.norm(patches, axis=1, keepdims=True), 1e-6)


def _corners(g):
    """[(y, x), …] of a picture [1, 1, h, w], strongest first."""
    gx = F.pad((g[..., 2:] - g[..., :-2]) / 2, (1, 1, 0, 0))
    gy = F.pad((g[..., 2:, :] - g[..., :-2, :]) / 2, (0, 0, 1, 1))
    xx, yy, xy = F.avg_pool2d(torch.cat([gx * gx, gy * gy, gx * gy], 1), 5, 1, 2)[0]
    strength = (xx + yy) / 2 - torch.sqrt((xx - yy) ** 2 / 4 + xy**2)
    peak = strength == F.max_pool2d(strength[None, None], 7, 1, 3)[0, 0]
    peak &= strength > max(GRAIN, float(strength.max()) / 300)
    peak[:4], peak[-4:], peak[:, :4], peak[:, -4:] = False, False, False, False
    return peak.nonzero()[strength[peak].argsort(descending=True, stable=True)].tolist()


class Pictures:
    """A pool of images (len, [i]) as Pictures."""

    def __init__(self, images):
        self.images, self._made = images, {}

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i) -> Picture:
        if i not in self._made:
            self._made[i] = Picture(self.images[i])
        return self._made[i]


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute difference, in the units of the arrays."""
    return float(np.abs(a - b).mean())
