r"""Answers and how completions are scored. Imports nothing but Python, so that other pipelines can use it without
torch.

Format: the thinking form is exactly one <think>…</think> with something in it, at the start, and after it exactly one
\boxed{…}; the direct form is exactly one \boxed{…}. A thought may mention either as prompts do: "<think></think>",
"\boxed{}". What stands in the box is read by `answers`. Nothing here raises on any string, and time is linear in its
length.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from sslr1.puzzles import answers

KINDS = ("choice", "number", "sequence")  # of puzzles
OWN = ("quantity", "yes/no", "text", "function")  # and of users' own questions
RULES = ("default", "paper", "visual_jigsaw", "exact")
_BOX = "\\boxed{"
_BRACE = re.compile(r"[{}]")
_MARK = "[`'\"“”‘’]"
_MENTION = re.compile(  # of the tags, in a thought
    rf"<think>{_MARK}{{0,3}} {{0,3}}(?:and|to|or|/|,|…|\.\.\.)? {{0,3}}{_MARK}{{0,3}}</think>"
    rf"|{_MARK}</?think>{_MARK}"
    rf"|</?think>(?= (?:tags?|blocks?|sections?)\b)"
)


@dataclass(frozen=True)
class Answer:
    """kind "choice" (value: a letter), "number" (an integer, degrees modulo 360) or "sequence" (K integers, a
    permutation of 1…K); of users' own questions also "quantity" (any number), "yes/no", "text" (compared as `words`
    has it) and "function" (its text). choices: every valid value of a single answer, for drawing a random one, () where
    they can't be counted; a sequence's follow from K. direction: in which a number of degrees was asked for,
    "clockwise" or "counter-clockwise"; "" is taken for clockwise where an answer names one. tolerance: how far a
    quantity may lie from it. judge: of a function's, (text in the box) -> accuracy from 0 to 1; no part of its dict."""

    kind: str
    value: str | int | float | tuple
    choices: tuple = ()
    direction: str = ""
    tolerance: float = 0.0
    judge: Callable | None = field(default=None, compare=False, repr=False)

    def __post_init__(self):
        if self.direction not in answers.DIRECTIONS:
            raise ValueError(f"direction {self.direction!r} is not one of {tuple(answers.DIRECTIONS)}")
        if self.kind not in (*KINDS, *OWN):
            raise ValueError(f"answer kind {self.kind!r} is not one of {(*KINDS, *OWN)}")
        if self.kind == "sequence":
            object.__setattr__(self, "value", tuple(int(v) for v in self.value))
            if sorted(self.value) != list(range(1, len(self.value) + 1)):
                raise ValueError(f"a sequence must be a permutation of 1…K, got {self.value}")
        object.__setattr__(self, "choices", tuple(self.choices))

    @property
    def text(self) -> str:
        """Canonical form, what stands in the box."""
        return to_text(self.value)

    def to_dict(self) -> dict:
        value = list(self.value) if self.kind == "sequence" else self.value
        more = {key: held for key in ("direction", "tolerance") if (held := getattr(self, key))}
        return {"kind": self.kind, "value": value, "choices": list(self.choices), **more}

    @classmethod
    def from_dict(cls, d: dict) -> "Answer":
        more = d.get("direction", ""), d.get("tolerance", 0.0)
        return cls(d["kind"], d["value"], tuple(d.get("choices", ())), *more)


@dataclass(frozen=True)
class Score:
    """reward: by the rule. exact: 1.0 or 0.0. accuracy: share of right places (exact for single answers, 0 for an
    invalid list). format_ok: the form was kept. parsed: the answer that was read, None if none could be."""

    reward: float
    exact: float
    accuracy: float
    format_ok: bool
    parsed: str | int | float | tuple | None


def to_text(value) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def random_answer_text(answer: Answer, rng) -> str:
    """Text of an answer that is valid and uniformly random; rng: a NumPy generator. Where valid ones can't be counted,
    a digit or a letter."""
    if answer.kind == "sequence":
        return to_text(tuple(int(v) + 1 for v in rng.permutation(len(answer.value))))
    if answer.kind in OWN and not answer.choices:
        return ("0123456789" if answer.kind == "quantity" else "ABCDEFGH")[int(rng.integers(0, 8))]
    return to_text(answer.choices[int(rng.integers(0, len(answer.choices)))])


