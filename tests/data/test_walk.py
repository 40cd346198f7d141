"""What lies below a folder: joined by links, beside what systems leave, in formats that are not read; all of it is
accounted for."""

import gzip
import os
import socket
import tarfile
from types import SimpleNamespace

import pytest

from sslr1.data import BadImages, ImageFolder, ImageStore, walk
from sslr1.errors import UserError
from sslr1.setup import session
from tests.data.test_shards import archive, special


@pytest.fixture(scope="module")
def photo(scenes):
    return min(scenes.iterdir()).read_bytes()


def fill(folder, photo, count=16, suffix=".jpg"):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"{i:02d}{suffix}").write_bytes(photo)
    return folder


def paths(folder):
    return [file.path for file in ImageFolder.scan(folder).files]


def test_folders_joined_by_links_are_one(tmp_path, photo):
    """In folders, in links' folders, in archives; each folder once; the list is that of the names, and reads through
    them."""
    outside = fill(tmp_path / "disk" / "coco", photo)
    fill(outside / "deep", photo, 2)
    archive(tmp_path / "disk" / "shard.tar", [("x.jpg", photo)])
    mix = fill(tmp_path / "mix", photo, 3)
    fill(mix / "own" / "inner", photo, 2)
    (mix / "coco").symlink_to("../disk/coco")
    (mix / "shards.tar").symlink_to(tmp_path / "disk" / "shard.tar")
    fill(tmp_path / "more", photo, 1)
    (outside / "deep" / "more").symlink_to(tmp_path / "more")  # found on the way, after all those above
    found = ImageFolder.scan(mix)
    expected = [f"coco/{i:02d}.jpg" for i in range(16)] + [f"coco/deep/{i:02d}.jpg" for i in range(2)]
    expected += ["coco/deep/more/00.jpg", "shards.tar/x.jpg"] + [f"own/inner/{i:02d}.jpg" for i in range(2)]
    expected += [f"{i:02d}.jpg" for i in range(3)]
    assert [f.path for f in found.files] == sorted(expected, key=lambda path: path.split("/"))
    assert (found.refused, found.about) == ([], "")
    assert {found.read(n) for n in range(len(found))} == {photo}
    (tmp_path / "linked").symlink_to(mix)
    assert paths(tmp_path / "linked") == [f.path for f in found.files]


def test_links_that_lead_round_or_nowhere_are_named(tmp_path, photo):
    mix = fill(tmp_path / "home" / "mix", photo)
    fill(mix / "own", photo, 1)
    links = {
        "own/round": mix,
        "again": mix / "own",
        "up": tmp_path,
        "gone": tmp_path / "unmounted",
        "self": mix / "self",
        "whole": "/",
    }
    for name, target in links.items():
        (mix / name).symlink_to(target)
    other = fill(tmp_path / "other", photo, 1)
    (other / "back").symlink_to(mix / "own")
    (mix / "b").symlink_to(other)
    (mix / "c").symlink_to(other)
    found = ImageFolder.scan(mix)
    assert len(found) == 18 and "b/00.jpg" in paths(mix)
    assert dict(found.refused) == {
        "own/round": "a link to data.path itself",
        "again": "a link to the folder own, which is read under that name",
        "b/back": "a link to the folder own, which is read under that name",
        "c": "a link to the folder b, which is read under that name",
        "up": f"a link to {tmp_path}, a folder that holds this one",
        "whole": "a link to /, a folder that holds this one",
        "gone": f"a link to {tmp_path / 'unmounted'}: No such file or directory",
        "self": f"a link to {mix / 'self'}: Too many levels of symbolic links",
    }
    assert found.about.startswith("26 files: 18 images, 8 not read (8 refused, e.g. again: a link to the folder own")
    lone = tmp_path / "lone"
    lone.mkdir()
    (lone / "gone").symlink_to("unmounted")
    with pytest.raises(UserError, match=r"holds no images.*1 file: 0 images.*gone: a link to unmounted: No such file"):
        ImageFolder.scan(lone)


