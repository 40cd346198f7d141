r"""What a completion answers, and what the answers of a benchmark add up to. Knows records, nothing of models or files.

How an answer is read (`read_answer`), the first rule that decides:

1. Only what follows the last </think> counts; a block of thinking that never ends answers nothing
   (`puzzles.reward.thought_of`).
2. If that holds a closed \boxed{…}, only the content of the last one counts, by rules 3 and 4a and b alone.
3. What only dresses is dropped: LaTeX, Markdown, other widths of characters (`puzzles.dress.plain`).
4. Multiple choice, with letters of the question's own options only:
   a. what a puzzle's box may hold for a choice (`puzzles.answers.choice`): "b", "(B)", "Option B", "B. A red car";
   b. the text of exactly one option, case and spacing aside, alone or after its letter or "The answer is": "a red
      car";
   c. letters in brackets, and capital ones that are marked by ")", ":" or a full stop after them or by "answer",
      "option" or "choice" (and "is" or ":") or 答案, 选项, 选 in front: if they are all the same one, it;
   d. capital letters that stand alone, A and I not where a word in small letters follows ("A dog", but "A or B", "A
      is", "A and", "A because"): if they are all the same one, it.
   A letter that is taken back ("not B", "B is wrong", "B?", 不是B) is none; of "B or C" both are. Two different letters
   answer nothing, and a word that only begins with a letter is none.
5. Yes or no: whichever of the words "yes" and "no" is in it; of both, the first word of all if a comma, a full stop or
   the like follows it ("Yes, there is no dog"), else neither. 是, 对 and 有, 不, 否 and 没有 where a text begins with
   them.

No answer is a wrong answer. The scripts of the paper's protocol agree with this on what is asked for, a letter or one
of the two words; of other text they take the first letter of the alphabet, so "The answer is B" is T there and "Blue"
is B.
"""

import random
import re
from math import prod
from string import ascii_uppercase

from sslr1.errors import UserError
from sslr1.evaluate import intervals
from sslr1.puzzles import answers, dress
from sslr1.puzzles.reward import boxes_of, thought_of
from sslr1.sums import plain_sum

LABELS = ("category", "l2-category", "split")  # columns by which results are told apart

# The paper's results (arXiv 2604.20705): read off its figure, so the last digit may be off by one; by the protocol of
# Visual Jigsaw (arXiv 2509.25190). What each column measures is said where a plain accuracy on a file of that name is
# something else.
PAPER_MODELS = ("Qwen2.5-VL-3B", "Qwen2.5-VL-3B + SSL-R1", "Qwen2.5-VL-7B", "7B + Visual Jigsaw", "7B + SSL-R1")
PAPER = {
    "V*": (76.44, 80.63, 76.96, 80.63, 81.68),
    "HR-Bench": (64.12, 68.75, 67.38, 71.13, 71.75),
    "MMBench": (77.15, 78.52, 83.33, 84.45, 84.11),
    "MMStar": (51.49, 57.67, 59.75, 65.81, 62.81),
    "MMVP": (43.33, 54.67, 54.66, 60.66, 60.00),
    "SugarCrepe++": (61.05, 61.49, 61.59, 63.02, 63.67),
    "Winoground": (27.75, 29.25, 37.00, 39.00, 41.25),
    "DA-2K": (51.89, 61.70, 54.45, 60.35, 63.54),
    "OmniSpatial": (45.27, 46.84, 42.66, 44.49, 45.40),
    "VSR": (77.31, 77.68, 77.68, 80.36, 81.05),
    "OVD-Eval": (35.21, 35.60, 35.07, 36.49, 36.50),
    "LISA": (59.59, 61.58, 71.89, 74.54, 74.07),
    "MME-RealWorld": (42.68, 43.67, 43.41, 45.96, 49.87),
}
MMVP_CORRECTED = (None, None, 50.00, 57.33, None)  # the same models' answers, or repeated ones, by the right pairs
PAPER_MEASURES = {
    "HR-Bench": "its 8K images",
    "MMBench": "its English dev split",
    "MMStar": "its fine-grained part",
    "MMVP": "pairs, by the legacy pairing",
    "SugarCrepe++": "groups of three questions, all right",
    "Winoground": "groups of questions, all right",
    "OVD-Eval": "an average precision of boxes",
    "LISA": "boxes with an IoU above 0.5",
    "MME-RealWorld": "its lite set",
}
OTHERWISE = ("SugarCrepe++", "Winoground", "OVD-Eval", "LISA")  # not by right answers alone: nothing here compares
ALIASES = {  # VLMEvalKit's names of their files
    "V*": ("vstar", "vstarbench"),
    "HR-Bench": ("hrbench8k",),
    "MMBench": ("mmbenchdeven",),
    "MME-RealWorld": ("mmerealworldlite",),
}

