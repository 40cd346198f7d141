r"""A written answer without its dress, whatever that is made of: characters of other widths and fonts, LaTeX, Markdown,
HTML, JSON and the commonest Chinese words become plain words, numbers and signs. Imports nothing but Python.

Nothing here raises on any string, and time is linear in its length.
"""

import re
import unicodedata

_SKIP = 24  # characters of what a LaTeX command is told in braces: a colour, a length, an array's columns

# --- characters -------------------------------------------------------------------------------------------------------

_INVISIBLE = "\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\ufe0e\ufe0f\ufeff"  # reordering marks are not among them
_SIGNS = {
    "-": "‐‑‒–−﹣－",
    " - ": "—―",
    " → ": "→⇒⟶⟹➔➜➡",
    ",": "、､",
    ".": "。｡",
    "°": "º˚",
    "”": "“”„‟«»‹›「」『』《》〈〉",
    "'": "‘’‚‛",
    "[": "【〔",
    "]": "】〕",
    "": _INVISIBLE + "✓✔✅☑",
    " clockwise ": "↻⟳",
    " counterclockwise ": "↺⟲",
}


class _Fold(dict):
    """For `str.translate`: characters of another width or font as plain ones, circled ones apart; powers and fractions
    are left, since 27⁰ is not 270."""

    def __missing__(self, code):
        if code < 128:
            return code
        char = chr(code)
        if unicodedata.category(char) == "Zs":
            return " "
        tag, _, _ = unicodedata.decomposition(char).partition(" ")
        if tag in ("<wide>", "<narrow>", "<font>"):
            return unicodedata.normalize("NFKC", char)
        return f" {unicodedata.normalize('NFKC', char)} " if tag == "<circle>" else code


_FOLD = _Fold({ord(char): sign for sign, chars in _SIGNS.items() for char in chars})


def folded(text) -> str:
    """Every character in its plainest form."""
    return text if text.isascii() else text.translate(_FOLD)


# --- words, numbers and signs -----------------------------------------------------------------------------------------

_TOKEN = re.compile(
    r"\\\\(?:\[-?[0-9.]{1,6} ?[a-z]{2}\])?"  # the end of a row
    r"|\\[A-Za-z]+(?:\*(?=\{))?|\\."
    r"|[A-Za-z]+(?:'[a-z]+)?|[0-9]+(?:\.[0-9]+)?|[\u3400-\u9fff]+"
    r"|</?[a-z]{1,10}\b[^<>]{0,40}>|~~|-{1,2}>|=>|-{3,}|\*+|_+|`+|[ \t\r\f\v]+|.",
    re.DOTALL,
)
_DRESS = frozenset(
    "text textbf textit textrm textsf texttt textnormal textup textmd textsc mathbf mathrm mathit mathsf mathtt "
    "mathcal mathbb mathfrak mathscr mathnormal mathop boldsymbol bold bm pmb emph underline operatorname mbox hbox "
    "fbox bf rm it sf tt bfseries itshape rmfamily ttfamily tiny small normalsize large Large LARGE huge Huge "
    "displaystyle textstyle scriptstyle left right middle big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl "
    "Biggr quad qquad enspace enskip thinspace medspace thickspace negthinspace hfill hline toprule midrule "
    "bottomrule centering noindent limits nolimits checkmark ensuremath ang SI qty unit num si".split()
)
_TOLD = frozenset("color textcolor hspace vspace kern mspace hskip".split())  # what is told is dropped as well
_NAMED = {
    "circ": "°", "degree": "°", "degrees": "°", "deg": "°", "textdegree": "°", "textsuperscript": "^", "to": "→",
    "rightarrow": "→", "Rightarrow": "→", "longrightarrow": "→", "Longrightarrow": "→", "lbrace": "{", "rbrace": "}",
    "lbrack": "[", "rbrack": "]", "langle": "⟨", "rangle": "⟩", "lparen": "(", "rparen": ")", "newline": "\\\\",
    "cr": "\\\\", "tabularnewline": "\\\\", "colon": ":", "minus": "-", "theta": "theta", "alpha": "theta",
    "beta": "theta", "phi": "theta", "varphi": "theta", "angle": "angle",
}  # fmt: skip
_ESCAPED = {"{": "{", "}": "}", "#": "#", "(": "", ")": "", "[": "", "]": "", "$": "", " ": "", "\n": "\n"}
_ESCAPED |= {space: "" for space in ",;:!>/"}
_GRIDS = frozenset(
    "matrix pmatrix bmatrix Bmatrix smallmatrix array tabular aligned align gathered split center".split()
)
_TAGS = frozenset("b strong i em u p span div answer code center font big small".split())
_CHINESE = {
    "顺时针": "clockwise", "順時針": "clockwise", "逆时针": "counterclockwise", "逆時針": "counterclockwise",
    "方向": "of", "旋转": "rotated", "旋轉": "rotated", "转": "rotated", "度": "degrees", "角度": "angle", "为": "is",
    "為": "is", "是": "is", "答案": "answer", "正确": "correct", "正確": "correct", "最终": "final", "最終": "final",
    "最后": "final", "应该": "is", "应": "is", "选项": "option", "選項": "option", "选择": "option", "選擇": "option",
    "选": "option", "選": "option", "候选": "option", "图": "image", "顺序": "order", "順序": "order", "排列": "order",
    "图块": "tile", "的": "of", "点": "point", "图片": "image", "我": "my", "和": "and",
}  # fmt: skip
_WORD = re.compile("|".join(sorted(_CHINESE, key=len, reverse=True)))


