"""Where images come from beside one folder: parquet files, several sources, formats that need a package."""

import pickle
import shutil
import sys
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sslr1 import model
from sslr1.data import Decoder, ImageFolder, ImageStore, parquet, walk
from sslr1.data.decode import formats
from sslr1.data.draws import Draws, dealt
from sslr1.data.scenes import scene
from sslr1.data.sources import Source
from sslr1.errors import UserError
from tests.data.test_data import content, stream
from tests.data.test_shards import archive


@pytest.fixture(scope="module")
def files(scenes):
    return [path.read_bytes() for path in sorted(scenes.iterdir())[:60]]


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return model.load_tokenizer(tiny)


def table(path, files, row_group_size=7, **columns):
    """As Hugging Face's `datasets` writes images."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = pa.array([data and {"bytes": data, "path": f"{i}.jpg"} for i, data in enumerate(files)])
    pq.write_table(pa.table({"image": images, "label": range(len(files)), **columns}), path, row_group_size)
    return path


def loose(folder, files):
    folder.mkdir(parents=True)
    for i, data in enumerate(files):
        (folder / f"{i:04d}.jpg").write_bytes(data)
    return folder


def test_a_parquet_file_gives_the_puzzles_of_a_folder(tmp_path, files, tokenizer):
    """In the same order; a null and a file that is no image are passed over as bad files are."""
    folder = loose(tmp_path / "loose", files)
    (folder / "0007.jpg").write_bytes(b"")
    (folder / "0020.jpg").write_bytes(b"hello")
    spoilt = [*files[:7], None, *files[8:20], b"hello", *files[21:]]
    table(tmp_path / "hub" / "data" / "train-00000-of-00002.parquet", spoilt[:30])
    table(tmp_path / "hub" / "data" / "train-00001-of-00002.parquet", spoilt[30:], 100)
    (tmp_path / "hub" / "README.md").write_text("a data set")
    found = ImageFolder.scan(tmp_path / "hub")
    assert found.files[29].path == "data/train-00000-of-00002.parquet/29" and found.about.endswith("(1 .md)")
    found.freeze(tmp_path / "files.txt")
    again = ImageFolder.thaw(tmp_path / "hub", tmp_path / "files.txt")
    assert again.files == found.files and pickle.loads(pickle.dumps(found)).read(3) == files[3]
    one, other = stream(ImageFolder.scan(folder), tokenizer), stream(again, tokenizer)
    for step in range(5):
        assert content(one.get(step)) == content(other.get(step))
    assert one.store.bad.keys() == other.store.bad.keys() == {7, 20}
    assert other.store.bad[7].startswith("can't be read: the row holds no image")
    one.close()
    other.close()


def test_parquet_rows_are_read_by_row_group(tmp_path, files, monkeypatch):
    """Of a group no more at once than it takes; other column kinds alike; a file that has changed is bad."""
    rows = files * 3
    whole = table(tmp_path / "a.parquet", rows, 90)
    kinds = {"plain": pa.binary(), "large": pa.large_binary(), "view": pa.binary_view()}
    for name, kind in kinds.items():
        pq.write_table(pa.table({"n": range(60), name: pa.array(files, kind)}), tmp_path / f"{name}.parquet")
    found = ImageFolder.scan(tmp_path)
    assert len(found) == 360 and found.refused == []
    order = np.random.default_rng(0).permutation(360).tolist()
    assert all(found.read(n) == (rows if n < 180 else files)[n if n < 180 else n % 60] for n in order)
    assert max(map(len, pq.ParquetFile(whole).iter_batches(parquet.ROWS, row_groups=[0]))) == parquet.ROWS
    monkeypatch.setattr(parquet, "OPEN", 1)
    assert [found.read(n) for n in (0, 190, 1)] == [rows[0], files[10], rows[1]]
    table(whole, rows[:30])
    fresh = ImageFolder.thaw(tmp_path, _frozen(found, tmp_path))
    with pytest.raises(OSError, match="its file's size has changed: it had"):
        fresh.read(0)
    whole.unlink()
    with pytest.raises(OSError, match="No such file"):
        fresh.read(0)


def _frozen(folder, place):
    folder.freeze(place / "files.txt")
    return place / "files.txt"


def test_what_a_parquet_file_lacks_is_said_in_a_line(tmp_path, files, monkeypatch):
    path = table(tmp_path / "a.parquet", files, mask=[b"x"] * 60)
    for source, words in (
        (path, r"several columns may hold images \(image, mask\): name one, {path: …, column: …}"),
        (Source(path, None, "img"), r"a.parquet: no column 'img': it has image \(struct<.*>\), label \(int64\), mask"),
        (Source(path, None, "label"), r"column 'label' holds no images \(binary, or a struct of bytes and path\)"),
        (Source(tmp_path, None, "img"), r"a.parquet: no column 'img'"),
    ):
        for look in (ImageFolder.check, ImageFolder.scan):
            with pytest.raises(UserError, match=words) as caught:
                look(source)
            assert "\n" not in str(caught.value)
    assert ImageFolder.scan(Source(path, None, "image")).read(3) == files[3]
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "text.parquet")
    with pytest.raises(UserError, match=r"holds no images .*no column of images .*: it has text \(string\)"):
        ImageFolder.check(tmp_path / "text.parquet")
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "empty.parquet")
    with pytest.raises(UserError, match="holds no images"):
        ImageFolder.check(tmp_path / "empty.parquet")
    data = path.read_bytes()
    for cut in (0, 3, 100, len(data) - 1):
        (tmp_path / "cut.parquet").write_bytes(data[:cut])
        with pytest.raises(UserError, match=r"cut\.parquet: not a parquet file that can be read") as caught:
            ImageFolder.check(tmp_path / "cut.parquet")
        assert "\n" not in str(caught.value)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(UserError, match=r"needs pyarrow: pip install 'sslr1\[parquet\]'"):
            ImageFolder.check(path)
    damaged = bytearray(data)
    damaged[4:-5000] = bytes(len(data) - 5004)
    (tmp_path / "damaged.parquet").write_bytes(damaged)
    found = ImageFolder.scan(Source(tmp_path / "damaged.parquet", None, "image"))
    with pytest.raises(OSError, match="its row group can't be read"):
        found.read(0)


def test_several_sources_are_one_list(tmp_path, files, tokenizer):
    """In their order, under names of their own; each image once; reading, thawing and the split go through them all."""
    loose(tmp_path / "a" / "photos", files[:20])
    loose(tmp_path / "b" / "photos", files[20:30])
    archive(tmp_path / "x.tar", [(f"{i}.jpg", files[i]) for i in range(30, 40)])
    table(tmp_path / "y.parquet", files[40:])
    paths = [tmp_path / name for name in ("b/photos", "y.parquet", "a/photos", "x.tar")]
    found = ImageFolder.scan(paths)
    assert [found.files[n].path for n in (0, 10, 30, 50)] == [
        "photos/0000.jpg",
        "y.parquet/00",
        "3/photos/0000.jpg",
        "x.tar/30.jpg",
    ]
    expected = [*files[20:30], *files[40:], *files[:20], *files[30:40]]
    again = ImageFolder.thaw(paths, _frozen(found, tmp_path))
    assert [again.read(n) for n in range(60)] == expected == [found.read(n) for n in range(60)]
    assert again.parts == found.parts and again.weighted() == []
    (tmp_path / "all").mkdir()
    for i, data in enumerate(expected):
        (tmp_path / "all" / f"{i:04d}.jpg").write_bytes(data)
    one, other = stream(ImageFolder.scan(tmp_path / "all"), tokenizer), stream(again, tokenizer)
    assert content(one.get(3)) == content(other.get(3))
    with pytest.raises(UserError, match=r"files.txt does not list the images of"):
        ImageFolder.thaw(paths[::-1], tmp_path / "files.txt")
    for bad, words in (
        ([*paths, tmp_path / "a"], r"photos' is within '.*/a': each image is to have one name"),
        ([paths[0], paths[0]], "is named twice"),
        ([paths[0], tmp_path / "none"], "none' is not a folder, .* it does not exist"),
    ):
        with pytest.raises(UserError, match=words):
            ImageFolder.check(bad)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty' holds no images"):
        ImageFolder.scan([paths[0], tmp_path / "empty"])
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "more").symlink_to(paths[0])
    shutil.copy(tmp_path / "all" / "0000.jpg", tmp_path / "linked" / "own.jpg")
    assert len(ImageFolder.scan([*paths, tmp_path / "linked"])) == 61  # what the link leads to is there already


def test_weights_are_shares_of_the_draws(draw):
    """Exactly, epoch by epoch; a source's images are each met once before any is met again; whatever the world size."""
    assert dealt(10, [1, 1, 1]) == [4, 3, 3] and dealt(100, [1e-9, 1]) == [1, 99] and dealt(7, [0.0, 3.0]) == [0, 7]
    assert [number for place in range(9) for _, number in [Draws(range(9), 0).at(2, place)]] == [*range(9)]
    ends = np.cumsum(draw.integers(14, 40, 3)).tolist()  # 10 of each at least: two orders of as few never agree by luck
    sources = [(range(a, b), w) for a, b, w in zip([0, *ends], ends, (3.0, 1.0, 0.5))]
    numbers = sorted(draw.permutation(ends[-1])[: ends[-1] - 4].tolist())  # what isn't held out
    draws, seen = Draws(numbers, 4, sources), []
    shares = dealt(len(numbers), [3.0, 1.0, 0.5])
    for epoch in range(30):
        drawn = [draws.at(epoch, place) for place in range(len(draws))]
        assert [sum(number in of for _, number in drawn) for of, _ in sources] == shares
        seen += drawn
    assert len(set(seen)) == len(seen)  # (turn, image): the address of its puzzle
    for of, _ in sources:
        own = [number for number in numbers if number in of]
        turns = Counter(turn for turn, number in seen if number in of)
        assert all(turns[turn] == len(own) for turn in range(max(turns)))
        orders = [[n for turn, n in seen if turn == t and n in of] for t in range(2)]
        assert max(turns) < 2 or (sorted(orders[0]) == sorted(orders[1]) == own and orders[0] != orders[1])


