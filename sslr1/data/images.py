"""Images by number: a frozen list of files, their bytes, and a cache of decoded ones."""

import hashlib
import json
import os
import re
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate, permutations
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np

from sslr1.data import parquet, shards
from sslr1.data.decode import Decoder, formats, why
from sslr1.data.listing import Files, Gathered, written
from sslr1.data.mixed import Decoded
from sslr1.data.walk import (
    ARCHIVE,
    COMPRESSED,
    CONTAINERS,
    OPTIONAL,
    PARQUET,
    SUFFIXES,
    UNPACK,
    Census,
    Walk,
    is_aside,
    is_image,
)
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


class Source(NamedTuple):
    """Where images come from: a folder, a .tar archive or a parquet file. weight: its share of the draws beside other
    sources'; column: what holds the images in parquet files, found unless given."""

    path: str
    weight: float | None = None
    column: str | None = None


class Part(NamedTuple):
    """A source as a list has it. first: the number of its first image; before: what its paths begin with there, and do
    not below `root`."""

    source: Source
    root: Path
    before: str = ""
    first: int = 0

    @property
    def tag(self) -> str:
        """What its paths begin with, its archive's name included."""
        name = Path(self.source.path).name
        return self.before if self.root == Path(self.source.path) else f"{self.before}{name}/"


