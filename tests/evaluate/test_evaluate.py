"""The command as a user runs it: run folders and checkpoints, several ranks, logs, baselines; and the tables."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from sslr1 import config
from sslr1.data import ImageFolder
from sslr1.errors import UserError
from sslr1.evaluate import __main__ as evaluate
from sslr1.evaluate import benchmarks, held_out, logs, scoring, tables
from tests.evaluate.test_benchmarks import a_row, png, write
from tests.forks import launch

OPTIONS = ("train.threads=1", "rollout.max_tokens=6")


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny, scenes):
    """A run folder as a run leaves it, with a checkpoint that has learnt nothing."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    for step in ("step-000002", "step-000010"):
        shutil.copytree(tiny, folder / "checkpoints" / step / "hf")
    given = [f"model.path={tiny}", f"data.path={scenes}", "eval.count=7", "data.min_side=112"]
    (folder / "config.yaml").write_text(config.dump(config.load("configs/tiny.yaml", given)))
    ImageFolder.scan(scenes).freeze(folder / "files.txt")
    return folder


def test_what_can_be_evaluated(run, tiny, tmp_path, monkeypatch):
    newest = run / "checkpoints" / "step-000010"
    for what, step in ((run, newest), (newest, newest), (newest / "hf", newest), (newest.parent / "step-000002",) * 2):
        source, given, folder = evaluate.locate(str(what))
        loaded = config.load(source, given)
        assert (source, folder) == (run / "config.yaml", run) and loaded.eval.count == 7
        assert loaded.model.path == str(step / "hf")
    source, given, folder = evaluate.locate(str(tiny))
    loaded = config.load(source, ["data.path=d", *given])
    assert source is folder is None and loaded.model.path == str(tiny)
    shutil.copytree(newest, tmp_path / "step-000010")  # without its run
    source, given, folder = evaluate.locate(str(tmp_path / "step-000010"))
    assert source is folder is None and config.load(source, ["data.path=d", *given]).model.path.startswith(
        str(tmp_path)
    )
    assert evaluate.locate("configs/tiny.yaml") == (Path("configs/tiny.yaml"), [], None)
    with pytest.raises(UserError, match="names on the Hugging Face hub are not fetched"):
        evaluate.locate("Qwen/Qwen2.5-VL-3B-Instruct")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    for what, words in ((tmp_path / "empty", "has no checkpoint yet"), (tmp_path, "is no run folder")):
        with pytest.raises(UserError, match=words):
            evaluate.locate(str(what))


def test_puzzles_of_a_run_on_one_rank_and_two(run, tmp_path):
    """Numbers, log and the comparison with it: the same on two ranks, and no difference then. What these scenes can't
    decide, ordering with tiles recoloured, is said and spoils nothing."""
    out = [tmp_path / name / "out.json" for name in ("one", "two")]
    asked = ["--puzzle", "rotation", "ordering", "--levels", "2", "4", "--form", "both"]
    one = launch("sslr1.evaluate", run, *OPTIONS, *asked, "--out", out[0])
    log = out[0].with_suffix(".jsonl")
    launch("sslr1.evaluate", run, *OPTIONS, *asked, "--out", out[1], "--baseline", log, ranks=2)
    assert log.read_text() == out[1].with_suffix(".jsonl").read_text()
    records = [json.loads(line) for line in log.read_text().splitlines()]
    first, second = (json.loads(path.read_text())["cells"] for path in out)
    assert len(first) == 6 and len(records) == 6 * 7
    missing = json.loads(out[0].read_text())["missing"]
    assert (
        len(missing) == 1 and missing[0].startswith("not asked: ordering, level 4: only ") and missing[0] in one.stdout
    )
    for a, b in zip(first, second):
        assert b.pop("baseline") == a["accuracy"] and (b.pop("difference"), b.pop("difference_interval")) == (0, [0, 0])
        assert a == b
        own = [r for r in records if all(r[key] == a[key] for key in ("puzzle", "level", "form"))]
        assert a["n"] == len(own) == 7 and a["accuracy"] == sum(r["score"] for r in own) / 7
    for form, words in (("thinking", "<think>"), ("direct", "")):
        own = [r for r in records if r["form"] == form]
        assert all(("<think>" in r["question"]) == bool(words) for r in own)
    puzzles = [
        [(r["image"], r["epoch"], r["attempt"], r["answer"]) for r in records if r["form"] == f] for f in evaluate.FORMS
    ]
    assert puzzles[0] == puzzles[1] and len(set(puzzles[0])) > 15
    chance = {(c["puzzle"], c["level"]): c["chance"] for c in first}
    assert chance["rotation", 2] == 0.25 and chance["rotation", 4] == pytest.approx(1 / 12)
    assert (
        "*" in one.stdout and "level 2" in one.stdout and str(run / "checkpoints" / "step-000010" / "hf") in one.stdout
    )