def test_a_folder_within_a_linked_one_that_was_read_before_is_not_read_again(tmp_path, photo):
    fill(tmp_path / "disk" / "part", photo)
    fill(tmp_path / "disk" / "rest", photo, 1)
    (tmp_path / "mix").mkdir()
    (tmp_path / "mix" / "a").symlink_to(tmp_path / "disk" / "part")
    (tmp_path / "mix" / "b").symlink_to(tmp_path / "disk")
    found = ImageFolder.scan(tmp_path / "mix")
    assert len(found) == 17 and found.refused == [("b/part", "the folder a, which is read under that name")]


def test_an_image_with_several_names_counts_once(tmp_path, photo):
    """Or it could be trained on and held out. A link counts where its file doesn't stand under a name of its own."""
    mix = fill(tmp_path / "mix", photo)
    (mix / "blob").write_bytes(photo)  # as in Hugging Face's cache: only its links say that it is an image
    outside = fill(tmp_path / "outside", photo, 1)
    for name, target in (
        ("copy.jpg", mix / "03.jpg"),
        ("a.jpg", outside / "00.jpg"),
        ("b.jpg", outside / "00.jpg"),
        ("c.jpg", mix / "blob"),
        ("notes.txt", mix / "blob"),
    ):
        (mix / name).symlink_to(target)
    found = ImageFolder.scan(mix)
    assert [f.path for f in found.files] == sorted([f"{i:02d}.jpg" for i in range(16)] + ["a.jpg", "c.jpg"])
    assert found.refused == [] and found.about == (
        "22 files: 18 images, 4 not read (2 links to files that are there already, 1 .txt, 1 without an ending)"
    )


def test_without_links_the_list_is_what_it_was(tmp_path, photo):
    """Every regular file by its name, by parts of the path: lists that runs have frozen are made anew alike."""
    for name in ("b", "b-c", "b/é", "a b/x.tar", "ZZ/10", "ZZ/9"):
        fill(tmp_path / name, photo, 3, ".JPG")
    (tmp_path / "b" / "empty.png").touch()
    found = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    assert paths(tmp_path) == sorted(found, key=lambda path: path.split("/"))


LEFT_ASIDE = (
    "._00.jpg",
    ".hidden.png",
    ".Trash/1.jpg",
    ".Trash-1000/files/1.jpg",
    "__MACOSX/._00.jpg",
    "sub/._a.jpg",
    "sub/@eaDir/00.jpg/SYNOPHOTO_THUMB_M.jpg",
    ".ipynb_checkpoints/00-checkpoint.jpg",
    ".DS_Store",
    "$RECYCLE.BIN/1.jpg",
    "._more.tar",
    "#recycle/1.tar",
)  # fmt: skip


def test_what_systems_leave_is_no_image(tmp_path, photo):
    """Nor bad, in folders and in archives; a folder of one's own may be hidden."""
    home = fill(tmp_path / ".data" / "photos", photo)
    for name in LEFT_ASIDE:
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_bytes(b"\0\5\x16\7 Mac OS X")
    (tmp_path / "hidden").mkdir()
    (home / ".linked").symlink_to(tmp_path)
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(home, "photos")
    for name in ("photos", "../photos.tar"):
        found = ImageFolder.scan(home.parent / name)
        assert len(found) == 16 and not any(walk.is_aside(part) for f in found.files for part in f.path.split("/")[1:])
        assert found.refused == [] and found.about.startswith("16 files: 16 images; "), found.about
        assert "hidden or system entries left aside" in found.about


