"""What leaves the project: a run's model as one folder, puzzles as other trainers' data."""

import io
import json
import os
import re
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sslr1 import export, model, ops, puzzles
from sslr1.data import Decoder, ImageFolder, ImageStore, Pool
from sslr1.errors import UserError
from sslr1.integrations import easyr1, ms_swift, trl, verl
from sslr1.puzzles.series import Address
from tests.forks import launch


def command(monkeypatch, *arguments):
    """Exit code of `python -m sslr1.export …`, in this process."""
    monkeypatch.setattr(sys, "argv", ["sslr1.export", *map(str, arguments)])
    try:
        export.main()
    except SystemExit as end:
        return end.code
    return 0


# ---------------------------------------------------------------------------------------------------- models


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny, scenes):
    """A run of one step on two ranks, which computes in bfloat16 and keeps its parameters, sharded, in float32."""
    folder = tmp_path_factory.mktemp("runs")
    settings = {
        "model.path": tiny,
        "model.dtype": "bfloat16",
        "data.path": scenes,
        "data.min_side": 112,
        "log.dir": folder,
        "log.name": "run",
        "rollout.prompts": 2,
        "rollout.group_size": 2,
        "train.warmup.steps": 1,
        "train.warmup.batch": 2,
        "train.steps": 1,
        "eval.count": 2,
    }
    launch("sslr1.train", "configs/tiny.yaml", *(f"{k}={v}" for k, v in settings.items()), ranks=2)
    return folder / "run"


def weights(folder):
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def test_a_model_leaves_whole(run, tmp_path, monkeypatch, capsys):
    """In float32 it is what the shards hold, to the bit; rounded to the run's own dtype, what the checkpoint's folder
    holds."""
    newest = run / "checkpoints" / "step-000001"
    assert command(monkeypatch, "model", run, tmp_path / "own", "--checkpoint", "newest") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'own'}: {newest}\n"
    own, hf = weights(tmp_path / "own"), weights(newest / "hf")
    assert own.keys() == hf.keys() and all(torch.equal(own[k], hf[k]) and own[k].dtype == torch.bfloat16 for k in hf)
    names = {path.name for path in (newest / "hf").iterdir()}
    assert {path.name for path in (tmp_path / "own").iterdir()} == names and "preprocessor_config.json" in names

    for source in (newest, newest / "state", newest / "hf"):
        out = tmp_path / f"full-{source.name}"
        assert export.export_model(source, out, dtype="float32") == newest
        full = weights(out)
        assert all(torch.equal(full[k].bfloat16(), hf[k]) for k in hf)
    assert any(not torch.equal(full[k], hf[k].float()) for k in hf)
    stored = {}  # each parameter's rows from both ranks' files, end to end
    for path in sorted((newest / "state").glob("*.safetensors")):
        for name, rows in load_file(path).items():
            stored.setdefault(name.removeprefix("model."), []).append(rows)
    network = model.load_model(out)
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, torch.cat(stored[name])), name
    assert sum(len(rows) == 2 for rows in stored.values()) > 10
    assert network.generation_config.eos_token_id == model.load_model(newest / "hf").generation_config.eos_token_id
    assert model.load_tokenizer(out).chat_template


