"""Images, decoding and the stream: broken files, frozen lists, substitutes, addresses."""

import inspect
import io
import shutil
from dataclasses import replace

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from sslr1 import model, ops, puzzles
from sslr1.config.inputs import Data
from sslr1.data import (
    Decoder,
    ImageFolder,
    ImageStore,
    Pool,
    PuzzleStream,
    choose_held_out,
    headers,
    listing,
    make_held_out,
)
from sslr1.data.decode import _pillow, _turbo
from sslr1.data.scenes import scene
from sslr1.errors import UserError
from sslr1.ops import keys
from sslr1.puzzles import look
from sslr1.puzzles.curriculum import HORIZON, LAG, Curriculum
from sslr1.puzzles.picture import MAX_SIDE, MIN_SIDE, Picture

SPEC = ops.PatchSpec(max_pixels=112 * 112)
BACKENDS = [
    "pillow",
    pytest.param("dali", marks=pytest.mark.skipif(Decoder().backend != "dali", reason="DALI is not installed")),
]


def encoded(array, kind="JPEG", **options):
    out = io.BytesIO()
    Image.fromarray(array).save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("threads", [1, 3])
def test_decoding_is_pillows_and_bad_files_are_none(draw, backend, threads):
    arrays = [draw.integers(0, 256, (40 + i, 50, 3), dtype=np.uint8).repeat(2, 0).repeat(2, 1) for i in range(6)]
    files = [encoded(a, "PNG" if i % 3 == 2 else "JPEG") for i, a in enumerate(arrays)]
    broken = {1: files[1][:60], 3: b"", 4: b"not a picture", 5: b"\xff\xd8" + bytes(range(200))}
    mixed = [broken.get(i, f) for i, f in enumerate(files)]
    decoder = Decoder(backend, threads)
    for _ in range(2):  # a spoiled pipeline must be whole again
        for given, bad in ((files, set()), (mixed, set(broken))):
            for i, image in enumerate(decoder.decode(given)):
                if i in bad:
                    assert image is None
                else:
                    assert np.array_equal(image.numpy(), np.asarray(Image.open(io.BytesIO(given[i])).convert("RGB")))


@pytest.mark.parametrize("backend", BACKENDS)
def test_mutated_files_neither_crash_nor_touch_their_neighbours(draw, backend):
    """Bad headers among good files are what crashes DALI when it decodes in batches."""
    files = [encoded(scene(i)) for i in range(20)]
    decoder = Decoder(backend, 2)
    whole = decoder.decode(files)
    for _ in range(40):
        given, spoilt = list(files), set(draw.choice(20, 3, replace=False).tolist())
        for i in spoilt:
            data = bytearray(files[i])
            if draw.random() < 0.5:
                data = data[: draw.integers(0, len(data))]
            for place in draw.integers(0, max(1, min(len(data), 700)), draw.integers(0, 8)):
                data[place : place + 1] = bytes([draw.integers(0, 256)])
            given[i] = bytes(data)
        for i, image in enumerate(decoder.decode(given)):
            assert torch.equal(image, whole[i]) if i not in spoilt else image is None or image.dtype == torch.uint8


def jpeg(draw, size):
    """A JPEG file of any kind, of which nothing has to be turned or converted."""
    height, width = size
    array = draw.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    array = np.ascontiguousarray(
        array[:height, :width] // 2 + draw.integers(0, 128, (height, width, 3), dtype=np.uint8)
    )
    quality = int(draw.integers(5, 101))
    kind = str(draw.choice(["4:4:4", "4:2:2", "4:2:0", "440", "411", "grey", "rgb"]))
    if kind in ("440", "411"):
        return simplejpeg.encode_jpeg(array, quality, colorsubsampling=kind)
    options = {"keep_rgb": True} if kind == "rgb" else {} if kind == "grey" else {"subsampling": kind}
    options |= {"progressive": bool(draw.random() < 0.3), "restart_marker_blocks": int(draw.integers(0, 5))}
    return encoded(array[:, :, 0] if kind == "grey" else array, quality=quality, **options)


