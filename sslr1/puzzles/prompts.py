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
        "{image}\nThis picture was turned {direction} by {angles} degrees. By how many?",
        "{image}\nBy how many degrees ({angles}) has this photo been rotated {direction}?",
        "Look at the picture. {image}\nSomebody rotated it {direction}. Was it by {angles} degrees?",
        "{image}\nStarting upright, this image was rotated {direction}: by {angles} degrees?",
        "An upright photo was turned {direction} and became this: {image}\nName the angle: {angles}.",
        "{image}\nWhich turn {direction} leads from the upright scene to this view: {angles} degrees?",
    ),
    "rotation_pair": (
        "{image}{image}\nThe second picture is the first one turned {direction} by {angles} degrees. By how many?",
        "Upright: {image} Turned: {image}\nBy how many degrees {direction}: {angles}?",
        "{image}\nThat picture was rotated {direction} and became this one:\n{image}\nBy {angles} degrees?",
        "{image}{image}\nHow far {direction} must the first image be turned to give the second: {angles} degrees?",
        "Compare the two pictures. {image}{image}\nThe second was rotated {direction} by {angles} degrees; which?",
        "{image} was rotated {direction} into {image}\nName the angle: {angles}.",
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
        "{image}\nOnly one of these {count} comes from the same image as that one.\n{candidates}\nWhich letter?",
        "Compare the first picture with the candidates. {image}\n{candidates}\nWhich is another view of it?",
        "First view: {image}\n{candidates}\nPick the letter of the view that belongs to the same image.",
    ),
    "inpainting": (
        "{image}\nA square was cut out of this picture and is shown grey.\n{candidates}\nWhich patch fills the hole?",
        "Picture with a grey hole: {image}\n{candidates}\nOne of these patches was there. Which?",
        "{image}\nWhat belongs where the grey square is?\n{candidates}\nGive the letter of the patch.",
        "The grey square hides a part of this image. {image}\n{candidates}\nPick the letter of the part it hides.",
        "{image}\nExactly one of {count} patches completes the picture without a flaw.\n{candidates}\nWhich letter?",
        "Complete the image: {image}\n{candidates}\nWhich patch goes into the grey square, unchanged?",
    ),
    "correspondence": (
        "{image}{image}\nThe ring REF in the first view marks a point. Which lettered ring in the second view marks the same point?",
        "View 1: {image}\nView 2: {image}\nWhich of the {count} letters in view 2 is at the place that REF marks in view 1?",
        "Both images show one scene. {image}{image}\nFind the point marked REF again: which letter is it in the second image?",
        "{image}\nREF marks a spot here. In the next view, {count} spots are marked.\n{image}\nGive the letter of the same spot.",
        "First: {image} Second: {image}\nMatch the point REF of the first picture to one of the lettered points of the second.",
        "{image}{image}\nThe camera moved between the two pictures. Where did REF go? Answer with its letter.",
    ),
}

SHEETS = (
    "The next picture is a sheet of several pictures with their marks. {sheet}",
    "Several marked pictures are laid out on one sheet: {sheet}",
    "{sheet}\nThis sheet holds several pictures; each has its mark above it.",
)


def question(name, level, readings, marks, choose, thinking, wordings=None, sheet=False):
    """The question of one puzzle and its answer.

    name, level: the puzzle's; readings: as in `Puzzle`; marks: the name of each of its canvases; choose(n): a keyed integer
    in [0, n); thinking: ask for <think></think> first; wordings: use only the first so many, plainest first (default: all,
    every paraphrase with every reading); sheet: the canvases are on one picture, and are referred to by their marks.
    """
    templates = QUESTIONS["rotation_pair" if (name, level) == ("rotation", 1) else name]
    asked = [(template, reading) for reading in readings for template in templates][:wordings]
    closings = (THINKING if thinking else DIRECT)[:wordings]
    template, (slots, answer) = asked[choose(len(asked))]
    lettered = [mark for mark in marks if mark in "ABCDEFGH"]
    slots = {**slots, "image": "<image>"}
    slots["tiles"] = "\n".join(f"{mark}: <image>" for mark in marks)
    slots["candidates"] = "\n".join(f"{mark}: <image>" for mark in lettered)
    opening = ""
    if sheet:
        opening = SHEETS[:wordings][choose(len(SHEETS[:wordings]))].format(sheet="<image>") + "\n"
        slots["tiles"] = f"(tiles {marks[0]} to {marks[-1]})"
        slots["candidates"] = f"(candidates {lettered[0]} to {lettered[-1]})" if lettered else ""
        for mark in marks:
            if mark not in lettered:
                template = template.replace("{image}", f"(picture {mark})", 1)
    return f"{opening}{template.format(**slots)}\n{closings[choose(len(closings))]}", answer
