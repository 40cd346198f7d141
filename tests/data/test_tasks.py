"""Questions of the user's own: rows, pictures, answers, functions, and their slots of the stream."""

import json
import os
import re
import shutil
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from sslr1 import config, model, ops
from sslr1.config.inputs import Task as Settings
from sslr1.data import Decoder, ImageFolder, ImageStore, PuzzleStream, ask_held_out
from sslr1.data.judge import Judge, imported
from sslr1.data.rows import BadRow, Lines, open_rows
from sslr1.data.tasks import Task, chance, smart_resize
from sslr1.errors import UserError
from sslr1.puzzles import Address, Form, PuzzleBatch, score
from sslr1.puzzles.curriculum import chance_reward, gain, margin
from sslr1.puzzles.reward import Answer
from sslr1.setup import entry
from sslr1.setup import tasks as own
from tests.conftest import ROOT
from tests.data import judges

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
SPEC = ops.PatchSpec(max_pixels=112 * 112)
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220)}


def disk(folder, number) -> tuple:
    """(file's name, colour's name) of a picture below a folder."""
    colour = list(COLOURS)[number % 3]
    place = folder / "pictures" / f"{number:04d}.png"
    if not place.exists():
        place.parent.mkdir(exist_ok=True)
        pixels = np.full((70 + number % 9, 90, 3), 240, np.uint8)
        pixels[20:50, 20 + number % 30 : 50 + number % 30] = COLOURS[colour]
        Image.fromarray(pixels).save(place)
    return f"pictures/{place.name}", colour