def turbo(data):
    return _turbo(data, headers.read(data))


def test_jpegs_come_out_as_from_pillow(draw):
    for _ in range(60):
        data = jpeg(draw, draw.integers(1, 70, 2))
        image, orientation = turbo(data)
        assert torch.equal(image, _pillow(data, None)[0]) and orientation == 1


def test_other_files_are_left_to_the_others(draw, monkeypatch):
    array = draw.integers(0, 256, (100, 120, 3), dtype=np.uint8)
    plain = encoded(array)
    size = plain.index(b"\xff\xc0") + 5
    others = {
        "png": encoded(array, "PNG"),
        "not a picture": b"hello",
        "nothing": b"",
        "a few bytes": plain[: draw.integers(1, 40)],
        "truncated": plain[: draw.integers(40, len(plain) - 2)],
        "bytes between segments": plain[:2] + b"\0\0" + plain[2:],
    }
    cmyk = io.BytesIO()
    Image.fromarray(array).convert("CMYK").save(cmyk, "JPEG")
    others["cmyk"] = cmyk.getvalue()
    assert turbo(plain) is not None
    assert [name for name, data in others.items() if turbo(data) is not None] == []
    monkeypatch.setattr("sslr1.data.decode.empty", lambda *size, dtype: pytest.fail(f"memory taken for {size}"))
    assert turbo(plain[:size] + b"\x20\x00\x20\x00" + plain[size + 4 :]) is None  # claims 67 megapixels


@pytest.mark.parametrize("backend", BACKENDS)
def test_exif_orientation_is_honoured(backend):
    array = np.zeros((64, 96, 3), np.uint8)
    array[:32] = 250
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to view
    (image,) = Decoder(backend).decode([encoded(array, quality=95, exif=exif)])
    assert image.shape == (96, 64, 3) and image[:, 40:].float().mean() > 200 > 50 > image[:, :24].float().mean()


def test_folders(tmp_path, scenes):
    with pytest.raises(UserError, match="not a folder"):
        ImageFolder.scan(tmp_path / "missing")
    with pytest.raises(ValueError, match="holds no images"):
        ImageFolder.scan(tmp_path)
    (tmp_path / "sub").mkdir()
    for i in range(15):
        shutil.copy(scenes / f"scene-{i:05d}.jpg", tmp_path / "sub" / f"{i}.JPG")
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match="holds 15 images"):
        ImageFolder.scan(tmp_path)
    shutil.copy(scenes / "scene-00000.jpg", tmp_path / "a b\tc.png")
    folder = ImageFolder.scan(tmp_path)
    assert len(folder) == 16
    folder.freeze(tmp_path / "files.txt")
    (tmp_path / "sub" / "new.jpg").write_bytes(b"")
    again = ImageFolder.thaw(tmp_path, tmp_path / "files.txt")
    assert again.files == folder.files and again.read(0) == folder.read(0)


def test_held_out_images_are_few_and_stay_held_out():
    folder = ImageFolder("x", [(f"{i}.jpg", 1) for i in range(3000)])
    train, held = folder.hold_out(0.05)
    assert len(held) == 150 and sorted([*train, *held]) == list(range(3000))
    grown = ImageFolder("x", [*folder.files] + [(f"new{i}.jpg", 1) for i in range(3000)])
    assert len(set(grown.hold_out(0.05)[1]) & set(held)) > 40  # by hash, not by place
    assert len(ImageFolder("x", folder.files[:100]).hold_out(0.05)[1]) == 50
    assert len(ImageFolder("x", [(f"{i}", 1) for i in range(100_000)]).hold_out(0.05)[1]) == 2000


