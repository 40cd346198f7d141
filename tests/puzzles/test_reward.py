r"""Scores: every case of the format, the parsing and the rules, and the traps that other reward functions fell into."""

import subprocess
import sys

import pytest

from sslr1.puzzles import answers
from sslr1.puzzles.prompts import DIRECT, THINKING
from sslr1.puzzles.reward import RULES, Answer, score
from tests import fuzz
from tests.fuzz import reward as fuzzed

CHOICE = Answer("choice", "B", ("A", "B", "C", "D"))
NUMBER = Answer("number", 270, (0, 90, 180, 270))
THREE = Answer("sequence", (2, 3, 1))
FOUR = Answer("sequence", (2, 1, 4, 3))
NINE = Answer("sequence", tuple(range(9, 0, -1)))


def direct(answer, text, rule="default"):
    return score(answer, text, rule, thinking=False)


@pytest.mark.parametrize("text", ["B", "b", "(B)", "[b]", "{B}", r"\text{B}", "B.", " B ", r"\text{(b)}", "B°"])
def test_choice_spellings(text):
    assert direct(CHOICE, rf"\boxed{{{text}}}").reward == 1.0


@pytest.mark.parametrize("text", ["A", "", "BB", "B or C", "2", "É", "B, C"])
def test_wrong_choices(text):
    s = direct(CHOICE, rf"\boxed{{{text}}}")
    assert (s.reward, s.exact, s.format_ok) == (0.1, 0.0, True)


@pytest.mark.parametrize(
    "text",
    [
        "270",
        "270°",
        "270 degrees",
        "-90",
        "+270",
        r"270^\circ",
        r"270^{\circ}",
        r"270\degree",
        "630",
        "270.",
        "(270)",
        "270.0",
        r"\text{270}",
    ],
)
def test_number_spellings(text):
    assert direct(NUMBER, rf"\boxed{{{text}}}").exact == 1.0


@pytest.mark.parametrize("text", ["90", "27", "", "two hundred and seventy", "270 90", "9" * 50, "2.70", "٢٧٠"])
def test_wrong_numbers(text):
    assert direct(NUMBER, rf"\boxed{{{text}}}").exact == 0.0


@pytest.mark.parametrize("text", ["2,3,1", "2, 3, 1", "[2, 3, 1]", "(2 3 1)", "2 3 1", "{2,3,1}", "2 ,3,1."])
def test_sequence_spellings(text):
    assert direct(THREE, rf"\boxed{{{text}}}").exact == 1.0


@pytest.mark.parametrize(
    "text", ["2,3", "2,3,1,1", "2,3,3", "0,1,2", "2,3,4", "2,,3,1", "231", "-2,3,1", "2;3;1", "2,3,1,4"]
)
def test_invalid_sequences_earn_nothing_but_the_format(text):
    s = direct(THREE, rf"\boxed{{{text}}}")
    assert (s.reward, s.accuracy, s.parsed) == (0.1, 0.0, None)


def test_a_constant_list_earns_nothing():
    assert direct(FOUR, r"\boxed{1,1,1,1}").reward == 0.1
    assert direct(FOUR, r"\boxed{1,1,1,1}", "paper").reward == 0.1
    assert direct(NINE, r"\boxed{5,5,5,5,5,5,5,5,5}", "visual_jigsaw").reward == 0.2


def test_partial_credit_of_each_rule():
    half = r"\boxed{2,1,3,4}"  # 2 of 4 places
    assert direct(FOUR, half).accuracy == 0.5
    assert direct(FOUR, half).reward == pytest.approx(0.1 + 0.9 * 0.2 * (0.5 - 0.25) / 0.75)
    assert direct(FOUR, half, "paper").reward == pytest.approx(0.6)
    assert direct(FOUR, half, "visual_jigsaw").reward == pytest.approx(0.2)
    assert direct(FOUR, half, "exact").reward == 0.1
    seven = r"\boxed{9,8,7,6,5,4,3,1,2}"
    assert direct(NINE, seven).reward == pytest.approx(0.1 + 0.9 * 0.5 * (7 / 9 - 1 / 9) / (8 / 9))
    assert direct(NINE, seven, "visual_jigsaw").reward == pytest.approx(0.2 + 0.2 * 7 / 9)
    assert direct(THREE, r"\boxed{2,1,3}").reward == 0.1  # no partial credit below four tiles
    assert direct(NINE, r"\boxed{1,2,3,4,5,6,7,8,9}").reward == pytest.approx(0.1)  # at 1/K, which is chance
    for rule, full in (("default", 1.0), ("paper", 1.1), ("visual_jigsaw", 1.2), ("exact", 1.0)):
        assert direct(NINE, r"\boxed{9,8,7,6,5,4,3,2,1}", rule).reward == pytest.approx(full)


