"""Images by number: a frozen list of files, their bytes, and a cache of decoded ones."""

import hashlib
import json
import os
import re
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock

import numpy as np

from sslr1.data import shards
from sslr1.data.decode import Decoder, formats, why
from sslr1.data.listing import Files, Gathered
from sslr1.data.walk import ARCHIVE, AVIF, COMPRESSED, SUFFIXES, UNPACK, Census, Walk, is_aside, is_image
from sslr1.errors import UserError
from sslr1.files import LFS, NOT_FETCHED, no_folder, whole, write_whole
from sslr1.ops import keys
from sslr1.puzzles.picture import MAX_SIDE, MIN_SIDE, Picture

ABOUT = "found.txt"  # beside a run's list: what was not read when it was made
SPLIT = "split.json"  # beside it: which of its images are held out
PATHS = re.compile(rb"\t(.+)\n")  # of a list's lines
FEWEST = 16  # images below which there is nothing to hold out
LARGEST_NOTE = 1024  # bytes of what Git LFS leaves in a file's place
LARGEST = 1 << 30  # bytes of a file; no image that is decoded needs more


class Rest(Sequence):
    """The numbers below n but for a few, in order, without a list of them. but: sorted."""

    def __init__(self, n, but):
        self.n, self.but = n, but
        self._before = [number - place for place, number in enumerate(but)]  # of each, how many are left below it

    def __len__(self):
        return self.n - len(self.but)

    def __getitem__(self, place):
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        place = int(place) % len(self)
        return place + bisect_right(self._before, place)


