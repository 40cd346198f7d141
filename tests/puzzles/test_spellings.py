r"""The two tables of spellings, judged as a person would: in the box by `score`, and by the reader of benchmarks."""

import pytest

from sslr1.evaluate import scoring
from sslr1.puzzles.reward import Answer, score
from tests.puzzles.spellings import OPTIONS, RIGHT, WRONG

QUARTERS = (0, 90, 180, 270)
ASKED = {
    "B": Answer("choice", "B", tuple("ABCD")),
    "270": Answer("number", 270, QUARTERS),
    "90 left": Answer("number", 90, QUARTERS, direction="counter-clockwise"),
    "231": Answer("sequence", (2, 3, 1)),
    "2143": Answer("sequence", (2, 1, 4, 3)),
    "9": Answer("sequence", range(9, 0, -1)),
}
PROSE = {"prose B": ("B", OPTIONS), "prose yes": ("yes", ())}


def test_there_are_many_and_none_is_in_both():
    assert sum(len(set(texts)) for table in (RIGHT, WRONG) for texts in table.values()) >= 800
    for asked in RIGHT:
        assert len(set(RIGHT[asked])) == len(RIGHT[asked]) and len(set(WRONG[asked])) == len(WRONG[asked])
        assert not set(RIGHT[asked]) & set(WRONG[asked])


@pytest.mark.parametrize("asked", ASKED)
def test_spellings_in_the_box(asked):
    def exact(text):
        found = score(ASKED[asked], rf"\boxed{{{text}}}", thinking=False)
        assert found.format_ok
        return found.exact

    assert [text for text in RIGHT[asked] if not exact(text)] == []
    assert [text for text in WRONG[asked] if exact(text)] == []


@pytest.mark.parametrize("asked", PROSE)
def test_spellings_of_a_benchmark(asked):
    right, options = PROSE[asked]
    assert [text for text in RIGHT[asked] if scoring.read_answer(text, options) != right] == []
    assert [text for text in WRONG[asked] if scoring.read_answer(text, options) == right] == []


def test_the_box_is_read_alike_by_benchmarks():
    assert [text for text in RIGHT["B"] if scoring.read_answer(rf"\boxed{{{text}}}", OPTIONS) != "B"] == []
    assert [text for text in WRONG["B"] if scoring.read_answer(rf"\boxed{{{text}}}", OPTIONS) == "B"] == []