@pytest.mark.parametrize(
    "text",
    ["B", r"\boxed{B", r"\boxed{B}\boxed{B}", r"\boxed{B} \boxed{C}", "", r"\boxed", r"boxed{B}", r"\boxed{\boxed{B}}"],
)
def test_direct_format_failures(text):
    s = direct(CHOICE, text)
    assert (s.reward, s.format_ok) == (0.0, False)


def test_direct_format_allows_words_around_and_braces_inside():
    assert direct(CHOICE, r"The answer is \boxed{\text{B}}, I think.").format_ok
    assert direct(CHOICE, r"\boxed{{{B}}}").exact == 1.0


@pytest.mark.parametrize(
    "text, ok",
    [
        (r"<think>hm</think>\boxed{B}", True),
        ("  <think>hm</think>\n\nSo: \\boxed{B}", True),
        (r"<think></think>\boxed{B}", False),
        ("<think> \n </think>\\boxed{B}", False),
        (r"\boxed{B}", False),
        (r"hm</think>\boxed{B}", False),
        (r"<think>hm\boxed{B}", False),
        (r"<think>hm</think>", False),
        (r"<think>hm\boxed{B}</think>", False),
        (r"<think>\boxed{A}</think>\boxed{B}", False),
        (r"well <think>hm</think>\boxed{B}", False),
        (r"<think>a</think><think>b</think>\boxed{B}", False),
        (r"<think>a<think>b</think>\boxed{B}", False),
        (r"<think>hm</think>\boxed{B}</think>", False),
        (r"<think>hm</think>\boxed{A}\boxed{B}", False),
        (r'<think>It is "B"</think>"\boxed{B}"', True),
        ("<think>`hm`</think>`\\boxed{B}`", True),
    ],
)
def test_thinking_format(text, ok):
    assert score(CHOICE, text, thinking=True).format_ok is ok


@pytest.mark.parametrize(
    "thought, ok",
    [
        (r"I must reason first, then give the answer in \boxed{}. The roof is in B.", True),
        (r"Format: \boxed{...}. It is B.", True),
        (r"then \boxed{\text{your answer}}, or \boxed{answer}, or \boxed{…}, or \boxed{ }", True),
        ("The user wants <think></think> first. It is B.", True),
        ("I put my reasoning between <think> and </think>, as asked. It is B.", True),
        ("Inside `<think>` and `</think>`, then the box. B.", True),
        ("I am inside <think> tags, and close them by a </think> tag. B.", True),
        (r"Think step by step inside <think></think>, then give the final answer once, in \boxed{}. B.", True),
        (r"First I thought \boxed{A}.", False),
        (r"It is \boxed{B}.", False),
        (r"It is \boxed{\textbf{B}}.", False),
        (r"It is \boxed{A or B}.", False),
        (r"It is \boxed{90}.", False),
        (r"In \boxed{}: \boxed{B}", False),
        (r"It is \boxed{B", False),
        ("One <think>more</think> thought.", False),
        ("One <think> more thought.", False),
        ("<think></think>", False),
        (" <think> and </think> ", False),
    ],
)
def test_a_thought_may_mention_the_form_but_not_answer(thought, ok):
    found = score(CHOICE, rf"<think>{thought}</think>\boxed{{B}}")
    assert (found.format_ok, found.reward) == (ok, float(ok))


