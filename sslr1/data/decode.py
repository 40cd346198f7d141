"""Bytes to pixels: upright JPEG files by libjpeg-turbo itself, on which both of the others are built and whose calls cost more than
its own; what is left by DALI where it is installed, and by Pillow. EXIF orientation honoured, RGB.

All give the same pixels of the same files (up to a level where an image is reduced), and refuse the same: turbo and DALI are given
what `headers.read` says they read as Pillow does, and Pillow has the last word on what they can't read.
Of an animation the first frame counts; transparency is dropped; 16-bit pixels lose their lower byte.

Images much larger than wanted are reduced here, antialiased. A scale near 1 is left to the renderer, whose maps resample
anyway: a resize costs several times the decoding.
"""

import io
from concurrent.futures import ThreadPoolExecutor
from threading import local

import numpy as np
import torch

from sslr1.data import headers
from sslr1.errors import UserError
from sslr1.ops.memory import empty

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # whatever a file's name ends in

NEAR = 1.25  # times max_side: up to here an image is left as it is
MOST_PIXELS = 512  # a byte of a whole JPEG file: 64 a block, of which each takes a bit


class Decoder:
    """decode(list of bytes) -> list of uint8 [H, W, 3] CPU tensors, None where a file can't be decoded.

    backend: "dali", "pillow" or "auto" (DALI if it imports), for all but upright JPEG files; the attribute tells which one runs.
    threads: files decoded at once. max_side: the longer side, in px, to which images with one above 1.25 times it are reduced;
    None leaves all.
    """

    def __init__(self, backend="auto", threads=1, max_side=None):
        if backend not in ("auto", "dali", "pillow"):
            raise ValueError(f"data.decoder {backend!r} is not one of auto, dali, pillow")
        if backend != "pillow":
            try:
                import nvidia.dali  # noqa: F401

                backend = "dali"
            except ImportError:
                if backend == "dali":
                    raise UserError("data.decoder is dali, which is not installed: install it, or set auto") from None
                backend = "pillow"
        self.backend, self.max_side = backend, max_side
        self._ways = [_turbo, *([_Dali()] if backend == "dali" else []), _pillow]
        self._pool = ThreadPoolExecutor(threads, "decode") if threads > 1 else None

    def decode(self, files) -> list:
        return list((self._pool.map if self._pool else map)(self._one, files))

    def _one(self, data):
        header = headers.read(data)
        images = (way(data, header, self.max_side) for way in self._ways)
        return next((image for image in images if image is not None), None)


def _turbo(data, header, max_side):
    """An upright JPEG file's pixels. None for what isn't, what has to be reduced, and what libjpeg-turbo has to say anything about."""
    if header is None or not header.jpeg or header.turned:
        return None
    size = header.height, header.width
    if _reduced(size, max_side) or header.height * header.width > MOST_PIXELS * len(data):
        return None
    from simplejpeg import decode_jpeg  # here, so that nothing but decoding needs it

    try:
        image = empty(*size, 3, dtype=torch.uint8)
        decode_jpeg(data, buffer=image.numpy())
    except (ValueError, MemoryError):
        return None
    return image


class _Dali:
    """A DALI pipeline of one sample for each thread that calls. None for what Pillow has to look at.

    One sample a run, because a file whose header can't be parsed makes DALI 2.4 leave `run` while its threads still decode
    the batch's other samples, which crashes the process. A pipeline that met a bad file is unusable and is made anew.
    """

    def __init__(self):
        from nvidia.dali.tensors import TensorListCPU

        self._batch = TensorListCPU
        self._local = local()

    def __call__(self, data, header, max_side):
        if header is None or not headers.whole(data, header):
            return None
        try:
            image = self._run("decode", np.frombuffer(data, np.uint8)[None])
        except RuntimeError:
            self._local.decode = None
            return None
        if _reduced(image.shape, max_side):
            image = self._run("reduce", image.numpy()[None], max_side)
        return image

    def _run(self, kind, data, max_side=None):
        pipeline = getattr(self._local, kind, None)
        if pipeline is None:
            pipeline = _pipeline(kind, max_side)
            setattr(self._local, kind, pipeline)
        pipeline.feed_input("data", self._batch(data))  # not copied: it outlives the run
        (out,) = pipeline.run()
        pixels = np.asarray(out[0])  # DALI's own memory, until the next run
        image = empty(*pixels.shape, dtype=torch.uint8)
        np.copyto(image.numpy(), pixels)
        return image


def _pipeline(kind, max_side):
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(
        batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1, exec_async=False, exec_pipelined=False
    )
    def build():
        if kind == "decode":
            file = fn.external_source(name="data", dtype=types.UINT8, ndim=1, no_copy=True)
            return fn.decoders.image(file, device="cpu", output_type=types.RGB)
        image = fn.external_source(name="data", dtype=types.UINT8, ndim=3, layout="HWC", no_copy=True)
        return fn.resize(image, resize_longer=max_side, interp_type=types.INTERP_CUBIC, antialias=True)

    pipeline = build()
    pipeline.build()
    return pipeline


def _reduced(shape, max_side):
    """(height, width) to reduce an image of this shape to, None to leave it."""
    longer = max(shape[:2])
    if max_side is None or longer <= NEAR * max_side:
        return None
    return tuple(max(1, round(n * max_side / longer)) for n in shape[:2])


def why(data) -> str:
    """Why a file's bytes can't be decoded, for its user."""
    from PIL import UnidentifiedImageError

    if not data:
        return "the file is empty"
    try:
        _decoded(data)
    except UnidentifiedImageError:
        return f"not an image of a format that is read ({', '.join(FORMATS)})"
    except Exception as error:
        return " ".join(str(error).split()) or type(error).__name__
    return "damaged"


def _pillow(data, header=None, max_side=None):
    try:
        return torch.from_numpy(_decoded(data, max_side))
    except Exception:  # damaged files make Pillow raise nearly anything
        return None


def _decoded(data, max_side=None):
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        if image.width * image.height > headers.MAX_PIXELS:
            raise ValueError(
                f"{image.width}x{image.height} px, over {headers.MAX_PIXELS:,}: taken for a decompression bomb"
            )
        if image.mode in ("I", "F"):
            raise ValueError("32-bit pixels, which have no fixed range")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        image = image.convert("RGB")
        size = _reduced((image.height, image.width), max_side)
        if size:
            image = image.resize(size[::-1], Image.Resampling.BICUBIC)
        return np.array(image)
