"""Colour maps, 3x4 row by row on RGB in 0..255: the jitter of SimCLR's augmentation and how to compose it."""

import math
from itertools import pairwise

import numpy as np

from sslr1.puzzles.look import LUMA
from sslr1.sums import plain_sum

_TO_YIQ = np.array(((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)))
_TO_RGB = np.linalg.inv(_TO_YIQ)
# a rotation of the chroma plane of YIQ by an angle is KEEP + cos * COS + sin * SIN
_KEEP = np.outer(_TO_RGB[:, 0], _TO_YIQ[0])
_COS = np.outer(_TO_RGB[:, 1], _TO_YIQ[1]) + np.outer(_TO_RGB[:, 2], _TO_YIQ[2])
_SIN = np.outer(_TO_RGB[:, 2], _TO_YIQ[1]) - np.outer(_TO_RGB[:, 1], _TO_YIQ[2])
_TERMS = np.stack([_KEEP, _COS, _SIN, np.tile(LUMA, (3, 1))], -1).reshape(9, 4).tolist()  # of each of 3 x 3 entries


def jitter(rng, mean, brightness, contrast, saturation, hue):
    """A random colour map, as in SimCLR (arXiv 2002.05709): factors uniform in 1 ± their argument, hue turned by up to
    `hue` of a full turn. mean: the picture's mean RGB, floats, around which contrast scales."""
    b, c, s = rng.uniform(-1, 1, 3).tolist()
    b, c, s = 1 + b * brightness, 1 + c * contrast, 1 + s * saturation
    # brightness scales, contrast scales about the mean luma, and the other two leave greys as they are
    angle = 2 * math.pi * rng.uniform(-hue, hue)
    cos, sin, scale = s * math.cos(angle), s * math.sin(angle), b * c
    rest = (1 - c) * b * plain_sum(v * m for v, m in zip(LUMA, mean))
    keeps, turns, tilts, greys = scale * s, scale * cos, scale * sin, scale * (1 - s)
    a, b, c, d, e, f, g, h, i = (keeps * k + turns * t + tilts * v + greys * y for k, t, v, y in _TERMS)
    return (a, b, c, rest, d, e, f, rest, g, h, i, rest)


def greyed(colour):
    """The colour map, then everything that isn't luma taken away."""
    colour = np.reshape(colour, (3, 4))
    grey = plain_sum(weight * row for weight, row in zip(LUMA, colour))
    return tuple(np.tile(grey, 3).tolist())


def equalise(quantiles):
    """Colour maps, one for each step between neighbouring quantiles of a picture's luma: each takes its own step to
    0..255 and is clipped outside it, so that their mean spreads the luma evenly."""
    gains = [255 / (high - low) for low, high in pairwise(quantiles)]
    return [_affine(np.tile(gain * np.array(LUMA), (3, 1)), -gain * low) for gain, low in zip(gains, quantiles)]


def constant(rgb):
    """One colour, whatever was there."""
    return _affine(np.zeros((3, 3)), rgb)


def _affine(matrix, offset):
    offset = np.broadcast_to(offset, 3)[:, None]
    return tuple(np.concatenate([matrix, offset], 1).ravel().tolist())