class ImageFolder:
    """The image files below a folder, in the tar archives there and in the rows of parquet files, in sorted order; or
    those of several such sources, one after another. `files` is a Files, made of a list of File, or of tuples for it,
    unless it is one; `refused` one of (path as it can be printed, why it is none of them), which only `scan` fills;
    `about` a line on what is not read, empty where all is; `parts` the sources, one unless given."""

    def __init__(self, root, files, refused=(), about="", parts=()):
        self.root, self.refused, self.about = root, list(refused), about
        self.files = files if isinstance(files, Files) else Files.of(files)
        self.parts = parts or [Part(Source(str(root)), Path(root))]
        self._tables = parquet.Tables()

    @classmethod
    def check(cls, path, key="data.path") -> None:
        """Raises what `scan` would, of a folder that doesn't so much as begin like one of images. key: the setting that
        names it."""
        for part in parts_of(path, key):
            if not cls._begins_well(part, key):
                cls.scan(part.source, key, 1 if isinstance(path, list) else FEWEST)

    @staticmethod
    def _begins_well(part, key) -> bool:
        """Whether the first files of a source are as they should be, and it need not be looked through."""
        found = notes = 0
        path = part.source.path
        for name, size in Walk(part.root, Census()) if os.path.isdir(path) else [(os.path.basename(path), None)]:
            if size is None:
                with suppress(OSError, parquet.Unfit):
                    return name.lower().endswith(ARCHIVE) or parquet.count(part.root / name, part.source.column) > 0
                return False
            found += 1
            notes += size < LARGEST_NOTE and _is_note(part.root / name)
            if found == FEWEST > notes:
                return True
            if found == FEWEST:
                raise UserError(f"{key} {str(path)!r}: {name}, and all else that was looked at there, {NOT_FETCHED}")
        return False

    @classmethod
    def scan(
        cls, path, key="data.path", fewest=FEWEST, scratch=None, report=lambda found: None, exclude=None
    ) -> "ImageFolder":
        """Every image below the folder `path`, in the one archive or parquet file that it is, or in each of a list of
        them. path: itself, a Source, or a list of either. Raises UserError if there are none or too few; key: the
        setting that names it; scratch: a folder that holds the list, in a file without a name, which memory does
        otherwise; report(how many are found): called now and then; exclude: a file of paths, as the list has them, one
        a line, that are left out."""
        parts, census, walks, left_out = parts_of(path, key), Census(), [], 0
        without = _excluded(exclude)

        def each():
            nonlocal left_out
            for part in parts:
                found = Gathered(part.before, without, report)
                _gather(part, found, census, walks, key)
                yield found
                left_out += found.left_out
                census.refused += found.refused

        files, counts = written(each(), scratch)
        firsts = [0, *accumulate(counts)]
        parts = [part._replace(first=first) for part, first in zip(parts, firsts)]
        census.refused = sorted((_printable(name), reason) for name, reason in census.refused)
        census.images, census.empty, census.excluded = len(files), files.empty(), left_out
        about = "" if census.whole() else str(census)
        also, named = f"; {about}" if about else "", _named(parts, key)
        if without and not left_out:
            raise UserError(f"data.exclude {str(exclude)!r} names none of the images, which files.txt would list")
        for part, count in zip(parts, counts):
            if not count:
                kinds = f"{', '.join(SUFFIXES)}, or {ARCHIVE} archives or {PARQUET} files of them"
                raise UserError(f"{key} {part.source.path!r} holds no images ({kinds}){also}".lstrip())
        if len(files) < fewest:
            needed = f"at least {fewest} are needed, some to train on and some to hold out"
            raise UserError(f"{named} holds {len(files)} images; {needed}{also}")
        return cls(_roots(parts), files, census.refused, about, parts)

    @classmethod
    def thaw(cls, path, listing) -> "ImageFolder":
        """The folder, or the list of sources, as it was listed by `freeze`. Raises UserError if the list is damaged, is
        of other sources, or names files of formats that were read where it was made and are not here."""
        files, parts = Files.open(listing), parts_of(path, gone=True)
        for kind, (names, package) in OPTIONAL.items():
            ending = re.compile(rb"(?i)(?:" + b"|".join(re.escape(name.encode()) for name in names) + rb")\n")
            unread = 0 if kind in formats() else sum(len(ending.findall(part)) for part in files.parts())
            if unread:
                reads = "this Pillow does" if kind == "AVIF" else "Pillow does, as it is installed,"
                raise UserError(
                    f"{listing} names {unread} {' and '.join(names)} files, which {reads} not read: install one that "
                    f"does ({package}), as when the list was made"
                )
        if len(parts) > 1:
            firsts = [0]
            for part in parts:
                firsts.append(bisect_left(files, True, firsts[-1], key=lambda file: not file.path.startswith(part.tag)))
            if firsts[-1] != len(files) or len(set(firsts)) < len(firsts):
                raise UserError(f"{listing} does not list the images of {', '.join(p.source.path for p in parts)}")
            parts = [part._replace(first=first) for part, first in zip(parts, firsts)]
        about = Path(listing).with_name(ABOUT)
        about = about.read_text(encoding="utf-8").strip() if about.exists() else ""
        return cls(_roots(parts), files, about=about, parts=parts)

    def weighted(self) -> list:
        """[(numbers of a source's images, its weight)], [] where none has one; 1 where others have."""
        if all(part.source.weight is None for part in self.parts):
            return []
        ends = [*(part.first for part in self.parts[1:]), len(self)]
        return [
            (range(part.first, end), 1.0 if part.source.weight is None else part.source.weight)
            for part, end in zip(self.parts, ends)
        ]

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
        part = self.parts[bisect_right(self.parts, number, key=lambda part: part.first) - 1]
        path = path.removeprefix(part.before)
        if offset is not None:
            container = self._container(part.root, path)
            if container.suffix.lower() == PARQUET:
                return self._tables.read(container, size, offset, part.source.column)
        if size > LARGEST:
            raise OSError(f"{size:,} bytes, more than {LARGEST:,}")
        if offset is not None:
            return shards.read(container, size, offset)
        with shards.open_file(part.root / path) as file:
            data = file.read(size + 1)
        if len(data) != size:
            raise OSError(f"its size has changed: it had {size:,} bytes when the run began")
        return data

    def _container(self, root, path):
        """The file that a member's or a row's path goes through: the first part of it that is one."""
        parts = [path[: found.end()] for found in re.finditer(r"\.(?:tar|parquet)(?=/)", path, re.IGNORECASE)]
        return next((root / part for part in parts if os.path.isfile(root / part)), root / parts[0])

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


