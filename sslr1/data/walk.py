"""What lies below a folder: image files and archives one by one, and a count of all that is not read.

Folders joined by links are followed. Nothing is passed over in silence: what can't be read is named with its reason,
other files are counted by kind, and so is what systems leave beside people's files.
"""

import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_IFREG, S_ISDIR, S_ISREG
from types import SimpleNamespace

from sslr1.data.decode import formats

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
# Images where their format is read, and how to have it read
AVIF = ".avif"
OPTIONAL = {
    "AVIF": ((AVIF,), "pip install -U pillow"),
    "HEIF": ((".heic", ".heif", ".hif"), "pip install 'sslr1[heif]'"),
    "JXL": ((".jxl",), "pip install 'sslr1[jxl]'"),
}
ARCHIVE, PARQUET = ".tar", ".parquet"
CONTAINERS = (ARCHIVE, PARQUET)  # files that hold many images
COMPRESSED = tuple(
    ".tar.gz .tgz .tar.bz2 .tbz .tbz2 .tar.xz .txz .tar.zst .tzst .tar.lz4 .tar.lzma .zip .7z .rar".split()
)
UNPACK = "a compressed archive, which is not read: unpack it, or pack it again as a plain .tar"
# Beside hidden names: what macOS, network drives and recycle bins leave
SYSTEM = {"__MACOSX", "@eaDir", "@Recycle", "#recycle", "#snapshot", "$RECYCLE.BIN", "System Volume Information"}
KINDS = 6  # that a count names
UNWANTED, TYPE = -1, 0o170000  # the bits of a file's mode that say what it is


def endings() -> tuple:
    """How names of image files end, in lower case."""
    return (*SUFFIXES, *(name for kind, (names, _) in OPTIONAL.items() if kind in formats() for name in names))


def wanting(counts) -> list:
    """[(endings, how to have them read)] of those that stand in `counts` and are of no format that is read."""
    out = []
    for kind, (names, package) in OPTIONAL.items():
        found = [name for name in names if counts.get(name)]
        if found and kind not in formats():
            out.append((found, package))
    return out


def is_image(name) -> bool:
    return name.lower().endswith(endings())


def is_aside(name) -> bool:
    """Whether a file or folder of that name is none of its user's: hidden (macOS's ._x beside x, .Trash), or a system's
    own."""
    return (name.startswith(".") and name not in (".", "..")) or name in SYSTEM


@dataclass
class Census:
    """Files by what becomes of them. images: how many are image files, `empty` of them; excluded: how many more were
    left out as asked; refused: (name, reason) of what ought to have been read; other: how many are of each other kind;
    aside: names for which `is_aside` holds."""

    images: int = 0
    empty: int = 0
    excluded: int = 0
    refused: list = field(default_factory=list)
    other: Counter = field(default_factory=Counter)
    aside: int = 0

    def count(self, name) -> None:
        """A file that isn't looked at, by the end of its name."""
        suffix = os.path.splitext(name)[1].lower()
        kind = "without an ending" if not suffix else "of other kinds"
        self.other[suffix if re.fullmatch(r"\.\w{1,9}", suffix) else kind] += 1

    def whole(self) -> bool:
        """Whether there is nothing but images."""
        return not (self.empty or self.excluded or self.refused or self.other or self.aside)

    def __str__(self):
        """One line, e.g. "88 files: 20 images, 68 not read (38 .heic, 30 .avif)"."""
        unread = len(self.refused) + self.other.total()
        named = sorted(self.other.items(), key=lambda kind: (-kind[1], kind[0]))[:KINDS]
        kinds = [f"{n:,} {kind}" for kind, n in named]
        if rest := self.other.total() - sum(n for _, n in named):
            kinds.append(f"{rest:,} more")
        if self.refused:
            name, reason = self.refused[0]
            kinds.append(f"{len(self.refused):,} refused, e.g. {name}: {reason}")
        line = f"{_number(self.images + self.excluded + unread, 'file')}: {_number(self.images, 'image')}"
        line += f" ({self.empty:,} empty)" if self.empty else ""
        line += f", {self.excluded:,} left out by data.exclude" if self.excluded else ""
        line += f", {unread:,} not read ({', '.join(kinds)})" if unread else ""
        line += "".join(f"; {', '.join(names)} after {package}" for names, package in wanting(self.other))
        line += f"; {_number(self.aside, 'hidden or system entr', 'y', 'ies')} left aside" if self.aside else ""
        return line


def _number(n, noun, one="", many="s"):
    return f"{n:,} {noun}{one if n == 1 else many}"