def test_a_benchmark_on_one_rank_and_two(tiny, tmp_path, draw):
    sizes = [(30 + 9 * i, 90 - 5 * i) for i in range(9)]
    rows = [a_row(i, png(draw, *size), category="xy"[i % 2]) for i, size in enumerate(sizes, 1)]
    rows += [a_row(10, "3", A="", B="", answer="Yes"), a_row(11, str([png(draw), png(draw)]), C="three")]
    path, out = write(tmp_path / "made.tsv", rows), [tmp_path / f"{name}.json" for name in ("one", "two")]
    asked = ["--benchmark", path, "--circular", "--form", "both", "--max-pixels", 112 * 112, "--max-tokens", 6]
    one = launch("sslr1.evaluate", tiny, *OPTIONS[:1], *asked, "--out", out[0])
    log = out[0].with_suffix(".jsonl")
    launch("sslr1.evaluate", tiny, *OPTIONS[:1], *asked, "--out", out[1], "--baseline", log, ranks=2)
    assert log.read_text() == out[1].with_suffix(".jsonl").read_text()
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(r["form"], r["index"], r["rotation"]) for r in records] == [
        (form, str(i), k)
        for form in ("direct", "thinking")
        for i in range(1, 12)
        for k in range({10: 1, 11: 3}.get(i, 2))
    ]
    assert len({r["completion"] for r in records}) > 3  # or the comparison would compare nothing
    first, second = (json.loads(path.read_text())["forms"] for path in out)
    for form in ("direct", "thinking"):
        assert set(first[form]["measures"]) == {"plain", "circular"}
        for measure, numbers in first[form]["measures"].items():
            theirs = second[form]["measures"][measure]
            assert numbers.items() <= theirs.items() and theirs["difference"] == 0 and numbers["n"] == 11
        assert first[form]["groups"]["category"]["x"]["n"] == 6
    assert "made, direct form" in one.stdout and "circular" in one.stdout and "by category" in one.stdout


def test_levels():
    assert evaluate._levels(None, "rotation", 3) == [3]
    assert evaluate._levels(["all"], "rotation", 3) == [1, 2, 3, 4] and evaluate._levels(["4", "2"], "ordering", 3) == [
        2,
        4,
    ]