def _is_note(path) -> bool:
    """Whether a file is Git LFS's note of one; not, where it can't be read."""
    try:
        with open(path, "rb") as file:
            return file.read(len(LFS)) == LFS
    except OSError:
        return False


def parts_of(path, key="data.path", gone=False) -> list:
    """The Parts of a path, a Source (or what has its fields), or a list of either, without their first numbers. Raises
    UserError where one is within another, or, unless it may be `gone`, where it is nowhere."""
    given = path if isinstance(path, list) else [path]
    sources = [
        Source(os.fspath(one))
        if isinstance(one, str | os.PathLike)
        else Source(os.fspath(one.path), one.weight, one.column)
        for one in given
    ]
    parts, tags = [], set()
    for number, source in enumerate(sources, 1):
        part = Part(source, _root(source.path))
        named = f"{key} {source.path!r}".lstrip()
        if not gone and not (part.root.is_dir() and os.path.exists(source.path)):
            packed = source.path.lower().endswith(COMPRESSED) and os.path.exists(source.path)
            why = f"it is {UNPACK}" if packed else f"it {no_folder(source.path, 'dataset')}"
            raise UserError(f"{named} is not a folder, a {ARCHIVE} archive or a {PARQUET} file: {why}")
        if len(sources) > 1:
            whole = part.root == Path(source.path)
            part = part._replace(before=f"{os.path.basename(os.path.abspath(source.path)) or number}/" if whole else "")
            if part.tag in tags:  # of another source of that name
                part = part._replace(before=f"{number}/{part.before}")
            tags.add(part.tag)
        parts.append(part)
    real = [os.path.realpath(source.path) for source in sources]
    for one, inner in permutations(range(len(sources)), 2):
        if real[one] == real[inner] or real[inner].startswith(real[one].rstrip("/") + "/"):
            within = "named twice" if real[one] == real[inner] else f"within {sources[one].path!r}"
            raise UserError(f"{key}: {sources[inner].path!r} is {within}: each image is to have one name")
    return parts


def _named(parts, key):
    return f"{key} {', '.join(repr(part.source.path) for part in parts)}".lstrip()


def _roots(parts):
    """The folder of a list, or the sources in words."""
    return parts[0].root if len(parts) == 1 else ", ".join(part.source.path for part in parts)


def _root(path):
    """The folder of what `path` names: itself, or the one that the archive or the parquet file is in."""
    path = Path(path)
    return path.parent if path.suffix.lower() in CONTAINERS and not path.is_dir() else path


def _excluded(path) -> frozenset:
    if path is None:
        return frozenset()
    try:
        return frozenset(line for line in Path(path).read_text("utf-8").split("\n") if line)
    except (OSError, ValueError) as error:
        raise UserError(
            f"data.exclude {str(path)!r} can't be read: {getattr(error, 'strerror', None) or error}"
        ) from None


def _gather(part, found, census, walks, key) -> None:
    """All images of a source. walks: those of the sources before, to which this one's is added."""
    path = Path(part.source.path)
    if part.root == path:
        walks.append(Walk(part.root, census, walks[-1] if walks else None))
        files = walks[-1]
    else:
        files = [(path.name, None)]
    for name in found.add_all(files):
        if name.lower().endswith(ARCHIVE):
            _add_members(found, part.root, name, census)
            continue
        column = part.source.column
        try:
            rows, size = parquet.count(part.root / name, column), os.path.getsize(part.root / name)
        except (OSError, parquet.Unfit) as error:
            if column is not None and os.access(part.root / name, os.R_OK):  # which is meant for this file, too
                raise UserError(f"{key} {part.source.path!r}: {name}: {error}".lstrip()) from None
            census.refused.append((name, getattr(error, "strerror", None) or str(error)))
            continue
        width = len(str(rows - 1))  # so that rows are sorted as they stand
        for row in range(rows):
            found.add(f"{name}/{row:0{width}}", size, row)


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
