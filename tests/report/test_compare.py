"""Two runs on one page: what is paired, what is said where nothing can be, and the intervals of differences."""

import json
import math

import numpy as np
import pytest

from sslr1 import config
from sslr1.errors import UserError
from sslr1.report import compare
from sslr1.runs.records import JsonLines
from tests.browser import CHROMIUM, Page
from tests.conftest import ROOT
from tests.forks import launch
from tests.report.test_report import Parts, data_of, step

NAMES = ("rotation", "ordering")
ADDRESSES = {name: [[name, 1, 5, 0, attempt, number] for number in range(8) for attempt in (0, 3)] for name in NAMES}
ASKED = {"levels": {}, "count": 16, "seed": 0, "pixels": [14, 2, 1, 2], "composed": False, "images": ["a", "b"]}


def make_run(folder, marks, *overrides, steps=20, addresses=ADDRESSES, **asked):
    """A run folder. marks: {puzzle: string} of the last evaluation, None for a folder without them."""
    folder.mkdir()
    given = ("puzzles.mixture={rotation: 0.5, ordering: 0.5}", "puzzles.levels={rotation: 1, ordering: 1}")
    settings = config.load(ROOT / "configs" / "tiny.yaml", (*given, f"log.name={folder.name}", *overrides))
    (folder / "config.yaml").write_text(config.dump(settings))
    (folder / "files.txt").write_text("12\ta\n13\tb\n")
    (folder / "held_out.json").write_text(json.dumps({"asked": {**ASKED, **asked}, "addresses": addresses}))
    lines = JsonLines(folder / "metrics.jsonl")
    names = [name for name, share in settings.puzzles.mixture.items() if share]
    for k in range(steps + 1):
        line = step(k, 1) if k else {"step": 0}
        if k in (0, steps):
            for name in names:
                found = (marks or {}).get(name, "01" * 8)
                share = found.count("1") / len(found.replace("-", ""))
                line |= {f"eval/{name}/{key}": v for key, v in (("exact", share), ("chance", 0.25), ("n", len(found)))}
                line[f"eval/{name}/accuracy"] = share
        lines.write(line)
    if marks:
        JsonLines(folder / "held_out.jsonl").write({"step": 0, **dict.fromkeys(marks, "0" * 16)})
        JsonLines(folder / "held_out.jsonl").write({"step": steps, **marks})
    return folder


def words(source):
    return " ".join(Parts(source).text.split())


def test_differences_are_taken_puzzle_by_puzzle(tmp_path):
    """The second run asked fewer, in another order, and could not read one of them."""
    first = make_run(tmp_path / "a", {"rotation": "1111000011110000", "ordering": "0" * 16})
    other = {name: [*reversed(some)] for name, some in ADDRESSES.items()}
    other["rotation"] = other["rotation"][:12]  # the last twelve, from behind
    second = make_run(
        tmp_path / "b", {"rotation": "11111111000-", "ordering": "0" * 16}, steps=30, addresses=other, count=12
    )
    source = compare.page(first, second)
    kept = [int(c) for c in "000011110000"[1:]]  # of the first's, in its order, less the one that was gone
    theirs = [int(c) for c in "00011111111"]
    won = sum(b > a for a, b in zip(kept, theirs))
    lost = sum(a > b for a, b in zip(kept, theirs))
    row = compare.differences(
        [first, second], *zip(*[(c, r) for c, _, r in map(compare.read, (first, second))]), NAMES
    )[0]
    assert (row["paired"]["n"], row["paired"]["won"], row["paired"]["lost"]) == (11, won, lost) and won > lost
    assert row["paired"]["difference"] == (won - lost) / 11
    assert f"{100 * (won - lost) / 11:+.1f}" in words(source)
    assert "ordering level 1 25.0% 0.0 ± 0.0 0.0 ± 0.0 +0.0" in words(source) and "step 20 and step 30" in words(source)


@pytest.mark.parametrize(
    "change, said",
    [
        (
            {"overrides": ["puzzles.levels={rotation: 2, ordering: 1}"]},
            "level 1 in the first run, level 2 in the second",
        ),
        (
            {"overrides": ["data.max_side=300"]},
            "held-out puzzles of other images, or of another train.seed or size, or by other rules",
        ),
        ({"seed": 7}, "held-out puzzles of other images, or of another train.seed or size, or by other rules"),
        ({"rules": 2}, "held-out puzzles of other images, or of another train.seed or size, or by other rules"),
        (
            {"images": ["a", "c"]},
            "held-out puzzles of other images, or of another train.seed or size, or by other rules",
        ),
        ({"addresses": {n: [[n, 1, 6, 0, 0, k] for k in range(16)] for n in NAMES}}, "other held-out puzzles"),
        ({"marks": None}, "the second run's folder doesn't say which puzzles it solved"),
        ({"overrides": ["puzzles.mixture={ordering: 1.0}"]}, "the second run was not asked it"),
    ],
    ids=["level", "size", "seed", "rules", "images", "addresses", "no record", "no such puzzle"],
)
def test_where_nothing_can_be_paired_it_is_said(tmp_path, change, said):
    marks = dict.fromkeys(NAMES, "01" * 8)
    first = make_run(tmp_path / "a", marks)
    marks, overrides = change.pop("marks", marks), change.pop("overrides", ())
    second = make_run(tmp_path / "b", marks, *overrides, **change)
    assert f"not paired: {said}" in words(compare.page(first, second))


def test_other_files_are_other_puzzles(tmp_path):
    marks = dict.fromkeys(NAMES, "01" * 8)
    first, second = (make_run(tmp_path / name, marks) for name in "ab")
    assert "not paired" not in words(compare.page(first, second))
    (second / "files.txt").write_text("12\ta\n14\tb\n")
    assert "not paired: held-out puzzles of other images" in words(compare.page(first, second))


