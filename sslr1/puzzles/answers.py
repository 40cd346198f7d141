r"""What a written answer says: a letter, a number of degrees, a list of numbers, any number, yes or no, or its words.
Imports nothing but Python.

`choice`, `number` and `sequence` accept what `dress` leaves word by word: what they don't know is no answer, so
alternatives, negations, other units and further entries are none. Nothing here raises on any string, and time is linear
in its length.
"""

import re

from sslr1.puzzles.dress import atoms, folded, plain

LONGEST = 20_000  # characters of a box, dress included; more is no answer
_MOST = 500  # words, numbers and signs of an answer
_DIGITS = 9  # of a number in a list
_TURN_DIGITS = 4  # of a number of degrees

_LATEX_QUOTES = re.compile("``([^`']*)''")
_CLOSING = {"(": ")", "[": "]", "{": "}", "⟨": "⟩"}
_FILL = frozenset("the final correct best answer is it it's so therefore".split())
_OF_CHOICE = _FILL | frozenset(
    "option choice candidate image picture photo view patch point letter label region crop my of right match matches "
    "matching missing piece tile ans".split()
)
_OF_ANGLE = _FILL | frozenset(
    "a angle rotation rotated rotate rotates turned turn turns by of was image picture photo in this be should "
    "direction has been".split()
)
_OF_LIST = _FILL | frozenset("order ordering sequence arrangement permutation list reading of in are".split())
_ENTRY = frozenset("tile tiles piece pieces number numbers patch #".split())
_AGAINST = frozenset(
    "or not no nor neither none never cannot wrong incorrect false except unless but either both instead rather "
    "nothing".split()
)
_AGAINST_CHINESE = re.compile("[不非没沒或错錯否和与與]")
_IN_TEXT = frozenset(".,:;()[]{}-'\"!°=% \n") | {"\\\\"}
_CLOCKWISE = {"clockwise": 1, "cw": 1, "counterclockwise": -1, "anticlockwise": -1, "ccw": -1, "acw": -1}
DIRECTIONS = {"": 1, "clockwise": 1, "counter-clockwise": -1}
_AROUND = {"(": ")", "[": "]", '"': '"', "'": "'"}
_FIRST = re.compile(r"(?:(?:the|final|correct|answer|is|it|number|count|total|value|of|so|therefore)\b ?|[:=] ?)+")
_PLAIN_NUMBER = re.compile(r"([-+] ?)?(\d{1,3}(?:,\d{3})+|\d+)?(\.\d+)?(e[-+]?\d{1,3})?")
_LONGEST_NUMBER = 40  # characters
_DEGREES = frozenset(("°", "degrees", "degree", "deg", "degs"))


def _read(content) -> list | None:
    """Atoms of a box's content without blanks and quotation marks, degree signs as "°"; None if it can't be an
    answer."""
    content = content.strip()
    if len(content) > LONGEST:
        return None
    found, sound = atoms(_LATEX_QUOTES.sub(r'"\1"', folded(content)) + " ")
    if not sound:
        return None
    found = [atom for atom in found if not atom.isspace() or atom == "\n"]
    while found and found[-1] == "\n":
        found.pop()
    if len(found) > _MOST:
        return None
    out, quotes = [], {"'": 0, '"': 0, "”": 0}
    for atom in found:
        if atom in quotes:
            quotes[atom] += 1
            if out and out[-1] == atom != "”":
                return None  # of nothing: seconds of arc
            out.append(atom)
        elif out and out[-1] == "^" and atom in ("°", "o", "O"):
            out[-1] = "°"
        else:
            out.append(atom)
    if any(count % 2 for count in quotes.values()):
        return None
    return [atom for atom in out if atom not in quotes]


def holds_any(content) -> bool:
    """Whether a number or a letter that stands alone is in it, or more than can be looked at."""
    if len(content) > LONGEST:
        return True
    found, _ = atoms(folded(content))
    return any(_is_letter(atom) or atom[0].isdecimal() for atom in found)


def _pairs(found) -> dict | None:
    """{place of an opening bracket: place of its closing one}; None unless all are in pairs, each with something in
    it."""
    out, opened = {}, []
    for i, atom in enumerate(found):
        if atom in _CLOSING:
            opened.append(i)
        elif atom in ")]}⟩":
            if not opened or _CLOSING[found[opened[-1]]] != atom or opened[-1] == i - 1:
                return None
            out[opened.pop()] = i
    return None if opened else out


