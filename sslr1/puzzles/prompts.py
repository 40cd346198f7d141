r"""Questions in words: a puzzle's own templates, and what is said around them. `<image>` stands where each canvas goes,
in order.

Imports nothing but Python. Templates (`QUESTIONS` of each puzzle's file, six paraphrases or more) are filled by
`str.format`: {image} is one canvas; {tiles} and {candidates} are the labelled canvases; the rest are the puzzle's own
fields.
"""

LETTERS = "ABCDEFGH"  # of candidates
THINKING = (
    r"Think step by step inside <think></think>, then give the final answer once, in \boxed{}.",
    r"First reason inside <think></think>; after that write only the answer, in \boxed{}.",
    r"Put your reasoning between <think> and </think> and then the answer in \boxed{}.",
)
DIRECT = (
    r"Answer in \boxed{}.",
    r"Give only the answer, in \boxed{}.",
    r"Write the answer in \boxed{} and nothing else.",
)

SHEETS = (
    "The next picture is a sheet of several pictures with their marks. {sheet}",
    "Several marked pictures are laid out on one sheet: {sheet}",
    "{sheet}\nThis sheet holds several pictures; each has its mark above it.",
)


def every(ask):
    """What ask(choose) returns for each way in which it may choose, once."""
    chosen = [0]
    while chosen:
        sizes = []

        def choose(n):
            sizes.append(n)
            return chosen[len(sizes) - 1] if len(sizes) <= len(chosen) else 0

        yield ask(choose)
        chosen += [0] * (len(sizes) - len(chosen))
        while chosen and chosen[-1] + 1 == sizes[len(chosen) - 1]:
            chosen.pop()
        if chosen:
            chosen[-1] += 1


def question(templates, readings, marks, choose, thinking, wordings=None, sheet=False):
    """The question of one puzzle and its answer.

    templates: of the puzzle's level; readings: as in `Puzzle`; marks: the name of each of its canvases; choose(n): a
    keyed integer in [0, n); thinking: ask for <think></think> first; wordings: use only the first so many, plainest
    first (default: all, every paraphrase with every reading); sheet: the canvases are on one picture, and are referred
    to by their marks.
    """
    asked = [(template, reading) for reading in readings for template in templates][:wordings]
    closings = (THINKING if thinking else DIRECT)[:wordings]
    template, (fields, answer) = asked[choose(len(asked))]
    lettered = [mark for mark in marks if mark in LETTERS]
    fields = {**fields, "image": "<image>"}
    fields["tiles"] = "\n".join(f"{mark}: <image>" for mark in marks)
    fields["candidates"] = "\n".join(f"{mark}: <image>" for mark in lettered)
    opening = ""
    if sheet:
        opening = SHEETS[:wordings][choose(len(SHEETS[:wordings]))].format(sheet="<image>") + "\n"
        fields["tiles"] = f"(tiles {marks[0]} to {marks[-1]})"
        fields["candidates"] = f"(candidates {lettered[0]} to {lettered[-1]})" if lettered else ""
        for mark in marks:
            if mark not in lettered:
                template = template.replace("{image}", f"(picture {mark})", 1)
    return f"{opening}{template.format(**fields)}\n{closings[choose(len(closings))]}", answer
