"""Bytes to pixels: DALI where it is installed, Pillow elsewhere. EXIF orientation honoured, RGB."""

import io
from concurrent.futures import ThreadPoolExecutor
from threading import local

import numpy as np
import torch


class Decoder:
    """decode(list of bytes) -> list of uint8 [H, W, 3] CPU tensors, None where a file can't be decoded.

    backend: "dali", "pillow" or "auto" (DALI if it imports); the attribute tells which one runs. threads: files decoded at
    once.
    """

    def __init__(self, backend="auto", threads=1):
        if backend not in ("auto", "dali", "pillow"):
            raise ValueError(f"data.decoder {backend!r} is not one of auto, dali, pillow")
        if backend == "auto":
            try:
                import nvidia.dali  # noqa: F401

                backend = "dali"
            except ImportError:
                backend = "pillow"
        self.backend = backend
        self._one = _Dali() if backend == "dali" else _pillow
        self._pool = ThreadPoolExecutor(threads, "decode") if threads > 1 else None

    def decode(self, files) -> list:
        return list((self._pool.map if self._pool else map)(self._one, files))


class _Dali:
    """A DALI pipeline of one sample for each thread that calls.

    One sample a run, because a file whose header can't be parsed makes DALI 2.4 leave `run` while its threads still decode
    the batch's other samples, which crashes the process. A pipeline that met a bad
    file is unusable and is made anew.
    """

    def __init__(self):
        self._local = local()

    def __call__(self, data):
        if not data:
            return None
        pipeline = getattr(self._local, "pipeline", None)
        if pipeline is None:
            pipeline = self._local.pipeline = _pipeline()
        try:
            pipeline.feed_input("file", [np.frombuffer(data, np.uint8)])
            (decoded,) = pipeline.run()
        except RuntimeError:
            self._local.pipeline = None
            return None
        return torch.from_numpy(np.array(decoded.at(0)))


def _pipeline():
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def build():
        file = fn.external_source(name="file", dtype=types.UINT8, ndim=1)
        return fn.decoders.image(file, device="cpu", output_type=types.RGB)

    pipeline = build()
    pipeline.build()
    return pipeline


def _pillow(data):
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as image:
            image = ImageOps.exif_transpose(image)
            return torch.from_numpy(np.array(image.convert("RGB")))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
