"""How answers are read, and what they add up to; the numbers are worked out by hand."""

import random

import pytest

from sslr1.errors import UserError
from sslr1.evaluate import scoring

OPTIONS = ("a red car", "a blue car", "Vitamin D", "a dog")


@pytest.mark.parametrize(
    "completion, expected",
    [
        ("B", "B"),
        (" b.\n", "B"),
        ("(B)", "B"),
        ("**B.**", "B"),
        ('"B"', "B"),
        (r"\boxed{B}", "B"),
        (r"\boxed{\text{b}}", "B"),
        (r"$\boxed{B. a blue car}$", "B"),
        (r"First \boxed{A}, no: \boxed{C}", "C"),  # the last one
        (r"\boxed{A} and then \boxed{B", "A"),  # which is not closed
        (r"\boxed{A or B}", None),
        (r"\boxed{} B", None),  # a box is what counts, even an empty one
        (r"<think>Surely A. \boxed{A}</think> C", "C"),
        (r"<think>x</think>A</think>B", "B"),
        (r"<think>Surely \boxed{A}", None),  # cut off while it thought
        ("The answer is B", "B"),
        ("the Answer is: (C).", "C"),
        ("Answer: D", "D"),
        ("Option C is right", "C"),
        ("The answer is A because it is red", "A"),
        ("It is D", "D"),
        ("A dog", "D"),  # the text of an option, and its A is no letter
        ("a  DOG.", "D"),
        ("D. a dog", "D"),
        ("C. Vitamin D", "C"),  # two letters stand there, but it is one option as it was shown
        ("B. cat", "B"),
        ("B) because the A in it is small", "B"),
        ("A dog is there", None),
        ("A dog or a cat, so B", "B"),
        ("A or B", None),
        ("A and B", None),
        ("A. B. C. D.", None),
        ("A. a red car\nB. a blue car", None),
        ("Both (A) and (B)", None),
        ("Beach", None),  # only begins with a letter
        ("Blue", None),
        ("I think it's a B-52", None),
        ("E", None),  # no option
        ("The answer is E", None),
        ("", None),
        ("\0" * 10, None),
        ("ABCD", None),
        ("a red car or a dog", None),
    ],
)
def test_letters_are_read(completion, expected):
    assert scoring.read_answer(completion, OPTIONS) == expected


def test_options_of_the_same_words_are_told_by_their_letters():
    same = ("red", "Red ", "blue")
    assert [scoring.read_answer(text, same) for text in ("red", "B. red", "blue", "b")] == [None, "B", "C", "B"]


@pytest.mark.parametrize(
    "completion, expected",
    [
        ("Yes", "yes"),
        ("no.", "no"),
        (r"\boxed{No}", "no"),
        (r"<think>yes or no?</think>\boxed{Yes}", "yes"),
        ("Yes, there is no dog", "yes"),
        ("No, although yes was tempting", "no"),
        ("Yes or no", None),
        ("There is no dog, yes", None),
        ("None of them", None),
        ("I know", None),
        ("yesterday", None),
        ("", None),
    ],
)
def test_yes_and_no_are_read(completion, expected):
    assert scoring.read_answer(completion) == expected


@pytest.mark.timeout(20)
def test_long_completions_take_no_long_time():
    for piece in ("A ", "\\boxed{", "(", "answer ", "answer is ", " ", "B. ", "{}", "</think>", "I "):
        scoring.read_answer(piece * 30_000, OPTIONS)
        scoring.read_answer(piece * 30_000)


def row(index, score, rotation=0, chance=0.25, **labels):
    extracted = "A" if score else None
    return {
        "index": str(index),
        "rotation": rotation,
        "score": score,
        "chance": chance,
        "extracted": extracted,
        "finish": "stop",
        **labels,
    }


def test_circular_counts_a_question_when_all_its_rotations_are_right():
    rows = [row(1, 1), row(1, 1, 1), row(2, 1), row(2, 0, 1), row(3, 0), row(3, 1, 1), row(4, 1, chance=0.5)]
    found = scoring.measures(rows, "some benchmark")
    assert found == {"plain": {"1": 1, "2": 1, "3": 0, "4": 1}, "circular": {"1": 1, "2": 0, "3": 0, "4": 1}}
    chance = scoring.measures(rows, "some benchmark", "chance")
    assert chance["circular"] == {"1": 1 / 16, "2": 1 / 16, "3": 1 / 16, "4": 1 / 2}
    assert "circular" not in scoring.measures([r for r in rows if r["rotation"] == 0], "some benchmark")


