"""Copies of images are found, whatever was done to them within bounds, and other images are not."""

import base64
import io
import sys

import numpy as np
import pytest
from PIL import Image

from sslr1.data import ImageFolder, likeness
from sslr1.evaluate import overlap


@pytest.fixture(scope="module")
def images(photographs):
    """Parts of photographs that have nothing in common. (A lawn or gravel, without a large shape, is not found again
    once it is cropped.)"""
    parts = [image[y : y + 192, x : x + 192] for image in photographs for y in (0, 192) for x in (0, 192, 384)]
    return [part.numpy() for part in parts if part.shape[:2] == (192, 192)][:16]


def encoded(array, kind="JPEG", **options):
    out = io.BytesIO()
    Image.fromarray(array).save(out, kind, **options)
    return out.getvalue()


def copied(array, draw):
    """Cropped by up to 3 % a side, scaled by 0.25 to 2 in any way, compressed."""
    height, width = array.shape[:2]
    low, high = draw.uniform(0, 0.03, (2, 2)) * (height, width)
    image = Image.fromarray(array[round(low[0]) : round(height - high[0]), round(low[1]) : round(width - high[1])])
    size = np.array(image.size) * 2 ** draw.uniform(-2, 1)
    image = image.resize(size.round().astype(int).tolist(), Image.Resampling(int(draw.integers(0, 6))))
    return encoded(np.asarray(image), quality=int(draw.integers(50, 96)))


def test_copies_are_found_and_nothing_else(images, draw):
    whole = np.stack([likeness.thumbnail(encoded(image, "PNG")) for image in images])
    copies = np.stack([likeness.thumbnail(copied(image, draw)) for image in images for _ in range(4)])
    for found in (likeness.pairs(whole, copies), ((j, i, x) for i, j, x in likeness.pairs(copies, whole))):
        found = {(i, j): x for i, j, x in found}
        assert not [pair for pair in found if pair[0] != pair[1] // 4]
        assert len(found) >= 0.99 * len(copies) - 1, sorted(set(range(len(copies))) - {j for _, j in found})
        assert all(likeness.ALIKE <= x <= 1.0001 for x in found.values())


def test_thumbnails_of_any_file_are_alike(images):
    """Turned as EXIF says; whatever the format; nothing is found in what is flat."""
    exif = Image.Exif()
    exif[0x0112] = 6
    array = images[0]
    jpeg = likeness.thumbnail(encoded(array, quality=95)).astype(int)
    assert (
        np.abs(jpeg - likeness.thumbnail(encoded(array, "PNG"))).mean() < 4
    )  # of 256; decoded at a quarter of its size
    turned = likeness.thumbnail(encoded(np.ascontiguousarray(np.rot90(array)), quality=95, exif=exif))
    assert np.abs(jpeg - turned).mean() < 1
    flat = np.full((2, 32, 32), 90, np.uint8)
    assert list(likeness.pairs(flat, flat)) == []
    with pytest.raises(ValueError, match="not an image of a format"):
        likeness.thumbnail(b"hello")


def test_the_command_writes_what_data_exclude_takes(tmp_path, images, draw, monkeypatch, capsys):
    """Against a folder, and against a benchmark's table; what can't be read is said."""
    for folder in ("a", "b", "bench"):
        (tmp_path / folder).mkdir()
    for i, image in enumerate(images):
        (tmp_path / "ab"[i % 2] / f"{i:02d}.jpg").write_bytes(encoded(image, quality=90))
    (tmp_path / "a" / "bad.jpg").write_bytes(b"hello")
    copies = {number: copied(images[number], draw) for number in (4, 7, 12)}
    rows = ["index\tquestion\tanswer\timage"]
    for number, data in copies.items():
        (tmp_path / "bench" / f"{number}.jpg").write_bytes(data)
        rows.append(f"{number}\tIs it?\tyes\t{base64.b64encode(data).decode()}")
    (tmp_path / "bench.tsv").write_text("\n".join(rows) + "\n")
    monkeypatch.chdir(tmp_path)
    for against in ("bench", "bench.tsv"):
        monkeypatch.setattr(sys, "argv", ["overlap", "a", "b", "--against", against, "--out", "out.txt"])
        overlap.main()
        said = capsys.readouterr().out
        assert "1 images can't be read and are not compared, e.g. a/bad.jpg: not an image" in said
        assert f"3 of 17 images show the same as 3 of 3 of {against}: out.txt, pairs in out.pairs.tsv; set data" in said
        assert (tmp_path / "out.txt").read_text() == "a/04.jpg\na/12.jpg\nb/07.jpg\n"
        assert len((tmp_path / "out.pairs.tsv").read_text().splitlines()) == 3
    kept = ImageFolder.scan(["a", "b"], exclude="out.txt", fewest=1)
    assert len(kept) == 14 and kept.about.startswith("17 files: 14 images, 3 left out by data.exclude")
    monkeypatch.setattr(sys, "argv", ["overlap", "a", "--against", "nowhere"])
    with pytest.raises(SystemExit) as end:
        overlap.main()
    assert end.value.code == 2 and "nowhere' is not a folder" in capsys.readouterr().err
