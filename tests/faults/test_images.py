"""A run meets every kind of bad image, of changed files, of too many: it goes on, or ends in words, and nothing else
moves."""

import io
import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from sslr1 import config, model
from sslr1.data import BadImages, Decoder, ImageFolder, ImageStore, bad, headers
from sslr1.data.scenes import scene
from sslr1.errors import UserError
from sslr1.runs import metrics
from sslr1.runs.watch import Watch
from tests.data import kinds
from tests.data.test_data import content, stream
from tests.data.test_shards import archive
from tests.faults.epoch import epoch
from tests.forks import launch
from tests.test_train import records, train

NOTHING_ELSE = {"rotation": 0.6, "ordering": 0.4}  # puzzles that show no image but their own


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return model.load_tokenizer(tiny)


def copies(scenes, folder, count):
    """`count` files 0000.jpg …, each a scene."""
    sources = [path.read_bytes() for path in sorted(scenes.iterdir())]
    folder.mkdir()
    for i in range(count):
        (folder / f"{i:04d}.jpg").write_bytes(sources[i % len(sources)])
    return folder


def spoil(path, way):
    path.unlink()
    if way == "pipe":
        os.mkfifo(path)
    elif way == "folder":
        path.mkdir()
    elif way == "loop":
        path.symlink_to(path)
    elif way == "replaced":
        path.write_bytes(kinds.encoded(scene(1234)))
    assert way in ("gone", "pipe", "folder", "loop", "replaced")