@pytest.fixture
def broken_folder(tmp_path, scenes):
    """Sixty scenes, six of which are no good in different ways."""
    for i in range(60):
        shutil.copy(scenes / f"scene-{i:05d}.jpg", tmp_path)
    paths = sorted(tmp_path.iterdir())
    paths[3].write_bytes(paths[3].read_bytes()[:300])
    paths[10].write_bytes(b"")
    Image.fromarray(np.full((128, 128, 3), 80, np.uint8)).save(paths[20])
    Image.open(paths[30]).resize((60, 200)).save(paths[30])
    folder = ImageFolder.scan(tmp_path)
    paths[40].unlink()
    paths[50].write_bytes(b"hello")
    return folder


BAD = {3: "decoded", 10: "decoded", 20: "flat", 30: "min_side", 40: "read", 50: "size has changed"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_store_names_what_is_bad(broken_folder, backend):
    store = ImageStore(broken_folder, Decoder(backend), min_side=112, cache_bytes=10 * 128 * 128 * 3)
    images = store.get(range(60))
    assert [i for i, image in enumerate(images) if image is None] == list(BAD)
    assert all(words in store.bad[i] for i, words in BAD.items()), store.bad
    assert store._held <= store.cache_bytes
    assert all(torch.equal(a, b) for a, b in zip(store.get([5, 5, 59]), [images[5], images[5], images[59]]))
    pool = Pool(store, [10, 3, 7])
    assert len(pool) == 3 and torch.equal(pool[0].pixels, images[7])
    with pytest.raises(ValueError, match="none of the 2"):
        Pool(store, [10, 3])[1]


def test_cached_images_are_measured_once(scenes, monkeypatch):
    store = ImageStore(ImageFolder.scan(scenes), Decoder(), min_side=112)
    first = store.pictures(range(12))
    measured = []
    sample = look.sample
    monkeypatch.setattr(look, "sample", lambda pixels, n: measured.append(pixels) or sample(pixels, n))
    assert all(a is b for a, b in zip(first, store.pictures(range(12))))
    pool = Pool(store, list(range(12)))
    puzzles.make(store.pictures(range(4)), "similarity", spec=SPEC, pool=pool)
    assert not measured  # each was, once, to see whether it is flat
    puzzles.make(store.get([0]), "similarity", spec=SPEC, pool=pool)
    assert len(measured) == 1 and measured[0] is first[0].pixels
    kept = sum(v.nbytes for v in vars(first[0]).values() if isinstance(v, np.ndarray))
    assert 0.9 * Picture.KEPT < kept <= Picture.KEPT
    assert store._held == sum(p.pixels.numel() + Picture.KEPT for p in first)


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return model.load_tokenizer(tiny)


def stream(folder, tokenizer, **changes):
    options = dict(
        mixture={"rotation": 0.5, "ordering": 0.25, "similarity": 0.25},
        levels=lambda step, slot, name: {"rotation": 2, "ordering": 1, "similarity": 1}[name],
        batch=12,
        seed=4,
        form=puzzles.Form(spec=SPEC, thinking=False),
    )
    return PuzzleStream(
        ImageStore(folder, Decoder(), min_side=112), list(range(len(folder))), tokenizer, **{**options, **changes}
    )


def content(batch):
    return [
        (p.id, q, a, i, p.pixel_values.numpy().tobytes())
        for p, q, a, i in zip(batch.prompts, batch.puzzles.questions, batch.puzzles.answers, batch.images)
    ]


def test_stream_has_addresses(scenes, tokenizer):
    folder = ImageFolder.scan(scenes)
    one = stream(folder, tokenizer)
    steps = [content(one.get(k)) for k in range(4)]
    assert steps[2] == content(stream(folder, tokenizer).get(2))  # entered in the middle
    two = [stream(folder, tokenizer, rank=r, world_size=3) for r in range(3)]
    for k, whole in enumerate(steps):
        assert sorted(x for s in two for x in content(s.get(k))) == sorted(whole)
    assert steps[0] != content(stream(folder, tokenizer, seed=5).get(0))
    epoch = [i for k in range(12) for i in one.build(k).images]
    assert len(set(epoch)) == 144  # no image twice before all were seen
    one.close()


def test_stream_asks_for_the_level_of_each_slot(scenes, tokenizer):
    """Adaptive levels: the same puzzles whatever the ranks, and whether a step is prepared before or behind the update
    that it may not know of. Here rotation has just gone up, and step k + 1 is the first to feel it."""
    folder = ImageFolder.scan(scenes)

    def controller():
        c = Curriculum("adaptive", puzzles.LEVELS, {**puzzles.START_LEVEL, "rotation": 1}, 4)
        for step in range(HORIZON):
            c.update(step, {"rotation": {1: {"n": 8, "gain": 8.0, "margin": 8.0}}})
        return c

    k, c = HORIZON, controller()
    one = stream(folder, tokenizer, levels=c.level)
    before = one.get(k)
    ahead = one._ahead[k + 1].result()
    assert (
        not c.update(k, {}) and content(one.build(k)) == content(before) and content(one.build(k + 1)) == content(ahead)
    )
    for batch in (before, ahead):
        assert batch.puzzles.levels == [c.level(batch.step, j, n) for j, n in enumerate(batch.puzzles.names)]
    levels = [[b.puzzles.levels[j] for j in range(12) if b.puzzles.names[j] == "rotation"] for b in (before, ahead)]
    assert levels[0].count(1) > levels[0].count(2) and levels[1].count(2) > levels[1].count(1) and LAG == 2
    parts = [stream(folder, tokenizer, levels=controller().level, rank=r, world_size=3) for r in range(3)]
    assert sorted(x for s in parts for x in content(s.build(k + 1))) == sorted(content(ahead))
    one.close()


def test_stream_keeps_the_mixture(scenes, tokenizer):
    s = stream(ImageFolder.scan(scenes), tokenizer)
    for k in range(5):
        names = s.names(k)
        assert abs(names.count("rotation") - 6) <= 1 and abs(names.count("ordering") - 3) <= 1
    assert s.names(0) != s.names(1)


def test_bad_images_are_replaced_and_nothing_else_moves(broken_folder, scenes, tokenizer, tmp_path_factory):
    whole_folder = tmp_path_factory.mktemp("whole")
    for i in range(60):
        shutil.copy(scenes / f"scene-{i:05d}.jpg", whole_folder)
    options = dict(mixture={"rotation": 0.6, "ordering": 0.4})  # puzzles that show no other image
    good, broken = (stream(folder, tokenizer, **options) for folder in (ImageFolder.scan(whole_folder), broken_folder))
    replaced = 0
    for k in range(5):
        for a, b in zip(content(good.get(k)), content(broken.get(k))):
            if a[3] in BAD:
                replaced += 1
                assert b[3] not in BAD
            else:
                assert a == b
    assert replaced == len(BAD)


def test_an_unusable_folder_ends_with_a_reason(tmp_path, tokenizer):
    for i in range(20):
        (tmp_path / f"{i}.jpg").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no usable image after"):
        stream(ImageFolder.scan(tmp_path), tokenizer).get(0)


def test_a_slot_is_patient_where_others_found_an_image(scenes, tokenizer, monkeypatch):
    """Where few images can decide a puzzle, one slot among many draws more than 50 of those that can't; where none can,
    50 say so."""
    puzzle_at, usable = puzzles.puzzle_at, set()
    monkeypatch.setattr(
        puzzles, "puzzle_at", lambda at, *rest: replace(puzzle_at(at, *rest), decidable=at.index in usable)
    )
    s = stream(ImageFolder.scan(scenes), tokenizer, mixture={"rotation": 1.0})
    with pytest.raises(UserError, match=r"no usable image after 50 tries in .* for rotation$"):
        s.build(0)
    usable |= {3, 50}
    batches = [s.build(step) for step in range(2)]
    assert s.found and {number for batch in batches for number in batch.images} == usable
    assert max(slot.attempt for batch in batches for slot in batch.slots) > 50
    flat = s.again(batches[1], range(12))
    assert set(flat.images) <= usable and all(flat.puzzles.decidable)


def test_undecidable_images_fall_back_to_another_puzzle(tmp_path, tokenizer, scenes):
    """Vertical stripes: a half turn can't be told, the two halves of 1x2 can."""
    rng = np.random.default_rng(0)
    for i in range(20):
        stripes = rng.integers(0, 256, (1, 16, 3), dtype=np.uint8).repeat(8, 1).repeat(128, 0)
        stripes[:, 64:] = stripes[:, 63::-1]
        Image.fromarray(stripes).save(tmp_path / f"{i}.png")
    s = stream(ImageFolder.scan(tmp_path), tokenizer, mixture={"rotation": 0.5, "similarity": 0.5})
    batch = s.get(0)
    assert all(batch.puzzles.decidable)
    direct = puzzles.make(s.store.get(range(20)), "rotation", level=2, spec=SPEC)
    assert not all(direct.decidable)


def test_images_that_are_all_alike_fall_back_to_puzzles_that_need_no_others(tmp_path, tokenizer, scenes):
    """Similarity has no candidates among copies of one image; nor has a held-out similarity puzzle."""
    one = sorted(scenes.iterdir())[0].read_bytes()
    for i in range(20):
        (tmp_path / f"{i:02d}.jpg").write_bytes(one)
    folder = ImageFolder.scan(tmp_path)
    alike = stream(folder, tokenizer, mixture={"rotation": 0.2, "similarity": 0.8})
    assert alike.names(0).count("similarity") in (9, 10)
    assert set(alike.get(0).puzzles.names) == {"rotation"}
    alike.close()
    with pytest.raises(UserError, match="only 0 of 3 similarity"):
        choose_held_out(alike.store, range(20), "similarity", 1, 3, seed=1, form=puzzles.Form(spec=SPEC))


def test_held_out_puzzles_are_the_same_ones_whatever_the_ranks(scenes):
    store = ImageStore(ImageFolder.scan(scenes), Decoder(), min_side=112)
    numbers = store.folder.hold_out(0.3)[1]
    form = puzzles.Form(spec=SPEC, thinking=False, wordings=1)
    for name in puzzles.NAMES:
        level = 2 if name == "correspondence" else 1  # a fifth of its first level is decidable on square scenes
        chosen = choose_held_out(store, numbers, name, level, 100, seed=1, form=form)
        assert chosen == choose_held_out(store, numbers, name, level, 100, seed=1, form=replace(form, thinking=True))
        whole = list(make_held_out(store, numbers, chosen, form=form))
        assert [len(b) for b in whole] == [64, 36] and all(all(b.decidable) for b in whole)
        parts = [list(make_held_out(store, numbers, chosen[rank::2], form=form)) for rank in (0, 1)]
        answers = [[a for b in batches for a in b.answers] for batches in (whole, *parts)]
        assert answers[0][0::2] == answers[1] and answers[0][1::2] == answers[2]
        if answers[0][0].choices:  # a constant answer scores chance exactly
            assert [[a.value for a in answers[0]].count(c) for c in answers[0][0].choices] == [25] * 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_much_larger_images_are_reduced_and_others_left_alone(draw, backend):
    decoder = Decoder(backend, max_side=80)
    arrays = [draw.integers(0, 256, size, dtype=np.uint8) for size in ((90, 100, 3), (30, 40, 3), (15, 20, 3))]
    large = arrays[2].repeat(16, 0).repeat(16, 1)  # 240 x 320: over 1.25 times 80
    near, small, reduced = decoder.decode([encoded(a, "PNG") for a in (*arrays[:2], large)])
    assert np.array_equal(near.numpy(), arrays[0]) and np.array_equal(small.numpy(), arrays[1])
    assert reduced.shape == (60, 80, 3)
    means = (
        reduced.numpy().reshape(15, 4, 20, 4, 3)[:, 1:3, :, 1:3].mean((1, 3))
    )  # antialiased: flat cells keep their value
    assert np.abs(means - arrays[2]).mean() < 12


def test_tinted_scenes_have_hues_of_their_own():
    plain, tinted = (np.stack([scene(i, 64, tint=tint).mean((0, 1)) for i in range(40)]) for tint in (False, True))
    spread = [(means - means.mean(1, keepdims=True)).std(0).mean() for means in (plain, tinted)]
    assert spread[1] > 2 * spread[0]
    assert np.array_equal(scene(3, 64), scene(3, 64, tint=False)) and np.array_equal(
        scene(3, 64, tint=True), scene(3, 64, tint=True)
    )


def test_sides_are_the_configurations_defaults():
    fields = Data.model_fields
    assert (fields["min_side"].default, fields["max_side"].default) == (MIN_SIDE, MAX_SIDE)
    assert fields["holdout"].default == inspect.signature(ImageFolder.hold_out).parameters["share"].default


def test_a_list_without_objects_is_the_one_with_them(draw, monkeypatch):
    """Sorted by the parts of its paths, of one path the last; sizes, offsets, the split, over pieces of text."""
    monkeypatch.setattr(listing, "CHUNK", 1000)
    monkeypatch.setattr(listing, "ROWS", 128)
    signs = [*"ab/ -.~é日\t"]
    names = ["".join(draw.choice(signs, int(draw.integers(1, 30)))).strip("/") or "a" for _ in range(3000)]
    names = ["/".join(filter(None, name.split("/"))) + ".jpg" for name in names]
    rows = [(name, int(draw.integers(0, 3)) * 12345, [None, 0, 77][draw.integers(0, 3)]) for name in names]
    found = listing.Gathered()
    for row in rows:
        found.add(*row)
    expected = sorted({row[0]: row for row in rows}.values(), key=lambda row: row[0].split("/"))
    (files, counts) = listing.written([found])
    assert counts == [len(files)]
    assert [*files] == expected and files == listing.Files.of(expected)
    assert files.sizes().tolist() == [row[1] for row in expected]
    assert files.empty() == [row[1] for row in expected].count(0)
    folder = ImageFolder("x", files)
    train, held = folder.hold_out(0.05)
    ranked = sorted(range(len(files)), key=lambda i: keys.fold("holdout", files[i].path))
    assert held == sorted(ranked[: len(held)]) and [*train] == sorted(ranked[len(held) :])
    assert train[-1] == [*train][-1] and len(train) == len(files) - len(held)


def test_the_choice_of_held_out_images_is_kept(tmp_path, monkeypatch):
    """Of this list and share; another's is made anew, and where it can't be kept it is made each time."""
    folder, split = ImageFolder("x", [(f"{i}.jpg", 1) for i in range(300)]), tmp_path / "split.json"
    chosen = folder.hold_out(0.3, split)[1]
    with monkeypatch.context() as patch:
        patch.setattr(ImageFolder, "_choose", lambda *_: pytest.fail("chosen again"))
        assert folder.hold_out(0.3, split)[1] == chosen
    assert len(folder.hold_out(0.4, split)[1]) == 120
    assert ImageFolder("x", [(f"{i}.png", 1) for i in range(300)]).hold_out(0.4, split)[1] != chosen
    split.write_text("damaged")
    assert folder.hold_out(0.3, split)[1] == chosen
    assert folder.hold_out(0.3, tmp_path / "gone" / "split.json")[1] == chosen


def test_a_list_that_was_cut_short_is_refused(tmp_path):
    ImageFolder("x", [(f"{i}.jpg", 1) for i in range(20)]).freeze(tmp_path / "files.txt")
    text = (tmp_path / "files.txt").read_text()
    (tmp_path / "files.txt").write_text(text[:-1])
    with pytest.raises(UserError, match="line 20, is cut short: remove the file"):
        ImageFolder.thaw(tmp_path, tmp_path / "files.txt")
    (tmp_path / "files.txt").write_text(text.replace("1\t7.jpg", "one\t7.jpg"))
    with pytest.raises(UserError, match="line 8, is not"):
        ImageFolder.thaw(tmp_path, tmp_path / "files.txt")
