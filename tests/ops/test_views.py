"""Pairs of views: the compiled part against the same in Python."""

import numpy as np
import torch

from sslr1.ops import keys, views
from sslr1.puzzles import similarity
from sslr1.puzzles.picture import Picture


def test_compiled_and_plain_agree(seed, gallery, monkeypatch):
    """Crop by crop and number by number, whatever the image shows, and the generator is left alike."""
    flat, narrow = torch.full((300, 400, 3), 90, dtype=torch.uint8), gallery[0][:280, :60]
    for i, image in enumerate([*gallery, flat, narrow]):
        for level in (1, 2):
            for side in (112, 252):
                found = []
                for built in (views._C, None):
                    monkeypatch.setattr(views, "_C", built)
                    draw = keys.generator("views", seed, i, level, side)
                    pairs = [similarity.pair_of_views(draw, Picture(image), level, side, None) for _ in range(5)]
                    found.append((pairs, draw.random()))
                    monkeypatch.undo()
                assert views._C is None or found[0] == found[1]


def test_views_that_show_nothing_are_told(draw):
    image = Picture(torch.from_numpy(np.full((256, 256, 3), 127, np.uint8)))
    pair, told = similarity.pair_of_views(draw, image, 1, 112, None)
    assert len(pair) == 2 and not told