def atoms(text) -> tuple[list, bool]:
    r"""(words, numbers and signs of a folded text, with its white space; whether its Markdown is in pairs). What only
    dresses is dropped. Rows end with "\\"; "~~", a command or a tag that is not known stays and is nothing that an
    answer may hold."""
    out, marks = [], {}
    tokens = _Tokens(text)
    for token in tokens:
        first = token[0]
        if first == "\\" and len(token) > 1:
            out += _command(token, tokens)
        elif first in "*_`":
            if tokens.inside_a_word:
                out.append("*")
            else:
                marks[first] = marks.get(first, 0) + len(token)
        elif first == "<" and len(token) > 2:
            out.append(_tag(token))
        elif "\u3400" <= first <= "\u9fff":
            known = _WORD.findall(token)
            whole = sum(map(len, known)) == len(token)
            out += [part for word in known for part in (" ", _CHINESE[word])] + [" "] if whole else [token]
        elif first in " \t\r\f\v{}~$" and token != "~~":
            out.append(" ")
        elif token.startswith("---"):  # a dash, or the line below a table's head
            out.append("\n")
        elif token in ("->", "-->", "=>"):
            out.append("→")
        else:
            out.append(token)
    return [atom for atom in out if atom], all(count % 2 == 0 for count in marks.values())


class _Tokens:
    """Tokens of a text in order; a command may take those after it."""

    def __init__(self, text):
        self.text, self.at, self.start = text, 0, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.at >= len(self.text):
            raise StopIteration
        self.start, self.at = self.at, _TOKEN.match(self.text, self.at).end()
        return self.text[self.start : self.at]

    @property
    def inside_a_word(self) -> bool:
        return self.text[self.start - 1 : self.start].isalnum() and self.text[self.at : self.at + 1].isalnum()

    def take(self, opening="{", closing="}") -> str | None:
        """What stands in braces next, taken; None if that is nothing or long."""
        start = self.at
        while self.text[start : start + 1] == " " and start < self.at + _SKIP:
            start += 1
        end = self.text.find(closing, start, start + _SKIP)
        if self.text[start : start + 1] != opening or end < 0:
            return None
        self.at = end + 1
        return self.text[start + 1 : end]


def _command(token, tokens) -> list:
    name = token[1:].rstrip("*")
    if token.startswith("\\\\"):
        return ["\\\\"]
    if not name.isalpha():
        return [_ESCAPED.get(name, token)]
    if name in ("begin", "end"):
        of = (tokens.take() or "").rstrip("*")
        if name == "begin" and of in ("array", "tabular"):
            tokens.take()
        return ["[" if name == "begin" else "]"] if of in _GRIDS else [token]
    if name in _TOLD:
        tokens.take("[", "]")
        tokens.take()
        return [" "]
    if name in ("left", "right") and tokens.text[tokens.at : tokens.at + 1] == ".":
        tokens.at += 1
    return [" "] if name in _DRESS else [_NAMED.get(name, token)]


def _tag(token) -> str:
    name = re.match(r"</?([a-z]+)", token)[1]
    if name == "br":
        return "\n"
    if name in ("sup", "sub"):
        return "^" if token[1] != "/" else " "
    return " " if name in _TAGS else token


def plain(text) -> str:
    """The text without its dress, for reading prose: words, numbers, signs and white space."""
    return "".join(atoms(folded(text))[0]).replace("”", '"')
