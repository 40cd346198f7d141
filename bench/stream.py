"""JPEG files become puzzle patches: decode, draw and render, against DALI's decoding alone on the same files and threads."""

import io

import numpy as np
import torch
from PIL import Image

from sslr1 import puzzles
from sslr1.data import Decoder

IMAGES = 64


def photograph(size=(480, 640)):
    """Random, with the spectrum of a photograph, so that decoding costs what it costs on one."""
    noise = np.random.default_rng(torch.initial_seed() % 2**32).standard_normal((*size, 3))
    y, x = np.fft.fftfreq(size[0])[:, None], np.fft.fftfreq(size[1])[None]
    fall = 1 / np.maximum(np.hypot(y, x), 1 / max(size))
    values = np.fft.ifft2(np.fft.fft2(noise, axes=(0, 1)) * fall[..., None], axes=(0, 1)).real
    return ((values - values.min()) / np.ptp(values) * 255).astype(np.uint8)


def rows():
    out = io.BytesIO()
    Image.fromarray(photograph()).save(out, "JPEG", quality=90)
    files = [out.getvalue()] * IMAGES
    decoder = Decoder(threads=torch.get_num_threads())
    names = [puzzles.NAMES[i % len(puzzles.NAMES)] for i in range(IMAGES)]
    pool = [torch.from_numpy(photograph() // k) for k in (1, 2, 3, 4, 5)]
    row = {
        "what": f"{IMAGES} JPEG files of 640x480 → puzzles of every kind → patches",
        "against": "DALI decoding alone",
        "goal": "0.5",
        "ours": None,
        "peer": None,
    }
    if decoder.backend != "dali":
        yield {**row, "why_not": "DALI is not installed"}
        return

    def ours():
        batch = puzzles.make(decoder.decode(files), names, pool=pool)
        return batch.render_patches()

    assert len(ours()[1]) and all(image is not None for image in decoder.decode(files))
    yield {**row, "ours": ours, "peer": lambda: decoder.decode(files)}