def test_a_weighted_stream_is_the_same_on_any_ranks(tmp_path, files, tokenizer):
    loose(tmp_path / "a", files[:40])
    table(tmp_path / "b.parquet", files[40:])
    folder = ImageFolder.scan([tmp_path / "a", Source(tmp_path / "b.parquet", 3.0)])
    options = {"sources": folder.weighted()}
    one = stream(folder, tokenizer, **options)
    steps = [content(one.get(k)) for k in range(5)]
    assert steps[3] == content(stream(folder, tokenizer, **options).get(3))
    parts = [stream(folder, tokenizer, rank=r, world_size=3, **options) for r in range(3)]
    assert all(sorted(x for s in parts for x in content(s.build(k))) == sorted(steps[k]) for k in range(5))
    drawn = [row[3] for step in steps for row in step]
    assert sum(number >= 40 for number in drawn) == 45  # of 60
    one.close()


def test_what_is_excluded_is_not_listed(tmp_path, files):
    folder = loose(tmp_path / "photos", files[:30])
    archive(folder / "a.tar", [(f"{i}.jpg", files[i]) for i in range(30, 40)])
    (tmp_path / "out.txt").write_text("0003.jpg\na.tar/31.jpg\nelsewhere.jpg\n")
    found = ImageFolder.scan(folder, exclude=tmp_path / "out.txt")
    assert len(found) == 38 and not {"0003.jpg", "a.tar/31.jpg"} & {file.path for file in found.files}
    assert found.about == "40 files: 38 images, 2 left out by data.exclude"
    (tmp_path / "out.txt").write_text("elsewhere.jpg\n")
    with pytest.raises(UserError, match="names none of the images"):
        ImageFolder.scan(folder, exclude=tmp_path / "out.txt")
    with pytest.raises(UserError, match=r"data\.exclude .* can't be read: No such file"):
        ImageFolder.scan(folder, exclude=tmp_path / "none.txt")