def ended(monkeypatch, capsys, *arguments):
    """What is told by a command that ends before anything is built."""
    monkeypatch.setattr("sys.argv", ["evaluate", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        evaluate.main()
    assert end.value.code == 2
    return capsys.readouterr().err


def test_a_baseline_by_other_rules_is_of_other_puzzles():
    """The same address gives another puzzle then, be its answer the same. Older logs don't say their rules."""
    about = {"puzzle": "rotation", "level": 2, "form": "direct", "epoch": 0, "attempt": 0, "answer": "90"}
    about |= {"score": 1.0, "chance": 0.25, "accuracy": 1.0, "format": 1.0}
    own = [{**about, "image": name, "rules": 2} for name in "abc"]
    older = [{key: value for key, value in one.items() if key != "rules"} for one in own]
    for baseline, compared in ((own, True), (older, False), ([{**one, "rules": 3} for one in own], False)):
        (cell,) = held_out.puzzle_report(own, baseline)
        assert ("difference" in cell) == compared


def test_baselines_of_other_questions_are_refused(tiny, tmp_path, draw, monkeypatch, capsys):
    path, log = write(tmp_path / "made.tsv", [a_row(1, png(draw)), a_row(2, "1")]), tmp_path / "log.jsonl"
    whole = [
        {"index": str(i), "rotation": 0, "form": "direct", "answer": "A", "score": 1.0, "chance": 0.5} for i in (1, 2)
    ]
    asked = benchmarks.asked(benchmarks.read(path))
    for records, words in (
        (whole[:1], "has nothing in the direct form for index '2', rotation 0"),
        ([whole[0], whole[1] | {"answer": "B"}], "has the answer 'B' in the direct form for index '2'"),
        ([*whole, whole[0] | {"index": "3"}], "has 1 questions more in the direct form"),
        ([*whole, {}], "line 3: no 'index'"),
        ([*whole, 3], "line 3: no 'index'"),
    ):
        log.write_text("".join(json.dumps(r) + "\n" for r in records))
        told = ended(monkeypatch, capsys, tiny, "--benchmark", path, "--baseline", log)
        assert told.startswith(f"error: --baseline {log}") and words in told and told.count("\n") == 1, told
    log.write_text("".join(json.dumps(r) + "\n" for r in whole))
    assert evaluate.baseline_of(log, asked, ["direct"]) == whole
    assert "has nothing in the thinking form" in ended(
        monkeypatch, capsys, tiny, "--benchmark", path, "--baseline", log, "--form", "both"
    )
    log.write_text("no json\n")
    assert "can't be read as JSON lines" in ended(monkeypatch, capsys, tiny, "--benchmark", path, "--baseline", log)
    assert "can't be read" in ended(monkeypatch, capsys, tiny, "--benchmark", path, "--baseline", tmp_path / "none")


def test_wrong_options_are_refused(tiny, tmp_path, draw, monkeypatch, capsys):
    path = write(tmp_path / "made.tsv", [a_row(1, png(draw))])
    assert "must end in .json" in ended(monkeypatch, capsys, tiny, "--out", "x.txt")
    assert "can't be written: " in ended(monkeypatch, capsys, tiny, "--out", path / "x.json")
    assert "--count goes with --probes" in ended(monkeypatch, capsys, tiny, "--count", 3)
    assert "--max-pixels" in ended(monkeypatch, capsys, tiny, "--benchmark", path, "--max-pixels", 0)
    assert "a configuration or a folder is needed" in ended(monkeypatch, capsys)
    assert "1 to an even number" in ended(monkeypatch, capsys, tiny, "--benchmark", path, "--name", "MMVP")
    assert "say which images" in ended(monkeypatch, capsys, tiny)


def shown(table):
    console = Console(width=160, record=True, markup=False, file=open("/dev/null", "w"))
    console.print(table)
    return console.export_text()


def test_tables():
    scores = {str(i): float(i % 4 == 0) for i in range(1, 301)}
    records = [
        {"index": i, "rotation": 0, "score": s, "chance": 0.5, "extracted": "A", "finish": "stop", "category": "[red]"}
        for i, s in scores.items()
    ]
    direct = scoring.summarise(records, "MMVP", [r | {"score": 0.0} for r in records])
    numbers = {"benchmark": "MMVP", "forms": {"direct": direct}}
    main, category, paper = map(shown, tables.benchmark_tables(numbers))
    assert "25.0%" in main and "+25.0 (" in main and "0.0%" in main and "(20.4–30.2)" in main
    assert "[red]" in category
    legacy, corrected = (line for line in paper.splitlines() if line.startswith("│"))
    ours = f"{100 * direct['measures']['pairs, legacy']['accuracy']:.2f}"
    assert legacy.split("│")[1:-1] and [c.strip() for c in legacy.split("│")][2:-1] == [
        "43.33",
        "54.67",
        "54.66",
        "60.66",
        "60.00",
        ours,
    ]
    assert [c.strip() for c in corrected.split("│")][2:-1] == ["", "", "50.00", "57.33", "", "0.00"]
    assert "last digit may be off by one" in paper
    numbers["benchmark"] = "Winoground"  # whose groups are not made here
    assert [c.strip() for c in shown(tables.benchmark_tables(numbers)[-1]).splitlines()[4].split("│")][-2] == ""
    numbers["benchmark"] = "POPE"
    assert len(tables.benchmark_tables(numbers)) == 2
    cells = [
        {
            "puzzle": "rotation",
            "level": k,
            "form": "direct",
            "format": 1.0,
            **scoring.summary({"a": 1.0, "b": 0.0}, {"a": 0.25, "b": 0.25}, None),
        }
        for k in (1, 3)
    ]
    text = shown(tables.puzzle_table(cells, {("rotation", 3)}))
    assert "*50.0% (9.5–90.5)" in text and text.count("*50.0%") == 1 and "chance 25.0%" in text and "level 3" in text


def test_records_of_uneven_ranks_are_gathered(monkeypatch):
    """An image that one rank can't read any more leaves it fewer records than its share."""

    def ranks(mine):
        return [torch.frombuffer(bytearray(json.dumps(part).encode()), dtype=torch.uint8)[:, None] for part in parts]

    monkeypatch.setattr(logs.distributed, "all_gather_rows", ranks)
    for parts, found in (([[0, 2, 4], [1, 3]], range(5)), ([[0], [1, 3, 5], [2, 4]], range(6)), ([[], []], ())):
        assert logs.gather(parts[0]) == list(found)
