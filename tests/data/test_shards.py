"""Tar archives of images: read where they lie, whatever is wrong with them."""

import io
import os
import resource
import shutil
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from sslr1.data import ImageFolder, shards
from sslr1.errors import UserError
from tests import fuzz
from tests.fuzz import tar as fuzzed


def archive(path, members, format=tarfile.GNU_FORMAT):
    """members: (name, bytes), or a TarInfo for what has none."""
    with tarfile.open(path, "w", format=format) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


def special(name, kind, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def index(path):
    """(members, what is refused)"""
    refused = []
    return list(shards.index(path, refused)), refused


@pytest.fixture(scope="module")
def files(scenes):
    return [path.read_bytes() for path in sorted(scenes.iterdir())[:40]]


@pytest.fixture
def folder(tmp_path, files):
    """Shards as WebDataset has them, beside loose files and in a folder of their own."""
    (tmp_path / "images" / "more").mkdir(parents=True)
    pairs = [pair for i in range(12) for pair in ((f"{i:04d}.jpg", files[i]), (f"{i:04d}.json", b"{}"))]
    archive(tmp_path / "images" / "a.tar", pairs)
    archive(tmp_path / "images" / "more" / "b.tar", [(f"./x/{i:04d}.JPG", files[i]) for i in range(12, 20)])
    for i in range(20, 24):
        (tmp_path / "images" / f"{i:04d}.jpg").write_bytes(files[i])
    return tmp_path / "images"


def test_members_and_loose_files_are_images_alike(folder, files, tmp_path):
    found = ImageFolder.scan(folder)
    assert [f.path for f in found.files] == sorted([f.path for f in found.files], key=lambda p: p.split("/"))
    contents = {f.path: found.read(n) for n, f in enumerate(found.files)}
    expected = {f"a.tar/{i:04d}.jpg": files[i] for i in range(12)}
    expected |= {f"more/b.tar/x/{i:04d}.JPG": files[i] for i in range(12, 20)}
    expected |= {f"{i:04d}.jpg": files[i] for i in range(20, 24)}
    assert contents == expected and found.refused == []
    found.freeze(tmp_path / "files.txt")
    (folder / "c.tar").write_bytes((folder / "a.tar").read_bytes())
    again = ImageFolder.thaw(folder, tmp_path / "files.txt")
    assert again.files == found.files and all(again.read(n) == found.read(n) for n in range(len(found)))
    with ThreadPoolExecutor(8) as pool:  # by offset, from many threads
        assert list(pool.map(again.read, list(range(24)) * 20)) == [found.read(n) for n in range(24)] * 20


def test_one_archive_will_do(tmp_path, files):
    path = archive(tmp_path / "shard.tar", [(f"{i}.jpg", files[i]) for i in range(20)])
    found = ImageFolder.scan(path)
    found.freeze(tmp_path / "files.txt")
    again = ImageFolder.thaw(path, tmp_path / "files.txt")
    assert again.files == found.files and again.files[0].path == "shard.tar/0.jpg" and again.read(0) == files[0]
    with pytest.raises(UserError, match="holds 3 images"):
        ImageFolder.scan(archive(tmp_path / "few.tar", [(f"{i}.jpg", files[i]) for i in range(3)]))
    (tmp_path / "text.tar").write_text("not an archive " * 99)
    with pytest.raises(UserError, match=r"holds no images.*text.tar: not a tar archive"):
        ImageFolder.scan(tmp_path / "text.tar")
    with pytest.raises(UserError, match=r"not a folder, a \.tar archive or a"):
        ImageFolder.scan(tmp_path / "missing.tar")


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names(tmp_path, files, format):
    long = "/".join(["folder" * 8] * (4 if format == tarfile.USTAR_FORMAT else 40)) + "/"
    names = [f"{long}{i}.jpg" for i in range(16)] + ["größe-日本.jpg"]
    found = ImageFolder.scan(archive(tmp_path / "a.tar", list(zip(names, files)), format))
    assert sorted(f.path for f in found.files) == sorted(f"a.tar/{name}" for name in names)
    assert {found.read(n) for n in range(17)} == set(files[:17])


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_an_archive_cut_short_anywhere(tmp_path, files, format, draw):
    """What stands whole before the cut is used; what is cut is named."""
    members = [(f"{'long' * 40}/{i}.jpg", files[i]) for i in range(6)]
    whole = archive(tmp_path / "whole.tar", members, format).read_bytes()
    full, _ = index(tmp_path / "whole.tar")
    last = full[-1].offset + full[-1].size
    for cut in [0, 1, 511, 512, last - 1, last, len(whole) - 1, *draw.integers(1, len(whole), 60).tolist()]:
        path = tmp_path / "cut.tar"
        path.write_bytes(whole[:cut])
        found, refused = index(path)
        assert found == [m for m in full if m.offset + m.size <= cut]
        assert all(shards.read(path, m.size, m.offset) == files[n] for n, m in enumerate(found))
        cut_members = [m for m in full if m.offset <= cut < m.offset + m.size]
        for member in cut_members:
            assert refused == [(member.name, f"cut short: {cut - member.offset:,} of {member.size:,} bytes are there")]
        if cut < last:
            assert len(refused) == 1, cut


def test_behind_a_damaged_header_nothing_is_used(tmp_path, files):
    path = archive(tmp_path / "a.tar", [(f"{i}.jpg", files[i]) for i in range(6)])
    full, _ = index(path)
    data = bytearray(path.read_bytes())
    data[full[3].offset - 512 : full[3].offset - 412] = b"?" * 100
    path.write_bytes(data)
    found, refused = index(path)
    assert found == full[:3] and "damaged" in refused[0][1] and refused[0][0] == ""


def test_nothing_leads_out_of_an_archive(tmp_path, files):
    outside = tmp_path / "outside.jpg"
    outside.write_bytes(files[0])
    (tmp_path / "images").mkdir()
    hostile = [
        ("../outside.jpg", files[1]),
        ("a/../../outside.jpg", files[1]),
        (str(outside), files[1]),
        special("link.jpg", tarfile.SYMTYPE, "../outside.jpg"),
        special("hard.jpg", tarfile.LNKTYPE, "../outside.jpg"),
        special("device.jpg", tarfile.CHRTYPE),
        special("block.jpg", tarfile.BLKTYPE),
        special("pipe.jpg", tarfile.FIFOTYPE),
        special("folder.jpg", tarfile.DIRTYPE),
    ]
    archive(tmp_path / "images" / "a.tar", hostile + [(f"{i}.jpg", files[i]) for i in range(16)])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    found = ImageFolder.scan(tmp_path / "images")
    assert [f.path for f in found.files] == sorted(f"a.tar/{i}.jpg" for i in range(16))
    assert all(found.read(n) in files for n in range(16))
    reasons = dict(found.refused)
    assert len(reasons) == 8 and set(reasons.values()) == {
        "its name leads out of the archive",
        "a link",
        "a device or a pipe",
    }
    assert reasons["a.tar/../outside.jpg"] == reasons[f"a.tar/{outside}"] == "its name leads out of the archive"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def header(kind, size, name="x"):
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


HOSTILE = {
    "an extended header of 4 GB": header(b"x", 4 << 30) + b"11 path=xx\n" * 99,
    "a long name of 4 GB": header(b"L", 4 << 30) + b"name" * 999,
    "long names without end": header(b"L", 0) * 5000,
    "extended headers without end": header(b"x", 512) * 5000,
    "records within records": (header(b"x", 16384 - 1024) + b"2 " * 7679 + b"2=" + header(b"0", 0)) * 3,
    "a sparse map without end": header(b"x", 512)
    + b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n".ljust(512, b"\0")
    + header(b"0", 0)
    + b"9" * 9
    + b"\n"
    + b"1\n" * 200_000,
    "global records that pile up": b"".join(
        header(b"g", 512)
        + b"".join(b"%d k%d=v\n" % (len(str(k)) + 7, k) for k in range(n, n + 40)).ljust(512, b"\0")
        + header(b"0", 0)
        for n in range(10**6, 10**6 + 40 * 500, 40)
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_take_neither_time_nor_memory(tmp_path, name):
    path = tmp_path / "a.tar"
    path.write_bytes(HOSTILE[name])
    os.truncate(path, 5 << 30)  # a hole, which takes no room
    start, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _, refused = index(path)
    assert time.process_time() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 150 << 10
    assert refused or name == "records within records" or name == "global records that pile up"


def test_of_one_name_the_last_member_counts(tmp_path, files):
    path = archive(tmp_path / "a.tar", [("0.jpg", files[0]), ("1.jpg", files[2]), ("0.jpg", files[1])])
    found = ImageFolder.scan(path, fewest=1)
    assert [file.path for file in found.files] == ["a.tar/0.jpg", "a.tar/1.jpg"]
    assert found.read(0) == files[1] and not found.refused


def test_an_archive_that_has_changed_since(folder, files):
    """Members that were appended are no concern; others in the place of those listed are bad; so is a member of an
    archive that is gone."""
    found = ImageFolder.scan(folder)
    number = [f.path for f in found.files].index("a.tar/0005.jpg")
    with tarfile.open(folder / "a.tar", "a") as tar:
        info = tarfile.TarInfo("new.jpg")
        info.size = len(files[30])
        tar.addfile(info, io.BytesIO(files[30]))
    assert found.read(number) == files[5]
    archive(folder / "a.tar", [(f"{i:04d}.jpg", files[i + 1] + b"more") for i in range(12)])
    first = [f.path for f in found.files].index("a.tar/0000.jpg")
    for n in (first, number):  # where a header of another file stands, and where none does
        with pytest.raises(OSError, match="something else"):
            found.read(n)
    os.truncate(folder / "a.tar", found.files[number].offset + 5)
    with pytest.raises(OSError, match="something else"):
        found.read(number)
    (folder / "a.tar").unlink()
    with pytest.raises(FileNotFoundError):
        found.read(number)
    os.mkfifo(folder / "a.tar")  # which nobody writes to
    with pytest.raises(OSError):
        found.read(number)


def test_folders_may_have_archives_names(tmp_path, files):
    (tmp_path / "x.tar").mkdir()
    archive(tmp_path / "x.tar" / "y.tar", [(f"z.tar/{i}.jpg", files[i]) for i in range(16)])
    found = ImageFolder.scan(tmp_path / "x.tar")
    assert found.files[0].path == "y.tar/z.tar/0.jpg" and found.read(0) == files[0]
    outer = ImageFolder.scan(tmp_path)
    assert outer.files[0].path == "x.tar/y.tar/z.tar/0.jpg" and outer.read(0) == files[0]


def test_names_that_no_list_can_hold_are_refused(tmp_path, files):
    for i in range(16):
        (tmp_path / f"{i}.jpg").write_bytes(files[i])
    (tmp_path / "two\nlines.jpg").write_bytes(files[0])
    (tmp_path / "separator\u2028.jpg").write_bytes(files[0])
    with open(os.fsencode(tmp_path) + b"/latin-\xe9.jpg", "wb") as file:
        file.write(files[0])
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "nowhere.jpg").symlink_to("missing")
    found = ImageFolder.scan(tmp_path)
    reasons = dict(found.refused)
    assert len(found) == 17 and reasons["two\\nlines.jpg"] == "its name holds a line break"
    assert reasons["latin-\\udce9.jpg"] == "its name is not UTF-8" and reasons["pipe.jpg"] == "not a regular file"
    assert "No such file" in reasons["nowhere.jpg"] and len(reasons) == 4
    found.freeze(tmp_path / "files.txt")
    assert ImageFolder.thaw(tmp_path, tmp_path / "files.txt").files == found.files
    shutil.copy(tmp_path / "files.txt", tmp_path / "cut.txt")
    os.truncate(tmp_path / "cut.txt", 3)
    (tmp_path / "cut.txt").write_text("12\n")
    with pytest.raises(UserError, match="line 1, is not"):
        ImageFolder.thaw(tmp_path, tmp_path / "cut.txt")


def test_fuzz(seed):
    """A second's worth; `python -m tests.fuzz tar --minutes 10` for more."""
    assert fuzz.run(fuzzed.CHECKS, seconds=1, seed=seed) >= 20
