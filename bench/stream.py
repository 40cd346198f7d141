"""JPEG files become puzzle patches: decode, draw and render, against DALI's decoding alone on the same files and
threads."""

import io
import itertools
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from PIL import Image
from row import Row, Sides

from sslr1 import puzzles

IMAGES, STEP = 64, 8


_made = itertools.count()


def photograph(size=(480, 640)):
    """Random, with the spectrum of a photograph, so that decoding costs what it costs on one."""
    noise = np.random.default_rng((torch.initial_seed() % 2**32, next(_made))).standard_normal((*size, 3))
    y, x = np.fft.fftfreq(size[0])[:, None], np.fft.fftfreq(size[1])[None]
    fall = 1 / np.maximum(np.hypot(y, x), 1 / max(size))
    values = np.fft.ifft2(np.fft.fft2(noise, axes=(0, 1)) * fall[..., None], axes=(0, 1)).real
    return ((values - values.min()) / np.ptp(values) * 255).astype(np.uint8)


def rows(mode):
    if mode != "cpu":
        return []
    threads = torch.get_num_threads()
    return [
        Row(
            what=f"{IMAGES} JPEG files of 640x480 → the default mixture of puzzles → fp32 patches",
            against=f"DALI decoding alone, in one batch, {threads} threads",
            goal="0.5",
            make=partial(sides, threads),
        )
    ]


def sides(threads):
    from sslr1.data import Decoder  # which needs more packages than the other benchmarks

    files = []
    for _ in range(IMAGES):
        out = io.BytesIO()
        Image.fromarray(photograph()).save(out, "JPEG", quality=90)
        files.append(out.getvalue())
    decoder = Decoder()
    if decoder.backend != "dali":
        raise ModuleNotFoundError(name="DALI")
    shares = [name for name, share in puzzles.MIXTURE.items() for _ in range(round(share * IMAGES))]
    names = [shares[(7 * i) % len(shares)] for i in range(IMAGES)]  # the default mixture, interleaved
    pool = [puzzles.Picture(image) for image in decoder.decode(files[:16])]  # as the trainer's image store keeps them
    alone = batched(threads)
    pool_of_threads = ThreadPoolExecutor(threads)

    def ours():
        """Steps of 8 puzzles on as many threads as there are: each decodes, draws, renders, and lets its patches go, as
        a training step does."""
        return sum(pool_of_threads.map(step, range(0, IMAGES, STEP)))

    def step(first):
        which = range(first, first + STEP)
        images = decoder.decode(files[first : first + STEP])
        made = puzzles.make(images, [names[i] for i in which], index=which, pool=pool)
        return len(made.render_patches()[0])

    def check(patches, _):
        assert patches > IMAGES * 256

    return Sides(ours=ours, peer=lambda: alone(files), check=check)


def batched(threads):
    """DALI as it is used alone: one pipeline, all files of a call in one batch."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=IMAGES, num_threads=threads, device_id=None, prefetch_queue_depth=1)
    def build():
        file = fn.external_source(name="file", dtype=types.UINT8, ndim=1)
        return fn.decoders.image(file, device="cpu", output_type=types.RGB)

    pipeline = build()
    pipeline.build()

    def decode(files):
        pipeline.feed_input("file", [np.frombuffer(data, np.uint8) for data in files])
        return pipeline.run()

    return decode
