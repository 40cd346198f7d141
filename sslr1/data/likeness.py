"""Near-duplicates between two sets of images: copies that were scaled, compressed, or cropped by a few hundredths.

Each image becomes a grey thumbnail of 32x32. Its perceptual hash is that of pHash (Zauner 2010), the low frequencies of
the thumbnail's cosine transform, but kept as numbers, each times its frequency, in place of their signs: the cosine
between two is a matrix product, and bears a crop that turns many signs. The hash of its middle is taken, too. What
comes near is a candidate, and is confirmed by the thumbnails themselves: one of them, cropped in some of 81 ways, must
be the other one in its shapes.
"""

from itertools import product

import numpy as np

from sslr1.data import headers, pixels
from sslr1.data.decode import decoded

SIDE, KEPT = 32, 8  # px of a thumbnail; frequencies of its hash in each direction
NEAR = 0.72  # cosine of a candidate's hashes, at least
# Likeness of a pair, at least: of 1,000 photographs no two came to 0.83, and of 1,000 copies, cropped at random, none
# was under 0.96
ALIKE = 0.9
CROPS = (0.0, 0.015, 0.03)  # shares of a side
FINE, COARSE = 1.0, 6.0  # px of a thumbnail: shapes larger than the one and smaller than the other are compared
ROWS = 2048  # hashes of either set that are compared at once
PAIRS = 256  # thumbnails that are compared at once
FLAT = 2.0  # grey levels: the deviation under which a thumbnail shows nothing that could be compared


def thumbnail(data) -> np.ndarray:
    """uint8 [32, 32]: a file's picture (bytes) as training shows it, in grey. Raises ValueError where it can't be
    decoded."""
    from PIL import Image

    grey, orientation = _reduced(data)
    if grey is None:
        grey, orientation = np.asarray(Image.fromarray(decoded(data)).convert("L"))[:, :, None], 1
    return of_grey(pixels.upright(grey, orientation)[:, :, 0])


def of_grey(grey) -> np.ndarray:
    """The thumbnail of an image in grey, uint8 [H, W]."""
    from PIL import Image

    small = Image.fromarray(np.ascontiguousarray(grey)).resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(small)


def _reduced(data):
    """(grey [H, W, 1], orientation) of an ordinary JPEG file, decoded at an eighth of its size, or what leaves 64 px: a
    fraction of the work; (None, 1) of another."""
    header = headers.read(data)
    if header is None or not header.jpeg:
        return None, 1
    from simplejpeg import decode_jpeg

    try:
        grey = decode_jpeg(data, "GRAY", min_height=2 * SIDE, min_width=2 * SIDE, min_factor=1)
    except (ValueError, MemoryError):
        return None, 1
    return grey, header.orientation


def hashes(thumbnails, crop=0.0) -> np.ndarray:
    """float32 [n, 63] of uint8 [n, 32, 32]: of length 1, or 0 where nothing is to be seen. crop: the share of each side
    that is left out."""
    at = np.arange(SIDE)
    waves = np.cos(np.pi / SIDE * (at + 0.5) * np.arange(KEPT)[:, None]).astype(np.float32) @ _window(crop, crop)
    weights = np.hypot(*np.mgrid[:KEPT, :KEPT]).astype(np.float32)
    found = np.empty((len(thumbnails), KEPT * KEPT - 1), np.float32)
    for start in range(0, len(thumbnails), ROWS):
        some = thumbnails[start : start + ROWS].astype(np.float32)
        low = ((waves @ some @ waves.T) * weights).reshape(len(some), -1)[:, 1:]
        low[some.std((1, 2)) < FLAT] = 0
        found[start : start + len(some)] = low / np.maximum(np.linalg.norm(low, axis=1, keepdims=True), 1e-9)
    return found


def pairs(first, second):
    """(number in `first`, number in `second`, likeness) of every pair of thumbnails, uint8 [n, 32, 32], that show the
    same picture."""
    crop = CROPS[-1]
    whole, middle = (hashes(first), hashes(second)), (hashes(first, crop), hashes(second, crop))
    for start in range(0, len(first), ROWS):
        rows = slice(start, start + ROWS)
        for other in range(0, len(second), ROWS):
            columns = slice(other, other + ROWS)
            near = whole[0][rows] @ whole[1][columns].T
            np.maximum(near, middle[0][rows] @ whole[1][columns].T, out=near)
            np.maximum(near, whole[0][rows] @ middle[1][columns].T, out=near)
            a, b = np.nonzero(near >= NEAR)
            for at in range(0, len(a), PAIRS):
                one, two = a[at : at + PAIRS] + start, b[at : at + PAIRS] + other
                alike = likeness(first[one], second[two])
                yield from ((int(i), int(j), float(x)) for i, j, x in zip(one, two, alike) if x >= ALIKE)


def likeness(first, second) -> np.ndarray:
    """float32 [n]: the correlation of the shapes in each pair of thumbnails, uint8 [n, 32, 32] both, at the best crop
    of either."""
    return np.maximum(_cropped_to(first, second), _cropped_to(second, first))


def _cropped_to(whole, part):
    whole, part = whole.astype(np.float32), part.astype(np.float32)
    fine, coarse = _blur(FINE), _blur(COARSE)
    wanted = _standard(fine @ part @ fine.T - coarse @ part @ coarse.T)
    windows = [_window(low, high) for low, high in product(CROPS, CROPS)]
    across = [((fine @ window).T, (coarse @ window).T) for window in windows]
    best = np.full(len(whole), -1.0, np.float32)
    for window in windows:
        rows = fine @ window @ whole, coarse @ window @ whole  # cropped above and below
        for columns in across:
            shapes = _standard(rows[0] @ columns[0] - rows[1] @ columns[1])
            np.maximum(best, np.einsum("nyx,nyx->n", shapes, wanted), out=best)
    return best


def _standard(values):
    values = values - values.mean((1, 2), keepdims=True)
    return values / np.maximum(np.sqrt(np.einsum("nyx,nyx->n", values, values)), 1e-9)[:, None, None]


def _blur(deviation):
    """[32, 32] matrix of a Gaussian over a side."""
    at = np.arange(SIDE)
    weights = np.exp(-(((at[:, None] - at) / deviation) ** 2) / 2)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def _window(low, high):
    """[32, 32] matrix that takes a side's pixels to those of a part of it, without the shares `low` and `high` at its
    ends: means, as a resize would have them."""
    edges = np.arange(SIDE + 1)
    bounds = SIDE * low + edges * (1 - low - high)
    overlap = np.clip(np.minimum(bounds[1:, None], edges[1:]) - np.maximum(bounds[:-1, None], edges[:-1]), 0, None)
    return (overlap / overlap.sum(1, keepdims=True)).astype(np.float32)
