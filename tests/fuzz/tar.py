"""Fuzz of tar archives: headers that claim what they like, damaged, cut, repeated."""

import os
import resource
import tarfile
import tempfile
import time
from pathlib import Path
from unittest import mock

from hypothesis import strategies as st

from sslr1.data import ImageFolder, images, shards
from sslr1.errors import UserError

TYPES = [bytes([code]) for code in b"01234567gxLKSXVMN\0"]
NAMES = st.one_of(
    st.sampled_from(["a.jpg", "x/b.png", "../c.jpg", "/etc/d.jpg", "e" * 150 + ".jpg", "f.txt", ""]),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=120),
)
SIZES = st.one_of(st.integers(0, 2000), st.sampled_from([-1, -512, -(1 << 40), 1 << 33, 1 << 62, 8**11 - 1]))
RECORDS = st.dictionaries(
    st.sampled_from(
        ["path", "size", "linkpath", "hdrcharset", "GNU.sparse.map", "GNU.sparse.size", "GNU.sparse.major", "x"]
    ),
    st.one_of(NAMES, SIZES.map(str), st.sampled_from(["1", "BINARY", "0,0,1,2", "9" * 5000])),
    max_size=4,
)


@st.composite
def blocks(draw):
    """A member: a header that claims what it likes, with the right checksum, and some content."""
    kind = draw(st.sampled_from([b"0"] * 6 + TYPES))
    content = draw(st.one_of(st.binary(max_size=700), st.sampled_from([b"1\n" * 400, b"2 " * 400 + b"=", b"9" * 600])))
    if kind in b"xgX" and draw(st.booleans()):
        content = b"".join(
            b"%d %s=%s\n" % (draw(st.sampled_from([len(k) + len(v) + 5, 0, 1, 99999])), k.encode(), v.encode())
            for k, v in draw(RECORDS).items()
        )
    info = tarfile.TarInfo(draw(NAMES))
    info.type = kind
    size = draw(st.one_of(st.just(len(content)), SIZES))
    try:
        info.size = size
        header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    except ValueError:
        info.size = len(content)
        header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    return bytes(header[-512:]) + content + bytes(-len(content) % 512 if draw(st.integers(0, 9)) else 0)


@st.composite
def archives(draw):
    """Whole archives and damaged ones, with members stacked, repeated, overwritten and cut."""
    data = b"".join(draw(st.lists(blocks(), max_size=8))) * draw(st.sampled_from([1, 1, 1, 2, 60]))
    data = bytearray(data + bytes(draw(st.sampled_from([1024, 512, 0]))))
    for place, value in draw(st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=6)):
        if data:
            data[place % len(data)] = value
    return bytes(data[: draw(st.one_of(st.just(len(data)), st.integers(0, len(data))))])


def tar(data):
    """Indexing ends soon, says what it refuses, and names only members that lie in the archive and can be read; a
    folder with such an archive is an ImageFolder or a UserError."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        path.write_bytes(data)
        start, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        refused = []
        members = list(shards.index(path, refused))
        assert time.process_time() - start < 2 + len(data) / 1e5
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 300 << 10
        for name, size, offset in members:
            assert 0 <= size and 512 <= offset and offset + size <= len(data)
            assert not name.startswith("/") and ".." not in name.split("/")
            try:
                assert shards.read(path, size, offset) == data[offset : offset + size]
            except OSError:
                pass  # a pax header gave another size than the member's own
        assert all(isinstance(name, str) and reason for name, reason in refused)
        try:
            with mock.patch.object(images, "FEWEST", 1):
                found = ImageFolder.scan(folder)
        except UserError:
            return
        found.freeze(Path(folder) / "files.txt")
        assert ImageFolder.thaw(folder, Path(folder) / "files.txt").files == found.files
        assert sorted(os.listdir(folder)) == ["a.tar", "files.txt"]


CHECKS = [(st.one_of(archives(), st.binary(max_size=3000)), tar)]