_WORD = r"(?i:\b(?:answer|option|choice)%s)[\s(\[\"']*"
_ARTICLE = r"(?:[AI](?!\s+(?!(?:or|and|is|because)\b)[a-z])|[B-HJ-Z])(?![\w'-])"  # a letter; not "A dog", not "I think"
_MARKED = re.compile(
    "|".join(
        (
            _WORD % r"\s+(?:is\s)?" + r"([A-Z])(?![\w'-])",
            _WORD % r"(?:\s+is)?\s*[:-]" + f"({_ARTICLE})",
            r"(?:答案|answer|选项|選項|option|选择|選擇|选|選)\s*(?:应该|应|應)?(?:是|为|為|选|is)?[\s:(\[\"']*([A-Z])(?![A-Za-z0-9'-])",
            r"(?<!\w)[(\[]([A-Za-z])[)\]]",
            r"(?<![\w'.-])([A-Z])[).:](?!\w)",
        )
    )
)
_ALONE = re.compile(rf"(?<![\w'.-])({_ARTICLE})")
_ALSO = re.compile(
    r"[)\]\"']?,? ?(?:\b(?:or|and)\b|[/&或和]|,(?= ?[A-Z](?: ?[.,;]| or\b| and\b|$))) ?"
    r"(?:option )?[(\[\"']?([A-Z])(?![\w'-])"
)
_TAKEN_BACK = re.compile(
    r"~~[^~]{0,80}~~|<(?:s|del|strike)>[^<]{0,80}"
    r"|\\(?:x|b)?cancel\s?[A-Z]|\\sout\s?[A-Z]|(?:\\neg|\\lnot|\\not|¬|!)\s?[A-Z]"
    r"|(?i:\b(?:not|cannot|never|neither|nor|except|no|but|out)|n't)(?: [\w']{1,12}){0,3} "
    r"[(\[\"']?(?-i:[A-Z])(?![\w'-])(?: nor [A-Z]\b)?"
    r"|\b[A-Z][)\]\"']{0,2} (?:is|was|can|could)(?:n't| (?:not|never|wrong|incorrect|false|ruled out|impossible)\b)"
    r"|\b[A-Z][)\]\"']{0,2}\?"
    r"|[不非没错]\w{0,4}\s?[(\[]?[A-Z]"
)
_SAYS = re.compile(
    r"(?:so |therefore,? |thus,? )?(?:the )?(?:(?:final|correct|right|best) )?(?:answer|option|choice) ?(?:is ?:?|:) ?"
)
_YES_OR_NO = re.compile(r"(?<!\bnot )\b(yes|no)\b(?!\s?\?)")
_FIRST_WORD = re.compile(r"(?:the )?(?:answer ?(?:is ?:?|:) ?)?(yes|no) ?(?:[,.;:!\n(]|- )")
_CHINESE = re.compile(
    r"(?:答案(?:是|为|應為|应为)?+[:]? ?)?+(?:(不是|没有|沒有|否|不对|不|无)|(是|对|有))(?=的?(?:[\s,.!]|$))"
)


def read_answer(completion, options=()) -> str | None:
    """The letter that a completion chooses among `options` (their texts, A first), or "yes" or "no" where there are
    none; None if it can't be read."""
    _, text, _ = thought_of(completion)
    closed = [box for box in boxes_of(text or "") if box is not None]
    text = closed[-1] if closed else text
    if text is None:
        return None
    return _choice(text, options, boxed=bool(closed)) if options else _yes_or_no(text)


def _choice(text, options, boxed):
    letters = ascii_uppercase[: len(options)]
    said, plain_options = _plain(text), [_plain(option) for option in options]
    said = said[_SAYS.match(said).end() :] if _SAYS.match(said) else said
    named = [
        letter
        for letter, option in zip(letters, plain_options)
        if said == option or re.fullmatch(rf"[(\[]?{letter.lower()}(?:[)\].:]+\s*|\s){re.escape(option)}", said)
    ]
    if len(named) == 1:
        return named[0]
    letter = answers.choice(text)
    if letter is not None or boxed:
        return letter if letter and letter in letters else None
    text = " ".join(dress.plain(text).split())
    for option in options:  # a letter in an option's own words is no choice
        if len(option) > 2 and re.search(r"\b[A-Z]\b", option):
            text = text.replace(option, "")
    text = _TAKEN_BACK.sub(" ", text)
    for pattern in (_MARKED, _ALONE):
        found = set()
        for match in pattern.finditer(text):
            found.add(match.group(match.lastindex).upper())
            also = _ALSO.match(text, match.end(match.lastindex))
            if also:
                found.add(also[1])
        found &= set(letters)
        if found:
            return found.pop() if len(found) == 1 else None
    return None


def _plain(text):
    return " ".join(dress.plain(text).lower().strip(" \t\r\n\"'.").split())