class ImageFolder:
    """The image files below a folder and in the tar archives there, in sorted order. `files` is a Files, made of a list
    of File, or of tuples for it, unless it is one; `refused` one of (path as it can be printed, why it is none of
    them), which only `scan` fills; `about` a line on what is not read, empty where all is."""

    def __init__(self, root, files, refused=(), about=""):
        self.root, self.refused, self.about = Path(root), list(refused), about
        self.files = files if isinstance(files, Files) else Files.of(files)

    @classmethod
    def check(cls, path, key="data.path") -> None:
        """Raises what `scan` would, of a folder that doesn't so much as begin like one of images. key: the setting that
        names it."""
        found = notes = 0
        for name, size in Walk(_root(path), Census()) if os.path.isdir(path) else [(str(path), LARGEST)]:
            if size is None:
                return  # an archive, which isn't looked into
            found += 1
            notes += size < LARGEST_NOTE and _is_note(os.path.join(path, name))
            if found == FEWEST > notes:
                return
            if found == FEWEST:
                raise UserError(f"{key} {str(path)!r}: {name}, and all else that was looked at there, {NOT_FETCHED}")
        cls.scan(path, key)

    @classmethod
    def scan(cls, path, key="data.path", fewest=FEWEST, scratch=None, report=lambda found: None) -> "ImageFolder":
        """Every image below the folder `path`, or in the one archive that it is. Raises UserError if there are none or
        too few; key: the setting that names it; scratch: a folder that holds the list, in a file without a name, which
        memory does otherwise; report(how many are found): called now and then."""
        root, named = _root(path), f"{key} {str(path)!r}".lstrip()
        if not root.is_dir() or not os.path.exists(path):
            packed = str(path).lower().endswith(COMPRESSED) and os.path.exists(path)
            why = f"it is {UNPACK}" if packed else f"it {no_folder(path, 'dataset')}"
            raise UserError(f"{named} is not a folder or a {ARCHIVE} archive: {why}")
        census, found = Census(), Gathered(report)
        for name in found.add_all(Walk(root, census) if root == Path(path) else [(Path(path).name, None)]):
            _add_members(found, root, name, census)
        files = found.sorted(scratch)
        census.refused += found.refused
        census.refused = sorted((_printable(name), reason) for name, reason in census.refused)
        census.images, census.empty = len(files), files.empty()
        about = "" if census.whole() else str(census)
        also = f"; {about}" if about else ""
        if not len(files):
            raise UserError(f"{named} holds no images ({', '.join(SUFFIXES)}, or {ARCHIVE} archives of them){also}")
        if len(files) < fewest:
            needed = f"at least {fewest} are needed, some to train on and some to hold out"
            raise UserError(f"{named} holds {len(files)} images; {needed}{also}")
        return cls(root, files, census.refused, about)

    @classmethod
    def thaw(cls, path, listing) -> "ImageFolder":
        """The folder as it was listed by `freeze`. Raises UserError if the list is damaged, or names AVIF files, which
        were images where it was made and are none here."""
        files = Files.open(listing)
        ending = re.compile(rb"(?i)" + re.escape(AVIF.encode()) + rb"\n")
        unread = 0 if "AVIF" in formats() else sum(len(ending.findall(part)) for part in files.parts())
        if unread:
            raise UserError(
                f"{listing} names {unread} {AVIF} files, which this Pillow does not read: install one that does "
                "(pip install -U pillow), as when the list was made"
            )
        about = Path(listing).with_name(ABOUT)
        return cls(_root(path), files, about=about.read_text(encoding="utf-8").strip() if about.exists() else "")

    def freeze(self, listing) -> None:
        """Write the list: the lines of `files`."""
        with whole(listing) as file:
            for part in self.files.parts():
                file.write(part)

    def __len__(self):
        return len(self.files)

    def read(self, number: int) -> bytes:
        """An image's bytes, undecoded. Raises OSError if they can't be read or aren't as many as were listed: what has
        been replaced since is another image, which this run has not counted on."""
        path, size, offset = self.files[number]
        if size > LARGEST:
            raise OSError(f"{size:,} bytes, more than {LARGEST:,}")
        if offset is not None:
            return shards.read(self._archive(path), size, offset)
        with shards.open_file(self.root / path) as file:
            data = file.read(size + 1)
        if len(data) != size:
            raise OSError(f"its size has changed: it had {size:,} bytes when the run began")
        return data

    def _archive(self, path):
        """The archive that a member's path goes through: the first part of it that is a file."""
        parts = [path[: found.end()] for found in re.finditer(r"\.tar(?=/)", path, re.IGNORECASE)]
        return next((self.root / part for part in parts if os.path.isfile(self.root / part)), self.root / parts[0])

    def hold_out(self, share: float = 0.05, split=None) -> tuple[Sequence, list]:
        """(numbers to train on, numbers held out). Held out are the files whose path has the lowest hashes: `share` of
        them, at least 64 and at most 2,000, and never more than half. split: a file that keeps the choice, where it can
        be written; one that is of another list or share is made anew."""
        asked = {"share": share, "files": hashlib.blake2b(self.files.text, digest_size=16).hexdigest()} if split else {}
        kept = _kept(split) if split else {}
        held_out = kept.get("held_out")
        if not split or {key: kept.get(key) for key in asked} != asked:
            held_out = self._choose(min(max(round(share * len(self)), 64), 2000, len(self) // 2))
            with suppress(UserError):
                if split:
                    write_whole(split, json.dumps({**asked, "held_out": held_out}) + "\n")
        return Rest(len(self), held_out), held_out

    def _choose(self, count) -> list:
        hashes, at, digest = np.empty(len(self), np.uint64), 0, hashlib.blake2b
        for part in self.files.parts():  # as keys.fold("holdout", path) of each
            digests = b"".join([digest(path, digest_size=8).digest() for path in PATHS.findall(part)])
            some = hashes[at : at + len(digests) // 8]
            some[:] = keys.fold_digests("holdout", digests=np.frombuffer(digests, "<u8"))
            at += len(some)
        return sorted(np.argsort(hashes, kind="stable")[:count].tolist())

    def largest(self, numbers, count) -> list:
        """Of `numbers`, which are in order, those of the files of most bytes; of equals the first."""
        sizes = self.files.sizes()
        order = iter(np.argsort(-sizes, kind="stable"))
        found = []
        for number in order:
            place = bisect_right(numbers, number) - 1
            if place >= 0 and numbers[place] == number:
                found.append(int(number))
            if len(found) == count:
                break
        return found


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
            picture = None if image is None else Picture(image)
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


def _is_note(path) -> bool:
    """Whether a file is Git LFS's note of one; not, where it can't be read."""
    try:
        with open(path, "rb") as file:
            return file.read(len(LFS)) == LFS
    except OSError:
        return False


def _root(path):
    """The folder of what `path` names: itself, or the one that the archive is in."""
    path = Path(path)
    return path.parent if path.suffix.lower() == ".tar" and not path.is_dir() else path


def _add_members(found, root, name, census) -> None:
    """The images in an archive; counts what else is there."""
    refused = []
    for member in shards.index(root / name, refused):
        if _hidden(member.name):
            census.aside += 1
        elif is_image(member.name):
            found.add(f"{name}/{member.name}", member.size, member.offset)
        elif member.name.lower().endswith((ARCHIVE, *COMPRESSED)):
            reason = f"an archive within an archive, which is not read: unpack {name}"
            census.refused.append((f"{name}/{member.name}", reason))
        else:
            census.count(member.name)
    census.refused += [
        (f"{name}/{inner}" if inner else name, reason) for inner, reason in refused if not _hidden(inner)
    ]
    census.aside += sum(_hidden(inner) for inner, _ in refused)


def _kept(path) -> dict:
    """What was written there; nothing where that is gone or damaged."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _hidden(name):
    return any(map(is_aside, name.split("/")))


def _printable(name):
    return name.encode("utf-8", "backslashreplace").decode().replace("\n", "\\n")
