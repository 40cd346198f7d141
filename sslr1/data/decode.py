"""Bytes to pixels: JPEG files by libjpeg-turbo itself, on which the others are built and whose calls cost more than its
own; opaque 8-bit PNG files by DALI where it is installed; the rest by Pillow.

All give the same pixels of the same files (up to a level where an image is reduced), and refuse the same: turbo and
DALI are given what `headers.read` says they read as Pillow does, and Pillow has the last word on what they can't read.
What a picture shows, its transparency, depth and orientation, is `sslr1.data.pixels`' to say. Of an animation the first
frame counts. With dali_gpu, ordinary JPEG files are decoded on a GPU (`sslr1.data.mixed`), which rounds otherwise.

Images much larger than wanted are reduced here, antialiased. A scale near 1 is left to the renderer, whose maps
resample anyway: a resize costs several times the decoding.
"""

import io
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from importlib.util import find_spec
from threading import local

import numpy as np
import torch

from sslr1.data import headers, mixed, pixels
from sslr1.errors import UserError
from sslr1.files import LFS, NOT_FETCHED
from sslr1.ops.memory import empty


@lru_cache
def formats() -> tuple:
    """Formats that are read, whatever a file's name ends in: AVIF where Pillow was built with it, HEIF and JPEG XL
    where the packages for them are installed."""
    from PIL import features

    known = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]
    if "avif" in features.modules and features.check("avif"):
        known.append("AVIF")
    with suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
        known.append("HEIF")
    with suppress(ImportError):
        import pillow_jxl  # noqa: F401

        known.append("JXL")
    return tuple(known)


