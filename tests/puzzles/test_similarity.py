"""Similarity's views."""

import numpy as np
import torch

from sslr1.puzzles import similarity
from sslr1.puzzles.picture import Picture


def test_views_that_show_nothing_are_told(draw):
    image = Picture(torch.from_numpy(np.full((256, 256, 3), 127, np.uint8)))
    pair, told = similarity.pair_of_views(draw, image, 1, 112, None)
    assert len(pair) == 2 and not told