def test_pairs_are_rows_side_by_side_whatever_the_order():
    scores = [1, 1, 1, 0, 0, 1, 0, 0, 1, 1]
    rows = [row(i, s) for i, s in enumerate(scores, 1)]
    rows = rows[::-1]
    found = scoring.measures(rows, "MMVP")
    assert found["pairs"] == {"1": 1, "2": 0, "3": 0, "4": 0, "5": 1}
    assert "pairs" not in scoring.measures(rows, "MMBench")
    # The published scripts' shuffle, as it was written: the rows themselves, in the file's order
    data = [(i, s) for i, s in enumerate(scores)]
    state = random.getstate()
    random.seed(42)
    random.shuffle(data)
    random.setstate(state)
    legacy = [data[i][1] * data[i + 1][1] for i in range(0, 10, 2)]
    assert list(found["pairs, legacy"].values()) == legacy


def test_the_legacy_pairing_pairs_strangers():
    """With both of a pair right or both wrong, half of each, right pairing gives 50 % and the legacy one about 25."""
    rows = [row(i, (i - 1) // 2 % 2) for i in range(1, 301)]
    found = scoring.measures(rows, "mmvp")
    assert sum(found["pairs"].values()) == 75
    assert 20 <= sum(found["pairs, legacy"].values()) <= 55
    order = scoring.legacy_order(300)
    assert sorted(order) == list(range(300)) and order[:4] == [106, 239, 37, 89]


def test_summaries():
    rows = [row(i, i <= 6, category="x" if i <= 4 else "y", split="") for i in range(1, 9)]
    theirs = [row(i, i in (1, 2, 7), category="x") for i in range(1, 9)]
    found = scoring.summarise(rows, "name", theirs)
    plain = found["measures"]["plain"]
    assert (plain["n"], plain["accuracy"], plain["chance"]) == (8, 0.75, 0.25)
    assert (plain["baseline"], plain["difference"]) == (3 / 8, 3 / 8)
    low, high = plain["difference_interval"]
    assert -1 <= low < 3 / 8 < high <= 1
    x, y = found["groups"]["category"]["x"], found["groups"]["category"]["y"]
    assert (x["n"], x["accuracy"], x["difference"]) == (4, 1.0, 0.5)
    assert (y["n"], y["accuracy"], y["difference"]) == (4, 0.5, 0.25)
    assert found["groups"]["split"][""]["n"] == 8
    assert (found["unreadable"], found["cut_off"]) == (2, 0)
    assert found == scoring.summarise(rows, "name", theirs)  # the draws are keyed
    assert "difference" not in scoring.summarise(rows, "name")["measures"]["plain"]


@pytest.mark.parametrize(
    "name, known",
    [
        ("MMVP", "MMVP"),
        ("mmvp", "MMVP"),
        ("V*", "V*"),
        ("VStarBench", "V*"),
        ("MMBench_DEV_EN", "MMBench"),
        ("MMBench_DEV_EN_V11", None),
        ("MME-RealWorld-Lite", "MME-RealWorld"),
        ("HRBench4K", None),
        ("SugarCrepe++", "SugarCrepe++"),
        ("POPE", None),
        ("MMVP2", None),
    ],
)
def test_names_of_the_papers_benchmarks(name, known):
    assert scoring.paper_name(name) == known


def test_the_papers_figures_average_to_its_means():
    """Its means are in its figure too; each entry may be off by one in the last digit."""
    means = [sum(column) / len(scoring.PAPER) for column in zip(*scoring.PAPER.values())]
    assert means == pytest.approx([54.87, 58.31, 58.91, 62.07, 62.75], abs=0.02)


@pytest.mark.parametrize("indices", [[2, 3, 4, 5], [1, 2, 3], [0, 1, 2], [0, 2, 3, 4], [1, 2, 4, 5], ["a", "b"]])
def test_pairs_need_their_numbers(indices):
    rows = [type("Row", (), {"index": str(i)}) for i in indices]
    with pytest.raises(UserError, match="column index: MMVP's rows 2k-1 and 2k are a pair"):
        scoring.check_pairs(rows, "file.tsv")
    for whole in ((2, 1, 4, 3), (3, 0, 1, 2)):
        scoring.check_pairs([type("Row", (), {"index": str(i)}) for i in whole], "file.tsv")


def test_pairs_are_the_same_counted_from_0_or_from_1():
    scores = [1, 1, 0, 1, 1, 0, 0, 0, 1, 1, 1, 1]
    from_0, from_1 = (
        scoring.measures([{"index": str(first + i), "rotation": 0, "score": s} for i, s in enumerate(scores)], "MMVP")
        for first in (0, 1)
    )
    assert from_0["pairs"] == from_1["pairs"] == {"1": 1, "2": 0, "3": 0, "4": 0, "5": 1, "6": 1}
    assert from_0["pairs, legacy"] == from_1["pairs, legacy"]