WAYS = {
    "gone": "No such file",
    "pipe": "not a regular file",
    "folder": "Is a directory",
    "loop": "symbolic links",
    "replaced": "its size has changed",
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_the_stream_survives_every_bad_file(tmp_path, scenes, tokenizer):
    """Whole files of odd kinds are used, all under the name of a JPEG file; bad ones are listed with their reasons,
    those that go bad under way too; each other puzzle is what it was."""
    whole, spoilt = (copies(scenes, tmp_path / name, 156) for name in ("whole", "spoilt"))
    array = scene(7, 160)[:112]
    small = {"JPEG, 1x1", "PNG, 1x1", "JPEG, 30,000 px wide"}
    used, reasons = set(), {}
    numbers = iter(range(0, 156, 2))
    for name, (file, _, _) in kinds.good(array).items():
        if name.endswith((", 2", ", 4", ", 5", ", 7", ", 8")):
            continue
        number = next(numbers)
        (spoilt / f"{number:04d}.jpg").write_bytes(file)
        if name in small:
            reasons[number] = "the shorter side is under data.min_side"
        else:
            used.add(number)
    for file, _ in kinds.bad(array).values():
        number = next(numbers)
        (spoilt / f"{number:04d}.jpg").write_bytes(file)
        reasons[number] = "can't be decoded: "
    options = dict(mixture=NOTHING_ELSE)
    good, broken = (stream(ImageFolder.scan(f), tokenizer, **options) for f in (whole, spoilt))
    late = dict(zip(numbers, WAYS))
    slots = list(zip(content(good.get(0)), content(broken.get(0))))
    seen = {b[3] for _, b in slots} | set(broken._ahead[1].result().images)  # the next step is read in the background
    for number, way in late.items():
        spoil(spoilt / f"{number:04d}.jpg", way)
        if number not in seen:
            reasons[number] = WAYS[way]
    for step in range(1, 13):  # 156 slots: one epoch
        slots += list(zip(content(good.get(step)), content(broken.get(step))))
    for a, b in slots:
        if a[3] in reasons:
            assert b[3] not in reasons
        elif a[3] in used:
            assert b[3] == a[3]
        elif a[3] not in late:
            assert a == b
    assert set(broken.store.bad) == set(reasons)
    assert all(words in broken.store.bad[n] for n, words in reasons.items()), broken.store.bad
    assert len(used) > 30 and len(reasons) > 30 and len(late) == 5
    good.close()
    broken.close()


@contextmanager
def unprivileged():
    """As somebody who isn't the superuser, whom permissions don't stop."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_files_without_permission_are_listed(scenes):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        folder.chmod(0o755)
        for i, path in enumerate(sorted(scenes.iterdir())[:20]):
            shutil.copy(path, folder / f"{i:02d}.jpg")
            (folder / f"{i:02d}.jpg").chmod(0o644)
        archive(folder / "a.tar", [("0.jpg", (folder / "00.jpg").read_bytes())]).chmod(0o644)
        (folder / "closed").mkdir()
        store = ImageStore(ImageFolder.scan(folder), Decoder(), min_side=112)
        store.get([5])
        for name in ("03.jpg", "a.tar", "closed"):
            (folder / name).chmod(0)
        with unprivileged():
            images = store.get(range(21))
            refused = dict(ImageFolder.scan(folder).refused)
        assert [n for n, image in enumerate(images) if image is None] == [3, 20]
        assert set(store.bad.values()) == {"can't be read: Permission denied"}
        assert refused == {"a.tar": "can't be read: Permission denied", "closed": "can't be read: Permission denied"}


def test_archives_give_the_same_puzzles_as_files(tmp_path, scenes, tokenizer):
    """In the same order; a bad member is passed over as a bad file is."""
    loose = copies(scenes, tmp_path / "loose", 60)
    (loose / "0007.jpg").write_bytes((loose / "0007.jpg").read_bytes()[:900])
    (tmp_path / "tars").mkdir()
    for part in range(3):
        members = [(f"{i:04d}.jpg", (loose / f"{i:04d}.jpg").read_bytes()) for i in range(20 * part, 20 * part + 20)]
        archive(tmp_path / "tars" / f"{part}.tar", members)
    files, members = (stream(ImageFolder.scan(tmp_path / name), tokenizer) for name in ("loose", "tars"))
    for step in range(5):
        assert content(files.get(step)) == content(members.get(step))
    assert files.store.bad == members.store.bad and list(files.store.bad) == [7]
    files.close()
    members.close()


def pillow_opens(data):
    """An independent word on whether a file is whole."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return image.width * image.height <= headers.MAX_PIXELS
    except Exception:
        return False


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("count, of", [(100, 180), pytest.param(1000, 1200, marks=pytest.mark.slow)])
def test_mutated_files_in_a_stream(tmp_path, scenes, tiny, draw, count, of):
    """No crash, no hang; as bad as an independent check finds; all other puzzles are what they were."""
    whole, spoilt = (copies(scenes, tmp_path / name, of) for name in ("whole", "spoilt"))
    changed = sorted(draw.choice(of, count, replace=False).tolist())
    broken = set()
    for number in changed:
        path = spoilt / f"{number:04d}.jpg"
        data = kinds.mutated(path.read_bytes(), draw)
        path.write_bytes(data)
        if not pillow_opens(data):
            broken.add(str(number))
    launch("tests.faults.epoch", spoilt, tiny, tmp_path / "result.json", timeout=120 + count)
    found, expected = json.loads((tmp_path / "result.json").read_text()), epoch(whole, tiny)
    undecodable = {n for n, reason in found["bad"].items() if reason.startswith("can't be decoded")}
    assert undecodable == broken and count / 10 < len(broken) < count
    assert found["slots"].keys() == expected["slots"].keys() and len(found["slots"]) == of
    for slot, (image, rest) in expected["slots"].items():
        if image not in changed:
            assert found["slots"][slot] == [image, rest]
        elif str(image) in found["bad"]:
            assert found["slots"][slot][0] != image
    assert found["asked"][0] >= of and found["asked"][1] >= len(found["bad"])


def test_the_list_is_kept(tmp_path, scenes, one_process):
    """From start to start, with what was refused, names with tabs in them, and what an evaluation's own images say."""
    for name in ("train", "held"):
        copies(scenes, tmp_path / name, 20)
    for path in (tmp_path / "train" / "0003.jpg", tmp_path / "train" / "a\tb.jpg", tmp_path / "held" / "0004.jpg"):
        path.write_bytes(b"nothing")
    os.mkfifo(tmp_path / "held" / "pipe.jpg")
    stores = {
        p: ImageStore(ImageFolder.scan(tmp_path / n), Decoder(), 112) for p, n in (("", "train"), ("held/", "held"))
    }
    bad.write(tmp_path / bad.NAME, {"old.jpg": "bad in an earlier start", "0003.jpg": "what it was then"})
    listed = BadImages(tmp_path, stores, one_process)
    assert listed.untold() == 0
    for store in stores.values():
        store.get(range(len(store.folder)))
    assert listed.untold() == 3
    listed.update()
    assert listed.untold() == 0
    rows = dict(line.rsplit("\t", 1) for line in (tmp_path / bad.NAME).read_text().splitlines())
    assert rows.keys() == {"old.jpg", "0003.jpg", "a\tb.jpg", "held/0004.jpg", "held/pipe.jpg"}
    assert rows["old.jpg"] == "bad in an earlier start" and "format that is read" in rows["0003.jpg"]
    again = BadImages(tmp_path, {}, one_process)
    assert again.listed == rows and f"{tmp_path / bad.NAME} lists 5 files" in str(again)
    (tmp_path / bad.NAME).unlink()
    again.save()
    assert bad.read(tmp_path / bad.NAME) == rows


def test_too_many_bad_images_are_counted_sensibly():
    """Over a fifth, among 64 at least; over steps, not within one."""

    def run(steps, limit=0.2):
        updates = []
        listed = SimpleNamespace(update=lambda: updates.append(1))
        settings = config.check({"model": {"path": "m"}, "data": {"path": "d", "max_bad": limit}})
        watch = Watch(settings, listed, True)
        for counts in steps:
            watch.images(SimpleNamespace(overall=dict(zip(metrics.IMAGES, counts))))
        return [watch.asked, watch.bad], len(updates)

    assert run([(63, 63, 0)]) == ([63, 63], 0)
    assert run([(100, 20, 4)]) == ([100, 20], 1)
    assert run([(50, 50, 1), (200, 0, 0)]) == ([250, 50], 1)
    assert run([(100, 100, 1)], limit=1.0) == ([100, 100], 1)
    for steps in ([(64, 13, 0)], [(32, 7, 0), (32, 6, 0)], [(1000, 201, 0)]):
        with pytest.raises(
            UserError, match=r"of the \d+ images that puzzles asked for were bad, more than data.max_bad 20%"
        ):
            run(steps)


def test_a_run_with_too_many_bad_images_ends_in_words(tmp_path, tiny, scenes):
    """The list is there; started again from its checkpoint, it ends at the same step; told to go on, it does, and what
    was listed stays listed."""
    folder = tmp_path / "images"
    shutil.copytree(scenes, folder)
    for i in range(0, 150, 3):
        (folder / f"scene-{i:05d}.jpg").write_bytes(b"nothing")
    options = ["rollout.prompts=24", "rollout.group_size=2", "train.steps=4", "train.warmup.steps=0"]
    options += ["eval.every=9", "eval.count=4", "checkpoint.every=1"]
    lines = []
    for _ in range(2):
        done = train(tmp_path, tiny, folder, "run", *options, check=False)
        assert done.returncode == 2, done.stderr
        lines.append(done.stderr.strip().splitlines()[-1])
        assert lines[-1].startswith("error: ") and f"{tmp_path / 'run' / 'bad_images.txt'} lists" in lines[-1]
        assert (
            "images that puzzles asked for were bad, more than data.max_bad 20%" in lines[-1] and "scene-" in lines[-1]
        )
        listed = bad.read(tmp_path / "run" / "bad_images.txt")
        assert len(listed) > 15 and all(int(name[6:11]) % 3 == 0 for name in listed)
    assert lines[0].split("%")[0] == lines[1].split("%")[0] and "going on from" in done.stdout
    assert [r["step"] for r in records(tmp_path / "run")] == [
        0,
        1,
    ]  # 48 images asked for, or a few more; then 64 and more
    bad.write(tmp_path / "run" / "bad_images.txt", {**listed, "gone.jpg": "bad in an earlier start"})
    done = train(tmp_path, tiny, folder, "run", *options, "data.max_bad=0.9")
    after = bad.read(tmp_path / "run" / "bad_images.txt")
    assert (
        f"{len(after)} images were bad, see" in done.stdout and listed.items() <= after.items() and "gone.jpg" in after
    )
