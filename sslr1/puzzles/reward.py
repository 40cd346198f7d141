r"""Answers and how completions are scored. Imports nothing but Python, so that other pipelines can use it without torch.

Format: the thinking form is exactly one <think>…</think> with something in it, at the start, and after it exactly one
\boxed{…}; the direct form is exactly one \boxed{…}. Nothing here raises on any string, and time is linear in its length.
"""

import re
from dataclasses import dataclass

KINDS = ("choice", "number", "sequence")
RULES = ("default", "paper", "visual_jigsaw", "exact")
_BOX = "\\boxed{"
_BRACE = re.compile(r"[{}]")
_DIGITS = 9  # an answer of more digits than this is no answer


@dataclass(frozen=True)
class Answer:
    """kind "choice" (value: a letter), "number" (an integer, degrees modulo 360) or "sequence" (K integers, a permutation
    of 1…K). choices: every valid value of a single answer, for drawing a random one; a sequence's follow from K."""

    kind: str
    value: str | int | tuple
    choices: tuple = ()

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"answer kind {self.kind!r} is not one of {KINDS}")
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
        return {"kind": self.kind, "value": value, "choices": list(self.choices)}

    @classmethod
    def from_dict(cls, d: dict) -> "Answer":
        return cls(d["kind"], d["value"], tuple(d.get("choices", ())))


@dataclass(frozen=True)
class Score:
    """reward: by the rule. exact: 1.0 or 0.0. accuracy: share of right places (exact for single answers, 0 for an invalid
    list). format_ok: the form was kept. parsed: the answer that was read, None if none could be."""

    reward: float
    exact: float
    accuracy: float
    format_ok: bool
    parsed: str | int | tuple | None


def to_text(value) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def random_answer_text(answer: Answer, draw) -> str:
    """Text of an answer that is valid and uniformly random; draw: a NumPy generator."""
    if answer.kind == "sequence":
        return to_text(tuple(int(v) + 1 for v in draw.permutation(len(answer.value))))
    return to_text(answer.choices[int(draw.integers(0, len(answer.choices)))])


def score(answer, completion, rule="default", thinking=True) -> Score:
    """Score a completion. answer: Answer or its dict. ValueError for an unknown rule, never for any completion."""
    if rule not in RULES:
        raise ValueError(f"reward rule {rule!r} is not one of {RULES}")
    if not isinstance(answer, Answer):
        answer = Answer.from_dict(answer)
    body = completion if isinstance(completion, str) else ""
    format_ok = True
    if thinking:
        format_ok, body = _after_thinking(body)
    boxes = boxes_of(body)
    format_ok = format_ok and len(boxes) == 1 and boxes[0] is not None and body.count(_BOX) == 1
    parsed = _parse(answer, boxes[-1]) if boxes and boxes[-1] is not None else None
    accuracy = 0.0
    if parsed is not None:
        if answer.kind == "sequence":
            accuracy = sum(a == b for a, b in zip(parsed, answer.value)) / len(answer.value)
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
        return 0.2 + (1.0 if exact else 0.2 * accuracy if K > 4 else 0.0)
    if exact:
        return 1.0
    if rule == "exact":
        return 0.1
    partial = 0.5 if K >= 6 else 0.2 if K >= 4 else 0.0
    return 0.1 + (0.9 * partial * max(0.0, (accuracy - 1 / K) / (1 - 1 / K)) if partial else 0.0)


def _after_thinking(text):
    """(the thinking form holds, text behind it). Without a closing tag the whole text is looked at for an answer."""
    opened, closed = text.count("<think>"), text.count("</think>")
    stripped = text.lstrip()
    end = stripped.find("</think>")
    if end < 0:
        return False, text
    ok = opened == closed == 1 and stripped.startswith("<think>") and bool(stripped[len("<think>") : end].strip())
    return ok and _BOX not in stripped[:end], stripped[end + len("</think>") :]


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
    content = content.strip()
    if len(content) > 1000:
        return None
    content = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", content)
    content = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degree|\\circ", "°", content).strip()
    if answer.kind == "sequence":
        return _parse_sequence(content, len(answer.value))
    content = content.rstrip(".").strip()
    while len(content) > 2 and content[0] + content[-1] in ("()", "[]", "{}"):
        content = content[1:-1].strip().rstrip(".").strip()
    if answer.kind == "choice":
        letter = content.rstrip("°").strip().upper()
        return letter if len(letter) == 1 and "A" <= letter <= "Z" else None
    match = re.fullmatch(rf"([+-]?[0-9]{{1,{_DIGITS}}})(?:\.0+)?\s*(?:°|deg(?:ree)?s?)?\.?", content, re.IGNORECASE)
    return int(match.group(1)) % 360 if match else None


def _parse_sequence(content, K):
    content = content.rstrip(".").strip()
    if len(content) >= 2 and content[0] + content[-1] in ("()", "[]", "{}"):
        content = content[1:-1].strip()
    if not re.fullmatch(rf"[0-9]{{1,{_DIGITS}}}(?:(?:\s*,\s*|\s+)[0-9]{{1,{_DIGITS}}})*", content):
        return None
    values = tuple(int(v) for v in re.findall(r"[0-9]+", content))
    return values if sorted(values) == list(range(1, K + 1)) else None
