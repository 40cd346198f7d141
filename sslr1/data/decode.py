"""Bytes to pixels: DALI where it is installed, Pillow elsewhere. EXIF orientation honoured, RGB."""

import io

import numpy as np
import torch


class Decoder:
    """decode(list of bytes) -> list of uint8 [H, W, 3] CPU tensors, None where a file can't be decoded.

    backend: "dali", "pillow" or "auto" (DALI if it imports). `backend` tells which one runs.
    """

    def __init__(self, backend="auto", threads=1, batch=64):
        if backend not in ("auto", "dali", "pillow"):
            raise ValueError(f"data.decoder {backend!r} is not one of auto, dali, pillow")
        if backend == "auto":
            try:
                import nvidia.dali  # noqa: F401

                backend = "dali"
            except ImportError:
                backend = "pillow"
        self.backend, self.threads, self.batch = backend, threads, batch
        self._pipeline = _pipeline(threads, batch) if backend == "dali" else None

    def decode(self, files) -> list:
        if self.backend == "pillow":
            return [_pillow(data) for data in files]
        out = []
        for start in range(0, len(files), self.batch):
            out += self._dali(files[start : start + self.batch])
        return out

    def _dali(self, files):
        # an empty sample is no sample to DALI; None here, None in the answer
        arrays = [np.frombuffer(data, np.uint8) for data in files if data]
        if not arrays:
            return [None] * len(files)
        try:
            self._pipeline.feed_input("files", arrays)
            (decoded,) = self._pipeline.run()
        except RuntimeError:  # one bad sample spoils a pipeline: make a new one and find the culprit by halves
            self._pipeline = _pipeline(self.threads, self.batch)
            if len(files) == 1:
                return [None]
            middle = len(files) // 2
            return self._dali(files[:middle]) + self._dali(files[middle:])
        images = iter([torch.from_numpy(np.array(decoded.at(i))) for i in range(len(decoded))])
        return [next(images) if data else None for data in files]


def _pipeline(threads, batch):
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=batch, num_threads=threads, device_id=None, prefetch_queue_depth=1)
    def build():
        files = fn.external_source(name="files", dtype=types.UINT8, ndim=1)
        return fn.decoders.image(files, device="cpu", output_type=types.RGB)

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
