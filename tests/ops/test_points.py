"""Choosing points: the compiled part against plain NumPy, and both against what they promise."""

import numpy as np
import pytest

from sslr1.ops import backends
from sslr1.puzzles import points

MARKS = points.Marks(ring=0.05, tall=0.05, wide=0.04, room=0.08)
LIMITS = {"turns": 2, "apart": 0.15, "marks": MARKS}
TONES = (20.0, 230.0, 0.9)


@pytest.fixture(params=["compiled", "plain"])
def backend(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(backends, "_C", None)
    return request.param


def random_points(draw):
    """(grey, spots, what `distinct` takes but for looks and grains); cells of 5 px, so that looks differ."""
    grey = draw.uniform(0, 255, (12, 20)).repeat(5, 0).repeat(5, 1).astype(np.float32)
    grey[:, 50:] = grey[:, :50]  # every point of one half looks like one of the other
    n = int(draw.integers(0, 60))
    spots = draw.uniform(0, 1, (n, 2)) * grey.shape
    copies = draw.integers(0, max(n, 1), n // 3)
    spots[: n // 3] = (spots[copies] + (0, 50)) % grey.shape
    return grey, spots, (draw.uniform(0, 1, (n, 2)), draw.permutation(n), draw.integers(0, 8, n))


def test_compiled_and_plain_agree(draw, monkeypatch):
    for _ in range(50):
        count = int(draw.integers(2, 9))
        grey, spots, cloud = random_points(draw)
        refs, places = draw.uniform(0, 1, (count, 192, 2)), draw.uniform(0, 1, (count, 2))
        looks = points.surroundings(grey, spots, 9.0, TONES)
        found = points.distinct(*looks, *cloud, count, **LIMITS), points.balanced(refs, places)
        with monkeypatch.context() as m:
            m.setattr(backends, "_C", None)
            for one, other in zip(points.surroundings(grey, spots, 9.0, TONES), looks):
                assert one.dtype == other.dtype == np.float32 and one.shape == other.shape
                np.testing.assert_allclose(one, other, atol=1e-3)
            assert points.distinct(*looks, *cloud, count, **LIMITS) == found[0]
            plain = points.balanced(refs, places)
        assert (plain is None) == (found[1] is None)
        if plain is not None:
            assert np.array_equal(plain[0], found[1][0]) and np.abs(plain[1] - found[1][1]).max() < 1e-12


def test_distinct_points_lie_apart_with_room_for_their_marks(draw, backend):
    grey, spots, (places, order, starts) = random_points(draw)
    looks = points.surroundings(grey, spots, 9.0, TONES)
    chosen, sides = points.distinct(*looks, places, order, starts, 8, **LIMITS)
    assert len(chosen) == len(sides) <= 8 and all(np.diff([order.tolist().index(i) for i in chosen]) > 0)
    half = np.array((MARKS.tall, MARKS.wide))
    labels = places[chosen] + points.label_places(MARKS)[sides]
    for i, label in zip(chosen, labels):
        assert (label >= half).all() and (label <= 1 - half).all()
        for j, other in zip(chosen, labels):
            if i != j:
                assert np.linalg.norm(places[i] - places[j]) >= LIMITS["apart"]
                assert np.hypot(*np.maximum(abs(label - places[j]) - half, 0)) >= MARKS.room
                assert (abs(label - other) >= 2 * half).any()


def test_a_label_touches_its_ring():
    for label in points.label_places(MARKS):
        gap = np.hypot(*np.maximum(abs(label) - (MARKS.tall, MARKS.wide), 0))
        assert abs(gap - MARKS.ring) < 1e-9


def test_points_that_look_alike_are_not_distinct(backend):
    edge = np.where(np.arange(16) < 8, 60.0, -60.0).astype(np.float32)
    looks = np.stack([np.stack([edge, edge])] * 4)
    looks[2] = np.roll(looks[0], 6, 1)
    looks[3] *= 0.02  # hardly anything there
    places = np.array(((0.2, 0.2), (0.8, 0.8), (0.2, 0.8), (0.8, 0.2)))

    def chosen(turns, grain):
        cloud = np.full(4, grain, np.float32), places, np.array((3, 1, 0, 2)), np.zeros(4, int)
        return points.distinct(looks, *cloud, 4, turns=turns, apart=0.15, marks=MARKS)[0]

    assert chosen(0, 10.0) == chosen(2, 10.0) == [1, 2]
    assert chosen(6, 10.0) == chosen(8, 10.0) == [1]  # one is the other, turned
    assert chosen(5, 1.0) == [1]  # nearly so: two places at one edge
    assert chosen(2, 88.0) == [1, 2]  # they differ by 60 levels and more
    assert chosen(0, 92.0) == []  # no more than their grain does: what they show is noise


def test_what_a_view_clips_or_dims_tells_nothing(draw, backend):
    grey = draw.uniform(200, 255, (8, 10)).repeat(5, 0).repeat(5, 1).astype(np.float32)
    plain = points.surroundings(grey, np.array(((20.0, 25.0),)), 9.0, (0.0, 255.0, 1.0))
    dimmed = points.surroundings(grey, np.array(((20.0, 25.0),)), 9.0, (0.0, 255.0, 0.5))
    clipped = points.surroundings(grey, np.array(((20.0, 25.0),)), 9.0, (0.0, 150.0, 1.0))
    for whole, half, none in zip(plain, dimmed, clipped):
        np.testing.assert_allclose(half, whole / 2, atol=1e-3)
        assert abs(none).max() < 1e-3 < abs(whole).max()


def test_balanced_weights_have_even_margins(draw, backend):
    places = np.array(((0.3, 0.3), (0.3, 0.7), (0.7, 0.3), (0.7, 0.7)))
    refs = draw.uniform(0, 1, (4, 192, 2))
    ranks, weights = points.balanced(refs, places)
    assert np.abs(weights.sum(0) - 1).max() < 1e-3 and np.abs(weights.sum(1) - 1).max() < 1e-3
    for point, k in ((0, 0), (2, 191)):
        distances = np.linalg.norm(refs[point, k] - places, axis=1)
        assert ranks[point, k] == (distances < distances[point]).sum()
    assert points.balanced(np.broadcast_to(places[:, None], (4, 192, 2)), places) is None  # each is always the nearest