def _undressed(found) -> list:
    """Without the brackets around all of it."""
    pairs, start, end = _pairs(found) or {}, 0, len(found)
    while True:
        while end > start and found[end - 1] in (".", ",", "!", "\n"):
            end -= 1
        if start >= end or pairs.get(start) != end - 1:
            return found[start:end]
        start, end = start + 1, end - 1


def choice(content) -> str | None:
    """The one letter that is chosen, A to Z: alone, after words that say so ("Option", "The answer is"), or in front of
    ".", ")", ":", a dash or the like and words, the option's own, that name no other letter and take nothing back."""
    found = _read(content)
    if not found:
        return None
    found = _undressed(found)
    while found and (start := _said(found)):
        found = found[start:]
        if found and found[0] in (":", "=", "-", "."):
            found = found[1:]
        found = _undressed(found)
    if len(found) >= 3 and _CLOSING.get(found[0]) == found[2]:
        letter, rest, marked = found[1], found[3:], True
    else:
        letter, rest = found[0] if found else "", found[1:]
        marked = bool(rest) and rest[0] in (")", ".", ":", ",", "-", "(", "\n")
    if not _is_letter(letter):
        return None
    while rest and rest[-1] in (".", ",", ":", "!", "°", ")", "\n") and len(rest) <= 2:
        rest = rest[:-1]
    if rest and not (_says_so(rest) or (marked and _is_option_text(rest, letter))):
        return None
    return letter.upper()


def _said(found) -> int:
    """How many atoms in front only say that an answer comes."""
    end = (_pairs(found) or {}).get(0, 0) if found[0] in _CLOSING else 0
    words = found[1:end] if end else found[:1]
    return end + 1 if all(word.lower() in _OF_CHOICE or word in (":", "=", "\n") for word in words) else 0


def _is_letter(atom):
    return len(atom) == 1 and atom.isascii() and atom.isalpha()


def _says_so(rest):
    """ "is the answer", "option"."""
    words = [atom.lower() for atom in rest if atom not in (".", "!", "of")]
    return words in (["option"], ["choice"]) or (words[:1] == ["is"] and all(w in _OF_CHOICE for w in words[1:]))


def _is_option_text(rest, letter):
    words = 0
    for i, atom in enumerate(rest):
        word = atom.lower()
        following = rest[i + 1] if i + 1 < len(rest) else ""
        if (
            word in _AGAINST
            or word.endswith("n't")
            or (not atom.isascii() and not atom.isalpha())
            or _AGAINST_CHINESE.search(atom)
        ):
            return False
        if _is_letter(atom):
            article = atom in "AaI" and following.isalpha() and following.islower() and len(following) > 1
            if word != letter.lower() and not article:
                return False
        elif atom.isalpha() or "'" in atom:
            words += 1
        elif not atom[0].isdigit() and atom not in _IN_TEXT:
            return False
    return words > 0


def number(content, asked="") -> int | None:
    """Degrees modulo 360 in the direction that was asked for ("clockwise", which "" is too, or "counter-clockwise"): an
    integer, with its sign or the direction in which it is meant ("90° CCW"), not both, after words that say what it
    is."""
    found = _read(content)
    if not found or _pairs(found) is None:
        return None
    found = [atom.lower() for atom in found if atom not in "()[]{}⟨⟩\n" and atom != "\\\\"]
    found = ["-" if atom == "minus" else atom for atom in found]
    value, sign, direction, degrees, i = None, 0, 0, False, 0
    while i < len(found):
        atom, before, after = found[i], found[i - 1] if i else "", found[i + 1] if i + 1 < len(found) else ""
        turned, i = _direction(found, i)
        if turned:
            if direction == -turned:
                return None
            direction = turned
        elif atom[0].isdecimal() and atom.isascii():
            whole, _, zeros = atom.partition(".")
            if value is not None or len(whole) > _TURN_DIGITS or zeros.strip("0") or before == ".":
                return None
            value = int(whole)
        elif atom in ("-", "+") and value is None and after[:1].isdecimal():
            sign = -1 if atom == "-" else 1
        elif atom == "-" and before[:1].isdecimal() and after in _DEGREES:
            pass
        elif atom in _DEGREES:
            if value is None or degrees:
                return None
            degrees = True
        elif atom in (":", "="):
            if value is not None:
                return None
        elif atom in (".", ",", "!", ";"):
            if before in (".", ",", "!", ";", "") or (atom == "," and after[:1].isdecimal() and not before.isalpha()):
                return None
        elif atom not in _OF_ANGLE and not (atom == "right" and before == "the"):
            if after != "=" or not (atom == "theta" or _is_letter(atom)):
                return None
        i += 1
    if value is None or (sign < 0 and direction):
        return None
    turns = (sign or 1) * (direction * DIRECTIONS[asked] if direction else 1)
    return turns * value % 360


