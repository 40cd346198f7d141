"""What puzzles ask about an image: a sample of its pixels, means of cells, reduced grey, corners.

On CPU images the compiled part computes them; elsewhere, and where it is not built, the plain NumPy and PyTorch below.
"""

import numpy as np
import torch
import torch.nn.functional as F

from sslr1.ops import backends, transfer

LUMA = (0.299, 0.587, 0.114)


def sample(pixels: torch.Tensor, samples: int) -> np.ndarray:
    """Single pixels on a grid over uint8 [H, W, 3], uint8 [samples, samples, 3] on the CPU."""
    if backends._C is not None and pixels.device.type == "cpu":
        pixels, out = pixels.contiguous(), np.empty((samples, samples, 3), np.uint8)
        backends._C.sample(pixels.data_ptr(), *pixels.shape[:2], samples, out.ctypes.data)
        return out
    y, x = ((2 * np.arange(samples) + 1) * n // (2 * samples) for n in pixels.shape[:2])
    if pixels.device.type == "cpu":
        return pixels.numpy()[y].take(x, 1)
    y, x = (transfer.upload(torch.from_numpy(v), pixels.device, "plans") for v in (y, x))
    return pixels.index_select(0, y).index_select(1, x).cpu().numpy()


def cell_means(sample, size, top, left, height, width, rows, columns) -> np.ndarray:
    """Mean RGB of each cell of a grid over a rectangle (px) of the image of `size` (height, width) that `sample` was
    taken of, float32 [rows, columns, 3]. A cell has one sample at least."""
    samples = len(sample)
    if backends._C is not None:
        out, place = np.empty((rows, columns, 3), np.float32), (top, left, height, width, rows, columns)
        backends._C.cell_means(sample.ctypes.data, samples, *size, *place, out.ctypes.data)
        return out
    y = (np.arange(rows + 1) * (height / rows) + top) * (samples / size[0]) + 0.5
    x = (np.arange(columns + 1) * (width / columns) + left) * (samples / size[1]) + 0.5
    y = np.minimum(np.maximum(y.astype(np.int64), 0), samples)
    x = np.minimum(np.maximum(x.astype(np.int64), 0), samples)
    y0, x0 = np.minimum(y[:-1], samples - 1), np.minimum(x[:-1], samples - 1)
    y1, x1 = np.maximum(y[1:], y0 + 1), np.maximum(x[1:], x0 + 1)
    sums = np.zeros((samples + 1, samples + 1, 3), np.int32)
    sums[1:, 1:] = sample.cumsum(0, dtype=np.int32).cumsum(1, dtype=np.int32)
    rows_of = sums[y1] - sums[y0]
    total = rows_of.take(x1, 1) - rows_of.take(x0, 1)
    return (total / ((y1 - y0)[:, None, None] * (x1 - x0)[None, :, None])).astype(np.float32)


def contrast(sample, y, x, colour) -> float:
    """Standard deviation of luma, in 8-bit levels, after a colour map (12 numbers, 3x4) has clipped it, of every
    `step`-th of rows y = (from, to, step) and of columns x of a sample as above."""
    if backends._C is not None:
        return backends._C.contrast(sample.ctypes.data, len(sample), y, x, colour)
    colour = np.reshape(np.array(colour, np.float32), (3, 4))
    pixels = sample[slice(*y), slice(*x)].astype(np.float32)
    return float(((pixels @ colour[:, :3].T + colour[:, 3]).clip(0, 255) @ np.array(LUMA, np.float32)).std())


def reduced_grey(pixels: torch.Tensor, step: int) -> np.ndarray:
    """Mean grey of four of every step x step pixels (of all at 1 and 2), float32 [H // step, W // step]."""
    h, w = pixels.shape[0] // step, pixels.shape[1] // step
    if backends._C is not None and pixels.device.type == "cpu":
        pixels, grey = pixels.contiguous(), np.empty((h, w), np.float32)
        backends._C.reduced_grey(pixels.data_ptr(), *pixels.shape[:2], step, grey.ctypes.data)
        return grey
    part = pixels[: h * step, : w * step].sum(2, dtype=torch.int32).float() / 3
    if step > 1:
        part = part.view(h, step, w, step)[:, :: step // 2, :, :: step // 2].mean((1, 3))
    return part.cpu().numpy()


def corners(grey: np.ndarray, grain: float, share: float, most: int) -> np.ndarray:
    """(y, x) of a grey picture's textured corners, the strongest `most`, strongest first, int64 [n, 2].

    Shi and Tomasi's measure (1994): the smaller eigenvalue of the gradient's 5 x 5 structure tensor; peaks among 7 x 7
    neighbours, stronger than `grain` and than `share` of the strongest, at least four pixels from the edge.
    """
    if backends._C is not None:
        found = np.empty((most, 2), np.int64)
        return found[: backends._C.corners(grey.ctypes.data, *grey.shape, grain, share, most, found.ctypes.data)]
    g = torch.from_numpy(grey)[None, None]
    gx = F.pad((g[..., 2:] - g[..., :-2]) / 2, (1, 1, 0, 0))
    gy = F.pad((g[..., 2:, :] - g[..., :-2, :]) / 2, (0, 0, 1, 1))
    xx, yy, xy = F.avg_pool2d(torch.cat([gx * gx, gy * gy, gx * gy], 1), 5, 1, 2)[0]
    strength = (xx + yy) / 2 - torch.sqrt((xx - yy) ** 2 / 4 + xy**2)
    peak = strength == F.max_pool2d(strength[None, None], 7, 1, 3)[0, 0]
    peak &= strength > max(grain, float(strength.max()) * share)
    peak[:4], peak[-4:], peak[:, :4], peak[:, -4:] = False, False, False, False
    return peak.nonzero()[strength[peak].argsort(descending=True, stable=True)][:most].numpy()