def test_best_or_newest(tmp_path):
    for step, best in ((3, 3), (6, 3), (9, 3)):
        state = tmp_path / "run" / "checkpoints" / f"step-{step:06d}" / "state"
        state.mkdir(parents=True)
        (state / "trainer.json").write_text(json.dumps({"step": step, "best_step": best}))
        (state.parent / "hf").mkdir()
        (state.parent / "hf" / "config.json").write_text("{}")
    checkpoints = tmp_path / "run" / "checkpoints"
    assert export.checkpoint_of(tmp_path / "run").name == "step-000003"
    assert export.checkpoint_of(tmp_path / "run", "newest").name == "step-000009"
    shutil.rmtree(checkpoints / "step-000003")  # to make room
    there = "step-000003, is no longer there; there are step-000006, step-000009: --checkpoint newest takes step-000009"
    with pytest.raises(UserError, match=there):
        export.checkpoint_of(tmp_path / "run")
    assert export.checkpoint_of(tmp_path / "run", "newest").name == "step-000009"
    assert export.checkpoint_of(checkpoints / "step-000006").name == "step-000006"
    shutil.rmtree(checkpoints / "step-000006")
    with pytest.raises(UserError, match="there is step-000009: --checkpoint newest"):
        export.checkpoint_of(tmp_path / "run")
    (checkpoints / "step-000009" / "hf" / "config.json").unlink()
    with pytest.raises(UserError, match=r"step-000009 is not whole: .*hf/config.json is missing"):
        export.checkpoint_of(tmp_path / "run", "newest")
    (checkpoints / "step-000009" / "state" / "trainer.json").write_text("")
    with pytest.raises(UserError, match=r"trainer\.json, which says what the best checkpoint is, can't be read"):
        export.checkpoint_of(tmp_path / "run")


def test_refusals_leave_things_as_they_are(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("precious")
    assert command(monkeypatch, "model", run, tmp_path / "full") == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and shown.count("\n") == 1 and "is there already" in shown
    for what, complaint in ((tmp_path / "nothing", "not a folder"), (tmp_path / "full", "neither a run's folder nor")):
        with pytest.raises(UserError, match=complaint):
            export.export_model(what, tmp_path / "out")
    (tmp_path / "young" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="no complete checkpoint"):
        export.export_model(tmp_path / "young", tmp_path / "out")

    def fails(folder, *_):
        (folder / "half").write_text("written")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sslr1.runs.checkpoint.save_hf", fails)
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="No space"):
        export.export_model(run, tmp_path / "empty")
    assert {path.name for path in tmp_path.iterdir()} == {"full", "young", "empty"}
    assert not any((tmp_path / "empty").iterdir()) and (tmp_path / "full" / "mine").read_text() == "precious"


# --------------------------------------------------------------------------------------------------- puzzles


@pytest.fixture(scope="module")
def photos(tmp_path_factory, gallery):
    """A folder of photographs, one of them not an image and one without anything on it."""
    folder = tmp_path_factory.mktemp("photos")
    for i, image in enumerate(gallery):
        Image.fromarray(image.numpy()).save(folder / f"{i:02d}.png")
    (folder / "00-broken.jpg").write_bytes(b"not an image")
    Image.new("RGB", (300, 300), (90, 90, 90)).save(folder / "01-flat.png")
    return folder


