r"""Questions in words. `<image>` stands where each canvas goes, in order; six paraphrases a puzzle, chosen by the puzzle's key.

Imports nothing but Python, so that other pipelines can use it without torch. Templates are filled by `str.format`:
{image} is one canvas; {tiles} and {candidates} are the labelled canvases; the rest are the puzzle's own slots.
"""

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

QUESTIONS = {
    "rotation": (
        "{image}\nThis picture was turned {direction} by 0, 90, 180 or 270 degrees. By how many?",
        "{image}\nBy how many degrees (0, 90, 180 or 270) has this photo been rotated {direction}?",
        "Look at the picture. {image}\nSomebody rotated it {direction}. Was it by 0, 90, 180 or 270 degrees?",
        "{image}\nStarting upright, this image was rotated {direction}: by 0, 90, 180 or 270 degrees?",
        "An upright photo was turned {direction} and became this: {image}\nName the angle: 0, 90, 180 or 270.",
        "{image}\nWhich turn {direction} leads from the upright scene to this view: 0, 90, 180 or 270 degrees?",
    ),
    "rotation_pair": (
        "{image}{image}\nThe second picture is the first one turned {direction} by 0, 90, 180 or 270 degrees. By how many?",
        "Upright: {image} Turned: {image}\nBy how many degrees {direction}: 0, 90, 180 or 270?",
        "{image}\nThe picture above was rotated {direction} and became this one:\n{image}\nBy 0, 90, 180 or 270 degrees?",
        "{image}{image}\nHow far {direction} must the first image be turned to give the second: 0, 90, 180 or 270 degrees?",
        "Compare the two pictures. {image}{image}\nThe second was rotated {direction} by 0, 90, 180 or 270 degrees; which?",
        "{image} was rotated {direction} into {image}\nName the angle: 0, 90, 180 or 270.",
    ),
    "ordering": (
        "{tiles}\nThese tiles were cut from one picture of {rows} rows and {columns} columns. For each place in reading order, give the number of its tile.",
        "{tiles}\nOne image was cut into a {rows} by {columns} grid (rows by columns) and shuffled. List the tile numbers in reading order.",
        "A picture was cut into {count} tiles.\n{tiles}\nIt had {rows} rows and {columns} columns. Which tile goes where? List tile numbers, left to right, top to bottom.",
        "{tiles}\nPut the tiles back into {rows} rows and {columns} columns. Give the tile numbers row by row.",
        "Solve the jigsaw: {rows} rows, {columns} columns.\n{tiles}\nAnswer with the tile numbers in reading order.",
        "{tiles}\nThe {count} tiles form a {rows} by {columns} picture. Name the tile of each place, from the top left to the bottom right.",
    ),
    "similarity": (
        "Reference: {image}\n{candidates}\nWhich candidate shows the same scene as the reference?",
        "{image}\nThis view and one of the following were taken from the same picture.\n{candidates}\nWhich one?",
        "Find the other view of this image: {image}\n{candidates}\nGive its letter.",
        "{image}\nOnly one of these {count} comes from the image above.\n{candidates}\nWhich letter?",
        "Compare the first picture with the candidates. {image}\n{candidates}\nWhich is another view of it?",
        "First view: {image}\n{candidates}\nPick the letter of the view that belongs to the same image.",
    ),
}


def question(name, level, readings, canvases, choose, thinking, wordings=None):
    """The question of one puzzle and its answer.

    name, level: the puzzle's; readings: as in `Puzzle`; canvases: how many it shows; choose(n): a keyed integer in [0, n);
    thinking: ask for <think></think> first; wordings: use only the first so many, plainest first (default: all, every
    paraphrase with every reading).
    """
    templates = QUESTIONS["rotation_pair" if (name, level) == ("rotation", 1) else name]
    asked = [(template, reading) for reading in readings for template in templates][:wordings]
    closings = (THINKING if thinking else DIRECT)[:wordings]
    template, (slots, answer) = asked[choose(len(asked))]
    text = template.format(
        **slots,
        image="<image>",
        tiles="\n".join(f"{i + 1}: <image>" for i in range(canvases)),
        candidates="\n".join(f"{letter}: <image>" for letter in "ABCDEFGH"[: canvases - 1]),
    )
    return f"{text}\n{closings[choose(len(closings))]}", answer
