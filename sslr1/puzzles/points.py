"""Which points a puzzle can mark: apart from each other, with room for their marks, told apart by what surrounds them,
and ranked by distance evenly.

The compiled part computes it; where it is not built, the plain NumPy below.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from sslr1.ops import backends

RINGS, SECTORS = 4, 16  # of the samples around a point, whose rings are of one area; their means are of 2 x 2 each
_ANGLES = 2 * np.pi * (np.arange(SECTORS) + 0.5) / SECTORS
AROUND = np.sqrt((np.arange(RINGS) + 0.5) / RINGS)[:, None, None] * np.stack([np.sin(_ANGLES), np.cos(_ANGLES)], 1)
# Two points' surroundings are told apart if their means differ by more than so many 8-bit levels, and so much of their
# grain, which is how much neighbouring samples differ: half of it is left between means of noise, less at the best turn
LEAST, GRAINS = 2.0, 0.65
UNLIKE = 0.8  # and by so much of what they show: two places at one edge show nearly the same


class Marks(NamedTuple):
    """Sizes of a point's marks, shares of the canvas: radius of its ring, half the height and the width of the label
    that stands beside it, and how far others' labels stay from the point, so that it is seen whose they are."""

    ring: float
    tall: float
    wide: float
    room: float


@lru_cache
def label_places(marks) -> np.ndarray:
    """Where a label's middle is, seen from its point, so that it touches the ring: eight places around it, float64
    [8, 2] of (y, x)."""
    ring, tall, wide, _ = marks
    half = math.sqrt(0.5)
    slant = half * (tall + wide)
    slant = half * (slant + math.sqrt(slant**2 - tall**2 - wide**2 + ring**2))
    down, across = ring + tall, ring + wide
    y = (0.0, slant, down, slant, 0.0, -slant, -down, -slant)
    x = (across, slant, 0.0, -slant, -across, -slant, 0.0, slant)
    return np.stack([y, x], 1)


def surroundings(grey, spots, reach, tones):
    """(looks, grains): what surrounds points as far as `reach` px, without its mean, float32 [n, 2, SECTORS]: means of
    2 x 2 neighbouring samples, of which the last axis goes around; and how much neighbouring samples, single px, differ
    there, float32 [n].

    grey: float32 [H, W]; spots: float64 [n, 2], (y, x) in its px; tones: (darkest, lightest, gain), what samples are
    clipped to and multiplied by.
    """
    offsets, spots = reach * AROUND, np.ascontiguousarray(spots)
    if backends._C is not None:
        looks, grains = np.empty((len(spots), RINGS // 2, SECTORS), np.float32), np.empty(len(spots), np.float32)
        given, made = (
            (spots.ctypes.data, len(spots), offsets.ctypes.data, tones),
            (looks.ctypes.data, grains.ctypes.data),
        )
        backends._C.surroundings(grey.ctypes.data, *grey.shape, *given, *made)
        return looks, grains
    at = np.floor(spots[:, None, None] + offsets).astype(np.int64).clip(0, np.array(grey.shape) - 1)
    samples = grey[at[..., 0], at[..., 1]].clip(*tones[:2]).astype(np.float32) * np.float32(tones[2])
    around = samples + np.roll(samples, -1, 2)
    means = (around[:, ::2] + around[:, 1::2]) / 4
    looks = means - means.mean((1, 2), keepdims=True)
    grains = abs(np.diff(samples, axis=1)).mean((1, 2)) + abs(samples - np.roll(samples, -1, 2)).mean((1, 2))
    return looks.astype(np.float32), (grains / 2).astype(np.float32)


def distinct(looks, grains, places, order, starts, count, *, turns, apart, marks):
    """(numbers, sides) of the first `count` points, taken in `order` (int64 [n]), that lie at least `apart` from those
    before them in `places` (float64 [n, 2]), can be told from them in any turn by up to `turns` of SECTORS, and have
    room for `marks` beside theirs, the label at the first free one of `label_places(marks)` from `starts` (int64 [n])
    on; fewer where there are not so many. What shows too little to be told from an even surface is left out.
    """
    beside = label_places(marks)
    if backends._C is not None:
        arrays = [np.ascontiguousarray(a) for a in (looks, grains, places, order, starts)]
        limits = turns, apart, marks[1:], beside.ravel(), LEAST, GRAINS, UNLIKE
        found = backends._C.distinct(*(a.ctypes.data for a in arrays), len(order), count, *limits)
        return [number for number, _ in found], [side for _, side in found]
    room, half = marks.room, np.array((marks.tall, marks.wide))
    chosen, labels, numbers = [], [], []
    for i in order.tolist():
        if len(chosen) == count:
            break
        if abs(looks[i]).mean() < LEAST + GRAINS * grains[i]:
            continue
        at = places[i]
        others = places[chosen].reshape(-1, 2)
        if (np.hypot(*(others - at).T) < apart).any():
            continue
        taken = np.array(labels).reshape(-1, 2)
        if (np.hypot(*np.maximum(abs(taken - at) - half, 0).T) < room).any():
            continue
        free = None
        for k in range(8):
            side = int(starts[i] + 3 * k) % 8
            label = at + beside[side]
            inside = (label > half).all() and (label < 1 - half).all()
            rings = np.hypot(*np.maximum(abs(others - label) - half, 0).T) < room
            if inside and not rings.any() and not (abs(taken - label) < 2 * half).all(1).any():
                free = side
                break
        if free is None:
            continue
        if not all(_told(looks[[i, j]], grains[[i, j]], turns) for j in chosen):
            continue
        chosen.append(i)
        labels.append(at + beside[free])
        numbers.append(free)
    return chosen, numbers


def _told(looks, grains, turns):
    apart = min(abs(looks[0] - np.roll(looks[1], turn, 1)).mean() for turn in range(-turns, turns + 1))
    return apart > max(LEAST + GRAINS * grains.mean(), UNLIKE * abs(looks).mean())


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
