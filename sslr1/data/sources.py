"""Where images come from: folders, archives and parquet files, one or a list of them, and what lies in each."""

import os
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

from sslr1.data import parquet, shards
from sslr1.data.walk import ARCHIVE, COMPRESSED, CONTAINERS, PARQUET, UNPACK, Walk, is_aside, is_image
from sslr1.errors import UserError
from sslr1.files import no_folder


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


def named(parts, key):
    return f"{key} {', '.join(repr(part.source.path) for part in parts)}".lstrip()


def roots(parts):
    """The folder of a list, or the sources in words."""
    return parts[0].root if len(parts) == 1 else ", ".join(part.source.path for part in parts)


def _root(path):
    """The folder of what `path` names: itself, or the one that the archive or the parquet file is in."""
    path = Path(path)
    return path.parent if path.suffix.lower() in CONTAINERS and not path.is_dir() else path


def excluded(path) -> frozenset:
    if path is None:
        return frozenset()
    try:
        return frozenset(line for line in Path(path).read_text("utf-8").split("\n") if line)
    except (OSError, ValueError) as error:
        raise UserError(
            f"data.exclude {str(path)!r} can't be read: {getattr(error, 'strerror', None) or error}"
        ) from None


def gather(part, found, census, walks, key) -> None:
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


def _hidden(name):
    return any(map(is_aside, name.split("/")))