def test_curves_lie_over_each_other_by_step(tmp_path):
    first = make_run(tmp_path / "a", None, "optim.lr=1e-3")
    (tmp_path / "there").mkdir()
    second = make_run(tmp_path / "there" / "a", None, steps=30)
    source = compare.page(first, second)
    sections = {section["title"]: section for section in data_of(source)["sections"]}
    charts = {chart["title"]: chart for section in sections.values() for chart in section["charts"]}
    assert sections["Learning"]["steps"] == list(range(1, 31))
    reward = charts["Reward"]["series"]
    assert [len(s["values"]) for s in reward] == [30, 30] and reward[0]["values"][20:] == [None] * 10
    assert reward[0]["values"][:20] == reward[1]["values"][:20]
    assert [s["name"] for s in reward][1] == "there/a" and reward[0]["name"].endswith("/a")
    points = charts["rotation: held out, exact answers"]["points"]
    assert [p["steps"] for p in points] == [[0, 20], [0, 30]] and [p["colour"] for p in points] == [0, 1]
    assert {"Time a step, s", "Gradient norm, before clipping"} & set(charts) == {"Time a step, s"}
    assert "optim.lr 0.001 0.0003" in words(source) and "log.name" not in words(source)


def test_a_run_is_not_compared_with_itself_or_with_nothing(tmp_path):
    first = make_run(tmp_path / "a", None)
    with pytest.raises(UserError, match="are one run"):
        compare.page(first, tmp_path / "." / "a")
    with pytest.raises(UserError, match="is no run folder"):
        compare.page(first, tmp_path)
    begun = make_run(tmp_path / "b", None)
    (begun / "metrics.jsonl").unlink()
    assert "the second run was not asked it" in words(compare.page(first, begun))
    (first / "metrics.jsonl").unlink()
    assert data_of(compare.page(first, begun))["sections"] == []


def test_the_command_writes_a_page(tmp_path, monkeypatch, capsys):
    folders = [str(make_run(tmp_path / name, None)) for name in "ab"]
    out = tmp_path / "both.html"
    assert launch("sslr1", "compare", *folders, "--out", out).stdout == f"{out}\n"
    assert len(data_of(out.read_text(encoding="utf-8"))["sections"]) >= 3
    monkeypatch.setattr("sys.argv", ["compare", folders[0], str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        compare.main()
    assert "is no run folder" in capsys.readouterr().err


@pytest.mark.parametrize("n, both, only", [(20, 0.3, (0.2, 0.1)), (60, 0.5, (0.05, 0.05)), (400, 0.2, (0.3, 0.1))])
def test_intervals_hold_the_truth_as_often_as_they_say(seed, n, both, only):
    """Of 2,000 draws 95 in 100, at least 93: the standard error of that share is half a point."""
    rng = np.random.default_rng(seed)
    cells = rng.multinomial(n, [both, *only, 1 - both - sum(only)], size=2000)
    truth, held = only[1] - only[0], 0
    for a_and_b, a, b, neither in cells.tolist():
        first = [True] * (a_and_b + a) + [False] * (b + neither)
        second = [True] * a_and_b + [False] * a + [True] * b + [False] * neither
        found = compare.paired(first, second)
        assert found["difference"] == pytest.approx((b - a) / n) and found["low"] <= found["high"]
        held += found["low"] <= truth <= found["high"]
    assert 0.93 < held / 2000


def test_an_interval_has_a_width_where_no_pair_differs():
    found = compare.paired([True, False] * 10, [True, False] * 10)
    assert found["difference"] == 0 and found["low"] == -found["high"] and 0.05 < found["high"] < 0.2
    # Agresti and Min's formula by hand, of 2 pairs lost and 5 won of 20
    found = compare.paired([True] * 2 + [False] * 18, [False] * 2 + [True] * 5 + [False] * 13)
    b, c, n = 2.5, 5.5, 22
    half = 1.959964 * math.sqrt((b + c) - (c - b) ** 2 / n) / n
    assert (found["low"], found["high"]) == pytest.approx(((c - b) / n - half, (c - b) / n + half))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1600])
def test_in_a_browser(tmp_path, width, dark):
    marks = dict.fromkeys(NAMES, "01" * 8)
    folders = [make_run(tmp_path / name, marks, steps=steps) for name, steps in (("a", 20), ("b", 30))]
    file = compare.write(*folders, tmp_path / "compare.html")
    with Page(file, tmp_path / "profile", width, dark=dark) as page:
        assert page.run("document.documentElement.scrollWidth") <= width
        wrong = (
            "[...document.querySelectorAll('svg *')].some(e => [...e.attributes].some(a => /NaN|Inf/.test(a.value)))"
        )
        assert not page.run(wrong)
        drawn = page.run("[...document.querySelectorAll('figure svg')].map(e => e.querySelectorAll('path').length)")
        assert len(drawn) == sum(len(s["charts"]) for s in data_of(file.read_text())["sections"]) and all(drawn)
        x, y = page.run("(r => [r.right - 40, r.y + 50])(document.querySelector('figure svg').getBoundingClientRect())")
        page.run(f"scrollBy(0, {y} - 500)")
        page.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=500)
        page.settle()
        tip = page.run("document.querySelector('.tip:not([hidden])').textContent")
        assert tip.startswith("step 2") and tip.index("a –") < tip.index("b 0.")
        assert not page.problems, page.problems
        assert [url for url in page.requests if not url.startswith("data:")] == [file.as_uri()]
