"""The contact sheets and the quiz."""

import json
import re
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from sslr1 import preview, puzzles
from sslr1.data import ImageStore
from sslr1.data.scenes import write_scenes
from sslr1.errors import UserError
from tests.browser import CHROMIUM, Page
from tests.forks import launch
from tests.report.test_report import Parts, data_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory, photographs):
    """Sixteen scenes and the photographs."""
    folder = write_scenes(tmp_path_factory.mktemp("preview") / "images", 16, 288)
    for i, image in enumerate(photographs):
        Image.fromarray(image.numpy()).save(folder / f"photograph{i}.png")
    return folder


@pytest.fixture(scope="module")
def three(tmp_path_factory, photographs):
    folder = tmp_path_factory.mktemp("preview") / "three"
    folder.mkdir()
    for i, image in enumerate(photographs[:3]):
        Image.fromarray(image.numpy()).save(folder / f"{i}.png")
    return ImageStore.scan(folder, fewest=1)


def test_a_sheet_a_puzzle_and_a_page(folder, tmp_path):
    out = tmp_path / "out"
    launch("sslr1", "preview", folder, "--out", out, "--level", 1, 2, "--count", 1, "--html")
    assert {path.stem for path in out.glob("*.png")} == set(puzzles.NAMES)
    for path in out.glob("*.png"):
        with Image.open(path) as sheet:
            assert sheet.width == 1200 and sheet.height > 300 and len(sheet.getcolors(1 << 24)) > 1000
    page = (out / "index.html").read_text(encoding="utf-8")
    parts = Parts(page)
    asked = data_of(page)["puzzles"]
    assert sorted((one["puzzle"], one["level"]) for one in asked) == sorted(
        (n, k) for n in puzzles.NAMES for k in (1, 2)
    )
    assert [one["level"] for one in asked] == sorted(one["level"] for one in asked)
    assert len(parts.scripts) == 2 and "http" not in page.split("</style>")[1].replace(parts.scripts[1], "")
    assert "script-src 'sha256-" in page and "10 puzzles cut out of" in " ".join(parts.text.split())


def test_what_is_asked_is_what_was_made(folder):
    """Question, pictures, answer and options of each kind; the answer stands nowhere but in the page's data."""
    store = ImageStore.scan(folder)
    sheets, _ = preview.made(store, puzzles.NAMES, (1, 3), 1, seed=4)
    page = preview.page(sheets, store)
    made = {str(p.address): p for rows in sheets.values() for _, found in rows for p in found}
    asked = data_of(page)["puzzles"]
    assert {one["address"] for one in asked} == made.keys()
    for one in asked:
        puzzle = made[one["address"]]
        assert f"{one['question']}\n{one['told']}" == puzzle.question and "boxed" in one["told"]
        assert one["question"].count("<image>") == len(one["sizes"]) == len(puzzle.plan.sizes)
        assert one["chance"] == puzzle.chance and one["about"] == puzzles.describe(one["puzzle"], one["level"])
        if one["kind"] == "sequence":
            assert tuple(one["answer"]) == puzzle.answer.value and sorted(one["answer"]) == one["options"]
            assert one["grid"][0] * one["grid"][1] == len(one["answer"])
            rows, columns = one["grid"]
            assert re.search(rf"\b{rows}( rows|,? by ).*{columns}", one["question"], re.S)
        else:
            assert one["answer"] == puzzle.answer.value and tuple(one["options"]) == puzzle.answer.choices
        for canvas, (h, w) in zip(puzzle.render(), one["sizes"]):
            assert abs(canvas.shape[0] / canvas.shape[1] - h / w) < 0.03
    assert "answer" not in Parts(page).text.lower().replace("answer by a click", "").replace("their answers", "")


def test_each_puzzle_is_of_another_image_while_they_last(folder):
    store = ImageStore.scan(folder)
    sheets, missing = preview.made(store, puzzles.NAMES, (1, 2), 2, seed=0)
    used = Counter(p.address.index for rows in sheets.values() for _, found in rows for p in found)
    assert not missing and sum(used.values()) == 20
    # 20 images or so for 20 puzzles: one that decides few kinds of puzzle is passed over, none serves often
    assert len(used) >= 0.75 * min(20, len(store.folder)) and max(used.values()) <= 2


def test_three_images_make_what_they_can(three, tmp_path):
    """The puzzles that need others beside them are named; those that don't are as many as asked, all different."""
    sheets, missing = preview.made(three, puzzles.NAMES, (1, 2), 4, seed=0)
    assert {"similarity, level 1: none of 4", "similarity, level 2: none of 4"} <= {
        line.split(";")[0] for line in missing
    }
    assert {"rotation", "ordering", "correspondence"} <= sheets.keys()
    found = [p for rows in sheets.values() for _, some in rows for p in some]
    assert [len(some) for _, some in sheets["rotation"]] == [4, 4]
    assert len({str(p.address) for p in found}) == len(found) and {p.address.index for p in found} == {0, 1, 2}
    page = preview.page(sheets, three, missing)
    assert "similarity, level 1: none of " in Parts(page).text
    assert "3 images" in " ".join(Parts(page).text.split())
    with pytest.raises(UserError, match="gives none of the puzzles that were asked for"):
        preview.made(three, ["similarity"], (4,), 1, seed=0)