NEAR = 1.25  # times max_side: up to here an image is left as it is
MOST_PIXELS = 512  # a byte of a whole JPEG file: 64 a block, of which each takes a bit
# Brands of files that phones write, whatever they call them
_HEIF = dict.fromkeys((b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"), "HEIC")
_HEIF |= dict.fromkeys((b"avif", b"avis"), "AVIF")


class Decoder:
    """decode(list of bytes) -> list of uint8 [H, W, 3] CPU tensors, None where a file can't be decoded.

    backend: "dali", "pillow" or "auto" (DALI where it is installed), for what libjpeg-turbo doesn't read and for
    reducing; the attribute tells which one runs. DALI is imported with the first image that takes it. "dali_gpu": as
    "dali", but that ordinary JPEG files are decoded, reduced and turned on `device`, a GPU's, and come as
    `mixed.Decoded`, to be used on its default stream. threads: files decoded at once. max_side: the longer side, in
    px, to which images with one above 1.25 times it are reduced; None leaves all.
    """

    def __init__(self, backend="auto", threads=1, max_side=None, device=None):
        if backend not in ("auto", "dali", "dali_gpu", "pillow"):
            raise ValueError(f"data.decoder {backend!r} is not one of auto, dali, dali_gpu, pillow")
        if backend in ("dali", "dali_gpu") and not _has_dali():
            raise UserError(f"data.decoder is {backend}, which is not installed: install DALI, or set auto")
        if backend == "dali_gpu" and (device is None or device.type != "cuda"):
            raise UserError("data.decoder is dali_gpu, and this runs without a GPU: set data.decoder=auto")
        if backend == "auto":
            backend = "dali" if _has_dali() else "pillow"
        self.backend, self.max_side = backend, max_side
        dali = _Dali() if backend in ("dali", "dali_gpu") else None
        self._mixed = mixed.Mixed(device, threads, _sound) if backend == "dali_gpu" else None
        self._ways = [_turbo, *([dali.decode] if dali else []), _pillow]
        self._reduce = dali.reduce if dali else _resized
        self._pool = ThreadPoolExecutor(threads, "decode") if threads > 1 else None

    def decode(self, files) -> list:
        files = list(files)
        there = self._on_device(files) if self._mixed else {}
        rest = [n for n in range(len(files)) if n not in there]
        here = (self._pool.map if self._pool else map)(self._one, [files[n] for n in rest])
        found = there | dict(zip(rest, here))
        return [found[n] for n in range(len(files))]

    def _on_device(self, files) -> dict:
        """{number: Decoded} of the files that can be decoded there."""
        known = {n: headers.read(data) for n, data in enumerate(files)}
        known = {n: header for n, header in known.items() if _plain_jpeg(files[n], header)}
        known = {n: header for n, header in known.items() if header.height * header.width <= mixed.BATCH_PIXELS}
        with self._mixed.aside():
            images = self._mixed.decode([files[n] for n in known], list(known.values()))
            found = {
                n: mixed.finished(image, header.orientation, self.max_side if self._large(image) else None)
                for (n, header), image in zip(known.items(), images)
                if image is not None
            }
        if self._mixed.stream:
            for pair in found.values():  # whose memory must not be used again while it is still rendered from
                pair.device.record_stream(torch.cuda.default_stream(pair.device.device))
        return found

    def _large(self, image) -> bool:
        return self.max_side is not None and max(image.shape[:2]) > NEAR * self.max_side

    def _one(self, data):
        header = headers.read(data)
        found = (way(data, header) for way in self._ways)
        image, orientation = next((it for it in found if it is not None), (None, 1))
        if image is None:
            return None
        if self._large(image):
            image = self._reduce(image, self.max_side)
        return image if orientation == 1 else _turned(image, orientation)


def _has_dali() -> bool:
    try:
        return find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # nor anything else of nvidia's
        return False


def decoded(data) -> np.ndarray:
    """The pixels of one file (bytes), uint8 [H, W, 3], as any Decoder gives them. Raises ValueError, which says why it
    can't be."""
    image = Decoder("pillow").decode([data])[0]
    if image is None:
        raise ValueError(why(data))
    return image.numpy()


# Ways to decode: (bytes, Header or None) -> (uint8 [H, W, 3] as stored, orientation), or None for what isn't for this
# one


def _turbo(data, header):
    """An ordinary JPEG file. None too for what libjpeg-turbo has to say anything about."""
    if not _plain_jpeg(data, header):
        return None
    from simplejpeg import decode_jpeg  # here, so that nothing but decoding needs it

    try:
        image = empty(header.height, header.width, 3, dtype=torch.uint8)
        decode_jpeg(data, buffer=image.numpy())
    except (ValueError, MemoryError):
        return None
    return image, header.orientation


def _plain_jpeg(data, header) -> bool:
    return header is not None and header.jpeg and header.height * header.width <= MOST_PIXELS * len(data)


def _sound(data, header) -> bool:
    return _turbo(data, header) is not None


def _pillow(data, _):
    try:
        array, orientation = _opened(data)
        return torch.from_numpy(array), orientation
    except Exception:  # damaged files make Pillow raise nearly anything
        return None


def _opened(data):
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=formats()) as image:
        if image.width * image.height > headers.MAX_PIXELS:
            size = f"{image.width}x{image.height} px"
            raise ValueError(f"{size}, over {headers.MAX_PIXELS:,}: taken for a decompression bomb")
        array = pixels.on_white(image)
        if headers.is_jpeg(data):
            return array, headers.orientation(data)
        return array, pixels.orientation(*pixels.metadata(image))


def _turned(image, orientation):
    view = pixels.upright(image.numpy(), orientation)
    out = empty(*view.shape, dtype=torch.uint8)
    np.copyto(out.numpy(), view)
    return out


def _resized(image, max_side):
    """Reduced to a longer side of `max_side` by Pillow."""
    from PIL import Image

    scale = max_side / max(image.shape[:2])
    height, width = (max(1, round(n * scale)) for n in image.shape[:2])
    return torch.from_numpy(np.array(Image.fromarray(image.numpy()).resize((width, height), Image.Resampling.BICUBIC)))


class _Dali:
    """A DALI pipeline of one sample for each thread that calls.

    One sample a run, because a file whose header can't be parsed makes DALI 2.4 leave `run` while its threads still
    decode the batch's other samples, which crashes the process. A pipeline that met a bad file is unusable and is made
    anew.
    """

    def __init__(self):
        self._local = local()

    def decode(self, data, header):
        """An ordinary PNG file."""
        if header is None or header.jpeg:
            return None
        try:
            return self._run("decode", np.frombuffer(data, np.uint8)[None]), 1
        except RuntimeError:
            self._local.decode = None
            return None

    def reduce(self, image, max_side):
        """Reduced to a longer side of `max_side`."""
        return self._run("reduce", image.numpy()[None], max_side)

    def _run(self, kind, data, max_side=None):
        pipeline = getattr(self._local, kind, None)
        if pipeline is None:
            try:
                pipeline = _pipeline(kind, max_side)
            except ImportError as error:
                raise UserError(f"DALI is installed, but does not import ({error}): set data.decoder=pillow") from None
            setattr(self._local, kind, pipeline)
        from nvidia.dali.tensors import TensorListCPU

        pipeline.feed_input("data", TensorListCPU(data))  # not copied: it outlives the run
        (out,) = pipeline.run()
        frame = np.asarray(out[0])  # DALI's own memory, until the next run
        image = empty(*frame.shape, dtype=torch.uint8)
        np.copyto(image.numpy(), frame)
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


def why(data) -> str:
    """Why a file's bytes can't be decoded, for its user."""
    from PIL import UnidentifiedImageError

    if not data:
        return "the file is empty"
    if data.startswith(LFS):
        return f"it {NOT_FETCHED}"
    try:
        _opened(data)
    except UnidentifiedImageError:
        read = f"not an image of a format that is read ({', '.join(formats())})"
        return f"{_HEIF[data[8:12]]}, {read}" if data[4:8] == b"ftyp" and data[8:12] in _HEIF else read
    except Exception as error:
        return " ".join(str(error).split()) or type(error).__name__
    return "damaged"