def test_what_is_not_read_is_counted(tmp_path, photo, monkeypatch):
    fill(tmp_path, photo, 20)
    fill(tmp_path / "phone", b"heic", 38, ".HEIC")
    fill(tmp_path / "phone", b"avif", 30, ".avif")
    monkeypatch.setattr(walk, "formats", lambda: ("JPEG",))
    wanted = "; .avif after pip install -U pillow; .heic after pip install 'sslr1[heif]'"
    assert ImageFolder.scan(tmp_path).about == "88 files: 20 images, 68 not read (38 .heic, 30 .avif)" + wanted
    monkeypatch.setattr(walk, "formats", lambda: ("JPEG", "AVIF"))
    wanted = "; .heic after pip install 'sslr1[heif]'"
    assert ImageFolder.scan(tmp_path).about == "88 files: 50 images, 38 not read (38 .heic)" + wanted
    for i, name in enumerate(("a.json", "b", "c.cr2", "d.xml", "e.mov", "f.mp4", "g.txt", "h.a b", "i.\n")):
        fill(tmp_path / "others", b"", 1, name)
        if i < 7:
            fill(tmp_path / "others", b"", 9, name)
    (tmp_path / "nothing.png").touch()
    with socket.socket(socket.AF_UNIX) as held:
        here = os.getcwd()
        os.chdir(tmp_path)  # a socket's path is short
        held.bind("s")
        os.chdir(here)
        os.mkfifo(tmp_path / "pipe.jpg")
        found = ImageFolder.scan(tmp_path)
    assert found.refused == [("pipe.jpg", "not a regular file")]
    about = "156 files: 51 images (1 empty), 105 not read (38 .heic, 9 .cr2, 9 .json, 9 .mov, 9 .mp4, 9 .txt, 21 more, "
    assert found.about.startswith(about) and found.about.endswith(
        "1 refused, e.g. pipe.jpg: not a regular file)" + wanted
    )


def test_archives_that_are_not_read_are_named(tmp_path, photo):
    folder = fill(tmp_path / "images", photo)
    with tarfile.open(folder / "x.tar.gz", "w:gz"), tarfile.open(tmp_path / "inner.tar", "w"):
        pass
    (folder / "y.tar").write_bytes(gzip.compress(b"tar"))
    (folder / "z.zip").write_bytes(b"PK\3\4")
    inner = (tmp_path / "inner.tar").read_bytes()
    archive(folder / "all.tar", [("0.tar", inner), ("1.tgz", b""), ("1.json", b"{}"), ("2.jpg", photo)])
    links = [special(f"{i}.jpg", tarfile.SYMTYPE, "../x.jpg") for i in range(3)]
    archive(folder / "links.tar", links)
    found = ImageFolder.scan(folder)
    compressed = "a compressed archive, which is not read: unpack it"
    nested = "an archive within an archive, which is not read: unpack all.tar"
    assert len(found) == 17 and dict(found.refused) == {
        "x.tar.gz": f"{compressed}, or pack it again as a plain .tar",
        "z.zip": f"{compressed}, or pack it again as a plain .tar",
        "y.tar": compressed,
        "all.tar/0.tar": nested,
        "all.tar/1.tgz": nested,
        **{f"links.tar/{i}.jpg": "a link" for i in range(3)},
    }
    assert found.about.startswith("26 files: 17 images, 9 not read (1 .json, 8 refused, e.g. ")
    for name in ("x.tar.gz", "z.zip"):
        with pytest.raises(
            UserError, match=f"{name}' is not a folder, a .tar archive or a .parquet file: it is a compressed archive"
        ):
            ImageFolder.scan(folder / name)
    with pytest.raises(
        UserError, match=r"holds no images.*2 refused, e.g. all.tar/0.tar: an archive within an archive"
    ):
        archive(folder / "all.tar", [("0.tar", inner), ("1.tar", inner)])
        ImageFolder.scan(folder / "all.tar")
    with pytest.raises(
        UserError, match=r"holds no images.*3 files: 0 images, 3 not read \(3 refused, e.g. links.tar/0.jpg: a link"
    ):
        ImageFolder.scan(folder / "links.tar")