def test_a_page_of_many_puzzles_stays_small(three, monkeypatch):
    """Pictures shrink first; where they can't any more some puzzles are left out, and the page says so."""
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (600, 600, 3), np.uint8))
    whole = preview._strips([[noise]])
    monkeypatch.setattr(preview, "PAGE_BYTES", 4 * len(whole[0][0]))
    fitted = preview._strips([[noise]] * 8)
    assert len(fitted) == 8 and sum(len(picture) for picture, _ in fitted) <= preview.PAGE_BYTES
    (size,) = fitted[0][1]
    assert preview.FEWEST_PIXELS * 0.98 <= size[0] * size[1] < 360_000
    monkeypatch.setattr(preview, "PAGE_BYTES", 60_000)
    sheets, _ = preview.made(three, ["rotation"], (1, 2), 6, seed=0)
    page = preview.page(sheets, three)
    left = data_of(page)["puzzles"]
    assert 1 <= len(left) < 12 and sum(len(one["picture"]) for one in left) <= 80_000
    assert f"{len(left)} of 12 puzzles" in Parts(page).text and {one["level"] for one in left} == {1, 2}


def test_errors_are_one_line(tmp_path):
    done = launch("sslr1.preview", tmp_path, check=False)
    assert done.returncode == 2 and done.stderr.startswith(f"error: '{tmp_path}' holds no images"), done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1600])
def test_the_quiz_in_a_browser(folder, tmp_path, width, dark):
    """Each puzzle is answered, by clicks and by keys, half of them rightly; the score says so."""
    store = ImageStore.scan(folder)
    sheets, _ = preview.made(store, puzzles.NAMES, (1, 2), 1, seed=0)
    file = tmp_path / "index.html"
    file.write_text(preview.page(sheets, store), encoding="utf-8")
    asked = data_of(file.read_text(encoding="utf-8"))["puzzles"]
    with Page(file, tmp_path / "profile", width, dark=dark) as page:

        def press(key):
            for kind in ("keyDown", "keyUp"):
                page.call("Input.dispatchKeyEvent", type=kind, key=key)

        background = page.run("getComputedStyle(document.body).backgroundColor")
        assert (int(re.findall(r"\d+", background)[0]) < 50) == dark
        assert page.run("document.getElementById('score').hidden")
        for number, one in enumerate(asked):
            assert page.run("document.documentElement.scrollWidth") <= width
            assert page.run("document.querySelector('output').textContent") == f"{number + 1} of {len(asked)}"
            assert page.run("document.querySelector('.verdict')") is None
            pictures = page.run(
                "[...document.querySelectorAll('.question .picture')].map(e => e.getBoundingClientRect().right)"
            )
            assert len(pictures) == len(one["sizes"]) and max(pictures) <= width
            words = page.run(
                "[...document.querySelectorAll('.question .words, .told')].map(e => e.getBoundingClientRect().width)"
            )
            assert not words or min(words) > 0.7 * min(width, 1000)  # no column beside a picture
            right = number % 2 == 0
            if one["kind"] == "sequence":
                given = one["answer"] if right else one["answer"][::-1]
            else:
                given = [one["answer"] if right else next(o for o in one["options"] if o != one["answer"])]
            for value in given:
                place = one["options"].index(value)
                if number % 4 < 2:
                    page.run(f"document.querySelectorAll('.options .option')[{place}].click()")
                else:
                    press("abcdefghijkl"[place] if one["kind"] == "number" else str(value).lower())
            verdict = page.run("document.querySelector('.verdict').textContent")
            assert verdict.startswith("Right." if right else "No: it is"), (one["address"], verdict)
            assert page.run("document.querySelectorAll('.options .option:not(:disabled)').length") == 0
            assert page.run("document.querySelector('tr:last-child td:nth-child(3)').textContent") == (
                f"{number // 2 + 1} of {number + 1}"
            )
            press("ArrowRight")
        rows = page.run("[...document.querySelectorAll('#score tbody tr')].map(r => r.textContent)")
        assert len(rows) == len(asked) + 1 and rows[-1].startswith("all5 of 1050%")
        first = page.run(
            "(() => { document.querySelector('[name=back]').click();"
            " document.querySelector('.question .picture').click();"
            " return document.querySelectorAll('dialog[open] svg').length })()"
        )
        assert first == 1
        press("Escape")
        choose = "(s => { s.value = 'ordering'; s.dispatchEvent(new Event('change')) })"
        page.run(f"{choose}(document.querySelector('[name=puzzle]'))")
        assert page.run("document.querySelector('output').textContent") == "1 of 2"
        assert not page.problems, page.problems
        assert [url for url in page.requests if not url.startswith("data:")] == [file.as_uri()]
        assert json.loads(page.run("JSON.stringify([...document.images].length)")) == 0
