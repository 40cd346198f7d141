"""Choosing points: the compiled part against plain NumPy, and both against what they promise."""

import numpy as np
import pytest

from sslr1.ops import backends
from sslr1.puzzles import points


@pytest.fixture(params=["compiled", "plain"])
def backend(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(backends, "_C", None)
    return request.param


def random_points(draw):
    grey = draw.uniform(0, 255, (40, 50)).astype(np.float32)
    grey[:, 25:] = grey[:, :25]  # every point of one half looks like one of the other
    n = int(draw.integers(0, 60))
    spots = draw.uniform(0, 1, (n, 2)) * grey.shape
    copies = draw.integers(0, max(n, 1), n // 3)
    spots[: n // 3] = (spots[copies] + (0, 25)) % grey.shape
    return grey, spots, draw.uniform(0, 1, (n, 2)), draw.permutation(n)


LIMITS = {"radius": 3, "apart": 0.1, "alike": 0.9}


def test_compiled_and_plain_agree(draw, monkeypatch):
    for _ in range(50):
        count = int(draw.integers(2, 9))
        cloud = random_points(draw)
        refs, places = draw.uniform(0, 1, (count, 192, 2)), draw.uniform(0, 1, (count, 2))
        found = points.distinct(*cloud, count, **LIMITS), points.balanced(refs, places)
        with monkeypatch.context() as m:
            m.setattr(backends, "_C", None)
            assert points.distinct(*cloud, count, **LIMITS) == found[0]
            plain = points.balanced(refs, places)
        assert (plain is None) == (found[1] is None)
        if plain is not None:
            assert np.array_equal(plain[0], found[1][0]) and np.abs(plain[1] - found[1][1]).max() < 1e-12


def test_distinct_points_lie_apart_and_come_in_order(draw, backend):
    grey, spots, places, order = random_points(draw)
    chosen = points.distinct(grey, spots, places, order, 8, **LIMITS)
    assert len(chosen) <= 8 and all(np.diff([order.tolist().index(i) for i in chosen]) > 0)
    for i in chosen:
        assert all(np.linalg.norm(places[i] - places[j]) >= 0.1 for j in chosen if j != i)


def test_points_that_look_alike_are_not_distinct(draw, backend):
    grey = np.tile(draw.uniform(0, 255, (40, 20)).astype(np.float32), 2)
    spots, places = np.array(((20.5, 8.5), (20.5, 28.5), (9.5, 9.5))), np.array(((0.0, 0.0), (1.0, 1.0), (0.0, 1.0)))
    assert points.distinct(grey, spots, places, np.array((1, 0, 2)), 3, **LIMITS) == [1, 2]


def test_balanced_weights_have_even_margins(draw, backend):
    places = np.array(((0.3, 0.3), (0.3, 0.7), (0.7, 0.3), (0.7, 0.7)))
    refs = draw.uniform(0, 1, (4, 192, 2))
    ranks, weights = points.balanced(refs, places)
    assert np.abs(weights.sum(0) - 1).max() < 1e-3 and np.abs(weights.sum(1) - 1).max() < 1e-3
    for point, k in ((0, 0), (2, 191)):
        distances = np.linalg.norm(refs[point, k] - places, axis=1)
        assert ranks[point, k] == (distances < distances[point]).sum()
    assert points.balanced(np.broadcast_to(places[:, None], (4, 192, 2)), places) is None  # each is always the nearest
