"""Images by number: a frozen list of files, their bytes, and a cache of decoded ones."""

from collections import OrderedDict
from pathlib import Path
from threading import Lock

import torch

from sslr1.errors import UserError
from sslr1.files import write_whole
from sslr1.ops import keys
from sslr1.puzzles.picture import Picture

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
FEWEST = 16  # images below which there is nothing to hold out


class ImageFolder:
    """The image files below a folder, in sorted order. `files` is a list of (path relative to the folder, bytes)."""

    def __init__(self, root, files):
        self.root, self.files = Path(root), files

    @classmethod
    def scan(cls, root) -> "ImageFolder":
        """Every image file below `root`. Raises UserError if there are none or too few."""
        root = Path(root)
        if not root.is_dir():
            raise UserError(f"data.path {str(root)!r} is not a folder")
        paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not paths:
            raise UserError(f"data.path {str(root)!r} holds no images ({', '.join(SUFFIXES)})")
        if len(paths) < FEWEST:
            raise UserError(
                f"data.path {str(root)!r} holds {len(paths)} images; at least {FEWEST} are needed, some to train on and some to hold out"
            )
        return cls(root, [(p.relative_to(root).as_posix(), p.stat().st_size) for p in paths])

    @classmethod
    def thaw(cls, root, listing) -> "ImageFolder":
        """The folder as it was listed by `freeze`."""
        rows = [line.split("\t", 1) for line in Path(listing).read_text(encoding="utf-8").splitlines()]
        return cls(root, [(path, int(size)) for size, path in rows])

    def freeze(self, listing) -> None:
        """Write the list, one `bytes<tab>path` a line."""
        write_whole(listing, "".join(f"{size}\t{path}\n" for path, size in self.files))

    def __len__(self):
        return len(self.files)

    def read(self, number: int) -> bytes:
        return (self.root / self.files[number][0]).read_bytes()

    def hold_out(self, share: float) -> tuple[list, list]:
        """(numbers to train on, numbers held out). Held out are the files whose path has the lowest hashes: `share` of them,
        at least 64 and at most 2,000, and never more than half."""
        count = min(max(round(share * len(self)), 64), 2000, len(self) // 2)
        ranked = sorted(range(len(self)), key=lambda i: keys.fold("holdout", self.files[i][0]))
        return sorted(ranked[count:]), sorted(ranked[:count])


class ImageStore:
    """Decoded images by number; keeps the most recent ones up to `cache_bytes`.

    An image is bad, and None, if its bytes can't be read or decoded, its shorter side is under `min_side`, or it is flat.
    `bad` maps its number to the reason.
    """

    def __init__(self, folder, decoder, min_side=252, cache_bytes=1 << 28):
        self.folder, self.decoder, self.min_side, self.cache_bytes = folder, decoder, min_side, cache_bytes
        self.bad = {}
        self._cache, self._held = OrderedDict(), 0
        self._lock = Lock()  # the stream prepares the next step on a thread of its own

    def get(self, numbers) -> list:
        """uint8 [H, W, 3] tensors, None for bad images, in the order asked for. May be called from several threads."""
        with self._lock:
            return self._get(numbers)

    def _get(self, numbers):
        missing = [n for n in dict.fromkeys(numbers) if n not in self._cache and n not in self.bad]
        data = []
        for n in missing:
            try:
                data.append(self.folder.read(n))
            except OSError as error:
                data.append(b"")
                self.bad[n] = f"can't be read: {error.strerror or error}"
        fresh = dict(zip(missing, self.decoder.decode(data)))
        for n, image in fresh.items():
            reason = self._reason(image)
            if reason:
                self.bad.setdefault(n, reason)
        found = {n: fresh[n] if n in fresh else self._cache[n] for n in set(numbers) if n not in self.bad}
        for n in dict.fromkeys(n for n in numbers if n in found):
            if n in self._cache:
                self._cache.move_to_end(n)
            else:
                self._cache[n] = found[n]
                self._held += found[n].numel()
        while self._held > self.cache_bytes:
            self._held -= self._cache.popitem(last=False)[1].numel()
        return [found.get(n) for n in numbers]

    def complaint(self) -> str:
        """What is bad so far, as the end of a sentence; empty if nothing is."""
        if not self.bad:
            return ""
        first = min(self.bad)
        return f"; {len(self.bad)} bad so far, e.g. {self.folder.files[first][0]}: {self.bad[first]}"

    def _reason(self, image):
        if image is None:
            return "can't be decoded"
        if min(image.shape[:2]) < self.min_side:
            return f"{image.shape[1]}x{image.shape[0]} px: the shorter side is under data.min_side {self.min_side}"
        if Picture(image).flat:
            return "flat: almost no texture"
        return None


class Pool:
    """Some of a store's images by position, as `puzzles.make` wants its pool. A bad one is replaced by the next good one."""

    def __init__(self, store, numbers):
        self.store, self.numbers = store, numbers

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, i) -> torch.Tensor:
        for step in range(len(self)):
            (image,) = self.store.get([self.numbers[(i + step) % len(self)]])
            if image is not None:
                return image
        raise UserError(
            f"none of the {len(self)} images of the pool is usable; the first: {self.store.bad[self.numbers[0]]}"
        )
