"""Decoded images by number, the most recent ones kept, and a pool of some of them."""

from collections import OrderedDict
from threading import Lock

from sslr1.data.decode import Decoder, why
from sslr1.data.images import FEWEST, ImageFolder
from sslr1.data.mixed import Decoded
from sslr1.errors import UserError
from sslr1.puzzles.picture import MAX_SIDE, MIN_SIDE, Picture


class ImageStore:
    """Decoded images by number; keeps the most recent ones up to `cache_bytes`.

    An image is bad, and None, if its bytes can't be read or decoded, its shorter side is under `min_side`, or it is
    flat. `bad` maps its number to the reason.
    """

    def __init__(self, folder, decoder, min_side=MIN_SIDE, cache_bytes=1 << 28):
        self.folder, self.decoder, self.min_side, self.cache_bytes = folder, decoder, min_side, cache_bytes
        self.bad = {}
        self._cache, self._held = OrderedDict(), 0
        self._lock = Lock()  # the stream prepares the next step on a thread of its own

    @classmethod
    def scan(cls, path, min_side=MIN_SIDE, max_side=MAX_SIDE, threads=1, fewest=FEWEST) -> "ImageStore":
        """Of a folder as it is now, images reduced as a run's are unless asked otherwise. Raises UserError as
        `ImageFolder.scan` does."""
        return cls(ImageFolder.scan(path, "", fewest), Decoder(threads=threads, max_side=max_side), min_side)

    @property
    def refused(self) -> list:
        return self.folder.refused

    def named(self, number) -> str:
        return self.folder.files[number].path

    def get(self, numbers) -> list:
        """uint8 [H, W, 3] tensors, None for bad images, in the order asked for. May be called from several threads."""
        return [picture and picture.pixels for picture in self.pictures(numbers)]

    def pictures(self, numbers) -> list:
        """The same as Pictures, which remember what was measured of them."""
        with self._lock:
            fresh = self._read([n for n in dict.fromkeys(numbers) if n not in self._cache and n not in self.bad])
            self._held += sum(map(_size, fresh.values()))
            asked = [n for n in dict.fromkeys(numbers) if n not in self.bad]
            found = {n: fresh.get(n) or self._cache.pop(n) for n in asked}
            self._cache |= found  # as the last ones
            while self._held > self.cache_bytes:
                self._held -= _size(self._cache.popitem(last=False)[1])
            return [found.get(n) for n in numbers]

    def _read(self, numbers) -> dict:
        """{number: Picture} of the good ones."""
        data = {}
        for n in numbers:
            try:
                data[n] = self.folder.read(n)
            except OSError as error:
                self.bad[n] = f"can't be read: {error.strerror or error}"
        good = {}
        for (n, content), image in zip(data.items(), self.decoder.decode(data.values())):
            picture = None if image is None else Picture(*image) if isinstance(image, Decoded) else Picture(image)
            if reason := self._reason(picture, content):
                self.bad[n] = reason
            else:
                good[n] = picture
        return good

    def complaint(self) -> str:
        """What is bad so far, as the end of a sentence; empty if nothing is."""
        if not self.bad:
            return ""
        first = min(self.bad)
        return f"; {len(self.bad)} bad so far, e.g. {self.folder.files[first][0]}: {self.bad[first]}"

    def _reason(self, picture, content):
        if picture is None:
            return f"can't be decoded: {why(content)}"
        image = picture.pixels
        if min(image.shape[:2]) < self.min_side:
            reduced = ", as reduced to data.max_side" if max(image.shape[:2]) == self.decoder.max_side else ""
            size = f"{image.shape[1]}x{image.shape[0]} px{reduced}"
            return f"{size}: the shorter side is under data.min_side {self.min_side}"
        if picture.flat:
            return "flat: almost no texture"
        return None


class Pool:
    """Some of a store's images by position, as `puzzles.make` wants its pool. A bad one is replaced by the next good
    one."""

    def __init__(self, store, numbers):
        self.store, self.numbers = store, numbers

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, i) -> Picture:
        for step in range(len(self)):
            (picture,) = self.store.pictures([self.numbers[(i + step) % len(self)]])
            if picture is not None:
                return picture
        first = self.store.bad[self.numbers[0]]
        raise UserError(f"none of the {len(self)} images of the pool is usable; the first: {first}")


def _size(picture):
    """Bytes that a cached one takes."""
    return picture.pixels.numel() + Picture.KEPT
