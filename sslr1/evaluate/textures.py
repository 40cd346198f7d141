"""Pictures that show nothing, to probe puzzles with: what a solver still finds in them, the puzzle has put there."""

import io
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from sslr1 import ops


@dataclass(frozen=True)
class Textures:
    """`texture`s of these numbers, each drawn when it is asked for: so that no two puzzles need share one. What a
    fitted solver makes of a texture it makes of all its turns, and a few textures would be as few draws. jpeg: see
    `texture`."""

    numbers: range
    jpeg: str | None = None

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, i):
        return Textures(self.numbers[i], self.jpeg) if isinstance(i, slice) else texture(self.numbers[i], self.jpeg)


SUBSAMPLING = {"4:4:4": 0, "4:2:0": 2}


def texture(number, jpeg=None, size=360) -> torch.Tensor:
    """A random picture with the spectrum of a photograph and no direction; uint8 [size, size, 3]. Nothing in it says
    which way is up, so whatever tells how it was turned was put there by the turning.

    jpeg: a key of SUBSAMPLING, to have it through a JPEG file of quality 92. That leaves a direction: the standard
    tables quantise rows and columns differently, and where chroma is halved (4:2:0) its rounding alternates from column
    to column. A puzzle that moves pixels exactly keeps it.
    """
    from PIL import Image

    noise = torch.from_numpy(ops.generator("texture", number).standard_normal((3, size, size), np.float32))
    waves = torch.fft.irfft2(torch.fft.rfft2(noise) * _fall(size), (size, size))
    pixels = (waves / waves.std() * 45 + 127).clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy()
    if jpeg:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=92, subsampling=SUBSAMPLING[jpeg])
        pixels = np.array(Image.open(file))
    return torch.from_numpy(pixels)


@lru_cache
def _fall(size):
    """How the spectrum falls with frequency, float32 [size, size // 2 + 1]."""
    frequency = torch.hypot(torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)[None])
    return frequency.clamp(min=1 / size) ** -1.2