class Walk:
    """(path relative to `root`, bytes) of every image file below it, (path, None) of every archive and parquet file;
    counts all else in `census`.

    Folders reached by links come after all others, in the order of their names. Each folder is read once, under the
    first name, so a link that leads back ends there, and one to a folder above `root` is refused. A link to a file
    counts unless that file is there under its own name or an earlier link's: an image with two names could be both
    trained on and held out. before: the Walk of another folder of the same images, whose folders count as read.
    """

    def __init__(self, root, census, before=None):
        self.root, self.census, self.images = os.fspath(root), census, endings()
        self.endings = (*self.images, *CONTAINERS)
        # (device, inode): of folders read, with their names, of files that links led to, and of the folders above
        self.folders, self.files = (before.folders, before.files) if before else ({}, set())
        self.above = {_identity(os.stat(above)) for above in Path(os.path.realpath(root)).parents}
        self.links = []  # to folders and to nowhere known yet
        self.file_links = []

    def __iter__(self):
        yield from self._tree("")
        while self.links:  # of a round: those that its folders' own links add come after all of them
            links, self.links = sorted(self.links), []
            for name in links:
                yield from self._follow(name)
        for name in sorted(self.file_links):
            yield from self._linked_file(name)

    def _refuse(self, name, reason):
        self.census.refused.append((name or ".", reason))

    def _tree(self, top):
        """Everything in a folder and the folders in it, links aside. top: its path below the root, "" for that."""
        left = [top]
        while left:
            name = left.pop()
            try:
                identity = _identity(os.stat(self._path(name)))
                if top and identity in self.folders:
                    self._refuse(name, self._known(identity))
                    continue
                self.folders[identity] = name
                folder = os.open(self._path(name), os.O_RDONLY)  # a name is shorter to look up than a path
                try:
                    with os.scandir(folder) as entries:
                        yield from self._entries(f"{name}/" if name else "", entries, left)
                finally:
                    os.close(folder)
            except OSError as error:
                self._refuse(name, f"can't be read: {error.strerror}")

    def _entries(self, before, entries, left):
        """As _tree, of one folder. before: what its names begin with; left: takes the folders in it."""
        images = self.images
        for entry in entries:
            name = entry.name
            if name.endswith(images) and name[0] != "." and not entry.is_symlink():  # nearly all, where there are many
                try:
                    status = entry.stat()
                    if status.st_mode & TYPE == S_IFREG:
                        yield before + name, status.st_size
                        continue
                except OSError:
                    pass  # which is said below
            if is_aside(name):
                self.census.aside += 1
            elif entry.is_symlink():
                self.links.append(before + name)
            elif entry.is_dir():
                left.append(before + name)
            elif (size := self._size(before + name, entry)) != UNWANTED:
                yield before + name, size

    def _known(self, identity):
        name = self.folders[identity]
        return f"the folder {name}, which is read under that name" if name else "data.path itself"

    def _path(self, name):
        return os.path.join(self.root, name) if name else self.root

    def _size(self, name, entry):
        """Bytes of an image file, None for an archive, UNWANTED for what is neither, which is counted. entry: an
        os.DirEntry or the like, asked for its status only where the file is wanted."""
        if not name.lower().endswith(self.endings):
            if name.lower().endswith(COMPRESSED):
                self._refuse(name, UNPACK)
            elif entry.is_file():
                self.census.count(name)
            else:
                self.census.other["pipes, sockets or devices"] += 1
            return UNWANTED
        try:
            status = entry.stat()
        except OSError as error:
            self._refuse(name, f"can't be read: {error.strerror}")
            return UNWANTED
        if S_ISREG(status.st_mode):
            return None if name.lower().endswith(CONTAINERS) else status.st_size
        self._refuse(name, "not a regular file")
        return UNWANTED

    def _follow(self, name):
        path = self._path(name)
        try:
            status = os.stat(path)
        except OSError as error:
            return self._refuse(name, f"a link to {_target(path)}: {error.strerror}")
        if not S_ISDIR(status.st_mode):
            return self.file_links.append(name)
        identity = _identity(status)
        if identity in self.above:
            self._refuse(name, f"a link to {_target(path)}, a folder that holds this one")
        elif identity in self.folders:
            self._refuse(name, f"a link to {self._known(identity)}")
        else:
            yield from self._tree(name)

    def _linked_file(self, name):
        try:
            status = os.stat(self._path(name))
        except OSError as error:  # it was there a moment ago
            return self._refuse(name, f"a link to {_target(self._path(name))}: {error.strerror}")
        if name.lower().endswith(self.endings):
            identity, real = _identity(status), os.path.realpath(self._path(name))
            try:
                beside = _identity(os.stat(os.path.dirname(real))) in self.folders
            except OSError:
                beside = False
            own = os.path.basename(real)
            listed = beside and not is_aside(own) and own.lower().endswith(self.endings)
            if listed or identity in self.files:
                self.census.other["links to files that are there already"] += 1
                return
            self.files.add(identity)
        found = SimpleNamespace(stat=lambda: status, is_file=lambda: S_ISREG(status.st_mode))
        if (size := self._size(name, found)) != UNWANTED:
            yield name, size


def _identity(status):
    return status.st_dev, status.st_ino


def _target(path):
    try:
        return os.readlink(path)
    except OSError:
        return "nothing"