def test_our_own_prompts_may_be_repeated_in_a_thought():
    for words in THINKING + DIRECT:
        assert score(CHOICE, rf"<think>The task says: {words} So it is B.</think>\boxed{{B}}").reward == 1.0


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize(
    "text",
    [
        r"<think>Could it be \boxed{A}? The roof fits \boxed{B}, but then",
        r"<think>\boxed{B}",
        r"<think>hm</think> wait <think>\boxed{B}",
        r"As asked in <think></think>: \boxed{}. <think>\boxed{B}",
    ],
)
def test_a_thought_that_never_ends_answers_nothing(text, thinking):
    found = score(CHOICE, text, thinking=thinking)
    assert (found.parsed, found.exact, found.format_ok, found.reward) == (None, 0.0, False, 0.0)


def test_the_direction_that_was_asked_for():
    asked = {way: Answer("number", 90, (0, 90, 180, 270), way) for way in ("", "clockwise", "counter-clockwise")}
    for way, answer in asked.items():
        assert Answer.from_dict(answer.to_dict()) == answer
        for text, degrees in (
            ("90", 90),
            ("90° clockwise", 90),
            ("90° counter-clockwise", -90),
            ("270° CCW", 90),
            ("-90", -90),
        ):
            named = "c" in text.lower()
            expected = -degrees if way == "counter-clockwise" and named else degrees
            assert direct(answer, rf"\boxed{{{text}}}").exact == float(expected % 360 == 90), (way, text)
    with pytest.raises(ValueError, match="direction 'up'"):
        Answer("number", 90, direction="up")


def test_bad_format_gives_zero_by_every_rule():
    for rule in RULES:
        assert score(CHOICE, r"\boxed{B}", rule, thinking=True).reward == 0.0


def test_dict_round_trip():
    for answer in (CHOICE, NUMBER, THREE):
        assert Answer.from_dict(answer.to_dict()) == answer
        assert score(answer.to_dict(), rf"\boxed{{{answer.text}}}", thinking=False).exact == 1.0


def test_unknown_rule_and_bad_answers_are_errors():
    with pytest.raises(ValueError, match="reward rule"):
        score(CHOICE, "", rule="nice")
    with pytest.raises(ValueError, match="permutation"):
        Answer("sequence", (1, 1, 2))
    with pytest.raises(ValueError, match="kind"):
        Answer("essay", "B")


def test_any_string_gets_a_reward_in_range(seed):
    """Two seconds' worth; `python -m tests.fuzz reward --minutes 10` for more."""
    assert fuzz.run(fuzzed.CHECKS, seconds=2, seed=seed) >= 60


@pytest.mark.parametrize(
    "unit",
    [
        "\\boxed{",
        "\\boxed{}",
        "{",
        "<think>",
        "</think>",
        "\x00",
        "\\boxed{1 ",
        "\\text{",
        " ",
        "1,",
        "\\boxed{x}{",
        "`<think>",
        "$",
    ],
)
@pytest.mark.timeout(120)  # quadratic time would take hours
def test_megabytes_take_linear_time(unit):
    text = unit * (2_000_000 // len(unit))
    for t in (text, f"\\boxed{{{text}", f"<think>{text}</think>\\boxed{{{text}}}"):
        for thinking in (True, False):
            assert not score(NINE, t, thinking=thinking).exact


@pytest.mark.timeout(60)  # quadratic time would take much longer
def test_the_longest_answers_take_linear_time():
    units = [
        "$",
        "[",
        "(",
        "**",
        "\\left[",
        "\\begin{bmatrix}",
        "\\text{",
        "<b>",
        "选",
        "\u200b",
        "\u202e",
        "the . ",
        "option ",
        "\x00",
    ]
    units += [
        "\\\\",
        "\\color{",
        "[1,",
        "row 1: 1 ",
        "'",
        "--",
        "not ",
        "B or ",
        "\\boxed{}",
        "{}",
        "~",
        "\n",
        "1,",
        "°",
        "：",
        "\ud800",
    ]
    for unit in units:
        content = unit * (answers.LONGEST // len(unit))
        for text in (content, f"B. {content}", f"1, {content}"[: answers.LONGEST]):
            assert answers.number(text) in (None, 1) and answers.sequence(text) in (None, (1,))
            assert answers.choice(text) in (None, "B")
            answers.holds_any(text)


def test_reward_and_prompts_import_without_torch():
    code = (
        "import sys; sys.modules['torch'] = None; import sslr1.puzzles.reward, sslr1.puzzles.prompts; "
        "from sslr1.puzzles import score; print('fine')"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "fine\n"