def _direction(found, i):
    """(1 clockwise, -1 counter-clockwise, 0 neither; place of the last word that says it)."""
    if found[i] in _CLOCKWISE:
        return _CLOCKWISE[found[i]], i
    if found[i] in ("counter", "anti"):
        end = i + 2 if found[i + 1 : i + 2] == ["-"] else i + 1
        if found[end : end + 1] == ["clockwise"]:
            return -1, end
    if found[i : i + 2] == ["to", "the"] and found[i + 2 : i + 3] in (["left"], ["right"]):
        return (-1 if found[i + 2] == "left" else 1), i + 2
    return 0, i


def sequence(content) -> tuple | None:
    r"""Integers in reading order: separated by commas, spaces, arrows, dashes or "and", each with "tile" before it or
    not, in brackets or not; or a grid by its rows, which are of one length: nested lists, "\\", ";", matrices, "Row
    1:"."""
    found = _read(content)
    if not found or _pairs(found) is None:
        return None
    found = [atom.lower() for atom in found]
    last = max((i for i, atom in enumerate(found) if atom[0].isdecimal()), default=0)
    rows, gap, dashes, broken, semicolons, i = [[]], "", 0, False, False, 0
    while i < len(found):
        atom, before = found[i], found[i - 1] if i else ""
        entries = bool(rows[0])
        if atom in ("row", "line") and found[i + 2 : i + 3] == [":"] and found[i + 1].isdecimal():
            if found[i + 1] != str(len([row for row in rows if row]) + 1):
                return None
            broken, gap, i = entries, "", i + 2
        elif atom[0].isdecimal() and atom.isascii():
            if len(atom) > _DIGITS or "." in atom:
                return None
            if broken:
                rows.append([])
            rows[-1].append(int(atom))
            broken, gap = False, ""
        elif atom in ("-", "→"):
            if gap or not entries or broken:
                return None
            gap, dashes = "-", dashes + 1
        elif atom in (",", "&", "|"):
            if gap or (not entries and atom == ","):
                return None
            gap = atom if entries else ""
        elif atom in ("and", "then") and entries and gap in ("", ","):
            gap = "and"
        elif atom == "\n":
            gap = "" if gap == "|" else gap
        elif atom in ("\\\\", ";"):
            if gap not in ("", ",", "|") or not entries:
                return None
            broken, gap, semicolons = True, "", semicolons or atom == ";"
        elif atom in _CLOSING or atom in _CLOSING.values():
            broken = broken or entries
        elif atom in (":", "="):
            if entries:
                return None
        elif atom in (".", "!"):
            if gap or before in (".", "!") or i < last:
                return None
        elif atom in _ENTRY:
            pass
        elif atom not in (("in", "reading", "order") if entries else _OF_LIST):
            return None
        i += 1
    count = sum(map(len, rows))
    if not count or gap in ("-", "and", "&") or len({len(row) for row in rows}) > 1 or (dashes and dashes != count - 1):
        return None
    if semicolons and len(rows[0]) == 1:
        return None
    return tuple(value for row in rows for value in row)


def words(content) -> str | None:
    """The words of a box in lower case with one blank between them, without what dresses them, brackets and quotation
    marks around them all, and a full stop at their end."""
    if len(content) > LONGEST:
        return None
    text = " ".join(plain(content).casefold().split())
    while True:
        before = text
        text = text.rstrip(".!, ").strip()
        if len(text) > 1 and _AROUND.get(text[0]) == text[-1] and text[0] not in text[1:-1]:
            text = text[1:-1]
        if text == before:
            return text or None


def quantity(content) -> int | float | None:
    """A number that stands alone, after words that say no more than that it comes: with sign, commas between thousands,
    decimals or a power of ten (1.5e3)."""
    text = _after_first(content)
    found = _PLAIN_NUMBER.fullmatch(text) if text and len(text) <= _LONGEST_NUMBER else None
    if not found or not (found[2] or found[3]):
        return None
    value = float(text.replace(",", "").replace(" ", ""))
    if value in (float("inf"), float("-inf")):
        return None
    return int(value) if value.is_integer() else value


def yes_or_no(content) -> str | None:
    text = _after_first(content)
    return text if text in ("yes", "no") else None


def _after_first(content) -> str | None:
    text = words(content)
    return words(text[_FIRST.match(text).end() :]) if text and _FIRST.match(text) else text