@pytest.mark.parametrize("kind, package, ending", [("HEIF", "pillow_heif", ".HEIC"), ("JXL", "pillow_jxl", ".jxl")])
def test_formats_of_other_packages(tmp_path, kind, package, ending, monkeypatch):
    """Read as what they show, turned as they say; without the package they are counted, and their list is refused."""
    pytest.importorskip(package)
    formats.cache_clear()
    assert kind in formats()
    array = scene(3, 128)
    for i in range(16):
        exif = Image.Exif()
        exif[0x0112] = 6 if i == 1 else 1
        Image.fromarray(array[:, :96]).save(tmp_path / f"{i:02d}{ending}", kind, quality=95, exif=exif.tobytes())
    found = ImageFolder.scan(tmp_path)
    images = ImageStore(found, Decoder(), min_side=90).get(range(16))
    assert len(found) == 16 and images[0].shape == (128, 96, 3) and images[1].shape == (96, 128, 3)
    assert np.abs(images[0].numpy().astype(int) - array[:, :96]).mean() < 4
    turned = np.rot90(array[:, :96], -1)
    assert np.abs(images[1].numpy().astype(int) - turned).mean() < 4
    listing = _frozen(found, tmp_path)
    others = tuple(name for name in formats() if name != kind)
    monkeypatch.setattr(walk, "formats", lambda: others)
    monkeypatch.setattr("sslr1.data.images.formats", lambda: others)
    with pytest.raises(UserError, match=rf"\(16 {ending.lower()}.*{ending.lower()} after pip install 'sslr1"):
        ImageFolder.scan(tmp_path)
    with pytest.raises(UserError, match=rf"files.txt names 16 .*{ending.lower()}.* not read: install one that does"):
        ImageFolder.thaw(tmp_path, listing)
