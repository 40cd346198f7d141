"""What puzzles ask about an image: the compiled part against plain NumPy and PyTorch, and both against the
definition."""

import numpy as np
import pytest
import torch

from sslr1.ops import backends
from sslr1.ops.render import IDENTITY_COLOUR
from sslr1.puzzles.picture import SAMPLES, Picture, corners


@pytest.fixture(params=["compiled", "plain"])
def backend(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(backends, "_C", None)
    return request.param


def test_compiled_and_plain_agree(draw, gallery, monkeypatch):
    small = torch.from_numpy(draw.integers(0, 256, (61, 45, 3), dtype=np.uint8))
    for image in [*gallery, small, small.transpose(0, 1)]:
        compiled = Picture(image)
        H, W = image.shape[:2]
        places = [
            (
                draw.uniform(-20, H),
                draw.uniform(-20, W),
                draw.uniform(1, H),
                draw.uniform(1, W),
                *draw.integers(1, 25, 2),
            )
            for _ in range(20)
        ]
        found = [compiled.means(*place) for place in places], compiled.grey()[0], corners(*compiled.grey())
        colours = [tuple(draw.normal(0, 0.6, 12) + np.array(IDENTITY_COLOUR)) for _ in places]
        spreads = [compiled.contrast(*place[:4], colour) for place, colour in zip(places, colours)]
        with monkeypatch.context() as m:
            m.setattr(backends, "_C", None)
            plain = Picture(image)
            assert all(np.array_equal(a, plain.means(*place)) for a, place in zip(found[0], places))
            assert np.abs(found[1] - plain.grey()[0]).max() < 1e-4 and np.array_equal(found[2], corners(*plain.grey()))
            assert np.array_equal(compiled.sample, plain.sample)
            assert spreads == pytest.approx([plain.contrast(*p[:4], c) for p, c in zip(places, colours)], abs=1e-3)


def test_means_are_means(draw, backend):
    """Of an image that is SAMPLES px a side, every pixel counts."""
    pixels = draw.integers(0, 256, (SAMPLES, SAMPLES, 3), dtype=np.uint8)
    means = Picture(torch.from_numpy(pixels)).means(8, 16, 64, 48, 8, 4)
    expected = pixels[8:72, 16:64].reshape(8, 8, 4, 12, 3).mean((1, 3))
    assert np.abs(means - expected).max() < 1e-3


def test_corners_are_where_squares_have_theirs(backend):
    image = torch.full((160, 160, 3), 60, dtype=torch.uint8)
    image[40:90, 50:120] = 200
    found = corners(*Picture(image).grey())
    for y, x in ((40, 50), (40, 120), (90, 50), (90, 120)):
        assert np.linalg.norm(found - (y, x), axis=1).min() < 4
    assert len(found) < 12
    assert len(corners(*Picture(torch.full((160, 160, 3), 60, dtype=torch.uint8)).grey())) == 0


def test_flat(draw, backend):
    assert Picture(torch.full((100, 80, 3), 9, dtype=torch.uint8)).flat
    assert not Picture(
        torch.from_numpy(draw.integers(0, 256, (10, 10, 3), dtype=np.uint8)).repeat_interleave(10, 0)
    ).flat