def test_what_is_no_folder_of_images_is_named_for_what_it_is(tmp_path, monkeypatch, photo):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pdf").touch()
    for path, words in (("x.pdf", "it is a file, not a folder"), ("missing", "it does not exist$")):
        with pytest.raises(UserError, match=words):
            ImageFolder.check(path)
    with pytest.raises(UserError, match="not fetched: hf download some/photos --repo-type dataset --local-dir FOLDER"):
        ImageFolder.check("some/photos", "eval.path")
    note = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
    fill(tmp_path / "notes", note, 20)
    with pytest.raises(UserError, match=r"data\.path 'notes': .*\.jpg, and all else .*Git LFS's note.*git lfs pull"):
        ImageFolder.check("notes")
    fill(tmp_path / "notes", photo, 20)
    (tmp_path / "notes" / "a.jpg").write_bytes(note)
    ImageFolder.check("notes")
    store = ImageStore.scan("notes")
    store.get([number for number, file in enumerate(store.folder.files) if file[0] == "a.jpg"])
    assert "Git LFS's note of it: run git lfs pull" in store.complaint()
    (tmp_path / "one.tar").write_bytes(note)
    with pytest.raises(UserError, match=r"one\.tar: it is not the file itself but Git LFS's note"):
        ImageFolder.scan("one.tar")


def test_a_list_with_avif_files_needs_a_pillow_that_reads_them(tmp_path, photo, monkeypatch):
    """Another would pass them over as bad; one that reads them doesn't add to an older list."""
    fill(tmp_path / "images", photo)
    fill(tmp_path / "images", photo, 3, ".avif")
    monkeypatch.setattr(walk, "formats", lambda: ("JPEG", "AVIF"))
    listing = tmp_path / "files.txt"
    ImageFolder.scan(tmp_path / "images").freeze(listing)
    monkeypatch.setattr("sslr1.data.images.formats", lambda: ("JPEG",))
    with pytest.raises(
        UserError, match=r"files.txt names 3 \.avif files, which this Pillow does not read: install one"
    ):
        ImageFolder.thaw(tmp_path / "images", listing)
    monkeypatch.setattr(walk, "formats", lambda: ("JPEG",))
    ImageFolder.scan(tmp_path / "images").freeze(listing)
    monkeypatch.setattr(walk, "formats", lambda: ("JPEG", "AVIF"))
    assert len(ImageFolder.thaw(tmp_path / "images", listing)) == 16


def test_a_run_says_it_at_the_start_and_at_the_end(tmp_path, photo, one_process):
    """What was found is kept with the list; the line on bad images counts those of all starts."""
    fill(tmp_path / "images", photo)
    fill(tmp_path / "images", photo, 2, ".cr2")
    found = ImageFolder.scan(tmp_path / "images")
    found.freeze(tmp_path / "files.txt")
    (tmp_path / "found.txt").write_text(found.about + "\n")
    again = ImageFolder.thaw(tmp_path / "images", tmp_path / "files.txt")
    store = ImageStore(again, decoder=None)
    images = session.Images(store=store, train=[], held_out=[])
    line = f"{tmp_path / 'images'}: 18 files: 16 images, 2 not read (2 .cr2)"
    one = SimpleNamespace(images=images, evaluation=images)
    assert session.Session.not_read(one) == [line]
    listed = BadImages(tmp_path, {"": store}, one_process)
    assert listed.summary() == []
    store.bad[3] = "flat"
    listed.update()
    assert listed.summary() == [f"1 image was bad, see {tmp_path / 'bad_images.txt'}"]
    store.bad[4] = "flat"
    listed.update()
    assert listed.summary() == [f"2 images were bad, see {tmp_path / 'bad_images.txt'}"]
    again.refused = [("x.zip", "a compressed archive")]
    listed.update()
    assert listed.summary() == [f"2 images were bad, 1 name was refused, see {tmp_path / 'bad_images.txt'}"]
    assert "x.zip\trefused: a compressed archive\n" in (tmp_path / "bad_images.txt").read_text()
