r"""Fuzz of the reward: any string gets a Score, soon, whose numbers fit each other, by every rule. An answer in any
dress, one over the other, is that answer; two of them, or one that is taken back, are none.
"""

import time

from hypothesis import strategies as st

from sslr1.evaluate.scoring import read_answer
from sslr1.puzzles import answers
from sslr1.puzzles.reward import RULES, Answer, score

CHOICES = ("A", "B", "C", "D", "E", "F", "G", "H")
ANSWERS = st.one_of(
    st.integers(2, 8).flatmap(lambda n: st.sampled_from(CHOICES[:n]).map(lambda c: Answer("choice", c, CHOICES[:n]))),
    st.integers(0, 11).map(lambda k: Answer("number", 30 * k, tuple(range(0, 360, 30)))),
    st.integers(2, 9).flatmap(lambda n: st.permutations(range(1, n + 1))).map(lambda p: Answer("sequence", tuple(p))),
)
PIECES = [
    "\\boxed{",
    "\\boxed",
    "{",
    "}",
    "<think>",
    "</think>",
    "<think",
    "\\text{",
    "^\\circ",
    "^{\\circ}",
    "\\degree",
    "°",
    "degrees",
]
PIECES += [
    "1",
    "2",
    "3",
    "90",
    "-90",
    "9" * 12,
    ",",
    ", ",
    ";",
    " ",
    "\n",
    "\t",
    "\x00",
    "\ud800",
    "‮",
    "é",
    "𝟙",
    "٣",
    "²",
    "B",
    "b",
    "Β",
    "(B)",
]
PIECES += ["[", "]", "(", ")", ".", "+", "\\", "$", "\\boxed{1, 2, 3}", "\\boxed{B}", "<think>x</think>"]
PIECES += [
    "\\textbf{",
    "\\begin{bmatrix}",
    "\\end{bmatrix}",
    "\\begin{array}{cc}",
    "\\\\",
    "&",
    "|",
    "\\left[",
    "\\right]",
    "\\{",
    "\\}",
]
PIECES += [
    "**",
    "_",
    "`",
    "'",
    '"',
    "“",
    "”",
    "~~",
    "<b>",
    "</b>",
    "<sup>",
    "->",
    "---",
    "→",
    "：",
    "，",
    "。",
    "答案是",
    "选项",
    "逆时针",
    "不",
]
PIECES += [
    "Option ",
    "The answer is ",
    " or ",
    " and ",
    "not ",
    "clockwise",
    "counter-",
    "row 1:",
    "tile ",
    "\\color{red}",
    "\\,",
    "Ｂ",
    "②",
]
PIECES += ["`<think>`", "<think></think>", "\\boxed{}", "yes", "no", "A dog", "- ", "−", "--", "\u200b", "#", "="]
PARTS = st.one_of(st.sampled_from(PIECES), st.text(max_size=6))
LONG = st.tuples(PARTS, st.integers(1, 20_000)).map(lambda pair: (pair[0] * pair[1])[:60_000])
TEXTS = st.lists(st.one_of(PARTS, PARTS, PARTS, LONG), max_size=16).map("".join)
LARGEST = {
    "default": (0.1, 1.0),
    "paper": (0.1, 1.1),
    "visual_jigsaw": (0.2, 1.2),
    "exact": (0.1, 1.0),
}  # the format alone; an exact answer


def check_any(answer, text, thinking):
    """Any string at all."""
    start = time.thread_time()
    scores = {rule: score(answer, text, rule, thinking) for rule in RULES}
    took = time.thread_time() - start
    assert took < 0.5 + 1e-5 * len(text), f"{took:.2f} s for {len(text)} characters"
    (one, *others) = scores.values()
    for rule, s in scores.items():
        least, most = LARGEST[rule]
        assert (s.exact, s.accuracy, s.format_ok, s.parsed) == (one.exact, one.accuracy, one.format_ok, one.parsed)
        assert (
            0.0 <= s.accuracy <= 1.0
            and s.exact == float(s.accuracy == 1.0)
            and (s.parsed is not None or not s.accuracy)
        )
        if not s.format_ok:
            assert s.reward == 0.0
        else:
            assert least <= s.reward <= most and (s.reward == most) == bool(s.exact)
            assert s.accuracy or s.reward == least
        assert score(answer.to_dict(), text, rule, thinking) == s
    if answer.kind == "sequence" and one.parsed is not None:
        assert sorted(one.parsed) == sorted(answer.value)
    if one.exact:
        assert one.parsed == answer.value


def check_written(answer, other, before, spaces, thinking):
    """An answer in the right form earns what it is worth, whatever words without brackets stand before it."""
    words = "".join(c for c in before if c not in "\\{}<>")
    shown = other if other.kind == answer.kind and len(other.text) == len(answer.text) else answer
    think = f"{spaces}<think>a{words}</think>{spaces}" if thinking else ""
    for rule in RULES:
        found = score(answer, f"{think}{words}\\boxed{{{spaces}{shown.text}{spaces}}}{spaces}", rule, thinking)
        assert found.format_ok and found.parsed == shown.value and found.exact == float(shown.value == answer.value)
        assert (found.reward == LARGEST[rule][1]) == bool(found.exact)


def check_list(answer, values):
    """A list that is no permutation is no answer, however much of it stands in the right place."""
    valid = sorted(values) == sorted(answer.value)
    for rule in RULES:
        found = score(answer, f"\\boxed{{{', '.join(map(str, values))}}}", rule, thinking=False)
        assert found.parsed == (tuple(values) if valid else None)
        assert valid or (found.accuracy, found.reward) == (0.0, LARGEST[rule][0])