def rows_of(folder, count=40):
    found = [disk(folder, n) for n in range(count)]
    return [{"images": name, "question": f"Colour {n}?", "answer": colour} for n, (name, colour) in enumerate(found)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def task_of(path, name="vqa", judge=None, **settings):
    settings = {"kind": "text", **settings} if "function" not in settings else settings
    settings = Settings(path=str(path), **settings)
    return Task(name, settings, open_rows(settings.path, f"tasks.{name}.path"), judge)


def at(row, name="vqa", attempt=0):
    return Address(name, 1, 0, 0, attempt, row)


def configured(tiny, scenes, path, *overrides):
    given = [f"model.path={tiny}", f"data.path={scenes}", f"tasks.vqa.path={path}", "tasks.vqa.kind=text"]
    kept = [one for one in given if not any(one.startswith("tasks.vqa.kind") and "function" in o for o in overrides)]
    return config.load(ROOT / "configs/tiny.yaml", [*kept, *overrides])


def opened(tiny, c, folder=None, keep=False, tokenizer=None):
    spec = ops.PatchSpec.from_pretrained(tiny, max_pixels=c.puzzles.max_pixels or 12544)
    return own.open_tasks(c, tokenizer or model.load_tokenizer(tiny), spec, own.functions(c), folder, keep)


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return model.load_tokenizer(tiny)


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_patches_are_the_processors(tmp_path, draw):
    """Of pictures of any size and kind, several a question, bit for bit."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    kinds, rows, shown = ("PNG", "JPEG", "WEBP"), [], []
    for number in range(12):
        height, width = (int(n) for n in draw.integers(8, 500, 2))
        image = Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))
        image = image.convert("L") if number == 5 else image
        name = f"{number}.{kinds[number % 3].lower()}"
        image.save(tmp_path / name, kinds[number % 3], **({"quality": 90} if number % 3 == 1 else {}))
        shown.append(Image.open(tmp_path / name))
    for number in range(0, 12, 3):
        names = [f"{n}.{kinds[n % 3].lower()}" for n in range(number, number + 3)]
        rows.append({"images": names, "question": "<image> or <image>, <image>?", "answer": "x"})
    task = task_of(write(tmp_path / "q.jsonl", rows))
    spec = ops.PatchSpec(min_pixels=56 * 56, max_pixels=300 * 300)
    batch = PuzzleBatch(task.puzzles([at(row) for row in range(4)], Form(spec=spec)), Form(spec=spec))
    values, grids = batch.render_patches()
    bounds = {"min_pixels": spec.min_pixels, "max_pixels": spec.max_pixels}
    theirs = Qwen2VLImageProcessorPil(**bounds)(shown, return_tensors="pt")
    assert torch.equal(grids, theirs["image_grid_thw"]) and torch.equal(values, theirs["pixel_values"])
    assert batch.canvas_counts == [3] * 4


def test_sizes_are_transformers(draw):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as theirs

    for _ in range(500):
        height, width = (int(n) for n in np.exp(draw.uniform(0, 8, 2)))
        height, width = max(height, -(-width // 200)), max(width, -(-height // 200))
        low = int(draw.integers(1, 40)) * 784
        spec = ops.PatchSpec(min_pixels=low, max_pixels=low * int(draw.integers(2, 60)))
        bounds = {"factor": 28, "min_pixels": spec.min_pixels, "max_pixels": spec.max_pixels}
        assert smart_resize(height, width, spec) == theirs(height, width, **bounds)
    with pytest.raises(ValueError, match="longer than the model takes"):
        smart_resize(1, 201, SPEC)


def test_a_question_in_both_forms(tmp_path):
    row = {"images": [disk(tmp_path, 0)[0]], "question": " Which? ", "answer": "B", "choices": ["red", "blue"]}
    task = task_of(write(tmp_path / "q.jsonl", [row]), kind="letter")
    for thinking, ending in (
        (False, r"\boxed{}."),
        (True, r"<think></think>, then give the final answer once, in \boxed{}."),
    ):
        (puzzle,) = task.puzzles([at(0)], Form(spec=SPEC, thinking=thinking, wordings=1))
        assert puzzle.question.startswith("<image>\nWhich?\nA. red\nB. blue\n") and puzzle.question.endswith(ending)
        assert puzzle.answer == Answer("choice", "B", ("A", "B")) and puzzle.chance == 0.5
    asked = {task.puzzles([at(0, attempt=n)], Form(spec=SPEC))[0].question for n in range(20)}
    again = {task.puzzles([at(0, attempt=n)], Form(spec=SPEC))[0].question for n in range(20)}
    assert len(asked) == 3 and asked == again


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_lines_are_found_where_they_are(tmp_path, monkeypatch, draw, end, last):
    monkeypatch.setattr("sslr1.data.rows.BLOCK", int(draw.integers(1, 40)))
    lines, numbers = [], []
    for number in range(60):
        blank = number and draw.random() < 0.2
        lines.append(
            "" if blank else json.dumps({"n": number, "é": "x" * int(draw.integers(0, 9))}, ensure_ascii=False)
        )
        numbers += [] if blank else [number]
    text = end.join(lines) + (end if last else "")
    (tmp_path / "q.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    rows = Lines(tmp_path / "q.jsonl")
    assert [rows.read(row)["n"] for row in range(len(rows))] == numbers
    assert [read()["n"] for _, read in rows.each()] == numbers
    assert [rows.where(row).endswith(f", line {n + 1}") for row, n in enumerate(numbers)] == [True] * len(rows)


def test_a_row_takes_eight_bytes(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"a": 1}\n' * 100_000)
    rows = Lines(tmp_path / "q.jsonl")
    held = [value for value in vars(rows).values() if isinstance(value, np.ndarray)]
    assert len(rows) == 100_000 and sum(value.nbytes for value in held) == 8 * 100_001


def test_parquet_rows_are_the_same_questions(tmp_path, draw):
    """Pictures as a struct, as a list of them, as bytes and as paths; any row, in any order."""
    rows = rows_of(tmp_path)
    files = [(tmp_path / row["images"]).read_bytes() for row in rows]
    columns = {
        "struct": [{"bytes": data, "path": None} for data in files],
        "list": [[{"bytes": data, "path": "x.png"}] for data in files],
        "binary": files,
        "path": [row["images"] for row in rows],
        "named": [{"bytes": None, "path": row["images"]} for row in rows],
    }
    words = {key: [row[key] for row in rows] for key in ("question", "answer")}
    pq.write_table(pa.table({**columns, **words}), tmp_path / "q.parquet", row_group_size=7)
    listed = task_of(write(tmp_path / "q.jsonl", rows))
    order, form = draw.permutation(len(rows)).tolist(), Form(spec=SPEC)
    wanted = PuzzleBatch(listed.puzzles([at(row) for row in order], form), form)
    for name in columns:
        task = task_of(tmp_path / "q.parquet", images=name)
        found = PuzzleBatch(task.puzzles([at(row) for row in order], form), form)
        assert found.questions == wanted.questions and found.answers == wanted.answers
        assert torch.equal(found.render_patches()[0], wanted.render_patches()[0]), name
        assert task.named(3).endswith("q.parquet, row 3")


SPOILT = {
    "no column 'answer' (it has 'images', 'question', 'label')": lambda row: row.update(label=row.pop("answer")),
    "set tasks.vqa.images to the one": lambda row: row.pop("images"),
    "question is missing": lambda row: row.update(question=None),
    "question is 3, where a question is due": lambda row: row.update(question=3),
    "answer is missing": lambda row: row.update(answer=" "),
    "can't be read: No such file or directory": lambda row: row.update(images="pictures/none.png"),
    "can't be read: Is a directory": lambda row: row.update(images="pictures"),
    "not an image of a format that is read": lambda row: row.update(images="q.jsonl"),
    "is an address, not a file": lambda row: row.update(images="https://example.org/a.png"),
    "a picture is 3, where a path": lambda row: row.update(images=3),
    "it has 0 pictures": lambda row: row.update(images=[]),
    "it has 1 pictures, and <image> stands 2 times": lambda row: row.update(question="<image> <image>"),
    "holds <|im_end|>": lambda row: row.update(question="a <|im_end|> b"),
    "it has options in choices, which are for kind: letter": lambda row: row.update(choices=["a", "b"]),
    "is longer than the model takes": lambda row: row.update(images="pictures/long.png"),
    "answer is '.', which is no text": lambda row: row.update(answer="."),
    "can't be read out of a box": lambda row: row.update(answer="a } b"),
}


@pytest.mark.parametrize("said", SPOILT)
def test_a_malformed_row_is_named_with_its_line(tmp_path, tiny, scenes, tokenizer, draw, said):
    rows, number = rows_of(tmp_path, 20), int(draw.integers(0, 20))
    SPOILT[said](rows[number])
    Image.new("RGB", (402, 2)).save(tmp_path / "pictures" / "long.png")
    path = write(tmp_path / "q.jsonl", rows)
    with pytest.raises((UserError, OSError)) as error:
        opened(tiny, configured(tiny, scenes, path), tokenizer=tokenizer)
    text = str(error.value)
    assert said in text and text.startswith(f"tasks.vqa: {path}, line {number + 1}") and "\n" not in text


def test_what_a_file_may_not_be(tmp_path, tiny, scenes, tokenizer):
    for content, said in (
        ("", "has no rows"),
        ("\n\n", "has no rows"),
        ("[1]\n" * 20, "line 1: a JSON list, where an object is due"),
        ('{"a": 1\n' * 20, "line 1: no JSON object"),
        ('{"a": 1}\n' * 3, "has 3 rows; at least 16"),
    ):
        (tmp_path / "q.jsonl").write_text(content)
        with pytest.raises(UserError, match=said):
            opened(tiny, configured(tiny, scenes, tmp_path / "q.jsonl"), tokenizer=tokenizer)
    (tmp_path / "q.parquet").write_text("no")
    with pytest.raises(UserError, match="not a parquet file"):
        opened(tiny, configured(tiny, scenes, tmp_path / "q.parquet"), tokenizer=tokenizer)


def test_a_row_that_is_too_long_is_named(tmp_path, tiny, scenes, tokenizer):
    rows = rows_of(tmp_path, 30)
    rows[17]["question"] = "word " * 3000
    path = write(tmp_path / "q.jsonl", rows)
    c = configured(tiny, scenes, path, "train.token_budget=2000")
    tasks = opened(tiny, c, tokenizer=tokenizer)
    with pytest.raises(UserError, match=r"line 18: its prompt has up to [\d,]+ tokens.*train.token_budget=2000"):
        own.check_token_budget(c, tasks)
    tokens, row = tasks["vqa"].longest
    form = Form(spec=SPEC, thinking=c.puzzles.thinking, wordings=c.puzzles.wordings)
    batch = PuzzleBatch(tasks["vqa"].puzzles([at(17)], form), form)
    assert row == 17 and len(model.prompts(batch, tokenizer)[0].input_ids) == tokens


def test_what_settings_refuse():
    base = {"model": {"path": "m"}, "data": {"path": "d"}}
    for tasks, said in (
        ({"rotation": {"path": "q", "kind": "text"}}, "tasks.rotation is a puzzle's name"),
        ({"A b": {"path": "q", "kind": "text"}}, "a task's name is of the letters"),
        ({"a": {"path": "q"}}, "give either kind or function"),
        ({"a": {"path": "q", "kind": "text", "function": "a:b"}}, "give either kind or function"),
        ({"a": {"path": "q", "kind": "text", "tolerance": 1}}, "tolerance is for kind: number"),
        ({"a": {"path": "q", "function": "os.system"}}, "tasks.a.function"),
        ({"a": {"path": "q", "kind": "texts"}}, "tasks.a.kind is 'texts': one of 'letter', 'number'"),
        ({"a": {"path": "q", "kind": "text", "colum": 1}}, "tasks.a.colum is not a setting"),
        ({n: {"path": "q", "kind": "text", "share": 0.6} for n in "ab"}, "tasks have shares of 1.2 together"),
    ):
        with pytest.raises(config.ConfigError, match=said):
            config.check({**base, "tasks": tasks})
    with pytest.raises(config.ConfigError, match="stands on line 4 and on line 5"):
        path = config.__file__  # any name
        from sslr1.config.text import parse

        parse("model: {path: m}\ntasks:\n  b: {path: q}\n  a: {path: q}\n  a: {path: q}\n", config.Config, path)


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, value, answer, right, wrong",
    [
        ("letter", "b", Answer("choice", "B", ("A", "B", "C")), "B", "A"),
        ("letter", "green", Answer("choice", "B", ("A", "B", "C")), "(B) green", "green"),
        ("number", 3, Answer("quantity", 3), "3.0", "4"),
        ("number", "1,234.5", Answer("quantity", 1234.5), "1234.5", "1,234"),
        ("yes/no", True, Answer("yes/no", "yes", ("yes", "no")), "Yes.", "no"),
        ("yes/no", "No", Answer("yes/no", "no", ("yes", "no")), r"\text{no}", "yes or no"),
        ("sequence", [2, 1, 3], Answer("sequence", (2, 1, 3)), "2, 1, 3", "1,2,3"),
        ("sequence", "3,1,2", Answer("sequence", (3, 1, 2)), "3 → 1 → 2", "3,1"),
        ("text", "A Red Car.", Answer("text", "A Red Car."), "a red  car", "a car"),
        ("text", 7, Answer("text", "7"), "7.", "8"),
    ],
)
def test_kinds_of_answers(tmp_path, kind, value, answer, right, wrong):
    row = {"images": "a.png", "question": "?", "answer": value}
    row |= {"choices": ["red", "green", "blue"]} if kind == "letter" else {}
    task = task_of(write(tmp_path / "q.jsonl", [row]), kind=kind)
    found = task.asked(0).answer
    assert found == answer and Answer.from_dict(json.loads(json.dumps(found.to_dict()))) == answer
    for rule in ("default", "paper", "visual_jigsaw", "exact"):
        good, bad = (score(found, f"\\boxed{{{text}}}", rule, thinking=False) for text in (right, wrong))
        assert good.exact == 1 and bad.exact == 0 and good.reward > bad.reward > 0
        assert gain(found, good, chance(found)) == 1 and margin(found, good, rule) > margin(found, bad, rule)
    assert score(found, right, thinking=False).reward == 0  # without a box


@pytest.mark.parametrize(
    "kind, value, said",
    [
        ("letter", "D", "which is no letter of its 3 options"),
        ("letter", "rouge", "which is no letter of its 3 options"),
        ("letter", "A", "may be option A or C"),
        ("number", "three", "which is no number"),
        ("number", True, "which is no number"),
        ("number", float("nan"), "which is no number"),
        ("yes/no", "perhaps", "which is no yes/no"),
        ("yes/no", 1, "which is no yes/no"),
        ("sequence", [1, 1, 2], "which is no sequence"),
        ("sequence", [0, 1], "which is no sequence"),
        ("sequence", 3, "which is no sequence"),
        ("text", True, "which is no text"),
    ],
)
def test_answers_that_are_not_of_the_kind(tmp_path, kind, value, said):
    row = {"images": "a.png", "question": "?", "answer": value}
    row |= {"choices": ["red", "green", "A"]} if kind == "letter" else {}
    task = task_of(write(tmp_path / "q.jsonl", [row]), kind=kind)
    with pytest.raises(BadRow, match=said):
        task.asked(0)


def test_a_tolerance_and_what_chance_is_then(tmp_path):
    rows = [{"images": "a.png", "question": "?", "answer": n} for n in (1.0, 1.1, 2, 3)]
    task = task_of(write(tmp_path / "q.jsonl", rows), kind="number", tolerance=0.1)
    task.answers = (1, 1.1, 2, 3)
    one = task.asked(0).answer
    for text, right in (("1.1", 1), ("0.9", 1), ("1.11", 0), ("-1", 0)):
        assert score(one, f"\\boxed{{{text}}}", thinking=False).exact == right
    assert chance(one) == 0.5 and chance(task.asked(2).answer) == 0.25
    assert chance_reward(one) == pytest.approx(0.55) and chance_reward(task.asked(2).answer) == pytest.approx(0.325)
    assert chance_reward(Answer("quantity", 3)) == chance_reward(Answer("function", "x")) == pytest.approx(0.1)
    assert Answer.from_dict(one.to_dict()) == one


# --- functions --------------------------------------------------------------------------------------------------------


def test_a_function_judges(tmp_path):
    judge = Judge("vqa", "x:y", judges.words)
    row = {"images": "a.png", "question": "?", "answer": "red green", "more": 3}
    task = task_of(write(tmp_path / "q.jsonl", [row]), judge=judge, function="x:y")
    answer = task.asked(0).answer
    for text, accuracy in (("green", 0.5), ("red or green", 1.0), ("no", 0.0)):
        found = score(answer, f"\\boxed{{{text}}}", thinking=False)
        assert found.accuracy == accuracy and found.exact == (accuracy == 1)
        assert found.reward == pytest.approx(0.1 + 0.9 * accuracy)
    assert score(answer, r"\boxed{green}", "exact", thinking=False).reward == 0.1
    assert score(answer, "green", thinking=False).reward == 0 and judge.failed is None
    with pytest.raises(ValueError, match="without its judge"):
        score(answer.to_dict(), r"\boxed{green}", thinking=False)


@pytest.mark.parametrize(
    "name, said",
    [
        ("raises", "raised KeyError: 'colour'; the answer was 'red'"),
        ("leaves", "raised SystemExit: 0"),
        ("nan", "returned nan, where a number from 0 to 1 is due"),
        ("two", "returned 2, where a number"),
        ("nothing", "returned None, which is no number"),
        ("sleeps", "has not returned after 0.2 s"),
    ],
)
def test_a_function_that_fails_is_given_up(name, said):
    judge = Judge("vqa", f"judges:{name}", getattr(judges, name), limit_s=0.2)
    assert judge("red", {}) == 0 and said in judge.failed
    assert judge.failed.startswith(f"tasks.vqa.function judges:{name} ") and "\n" not in judge.failed
    judge.function = None  # nothing is asked of it again
    assert judge("red", {}) == 0 and said in judge.failed


def test_functions_that_are_not_there():
    assert imported("k", "tests.data.judges:words") is judges.words
    for path, said in (
        ("tests.data.nobody:words", "no module 'tests.data.nobody' is installed"),
        ("tests.data.judges:none", "the module has no such name"),
        ("tests.data.judges:number", "holds a int of that name"),
        ("tests.data.judges.words:x", "can't be imported"),
    ):
        with pytest.raises(UserError, match=said) as error:
            imported("tasks.vqa.function", path)
        assert str(error.value).startswith(f"tasks.vqa.function {path}")


def test_nothing_is_imported_from_a_run_or_a_model(tmp_path, tiny, scenes, monkeypatch):
    """Neither by its name, nor as part of the working folder, nor through PYTHONPATH, nor by a link."""
    run = tmp_path / "runs" / "planted"
    (run / "checkpoints" / "step-000001" / "hf").mkdir(parents=True)
    for folder in (run, run / "checkpoints" / "step-000001" / "hf"):
        (folder / "planted_judge.py").write_text(
            f"open({str(tmp_path / 'ran')!r}, 'w')\ndef score(text, row): return 1\n"
        )
    (run / "__init__.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "planted_link.py").symlink_to(run / "planted_judge.py")
    path = write(tmp_path / "q.jsonl", rows_of(tmp_path, 20))
    hf = run / "checkpoints" / "step-000001" / "hf"
    for here, there, name in (
        (run, None, "planted_judge:score"),
        (hf, None, "planted_judge:score"),
        (tmp_path, run, "planted_judge:score"),
        (tmp_path, None, "runs.planted.planted_judge:score"),
        (tmp_path, tmp_path / "linked", "planted_link:score"),
    ):
        monkeypatch.chdir(here)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "path", ["", *([str(there)] if there else []), *sys.path])
            tasks = {"vqa": Settings(path=str(path), function=name)}
            c = config.check({"model": {"path": str(hf)}, "data": {"path": str(scenes)}})
            object.__setattr__(c, "tasks", tasks)
            with pytest.raises(UserError, match=r"no module|of which nothing is run"):
                own.functions(c, [run])
        assert not (tmp_path / "ran").exists(), name
    # and that they would have run elsewhere
    shutil.copy(run / "planted_judge.py", tmp_path / "planted_free.py")
    monkeypatch.chdir(tmp_path)
    assert imported("k", "planted_free:score")("a", {}) == 1 and (tmp_path / "ran").exists()


def test_a_stored_configuration_imports_nothing_unasked(tmp_path, tiny, scenes, capsys, monkeypatch):
    """A run's, or one that lies in a model's folder: refused before anything is imported, unless --allow-functions or
    the command line itself names the function."""
    path = write(tmp_path / "q.jsonl", rows_of(tmp_path, 20))
    c = configured(tiny, scenes, path, f"tasks.vqa={{path: {path}, function: 'tests.data.judges:right'}}")
    reached = []

    def imports(config, folders):
        reached.append(folders)
        raise UserError("reached")

    monkeypatch.setattr(own, "functions", imports)
    run, free, hub = (tmp_path / name for name in ("run", "free", "hub"))
    (run / "checkpoints").mkdir(parents=True)
    shutil.copytree(tiny, hub)
    free.mkdir()
    for folder in (run, free, hub):
        (folder / "config.yaml").write_text(config.dump(c))
    (free / "linked.yaml").symlink_to(run / "config.yaml")

    def said(source, *overrides, **options):
        reached.clear()
        with pytest.raises(SystemExit), entry.session(source, list(overrides), **options):
            pass
        return capsys.readouterr().err

    for source in (run / "config.yaml", hub / "config.yaml", free / "linked.yaml"):
        words = said(source)
        assert "only imported with --allow-functions" in words and words.count("\n") == 1 and not reached
        assert "--allow-functions" in said(source, "tasks.vqa.share=0.2") and not reached
        assert "reached" in said(source, allow_functions=True) and reached[0][0] == source.resolve().parent
        assert "reached" in said(source, "tasks.vqa.function=tests.data.judges:words")
    assert "reached" in said(free / "config.yaml") and reached[0][0] is None


# --- the stream -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory, tiny, scenes, tokenizer):
    """(configuration, tasks) of two tasks, one of them with pictures that several questions share."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = rows_of(folder, 60)
    write(folder / "a.jsonl", rows)
    write(folder / "b.jsonl", [{**row, "images": rows[n // 4]["images"]} for n, row in enumerate(rows)])
    given = [f"model.path={tiny}", f"data.path={scenes}", "puzzles.mixture={rotation: 2, ordering: 1}"]
    for name in "ab":
        given += [f"tasks.{name}.path={folder}/{name}.jsonl", f"tasks.{name}.kind=text", f"tasks.{name}.share=0.2"]
    c = config.load(ROOT / "configs/tiny.yaml", given)
    return c, opened(tiny, c, tokenizer=tokenizer)


def stream_of(many, scenes, tokenizer, rank=0, world_size=1, batch=7):
    c, tasks = many
    store = ImageStore(ImageFolder.scan(scenes), Decoder("pillow", max_side=768), 112)
    return PuzzleStream(
        store,
        range(len(store.folder)),
        tokenizer,
        mixture=config.shares(c.model_dump()),
        levels=lambda step, slot, name: c.puzzles.levels[name],
        batch=batch,
        seed=5,
        form=Form(spec=SPEC, thinking=False),
        rank=rank,
        world_size=world_size,
        tasks=tasks,
    )


def test_shares_are_of_all_slots(many):
    found = config.shares(many[0].model_dump())
    assert found == pytest.approx({"rotation": 0.4, "ordering": 0.2, "a": 0.2, "b": 0.2})
    assert config.levels(many[0].model_dump()) | {"a": 1, "b": 1} == config.levels(many[0].model_dump())


def test_every_row_has_its_turn_before_any_comes_again(many, scenes, tokenizer):
    stream = stream_of(many, scenes, tokenizer)
    met = {"a": [], "b": []}
    for step in range(90):
        names = stream.names(step)
        for j, name in enumerate(names):
            if name in met:
                met[name].append(stream.row(step, name, names[:j].count(name)))
    stream.close()
    for name, rows in met.items():
        train = list(many[1][name].train)
        assert abs(len(rows) - 0.2 * 90 * 7) < 28  # 6 s.d.
        for turn in range(len(rows) // len(train)):
            some = rows[turn * len(train) : (turn + 1) * len(train)]
            assert sorted(row for _, row in some) == train and {epoch for epoch, _ in some} == {turn}


def test_slots_are_the_same_on_any_ranks_and_from_any_start(many, scenes, tokenizer):
    def asked(stream, steps):
        out = {}
        for step in steps:
            batch = stream.build(step)
            for slot, puzzle, prompt in zip(batch.slots, batch.puzzles, batch.prompts):
                out[step, slot.j] = (str(puzzle.address), puzzle.question, prompt.pixel_values.sum().item())
        stream.close()
        return out

    whole = asked(stream_of(many, scenes, tokenizer), range(4))
    assert {key[0] for _, key in zip(whole.values(), whole)} == {0, 1, 2, 3}
    assert asked(stream_of(many, scenes, tokenizer), [3]) == {key: x for key, x in whole.items() if key[0] == 3}
    parts = [asked(stream_of(many, scenes, tokenizer, rank, 2), range(4)) for rank in (0, 1)]
    assert parts[0] | parts[1] == whole and not parts[0].keys() & parts[1].keys()
    assert {name.split("-")[0] for name, *_ in whole.values()} == {"rotation", "ordering", "a", "b"}


def test_a_picture_that_has_gone_is_replaced_and_named(tmp_path, tiny, scenes, tokenizer):
    rows = rows_of(tmp_path, 40)
    path = write(tmp_path / "a.jsonl", rows)
    c = configured(tiny, scenes, path, "puzzles.mixture={rotation: 1}", "tasks.vqa.share=0.5")
    tasks = opened(tiny, c, tokenizer=tokenizer)
    gone, damaged = list(tasks["vqa"].train)[::2], list(tasks["vqa"].train)[1]
    for row in gone:
        os.remove(tmp_path / rows[row]["images"])
    (tmp_path / rows[damaged]["images"]).write_bytes(b"\x89PNG")
    stream = stream_of((c, tasks), scenes, tokenizer, batch=16)
    batch = stream.get(0)
    again = stream.again(batch, [place for place, name in enumerate(batch.puzzles.names) if name == "vqa"])
    stream.close()
    own_rows = [puzzle.address.index for puzzle in batch.puzzles if puzzle.address.puzzle == "vqa"]
    assert len(own_rows) == 8 and not {*own_rows} & {*gone, damaged} and batch.images_asked()[1] > 0
    assert again.puzzles.names == ["vqa"] * 8 and [p.address.index for p in again.puzzles] != own_rows
    assert all("No such file" in reason or row == damaged for row, reason in tasks["vqa"].bad.items())
    task = tasks["vqa"]
    for row in task.train:
        (tmp_path / rows[row]["images"]).write_bytes(b"no")
    stream = stream_of((c, tasks), scenes, tokenizer, batch=16)
    with pytest.raises(UserError, match=r"no usable row after 50 tries in tasks.vqa, e\.g\. .*a.jsonl, line"):
        stream.get(0)
    stream.close()


def test_questions_about_one_picture_are_on_one_side(many):
    for name in "ab":
        task = many[1][name]
        pictures = [{task.asked(row).pictures[0] for row in side} for side in (task.train, task.held_out)]
        assert not pictures[0] & pictures[1] and len(task.held_out) + len(task.train) == 60
        assert 20 <= len(task.held_out) <= 30


def test_held_out_rows_are_few_and_frozen(draw):
    pictures = draw.integers(0, 2**63, 100_000).astype(np.uint64)
    found = own.held_out(pictures, 0.05)
    assert len(found) == 2000 and found == own.held_out(pictures, 0.05) == sorted(found)
    shared = own.held_out(np.zeros(100, np.uint64), 0.05)  # one picture for all
    assert len(shared) == 50 and shared != list(range(50))
    grouped = own.held_out(np.repeat(pictures[:100], 3), 0.1)
    assert len(grouped) in (66, 64, 65) or len(grouped) % 3 == 0


def test_the_same_rows_are_held_out_wherever_the_file_lies(tmp_path, tiny, scenes, tokenizer, monkeypatch):
    """By a relative path, an absolute one, and after a move: what was trained on is not asked about."""
    folder = tmp_path / "first"
    folder.mkdir()
    write(folder / "q.jsonl", rows_of(folder, 40))
    monkeypatch.chdir(tmp_path)
    found = [
        opened(tiny, configured(tiny, scenes, path), tokenizer=tokenizer)["vqa"].held_out
        for path in ("first/q.jsonl", folder / "q.jsonl")
    ]
    folder.rename(tmp_path / "second")
    found.append(opened(tiny, configured(tiny, scenes, "second/q.jsonl"), tokenizer=tokenizer)["vqa"].held_out)
    assert found[0] == found[1] == found[2] and len(found[0]) == 20


def test_held_out_questions(many):
    _, tasks = many
    addresses = tasks["a"].held_out_addresses(10, 3)
    assert addresses == tasks["a"].held_out_addresses(10, 3) and len({a.index for a in addresses}) == 10
    assert {a.index for a in addresses} <= {*tasks["a"].held_out}
    assert len(tasks["a"].held_out_addresses(1000, 3)) == len(tasks["a"].held_out)
    batches = list(ask_held_out(tasks["a"], addresses, form=Form(spec=SPEC)))
    assert [p.address for batch in batches for p in batch] == addresses


def test_what_was_found_is_kept(tmp_path, tiny, scenes, tokenizer, monkeypatch):
    path = write(tmp_path / "q.jsonl", rows_of(tmp_path, 40))
    run = tmp_path / "run"
    run.mkdir()
    c = configured(tiny, scenes, path)
    first = opened(tiny, c, run, True, tokenizer)["vqa"]
    looked = Counter()
    monkeypatch.setattr(own, "_looked_through", lambda task, *_: looked.update([task.name]) or 1 / 0)
    second = opened(tiny, c, run, True, tokenizer)["vqa"]
    assert second.held_out == first.held_out and second.answers == first.answers == ("blue", "green", "red")
    assert second.longest == first.longest and not looked
    with pytest.raises(ZeroDivisionError):
        opened(tiny, configured(tiny, scenes, path, "puzzles.thinking=true"), run, True, tokenizer)
    (run / "checkpoints" / "step-000001").mkdir(parents=True)
    write(path, rows_of(tmp_path, 41))
    with pytest.raises(UserError, match=r"has changed since .* was started"):
        opened(tiny, c, run, True, tokenizer)


def test_the_pages_example(tmp_path, tiny, scenes, tokenizer, monkeypatch):
    """docs/your-questions.md: its files, as they stand there, repeated until they are enough."""
    blocks = dict(re.findall(r"```(json|yaml|python)\n(.*?)```", (ROOT / "docs/your-questions.md").read_text(), re.S))
    for number in range(3):
        disk(tmp_path, number)
        Image.open(tmp_path / f"pictures/{number:04d}.png").save(tmp_path / f"pictures/{number}.jpg")
    (tmp_path / "questions.jsonl").write_text(blocks["json"] * 8)
    (tmp_path / "run.yaml").write_text(blocks["yaml"])
    (tmp_path / "my_rewards.py").write_text(blocks["python"])
    monkeypatch.chdir(tmp_path)
    c = config.load("run.yaml", [f"model.path={tiny}", f"data.path={scenes}", "puzzles.max_pixels=12544"])
    tasks = opened(tiny, c, tokenizer=tokenizer)
    assert config.shares(c.model_dump())["counting"] == 0.3
    form = Form(spec=SPEC)
    for name, said, accuracy in (("counting", "3", 1), ("naming", "a 3 b", 1), ("naming", "b", 0)):
        (puzzle,) = tasks[name].puzzles([at(0, name)], form)
        assert score(puzzle.answer, f"\\boxed{{{said}}}", thinking=False).accuracy == accuracy
    assert [len(puzzle.plan.sizes) for puzzle in tasks["naming"].puzzles([at(0), at(1)], form)] == [1, 2]


def test_no_completion_raises_and_none_takes_long(draw):
    parts = [
        *"()[]{}'\".,!$%^-+0159e :=",
        "yes",
        "no",
        "the ",
        "answer is ",
        "\\text{",
        "\\boxed{",
        "\\frac",
        "٣",
        "−",
        "⁰",
    ]
    asked = [Answer("quantity", 3, tolerance=1), Answer("yes/no", "no", ("yes", "no")), Answer("text", "a red car")]
    asked.append(Answer("function", "x", judge=lambda text: 0.5))
    for _ in range(2000):
        content = "".join(draw.choice(parts, int(draw.integers(0, 12))))
        for answer in asked:
            assert 0 <= score(answer, f"\\boxed{{{content}}}", thinking=False).accuracy <= 1
    for part in ("(", "'", "the ", "1,234", "- ", ". "):
        began = time.process_time()
        for answer in asked:
            score(answer, f"\\boxed{{{part * (20_000 // len(part))}}}", thinking=False)
        assert time.process_time() - began < 5
