"""Tar archives of images (WebDataset's shards among them): where each member's bytes lie, found once, read by offset.

Nothing is ever extracted. Archives may be damaged or hostile: what can't be used is named with a reason, and reading
never goes beyond the archive, whatever its headers claim.
"""

import os
import stat
import tarfile
from typing import NamedTuple

from sslr1.files import LFS, NOT_FETCHED

BLOCK = tarfile.BLOCKSIZE
# Bytes of all headers of one member; a long name takes 4 KiB, and tarfile's parser is quadratic in them
HEADERS = 1 << 14
PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK\3\4", b"7z\xbc\xaf", b"Rar!")  # how one begins


class Member(NamedTuple):
    """A regular file in an archive: its name there, its size in bytes, and the offset of its bytes in the archive."""

    name: str
    size: int
    offset: int


def index(path) -> tuple[list, list]:
    """(every regular file of an archive as a Member, [(name, why it is refused)]). A name of "" stands for the archive
    itself.

    Refused are members that are cut short, links, devices, sparse files, and names that lead out of the archive. What
    stands before a damaged place is used; after it there is no telling where a member begins. Of members with one name
    the last counts, as it does when an archive is extracted.
    """
    members, refused = {}, []
    try:
        with open_file(path) as file:
            length = os.fstat(file.fileno()).st_size
            for info in _headers(file, length, refused):
                name = info.name.removeprefix("./")
                reason = _refusal(info, name, length)
                if reason:
                    refused.append((name, reason))
                elif info.isreg():
                    members[name] = Member(name, info.size, info.offset_data)
    except OSError as error:
        refused.append(("", f"can't be read: {error.strerror or error}"))
    return list(members.values()), refused


def _headers(file, length, refused):
    """Every header of an archive in turn; says in `refused` where they end before they should."""
    archive, end, cut = None, 0, False
    headers = _Headers(file)
    try:
        archive = tarfile.TarFile(fileobj=headers, mode="r", encoding="utf-8", errors="surrogateescape")
        while (info := archive.next()) is not None and archive.offset >= end + BLOCK:  # or it goes round in circles
            yield info
            end = archive.offset
            cut = end > length and info.offset_data + info.size > length
            headers.left = HEADERS
            archive.members.clear()  # tarfile keeps them all
            archive.pax_headers.clear()  # what one says of all files after it is of no use here
    except OSError:
        raise
    except Exception as error:  # damaged headers make tarfile raise nearly anything
        if archive is None:
            file.seek(0)
            start = file.read(len(LFS))
            reason = f"not a tar archive ({error})"
            if start.startswith(PACKED):
                reason = "a compressed archive, which is not read: unpack it"
            refused.append(("", f"it {NOT_FETCHED}" if start == LFS else reason))
            return
    if cut:
        return  # within a member, which is refused itself
    file.seek(end)
    block = file.read(BLOCK)
    if not block:
        refused.append(("", f"ends at byte {end:,} without the mark of an archive's end: cut short?"))
    elif block.count(0) < len(block):
        refused.append(("", f"damaged or cut short at byte {end:,} of {length:,}: what may follow is not used"))


class _Headers:
    """What tarfile sees of an archive's file: headers, of a member no more than HEADERS bytes, whatever they claim."""

    def __init__(self, file):
        self.file, self.left = file, HEADERS
        self.seek, self.tell = file.seek, file.tell

    def read(self, size):
        self.left -= size
        if size < 0 or self.left < 0:
            raise tarfile.ReadError(f"a header of more than {HEADERS} bytes")
        return self.file.read(size)


def _refusal(info, name, length):
    """Why a member is refused, or None."""
    if info.isdir():
        return None
    if info.issym() or info.islnk():
        return "a link"
    if info.isdev():
        return "a device or a pipe"
    if name.startswith("/") or ".." in name.split("/"):
        return "its name leads out of the archive"
    if info.issparse():
        return "a sparse file"
    if info.size < 0:
        return "its size is negative"
    if info.offset_data + info.size > length:
        return f"cut short: {max(length - info.offset_data, 0):,} of {info.size:,} bytes are there"
    return None


def read(path, size: int, offset: int) -> bytes:
    """A member's bytes. Raises OSError unless a header of a file of that size still stands before them."""
    with open_file(path) as file:
        file.seek(offset - BLOCK)
        block = file.read(BLOCK)
        data = file.read(size)
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        listed = header.isreg() and header.size == size == len(data)
    except (tarfile.HeaderError, ValueError):
        listed = False
    if not listed:
        raise OSError("the archive holds something else at its place than when the run began")
    return data


def open_file(path):
    """A regular file, to read its bytes. Raises OSError for anything else; never waits for a pipe that has taken its
    place."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError("not a regular file")
    return file