def lists():
    """A sequence and a list near it: one place may hold any number, one may be missing or twice there."""
    places = st.integers(0, 8)
    sequences = ANSWERS.filter(lambda answer: answer.kind == "sequence")

    def near(answer, change, number, place):
        values, place = list(answer.value), place % len(answer.value)
        values[place : place + 1] = {"one": [number], "gone": [], "twice": [values[place]] * 2}[change]
        return answer, values

    return st.builds(near, sequences, st.sampled_from(["one", "gone", "twice"]), st.integers(0, 10), places)


DRESS = [
    r"\text{%s}",
    r"\textbf{%s}",
    r"\mathbf{%s}",
    r"\textcolor{red}{%s}",
    "$%s$",
    r"\(%s\)",
    r"\left(%s\right)",
    r"\{%s\}",
    "{%s}",
]
DRESS += [
    "**%s**",
    "`%s`",
    '"%s"',
    "“%s”",
    "『%s』",
    "(%s)",
    "[%s]",
    "（%s）",
    "【%s】",
    r"\,%s\,",
    "\n%s\n",
    "<b>%s</b>",
    "\u200b%s\u200e",
]
DRESS += [
    "The answer is %s",
    "答案：%s",
    "Answer: %s",
    "**Answer:** %s",
    "%s\u3000",
    "__%s__",
    r"\begin{matrix}%s\end{matrix}",
    "<answer>%s</answer>",
]
ENDS = ["%s", "%s.", "%s。", " %s"]
SPELLED = {
    "choice": [
        "%s",
        "Option %s",
        "option (%s)",
        "%s.",
        "%s)",
        "选项%s",
        "%s: the roof",
        "%s\n\nThe roof goes on.",
        "Candidate **%s**",
    ],
    "number": [
        "%s",
        "%s°",
        r"%s^\circ",
        r"%s^{\circ}",
        "%s degrees",
        r"%s\text{ degrees}",
        "%s度",
        "%s.0",
        "%s degrees clockwise",
        "顺时针%s度",
    ],
    "sequence": [
        ", ",
        ",",
        " ",
        " → ",
        "，",
        "、",
        " & ",
        " - ",
        r" \to ",
        ", tile ",
        "\n",
        r"\\",
        "}{",
        ") (",
        "** **",
    ],
}


@st.composite
def dressed(draw, answer):
    how, text = draw(st.sampled_from(SPELLED[answer.kind])), answer.text
    if answer.kind == "sequence":
        text = how.join(map(str, answer.value))
        text = {"}{": "{%s}", ") (": "(%s)", "** **": "**%s**"}.get(how, "%s") % text
        text = f"[{text}]" if how == ") (" else text
    else:
        text = how % (text.lower() if draw(st.booleans()) and answer.kind == "choice" else text)
    if "\n\n" in text or ": the" in text or (text.endswith(")") and "(" not in text):  # not what is put into brackets
        return text
    for one in draw(st.lists(st.sampled_from(DRESS), max_size=6, unique=True)):
        text = one % text
    return draw(st.sampled_from(ENDS)) % text.rstrip(".")


def pairs():
    """An answer, another one of its kind, and both in some dress."""

    def spelled(answer):
        others = [c for c in answer.choices if c != answer.value]
        other = Answer("sequence", answer.value[::-1]) if not others else Answer(answer.kind, others[0], answer.choices)
        return st.tuples(st.just(answer), dressed(answer), dressed(other))

    return ANSWERS.flatmap(spelled)


def check_dressed(answer, text, other):
    found = score(answer, f"\\boxed{{{text}}}", thinking=False)
    assert found.exact == 1.0 and found.reward == 1.0, (answer, text)
    if answer.kind == "choice":
        assert read_answer(f"\\boxed{{{text}}}", ("one", "two") * 4)[0] == answer.value
    for wrong in (
        f"{text} or {other}",
        f"{text}, {other}",
        f"{text}\n{other}",
        f"not {text}",
        f"~~{text}~~",
        f"{other} or {text}",
    ):
        found = score(answer, f"\\boxed{{{wrong}}}", thinking=False)
        assert found.format_ok and found.exact == 0.0, (answer, wrong)


def check_read(text, options):
    """The reader of benchmarks: any string is an option, one of two words or nothing, soon; the parts of the grammar
    likewise."""
    start = time.thread_time()
    assert (
        read_answer(text, options) in (None, *CHOICES[: len(options)])
        if options
        else read_answer(text) in (None, "yes", "no")
    )
    assert answers.choice(text) is None or answers.choice(text) in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    assert answers.number(text) in (None, *range(360))
    assert all(value >= 0 for value in answers.sequence(text) or ())
    took = time.thread_time() - start
    assert took < 0.5 + 1e-5 * len(text), f"{took:.2f} s for {len(text)} characters"


SPACES = st.text(" \n\t", max_size=3)
CHECKS = [
    (st.tuples(ANSWERS, TEXTS, st.booleans()), lambda case: check_any(*case)),
    (st.tuples(ANSWERS, ANSWERS, st.text(max_size=9), SPACES, st.booleans()), lambda case: check_written(*case)),
    (lists(), lambda case: check_list(*case)),
    (pairs(), lambda case: check_dressed(*case)),
    (
        st.tuples(TEXTS, st.sampled_from([(), ("a dog", "Vitamin D"), ("A", "B", "C", "D", "it is E")])),
        lambda case: check_read(*case),
    ),
]