def _yes_or_no(text):
    chinese = _CHINESE.match(dress.folded(text).strip(" \n\"'*$."))
    if chinese:
        return "no" if chinese[1] else "yes"
    text = re.sub(r"[ \t]+", " ", re.sub("[\"'`]", "", dress.plain(text))).lower().strip()
    found = set(_YES_OR_NO.findall(text))
    if len(found) == 2:
        first = _FIRST_WORD.match(text)
        found = {first[1]} if first else set()
    return found.pop() if len(found) == 1 else None


def measures(records, name, field="score") -> dict:
    """{measure: {unit: score}} of a benchmark's records, each with index, rotation and `field`, a number in [0, 1].

    plain: each question as the file has it. circular, where options were rotated: a question counts if all its
    rotations do. pairs (MMVP): rows 2k - 1 and 2k, counted from 1, count together. pairs, legacy: as the published
    figures were paired, see `legacy_pairs`.
    """
    plain = {r["index"]: r[field] for r in records if r["rotation"] == 0}
    out = {"plain": plain}
    if any(r["rotation"] for r in records):
        rotations = {}
        for r in records:
            rotations.setdefault(r["index"], []).append(r[field])
        out["circular"] = {index: prod(all_of_it) for index, all_of_it in rotations.items()}
    if paper_name(name) == "MMVP":
        rows = [plain[index] for index in sorted(plain, key=int)]
        for measure, order in (("pairs", range(len(rows))), ("pairs, legacy", legacy_order(len(rows)))):
            pairs = enumerate(zip(order[::2], order[1::2]), 1)
            out[measure] = {str(k): rows[first] * rows[second] for k, (first, second) in pairs}
    return out


def legacy_order(n) -> list:
    """The order in which the scripts behind the published MMVP figures paired its n rows: neighbours after a shuffle by
    Python's generator with seed 42, so that unrelated questions make a pair. Its authors mended it in April 2026: 54.66
    became 50.00 for Qwen2.5-VL-7B, 60.66 became 57.33 for Visual Jigsaw's."""
    order = list(range(n))
    random.Random(42).shuffle(order)
    return order


def check_pairs(rows, path) -> None:
    """Raises UserError unless the rows' indices are 1…2K or 0…2K - 1, which is how MMVP's pairs are known."""
    given = {row.index for row in rows}
    if len(rows) % 2 or given not in ({str(first + i) for i in range(len(rows))} for first in (0, 1)):
        raise UserError(
            f"{path}, column index: MMVP's rows 2k-1 and 2k are a pair, so its indices must be 1 to an even number, or "
            "0 to an odd one, without gaps; give another --name if this is not MMVP"
        )


def paper_name(name) -> str | None:
    """The benchmark of the paper's table that a file of this name holds, None if there is none."""
    short = _short(name)
    return next((known for known in PAPER if short == _short(known) or short in ALIASES.get(known, ())), None)


def _short(name):
    return re.sub(r"[^a-z0-9*+]", "", name.lower())


def summary(scores, chances, baseline, *address) -> dict:
    """Numbers of one measure. scores, chances: {unit: 0 or 1}, {unit: chance}; baseline: another model's scores of the
    same units, or None; address: of the bootstrap's draws.

    n, accuracy with its 95 % interval (Wilson), chance; with a baseline its accuracy and the difference with its 95 %
    interval (paired bootstrap).
    """
    n, right = len(scores), plain_sum(scores.values())
    out = {
        "n": n,
        "accuracy": right / n,
        "interval": intervals.wilson(right, n),
        "chance": plain_sum(chances[unit] for unit in scores) / n,
    }
    if baseline is not None:
        differences = [scores[unit] - baseline[unit] for unit in scores]
        out["baseline"] = plain_sum(baseline[unit] for unit in scores) / n
        out["difference"] = plain_sum(differences) / n
        out["difference_interval"] = intervals.paired_bootstrap(differences, *address)
    return out


def summarise(records, name, baseline=None) -> dict:
    """{"measures": {measure: summary}, "groups": {column: {value: summary of plain}}, "unreadable", "cut_off"} of a
    benchmark's records, all of one form; baseline: another model's records of the same questions, or None."""
    scores, chances = measures(records, name), measures(records, name, "chance")
    theirs = measures(baseline, name) if baseline else {}
    out = {
        measure: summary(units, chances[measure], theirs.get(measure), name, measure)
        for measure, units in scores.items()
    }
    groups = {}
    for column in LABELS:
        for value in sorted({r[column] for r in records if column in r}):
            plain = {r["index"]: r["score"] for r in records if r[column] == value and r["rotation"] == 0}
            found = summary(plain, chances["plain"], theirs.get("plain"), name, column, value)
            groups.setdefault(column, {})[value] = found
    return {
        "measures": out,
        "groups": groups,
        "unreadable": sum(r["extracted"] is None for r in records),
        "cut_off": sum(r["finish"] == "length" for r in records),
    }
