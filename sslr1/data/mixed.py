"""JPEG files to pixels on a GPU, whole batches at once, by DALI's `mixed` decoder (data.decoder=dali_gpu).

It is given ordinary files only, as `headers.read` says: a header that can't be parsed takes DALI's process down. A file
that fails behind a good header makes its pipeline unusable: the pipeline is made anew, the batch without those of its
files that libjpeg-turbo fails at too is run again, and where that fails as well, its halves are, down to the files that
fail alone. So damaged files cost a batch one pipeline made anew; each at which only this decoder fails costs
1 + log2(files) of them at most.
"""

from contextlib import contextmanager, nullcontext
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from sslr1.errors import UserError

BATCH = 64  # files a run at most
BATCH_PIXELS = 1 << 26  # px of them together, 3 bytes each; a file of more goes another way

# What undoes each of EXIF's orientations, of tensors [H, W, 3]; as `pixels.upright` of arrays
_UPRIGHT = {
    1: lambda x: x,
    2: lambda x: x.flip(1),
    3: lambda x: x.flip(0, 1),
    4: lambda x: x.flip(0),
    5: lambda x: x.transpose(0, 1),
    6: lambda x: x.transpose(0, 1).flip(1),
    7: lambda x: x.flip(0, 1).transpose(0, 1),
    8: lambda x: x.transpose(0, 1).flip(0),
}


class Decoded(NamedTuple):
    """An image where puzzles are drawn from it, on the CPU, and the same where it was decoded: uint8 [H, W, 3]."""

    host: torch.Tensor
    device: torch.Tensor


class Mixed:
    """decode(files, headers) -> list of uint8 [H, W, 3] on the device, as stored, None for a file that fails. Raises
    UserError where all of a batch do that libjpeg-turbo decodes.

    device: a GPU's, or the CPU's, whose batches are decoded there (for tests); sound(file, header): whether
    libjpeg-turbo decodes it; make(device, threads): what has DALI's feed_input and run, a pipeline unless given.
    """

    def __init__(self, device, threads, sound, make=None):
        self.device, self.threads, self.sound, self.make = device, threads, sound, make or _pipeline
        self.pipeline, self.problem = None, None
        self.lock = Lock()  # of stores that share it, each with a thread of its own
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def aside(self):
        """Inside, one thread alone, and on a stream of its own: a download waits for nothing of the trainer's."""
        with self.lock, torch.cuda.stream(self.stream) if self.stream else nullcontext():
            yield

    def decode(self, files, headers) -> list:
        found = []
        for batch in _batches(headers):
            found += self._batch([files[n] for n in batch], [headers[n] for n in batch])
        return found

    def _batch(self, files, headers) -> list:
        found = self._run(files, headers)
        if found:
            return found
        left = [n for n, it in enumerate(zip(files, headers)) if self.sound(*it)]
        found = [None] * len(files)
        again = self._search([files[n] for n in left], [headers[n] for n in left], failed=len(left) == len(files))
        for n, image in zip(left, again):
            found[n] = image
        if len(left) > 1 and all(image is None for image in again):
            raise UserError(
                f"DALI's decoder on the GPU fails at each of {len(left)} files that libjpeg-turbo decodes "
                f"({self.problem}): set data.decoder=dali"
            )
        return found

    def _search(self, files, headers, failed=False) -> list:
        """failed: whether these have been run, all together."""
        if not files:
            return []
        found = None if failed else self._run(files, headers)
        if found or len(files) == 1:
            return found or [None]
        half = len(files) // 2
        return self._search(files[:half], headers[:half]) + self._search(files[half:], headers[half:])

    def _run(self, files, headers):
        """Their pixels, or None if one of them fails."""
        self.pipeline = self.pipeline or self.make(self.device, self.threads)
        try:
            self.pipeline.feed_input("data", [np.frombuffer(file, np.uint8) for file in files])
            (out,) = self.pipeline.run()
            sizes = [tuple(out[n].shape()) for n in range(len(files))]
            if sizes != [(header.height, header.width, 3) for header in headers]:
                raise RuntimeError("a size that is not its header's")
        except RuntimeError as error:
            self.pipeline, self.problem = None, " ".join(str(error).split())[:200]
            return None
        images = [torch.empty(size, dtype=torch.uint8, device=self.device) for size in sizes]
        for n, image in enumerate(images):
            _copy(out[n], image)  # DALI's own memory, until the next run
        if self.stream:
            torch.cuda.current_stream(self.device).synchronize()
        return images


def finished(image, orientation, max_side) -> Decoded:
    """Reduced to a longer side of max_side, if that is given, and turned upright, where it lies; and downloaded."""
    if max_side is not None:
        scale = max_side / max(image.shape[:2])
        size = [max(1, round(n * scale)) for n in image.shape[:2]]
        planes = image.permute(2, 0, 1)[None].float()
        planes = F.interpolate(planes, size, mode="bicubic", antialias=True, align_corners=False)
        image = planes[0].round_().clamp_(0, 255).to(torch.uint8).permute(1, 2, 0)
    image = _UPRIGHT[orientation](image).contiguous()
    return Decoded(image.cpu(), image)


def _batches(headers):
    """Lists of the numbers of neighbours that are decoded together."""
    batch, pixels = [], 0
    for n, header in enumerate(headers):
        more = header.height * header.width
        if batch and (len(batch) == BATCH or pixels + more > BATCH_PIXELS):
            yield batch
            batch, pixels = [], 0
        batch.append(n)
        pixels += more
    if batch:
        yield batch


def _copy(frame, image):
    from nvidia.dali.plugin.pytorch import feed_ndarray

    stream = torch.cuda.current_stream(image.device) if image.is_cuda else None
    feed_ndarray(frame, image, cuda_stream=stream)


def _pipeline(device, threads):
    try:
        from nvidia.dali import fn, pipeline_def, types
    except ImportError as error:
        raise UserError(f"DALI is installed, but does not import ({error}): set data.decoder=pillow") from None
    gpu = device.type == "cuda"

    @pipeline_def(
        batch_size=BATCH,
        num_threads=threads,
        device_id=(device.index or 0) if gpu else None,
        prefetch_queue_depth=1,
        exec_async=False,
        exec_pipelined=False,
    )
    def build():
        file = fn.external_source(name="data", dtype=types.UINT8, ndim=1)
        return fn.decoders.image(
            file,
            device="mixed" if gpu else "cpu",
            output_type=types.RGB,
            adjust_orientation=False,
            jpeg_fancy_upsampling=True,  # as libjpeg-turbo does it
        )

    pipeline = build()
    pipeline.build()
    return pipeline