def score(answer, completion, rule="default", thinking=True) -> Score:
    """Score a completion. answer: Answer or its dict. ValueError for an unknown rule, and where a function has no
    judge, never for any completion."""
    if rule not in RULES:
        raise ValueError(f"reward rule {rule!r} is not one of {RULES}")
    if not isinstance(answer, Answer):
        answer = Answer.from_dict(answer)
    if answer.kind == "function" and answer.judge is None:
        raise ValueError("an answer that a function judges can't be scored without its judge")
    thought, body, whole = thought_of(completion if isinstance(completion, str) else "")
    boxes = boxes_of(body or "")
    format_ok = len(boxes) == 1 and boxes[0] is not None and body.count(_BOX) == 1 and not _answers_in(thought)
    format_ok = format_ok and (whole or not thinking)
    parsed = _parse(answer, boxes[-1]) if boxes and boxes[-1] is not None else None
    accuracy = 0.0
    if parsed is not None:
        if answer.kind == "sequence":
            accuracy = sum(a == b for a, b in zip(parsed, answer.value)) / len(answer.value)
        elif answer.kind == "quantity":
            accuracy = float(abs(parsed - answer.value) <= answer.tolerance + 1e-12 * abs(answer.value))
        elif answer.kind == "text":
            accuracy = float(parsed == answers.words(answer.value))
        elif answer.kind == "function":
            accuracy = float(answer.judge(parsed))
        else:
            accuracy = float(parsed == answer.value)
    exact = float(accuracy == 1.0)
    return Score(_reward(answer, rule, format_ok, exact, accuracy), exact, accuracy, format_ok, parsed)


def _reward(answer, rule, format_ok, exact, accuracy):
    if not format_ok:
        return 0.0
    K = len(answer.value) if answer.kind == "sequence" else 0
    if rule == "paper":
        return 0.1 + accuracy
    if rule == "visual_jigsaw":
        return 0.2 + (1.0 if exact else 0.2 * accuracy if K > 4 or answer.kind == "function" else 0.0)
    if exact:
        return 1.0
    if rule == "exact":
        return 0.1
    if answer.kind == "function":
        return 0.1 + 0.9 * accuracy
    partial = 0.5 if K >= 6 else 0.2 if K >= 4 else 0.0
    return 0.1 + (0.9 * partial * max(0.0, (accuracy - 1 / K) / (1 - 1 / K)) if partial else 0.0)


def thought_of(text) -> tuple[str, str | None, bool]:
    """(what stands before the last </think>; what stands after it, None in a thought that never ends; whether that is
    one thought with something in it, at the start, and no tag after it). Without tags all of the text stands
    after."""
    start = len(text) - len(text.lstrip())
    opened = start + len("<think>") if text.startswith("<think>", start) else start
    last = text.rfind("</think>") - opened

    def unseen(mention):
        # the last closing tag is one, even between quotation marks, unless an opening one stands with it
        closes = mention.start() <= last < mention.end() and "<think>" not in mention[0]
        return mention[0] if closes else " " * len(mention[0])

    seen = text[:opened] + _MENTION.sub(unseen, text[opened:])
    end = seen.rfind("</think>")
    thought, body = ("", text) if end < 0 else (text[:end], text[end + len("</think>") :])
    if "<think>" in seen[max(end, 0) :]:
        return text, None, False
    whole = opened > start and end >= 0 and bool(seen[opened:end].strip())
    whole = whole and seen.count("<think>") == seen.count("</think>") == 1 and not re.search("</?think>", body)
    return thought, body, whole


def starts_opened(text) -> bool:
    """Whether a text closes a thought which it didn't open: the chat template has."""
    return "</think>" in text and not text.lstrip().startswith("<think>")


def _answers_in(thought) -> bool:
    r"""Whether a thought holds a box with an answer in it: a letter of its own or a number. An empty one, dots or
    words, as in \boxed{your answer}, only mention it."""
    return any(box is None or answers.holds_any(box) for box in boxes_of(thought))


def boxes_of(text) -> list:
    """Contents of each outermost \\boxed{…} in order; None for one that is never closed."""
    found, start = [], text.find(_BOX)
    while start >= 0:
        depth, i = 1, start + len(_BOX)
        for brace in _BRACE.finditer(text, i):
            depth += 1 if brace.group() == "{" else -1
            if depth == 0:
                end = brace.start()
                found.append(text[i:end])
                start = text.find(_BOX, end)
                break
        else:
            found.append(None)
            break
    return found


def _parse(answer, content):
    if answer.kind == "choice":
        return answers.choice(content)
    if answer.kind == "number":
        return answers.number(content, answer.direction)
    if answer.kind in OWN:
        read = {"quantity": answers.quantity, "yes/no": answers.yes_or_no, "text": answers.words, "function": str.strip}
        return read[answer.kind](content)
    values = answers.sequence(content)
    return values if values and sorted(values) == list(range(1, len(answer.value) + 1)) else None
