"""Tar archives of images (WebDataset's shards among them): where each member's bytes lie, found once, read by offset.

Nothing is ever extracted. Archives may be damaged or hostile: what can't be used is named with a reason, and reading
never goes beyond the archive, whatever its headers claim.
"""

import os
import stat
import tarfile
import zlib
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


def index(path, refused: list):
    """Every regular file of an archive as a Member, in turn; (name, why it is none) goes to `refused`. A name of ""
    stands for the archive itself.

    Refused are members that are cut short, links, devices, sparse files, and names that lead out of the archive. What
    stands before a damaged place is used; after it there is no telling where a member begins. Of members with one name
    the last counts, as it does when an archive is extracted; that is the caller's to see to.
    """
    try:
        with open_file(path) as file:
            length = os.fstat(file.fileno()).st_size
            for name, size, offset, reason in _headers(file, length, refused):
                name = name.removeprefix("./")
                if reason is None:
                    reason = _refusal(name, size, offset, length)
                if reason:
                    refused.append((name, reason))
                elif reason is None:
                    yield Member(name, size, offset)
    except OSError as error:
        refused.append(("", f"can't be read: {error.strerror or error}"))


def _headers(file, length, refused):
    """(name, size, offset of the bytes, why it is none of a regular file's: None if it is one's, "" of a folder) of
    every header of an archive in turn; says in `refused` where they end before they should."""
    archive, end, cut = None, 0, False
    headers = _Headers(file)
    try:
        while True:
            found = _ordinary(file.fileno(), end)
            if found:
                name, size, offset = found
                yield name, size, offset, None
                end = offset + (size + BLOCK - 1) // BLOCK * BLOCK
                cut = end > length and offset + size > length
                continue
            headers.left = HEADERS
            if archive is None:
                file.seek(end)
                archive = tarfile.TarFile(fileobj=headers, mode="r", encoding="utf-8", errors="surrogateescape")
            archive.offset = archive.offset if archive.firstmember else end
            info = archive.next()
            if info is None or archive.offset < end + BLOCK:  # or it goes round in circles
                break
            kind = _kind(info)
            yield info.name, info.size, info.offset_data, kind
            end = archive.offset
            cut = end > length and info.offset_data + info.size > length and kind is None
            archive.members.clear()  # tarfile keeps them all
            archive.pax_headers.clear()  # what one says of all files after it is of no use here
    except OSError:
        raise
    except Exception as error:  # damaged headers make tarfile raise nearly anything
        if archive is None and not end:
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


def _ordinary(handle, offset) -> tuple | None:
    """(name, size, offset of its bytes) of the regular file whose header stands at an offset, in a twentieth of the
    time that tarfile takes; None for whatever is out of the ordinary, which is left to tarfile. A long name, and pax
    records that alter nothing but name, times and owner, are ordinary."""
    block = os.pread(handle, BLOCK, offset)
    kind, size = _fields(block)
    name = None
    if kind in (b"x", b"L") and 0 < size <= HEADERS // 4:
        extra = os.pread(handle, size, offset + BLOCK)
        name = _path(extra) if kind == b"x" else extra.partition(b"\0")[0]
        offset += BLOCK + (size + BLOCK - 1) // BLOCK * BLOCK
        if name is None or len(extra) != size:
            return None
        block = os.pread(handle, BLOCK, offset)
        kind, size = _fields(block)
    if kind not in (b"0", b"\0"):
        return None
    if not name:
        name = block[:100].partition(b"\0")[0]
        prefix = block[345:500].partition(b"\0")[0]
        name = prefix + b"/" + name if prefix else name
    if not name or name.endswith(b"/"):
        return None
    return name.decode("utf-8", "surrogateescape"), size, offset + BLOCK


def _fields(block) -> tuple:
    """(kind, size) of an ordinary header; (None, 0) of another."""
    try:
        if block[257:262] == b"ustar" and not block[100:156].translate(None, b"01234567 \0"):
            summed = zlib.adler32(block[156:], zlib.adler32(block[:148])) & 0xFFFF  # 1 and the sum of its bytes
            if summed == (int(block[148:156].strip(b" \0"), 8) - 255) % 65521:
                return block[156:157], int(block[124:136].strip(b" \0"), 8)
    except ValueError:
        pass
    return None, 0


HARMLESS = {b"path", b"mtime", b"atime", b"ctime", b"uid", b"gid", b"uname", b"gname"}  # of pax records


def _path(records) -> bytes | None:
    """The path that pax records give, b"" if they give none; None where they say what may alter more."""
    path, at = b"", 0
    while at < len(records):
        length, space, _ = records[at : at + 8].partition(b" ")
        if not space or not length.isdigit() or not 5 <= int(length) <= len(records) - at:
            return None
        record = records[at : at + int(length)]
        key, _, value = record[len(length) + 1 : -1].partition(b"=")
        if key not in HARMLESS or not value or record[-1:] != b"\n" or b"\0" in value:
            return None
        if key == b"path":
            path = value
        at += int(length)
    return path


def _kind(info):
    """Why a header of tarfile's is none of a regular file's, "" of a folder, None if it is one."""
    if info.issym() or info.islnk():
        return "a link"
    if info.isdev():
        return "a device or a pipe"
    if info.issparse():
        return "a sparse file"
    return None if info.isreg() else ""


def _refusal(name, size, offset, length):
    """Why a regular file is refused, or None."""
    if name.startswith("/") or (".." in name and ".." in name.split("/")):
        return "its name leads out of the archive"
    if size < 0:
        return "its size is negative"
    if offset + size > length:
        return f"cut short: {max(length - offset, 0):,} of {size:,} bytes are there"
    return None


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
