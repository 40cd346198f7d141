"""A run of each kind of source, and of tasks beside one: killed and gone on with, evaluated, exported."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.test_shards import archive
from tests.data.test_sources import loose, table
from tests.faults.runs import command, finish, kill, lines, same, start, wait_for

JUDGE = "tests.data.judges:right"


def _archives(folder, files):
    folder.mkdir(parents=True)
    for part in range(2):
        archive(folder / f"{part}.tar", [(f"{i:04d}.jpg", files[i]) for i in range(part, len(files), 2)])
    return folder


def _hub(folder, files):
    for part in range(2):
        table(folder / "data" / f"train-{part:05d}-of-00002.parquet", files[part::2])
    return folder


def _phone(folder, files):
    pillow_heif = pytest.importorskip("pillow_heif")
    from sslr1.data.decode import decoded

    folder.mkdir(parents=True)
    for i, data in enumerate(files):
        image = decoded(data)
        pillow_heif.from_bytes("RGB", image.shape[1::-1], image.tobytes()).save(folder / f"IMG_{i:04d}.HEIC")
    return folder


def _tasks(folder, files) -> list:
    """Overrides: questions of the user's own, as lines with pictures' paths and as a parquet file with pictures."""
    rows = [{"images": f"{i:04d}.jpg", "question": f"Is {i} odd?", "answer": i % 2 == 1} for i in range(40)]
    loose(folder, files[:40])
    (folder / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    letters = [{"image": {"bytes": data, "path": None}, "question": "A or B?", "answer": "B"} for data in files[:40]]
    pq.write_table(pa.Table.from_pylist(letters), folder / "letters.parquet", row_group_size=9)
    return [
        f"tasks.odd={{path: {folder}/odd.jsonl, share: 0.25, kind: yes/no}}",
        f"tasks.letters={{path: {folder}/letters.parquet, share: 0.25, images: image, function: {JUDGE}}}",
    ]


def _mixed(folder, files):
    weights = {_archives(folder / "tars", files[:40]): 2, _hub(folder / "hub", files[40:80]): 1}
    parts = [f"{{path: {path}, weight: {weight}}}" for path, weight in weights.items()]
    return f"[{', '.join(parts)}, {loose(folder / 'loose', files[80:120])}]"


KINDS = {
    "mixed": _mixed,
    **{kind.__name__: pytest.param(kind, marks=pytest.mark.slow) for kind in (_archives, _hub, _phone)},
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_run_of_each_kind_of_source(tmp_path, warm, scenes, draw, kind):
    files = [path.read_bytes() for path in sorted(scenes.iterdir())[:120]]
    images = kind(tmp_path / "images", files)
    settings = ("train.steps=4", "train.warmup.steps=0", "checkpoint.every=1", "eval.every=4")
    tasks = kind is _mixed
    settings = (*settings, *_tasks(tmp_path / "tasks", files)) if tasks else settings
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    said, _ = finish(command(unbroken, warm, images, *settings))
    assert "60 images to train on, 60 held out" in said
    line, run = command(killed, warm, images, *settings), killed / "run"
    process = start(line)
    wait_for(lambda: lines(run / "metrics.jsonl") >= 2 + draw.integers(0, 2), process)
    kill(process)
    assert "going on from" in finish(line)[0]
    assert same(run, unbroken / "run")
    assert (run / "files.txt").read_bytes() == (unbroken / "run" / "files.txt").read_bytes()
    assert json.loads((run / "split.json").read_text())["share"] == 0.2
    python = command(killed, warm, images)[:2]
    evaluate = [*python, "sslr1.evaluate", str(run), "eval.count=4"]
    if tasks:
        assert (run / "tasks.json").read_bytes() == (unbroken / "run" / "tasks.json").read_bytes()
        _, err = finish(evaluate, code=2)
        assert "only imported with --allow-functions" in err and err.count("\n") == 1
        evaluate.append("--allow-functions")
    said, _ = finish(evaluate)
    assert "rotation" in said and "ordering" in said and tasks == ("letters" in said and "odd" in said)
    finish([*python, "sslr1.export", "model", str(run), str(tmp_path / "model")])
    assert (tmp_path / "model" / "model.safetensors").exists()
