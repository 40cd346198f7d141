"""Which points a puzzle can mark: apart from each other, told apart by what surrounds them, and ranked by distance
evenly.

The compiled part computes it; where it is not built, the plain NumPy below.
"""

import numpy as np

from sslr1.ops import backends


def distinct(grey, spots, places, order, count, *, radius, apart, alike) -> list:
    """Numbers of the first `count` points, taken in `order` (int64 [n]), that lie at least `apart` from those before
    them in `places` (float64 [n, 2]), and whose surroundings of (2 * radius + 1)^2 px correlate with theirs by `alike`
    at most; fewer where there are not so many.

    grey: float32 [H, W]; spots: float64 [n, 2], the points' (y, x) in its px.
    """
    if backends._C is not None:
        spots, places, order = (np.ascontiguousarray(a) for a in (spots, places, order))
        arrays = spots.ctypes.data, places.ctypes.data, order.ctypes.data
        return backends._C.distinct(grey.ctypes.data, *grey.shape, *arrays, len(order), count, radius, apart, alike)
    reach = np.arange(-radius, radius + 1)
    y, x = ((np.floor(v).astype(np.int64)[:, None] + reach).clip(0, n - 1) for v, n in zip(spots.T, grey.shape))
    patches = grey[y[:, :, None], x[:, None, :]].reshape(len(spots), len(reach) ** 2)
    patches = patches - patches.mean(1, keepdims=True)
    patches /= np.maximum(np.linalg.norm(patches, axis=1, keepdims=True), 1e-6)
    same = patches @ patches.T > alike
    same |= np.linalg.norm(places[:, None] - places[None], axis=2) < apart
    chosen = []
    for i in order.tolist():
        if len(chosen) < count and not same[i, chosen].any():
            chosen.append(i)
    return chosen


def balanced(refs, places):
    """(ranks, weights), or None where there are no such weights.

    refs: float64 [count, n, 2], where each of `count` points may be looked for, of which `places`, float64 [count, 2],
    are the true ones. ranks, int64 [count, n]: how many places lie nearer to the ref than the point's own. weights,
    float64 [count, count], of point and rank: 0 where no ref of the point has the rank; rows and columns add up to 1
    (Sinkhorn).
    """
    count, n = refs.shape[:2]
    if backends._C is not None:
        refs, places = np.ascontiguousarray(refs), np.ascontiguousarray(places)
        ranks, weights = np.empty((count, n), np.int64), np.empty((count, count))
        given, made = (refs.ctypes.data, places.ctypes.data), (ranks.ctypes.data, weights.ctypes.data)
        return (ranks, weights) if backends._C.balanced(*given, count, n, *made) else None
    distances = np.linalg.norm(refs[:, :, None] - places, axis=3)
    ranks = (distances < distances[np.arange(count), :, np.arange(count)][:, :, None]).sum(2)
    weights = (ranks[:, :, None] == np.arange(count)).any(1).astype(float)
    if not (weights.any(0).all() and weights.any(1).all()):
        return None
    for sweep in range(25):
        weights /= weights.sum(0)
        weights /= weights.sum(1, keepdims=True)
        if sweep % 5 == 4 and (off := abs(weights.sum(0) - 1).max()) < 1e-3:
            break
    return None if off > 0.02 else (ranks, weights)