def read(out, form, split="train"):
    """The rows as the trainer gets them: (question, canvases, truth, id)."""
    if form == "ms-swift":
        rows = [json.loads(line) for line in (out / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
        return [
            (r["messages"][0]["content"], [pixels(out / p) for p in r["images"]], r["solution"], r["id"]) for r in rows
        ]
    import pyarrow.parquet as pq

    found = []
    for row in pq.read_table(out / f"{split}.parquet").to_pylist():
        canvases = [pixels(io.BytesIO(image["bytes"])) for image in row["images"]]
        if form == "trl":
            parts = row["prompt"][0]["content"]
            assert [p["type"] for p in parts] == ["image" if p["text"] is None else "text" for p in parts]
            question = "".join(p["text"] or "<image>" for p in parts)
            found.append((question, canvases, row["answer"], row["id"]))
        elif form == "easyr1":
            found.append((row["problem"], canvases, row["answer"], row["id"]))
        else:
            assert row["data_source"] == f"sslr1/{row['extra_info']['address']['puzzle']}"
            assert str(Address(**row["extra_info"]["address"])) == row["extra_info"]["id"]
            assert row["extra_info"]["split"] == split and row["extra_info"]["index"] == len(found)
            (message,) = row["prompt"]
            found.append((message["content"], canvases, row["reward_model"]["ground_truth"], row["extra_info"]["id"]))
    return found


def pixels(file, form="PNG"):
    with Image.open(file) as image:
        assert image.format == form and image.mode == "RGB"
        return np.array(image)


REWARDS = {
    "trl": lambda truth, text: trl.reward([[{"role": "assistant", "content": text}]], [truth])[0],
    "verl": lambda truth, text: verl.compute_score("sslr1/any", text, truth)["score"],
    "easyr1": lambda truth, text: easyr1.compute_score([{"response": text, "ground_truth": truth}])[0]["overall"],
    "ms-swift": lambda truth, text: ms_swift.reward([text], solution=[truth])[0],
}


def remade(address, store, pool, spec, **options):
    """The puzzle that an id names, by `puzzles.make` alone."""
    kind, seed, epoch, attempt, index = address.split("/")
    puzzle, level = kind.split("-")
    seed, epoch, attempt, index, level = map(int, (seed, epoch, attempt, index, level))
    where = {"seed": seed, "epoch": epoch, "attempt": attempt, "index": [index], "level": level}
    return puzzles.make(store.get([index]), puzzle, **where, pool=pool, spec=spec, **options)


@pytest.mark.parametrize("form", REWARDS)
def test_rows_are_the_puzzles_of_their_addresses(form, photos, tmp_path, draw, monkeypatch):
    """Pictures to the bit, words, and a truth that the trainer's reward pays for, and for nothing else."""
    monkeypatch.setattr(export, "ROWS", 4)
    seed, count = int(draw.integers(1 << 30)), len(list(photos.iterdir())) + 3
    options = {"seed": seed, "max_pixels": 224 * 224, "count": count}
    made = export.export_puzzles(photos, tmp_path / "out", form, **options)
    (name,) = made
    assert made == {name: count} and {p.name for p in (tmp_path / "out").iterdir()} - {"images"} == {name, "files.txt"}
    folder = ImageFolder.thaw(photos, tmp_path / "out" / "files.txt")
    store = ImageStore(folder, Decoder(max_side=768))
    pool, spec = Pool(store, range(len(folder))), ops.PatchSpec(max_pixels=224 * 224)
    rows = read(tmp_path / "out", form)
    assert len(rows) == count == len({row[3] for row in rows})
    for q, (question, canvases, truth, address) in enumerate(rows):
        kind = puzzles.NAMES[q % 5]
        assert address.startswith(f"{kind}-{puzzles.START_LEVEL[kind]}/{seed}/{q // len(folder)}/")
        made = remade(address, store, pool, spec)
        assert made.questions == [question] and made.decidable == [True]
        assert all(np.array_equal(a, b.numpy()) for a, b in zip(canvases, made.render()[0], strict=True))
        assert question.count("<image>") == len(canvases)
        answer = made.answers[0]
        assert puzzles.Answer.from_dict(json.loads(truth)) == answer
        assert REWARDS[form](truth, f"<think>Look.</think> \\boxed{{{answer.text}}}") == 1.0
        assert REWARDS[form](truth, f"\\boxed{{{answer.text}}}") == 0.0
        wrong = puzzles.random_answer_text(answer, draw)
        assert wrong == answer.text or REWARDS[form](truth, f"<think>Look.</think> \\boxed{{{wrong}}}") < 1.0
    attempts = [int(address.split("/")[3]) for *_, address in rows]
    assert max(attempts) > 0  # in place of the images that are none
    export.export_puzzles(photos, tmp_path / "again", form, **options)
    assert files(tmp_path / "again") == files(tmp_path / "out")
    export.export_puzzles(photos, tmp_path / "other", form, **{**options, "seed": seed + 1, "count": 1})
    assert read(tmp_path / "other", form)[0][3].split("/")[1] == str(seed + 1)


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("form", [pytest.param("ms-swift", marks=pytest.mark.slow), "verl"])
def test_any_number_of_processes_writes_the_same_bytes(form, photos, tmp_path, monkeypatch, capfd):
    """In rows, pictures and the list of files, and the same images are found bad."""
    monkeypatch.setattr(export, "FEW", 8)
    options = {"count": 21, "val": 9, "max_pixels": 224 * 224}
    said = []
    for workers in (1, 2):
        made = export.export_puzzles(photos, tmp_path / str(workers), form, workers=workers, **options)
        assert list(made.values()) == [21, 9]
        said.append([line for line in capfd.readouterr().err.splitlines() if "bad so far" in line])
    assert files(tmp_path / "1") == files(tmp_path / "2")
    assert said[0] == said[1] and "00-broken.jpg" in said[0][0]


class Deadly(ImageFolder):
    """Whoever reads one of its images is killed, as for want of memory."""

    def read(self, number):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_process_that_is_killed(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFolder, "scan", lambda path, *_: Deadly(path, [("00.png", 1), ("02.png", 1)]))
    with pytest.raises(UserError, match="one of 2 processes was killed, perhaps for want of memory"):
        export.export_puzzles(photos, tmp_path / "out", "ms-swift", count=64, workers=2)
    assert not (tmp_path / "out").exists() and list(tmp_path.iterdir()) == []


def test_jpeg_is_nearly_the_picture(photos, tmp_path):
    """A third of the bytes or less, grey levels that differ by a few; the ids and answers are the same."""
    options = {"count": 5, "max_pixels": 448 * 448}
    for form in ("png", "jpeg"):
        export.export_puzzles(photos, tmp_path / form, "ms-swift", image_format=form, **options)
    png, jpeg = ((tmp_path / form / "train.jsonl").read_text() for form in ("png", "jpeg"))
    assert jpeg.replace(".jpg", ".png") == png
    pairs = [(p, tmp_path / "jpeg" / "images" / f"{p.stem}.jpg") for p in (tmp_path / "png" / "images").iterdir()]
    for one, other in pairs:
        difference = np.abs(pixels(one).astype(int) - pixels(other, "JPEG"))
        assert difference.mean() < 4
    sizes = [sum(p.stat().st_size for p in column) for column in zip(*pairs)]
    assert sizes[1] < 0.6 * sizes[0]


def test_the_outlook_is_what_comes(monkeypatch, capsys):
    """Told once, from the second chunk on; what starting took is no measure."""
    clock = [100.0]
    monkeypatch.setattr(export.time, "monotonic", lambda: clock[0])
    outlook = export.Outlook(1000, 2)
    for chunk in range(1000 // 8):
        clock[0] += 60.0 if chunk == 0 else 0.8
        outlook.add(
            [({"images": ["a.png"]}, {"a.png": bytes(300_000)}), ({"images": [{"bytes": bytes(100_000)}]}, {})] * 4
        )
    outlook.close()
    (told,) = re.findall(r"about .* to go", capsys.readouterr().err)
    assert told == "about 200 MB, 96 s to go"  # 960 of them, ten a second


def test_held_out_images_are_in_no_other_puzzle(scenes, tmp_path):
    """Neither as what is asked about nor as what it is to be told from."""
    options = {"count": 40, "val": 30, "puzzle": ["similarity", "rotation"], "level": [1, 3], "min_side": 112}
    made = export.export_puzzles(scenes, tmp_path / "out", "verl", thinking=False, max_side=None, **options)
    assert made == {"train.parquet": 40, "val.parquet": 30}
    train, held_out = ImageFolder.scan(scenes).hold_out(0.05)
    store = ImageStore(ImageFolder.scan(scenes), Decoder(), 112)
    for split, numbers in (("train", train), ("val", held_out)):
        rows = read(tmp_path / "out", "verl", split)
        assert {int(address.split("/")[-1]) for *_, address in rows} <= set(numbers)
        asked = {"similarity-1", "similarity-3", "rotation-1", "rotation-3"}
        assert {address.split("/")[0] for *_, address in rows} == asked
        assert all(not json.loads(truth)["thinking"] and "<think>" not in question for question, _, truth, _ in rows)
        for _, canvases, _, address in rows[:8]:
            made = remade(address, store, Pool(store, numbers), ops.PatchSpec(), thinking=False)
            assert all(np.array_equal(a, b.numpy()) for a, b in zip(canvases, made.render()[0], strict=True))


def test_the_models_processor_resizes_nothing(photos, tiny, tmp_path):
    """What another trainer's processor makes of the pictures is what our own trainer would have rendered."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor, spec = Qwen2VLImageProcessorPil.from_pretrained(tiny), ops.PatchSpec.from_pretrained(tiny)
    export.export_puzzles(photos, tmp_path / "out", "easyr1", model=tiny, count=5)
    store = ImageStore(ImageFolder.scan(photos), Decoder(max_side=768))
    for _, canvases, _, address in read(tmp_path / "out", "easyr1"):
        pixel_values, grid = remade(address, store, Pool(store, range(len(store.folder))), spec).render_patches()
        theirs = processor(images=[Image.fromarray(canvas) for canvas in canvases], return_tensors="pt")
        assert torch.equal(theirs["image_grid_thw"], grid) and torch.equal(theirs["pixel_values"], pixel_values)


def test_puzzles_on_the_command_line(photos, tmp_path, monkeypatch, capsys):
    out = tmp_path / "data" / "swift"
    arguments = ("--count", 2, "--puzzle", "ordering", "--level", 3, "--direct", "--composed", "--max-pixels", 451584)
    done = launch("sslr1", "export", "puzzles", photos, out, "--format", "ms-swift", *arguments, "--workers", 2)
    assert done.stdout == f"{out / 'train.jsonl'}: 2 puzzles\n" and "puzzles 2/2" in done.stderr
    for question, canvases, truth, address in read(out, "ms-swift"):
        assert len(canvases) == 1 and address.startswith("ordering-3/") and "<think>" not in question
        assert not json.loads(truth)["thinking"]
    for wrong, complaint in (
        ((photos, out, "--format", "trl"), "is there already"),
        ((photos, tmp_path / "new", "--format", "trl", "--level", 7), "rotation has no level 7"),
        ((tmp_path / "none", tmp_path / "new", "--format", "verl"), "is not a folder"),
        ((photos, tmp_path / "new", "--format", "trl", "--count", -1), "--count"),
    ):
        assert command(monkeypatch, "puzzles", *wrong) == 2 and complaint in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_without_pyarrow(photos, tmp_path, monkeypatch):
    """Said at once, before an image is read; JSONL does without."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"pip install 'sslr1\[export\]'"):
        export.export_puzzles(tmp_path / "none", tmp_path / "out", "trl")
    assert export.export_puzzles(photos, tmp_path / "out", "ms-swift", puzzle="rotation", count=1) == {"train.jsonl": 1}


def test_images_that_decide_nothing(tmp_path):
    for i in range(16):
        Image.new("RGB", (300, 300), (90, 90, 90)).save(tmp_path / f"{i}.png")
    with pytest.raises(UserError, match=r"rotation puzzle of level 2.*\d bad so far, e\.g\. \d+\.png: flat"):
        export.export_puzzles(tmp_path, tmp_path / "out", "ms-swift", puzzle="rotation")
    assert not (tmp_path / "out").exists()


@pytest.mark.peer
@pytest.mark.parametrize("form", ["trl", "verl", "easyr1"])
def test_hugging_face_data_sets_read_it(form, photos, tmp_path):
    """As the trainers do: images come back decoded, everything else as it was put down."""
    from datasets import load_dataset

    options = {"count": 6, "max_pixels": 224 * 224}
    export.export_puzzles(photos, tmp_path / "out", form, **options)
    file = str(tmp_path / "out" / "train.parquet")
    rows = load_dataset("parquet", data_files=file, cache_dir=str(tmp_path / "cache"))["train"]
    for row, (_, canvases, _, _) in zip(rows, read(tmp_path / "out", form), strict=True):
        assert row.keys() == {"trl": trl, "verl": verl, "easyr1": easyr1}[form].COLUMNS.keys()
        assert all(np.array_equal(np.asarray(a), b) for a, b in zip(row["images"], canvases, strict=True))
    if form == "trl":
        store = ImageStore(ImageFolder.scan(photos), Decoder(max_side=768))
        pool = Pool(store, range(len(store.folder)))
        in_memory = trl.dataset(pool, count=6, spec=ops.PatchSpec(max_pixels=224 * 224))
        assert in_memory.features == rows.features
