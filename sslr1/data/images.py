"""Images by number: a frozen list of files, and their bytes."""

import hashlib
import json
import os
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path

import numpy as np

from sslr1.data import parquet, shards, sources
from sslr1.data.decode import formats
from sslr1.data.listing import Files, Gathered, written
from sslr1.data.sources import Part, Source, parts_of
from sslr1.data.walk import ARCHIVE, OPTIONAL, PARQUET, SUFFIXES, Census, Walk
from sslr1.errors import UserError
from sslr1.files import LFS, NOT_FETCHED, whole, write_whole
from sslr1.ops import keys

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
        without = sources.excluded(exclude)

        def each():
            nonlocal left_out
            for part in parts:
                found = Gathered(part.before, without, report)
                sources.gather(part, found, census, walks, key)
                yield found
                left_out += found.left_out
                census.refused += found.refused

        files, counts = written(each(), scratch)
        firsts = [0, *accumulate(counts)]
        parts = [part._replace(first=first) for part, first in zip(parts, firsts)]
        census.refused = sorted((_printable(name), reason) for name, reason in census.refused)
        census.images, census.empty, census.excluded = len(files), files.empty(), left_out
        about = "" if census.whole() else str(census)
        also, named = f"; {about}" if about else "", sources.named(parts, key)
        if without and not left_out:
            raise UserError(f"data.exclude {str(exclude)!r} names none of the images, which files.txt would list")
        for part, count in zip(parts, counts):
            if not count:
                kinds = f"{', '.join(SUFFIXES)}, or {ARCHIVE} archives or {PARQUET} files of them"
                raise UserError(f"{key} {part.source.path!r} holds no images ({kinds}){also}".lstrip())
        if len(files) < fewest:
            needed = f"at least {fewest} are needed, some to train on and some to hold out"
            raise UserError(f"{named} holds {len(files)} images; {needed}{also}")
        return cls(sources.roots(parts), files, census.refused, about, parts)

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
        return cls(sources.roots(parts), files, about=about, parts=parts)

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


def _is_note(path) -> bool:
    """Whether a file is Git LFS's note of one; not, where it can't be read."""
    try:
        with open(path, "rb") as file:
            return file.read(len(LFS)) == LFS
    except OSError:
        return False


def _kept(path) -> dict:
    """What was written there; nothing where that is gone or damaged."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _printable(name):
    return name.encode("utf-8", "backslashreplace").decode().replace("\n", "\\n")
