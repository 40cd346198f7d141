"""Look at the puzzles that a folder of images gives.

python -m sslr1.preview FOLDER [--out DIR] [--puzzle NAME …] [--level 1 …] [--count 2] [--seed 0] [--html]

One PNG contact sheet a puzzle, every level asked for on it, each with its question and answer; --html adds a quiz of
them: can you solve it?
"""

import io
import sys
import textwrap
from collections import Counter
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from sslr1 import ops, puzzles
from sslr1.__main__ import parsed
from sslr1.data import ImageStore, Pool
from sslr1.errors import UserError
from sslr1.puzzles import sheet
from sslr1.report.layout import render
from sslr1.report.samples import data_uri
from sslr1.runs.samples import write_strip
from sslr1.setup import processors

WIDTH = 1200  # px of a contact sheet
TALLEST = 380  # px of one puzzle on it
MOST_PIXELS, FEWEST_PIXELS = 400_000, 60_000  # of one puzzle's pictures together in the quiz: as its page has room
PAGE_BYTES, WORDS_BYTES = 4_700_000, 1000  # of its puzzles, and of what one has beside its pictures


def examples(store, name, level, count, seed, shown=None) -> list:
    """`count` decidable Puzzles of one kind from a store's images, fewer where these make no more. Each is of another
    image as far as they last; then they serve again, for other puzzles. shown: a Counter of how often each image has
    served before, which is kept up to date: those that have served least come first."""
    shown = Counter() if shown is None else shown
    pool = Pool(store, list(range(len(store.folder))))
    order = ops.generator("preview", seed).permutation(len(pool)).tolist()
    form = puzzles.Form(spec=ops.PatchSpec(max_pixels=640 * 640))
    found = []
    for epoch in range(count):
        before = len(found)
        for number in sorted(order, key=lambda number: shown[number]):
            if len(found) == count:
                return found
            puzzle = _puzzle(store, puzzles.Address(name, level, seed, epoch, 0, number), form, pool)
            if puzzle:
                shown[number] += 1
                found.append(puzzle)
        if len(found) == before:
            break
    return found


def _puzzle(store, address, form, pool):
    """The puzzle of an address; None where its image is bad, or with the others can't decide it."""
    (image,) = store.pictures([address.index])
    try:
        puzzle = image and puzzles.puzzle_at(address, image, form, pool)
    except puzzles.PoolError:
        return None
    return puzzle if puzzle and puzzle.decidable else None


def made(store, names, levels, count, seed) -> tuple[dict, list]:
    """({puzzle: [(level, Puzzles)]}, a line for each kind of which there are fewer than `count`). Raises UserError
    where there are none at all."""
    shown, sheets, missing = Counter(), {}, []
    for name in names:
        for level in levels:
            found = examples(store, name, level, count, seed, shown)
            if found:
                sheets.setdefault(name, []).append((level, found))
            if len(found) < count:
                few = f"{len(found)} instead of {count}" if found else f"none of {count}"
                missing.append(
                    f"{name}, level {level}: {few}; these images, and what they can be set against, allow no more"
                )
    if not sheets:
        where = f"{str(store.folder.root)!r} gives none of the puzzles that were asked for"
        raise UserError(f"{where}{store.complaint()}")
    return sheets, missing


def picture(puzzle):
    """All canvases of a puzzle side by side, as they are rendered, with their marks, as a PIL image."""
    plan = puzzle.plan
    if len(puzzle.marks) > 1:
        unbounded = ops.PatchSpec(min_pixels=1, max_pixels=1 << 40)
        plan = sheet.compose(plan, puzzle.marks, puzzle.sheet, unbounded)
    return Image.fromarray(ops.render(puzzle.images, plan)[0].numpy())


def contact_sheet(rows):
    """A PIL image of rows (caption, Puzzles)."""
    font, bold = ImageFont.load_default(15), ImageFont.load_default(20)
    placed, y = [], 10
    for caption, found in rows:
        placed.append((y, None, caption))
        y += 34
        for puzzle in found:
            shown = picture(puzzle)
            scale = min(TALLEST / shown.height, 0.62 * WIDTH / shown.width, 1.0)
            shown = shown.resize((round(shown.width * scale), round(shown.height * scale)), Image.Resampling.LANCZOS)
            room = (WIDTH - shown.width - 40) // 8
            lines = [line for part in words(puzzle).split("\n") for line in textwrap.wrap(part, room) or [""]]
            placed.append((y, shown, "\n".join(lines)))
            y += max(shown.height, 19 * len(lines)) + 16
    out = Image.new("RGB", (WIDTH, y), "white")
    pen = ImageDraw.Draw(out)
    for y, shown, text in placed:
        if shown:
            out.paste(shown, (10, y))
            pen.text((shown.width + 24, y), text, "black", font)
        else:
            pen.text((10, y), text, "black", bold)
    return out


def caption(name, level) -> str:
    return f"{name}, level {level}: {puzzles.describe(name, level)}"


def words(puzzle) -> str:
    """What is asked, and the answer."""
    question = puzzle.question.replace("<image>", "[image]")
    return f"{question}\n\nanswer: {puzzle.answer.text}    chance: 1 in {round(1 / puzzle.chance):,}"


def page(sheets, store, remarks=()) -> str:
    """The quiz: one self-contained HTML page of {puzzle: [(level, Puzzles)]}, in which the answers are hidden until one
    is given, easier levels first. remarks: lines for its head."""
    asked = [(level, puzzle) for rows in sheets.values() for level, found in rows for puzzle in found]
    asked = [puzzle for _, puzzle in sorted(asked, key=lambda one: one[0])]
    strips = _strips([puzzle.render() for puzzle in asked])
    if len(strips) < len(asked):
        remarks = (
            *remarks,
            f"{len(strips)} of {len(asked)} puzzles, so that the page stays small: give a lower --count.",
        )
        asked = [asked[i * len(asked) // len(strips)] for i in range(len(strips))]
        strips = _strips([puzzle.render() for puzzle in asked])
    return render(
        "quiz.html",
        ("quiz",),
        folder=store.folder.root,
        images=len({puzzle.address.index for puzzle in asked}),
        remarks=remarks,
        data={"puzzles": [_asked(puzzle, *strip) for puzzle, strip in zip(asked, strips)]},
    )


def _strips(canvases) -> list:
    """(each puzzle's pictures as one in WebP, their sizes): as large as a page of them all may be, or of the first ones
    where they would be too small to be seen."""
    pixels = MOST_PIXELS
    while True:
        out = [_strip(some, pixels) for some in canvases]
        size = sum(len(picture) + WORDS_BYTES for picture, _ in out)
        if size <= PAGE_BYTES:
            return out
        if pixels == FEWEST_PIXELS:
            return out[: int(len(out) * PAGE_BYTES / size)]
        pixels = max(FEWEST_PIXELS, int(pixels * 0.9 * PAGE_BYTES / size))


def _strip(canvases, pixels):
    file = io.BytesIO()
    sizes = write_strip(file, canvases, pixels)
    return data_uri(file.getvalue()), sizes


def _asked(puzzle, picture, sizes) -> dict:
    """A puzzle as the page has it. options: what can be answered, of a sequence the entries; grid: rows and columns of
    its places; words: what a person needs of the question, and what the model is told beside it."""
    at, answer = puzzle.address, puzzle.answer
    out = {"puzzle": at.puzzle, "level": at.level, "about": puzzles.describe(at.puzzle, at.level)}
    out |= {"picture": picture, "sizes": sizes, "kind": answer.kind, "chance": puzzle.chance, "address": str(at)}
    out["question"], _, out["told"] = puzzle.question.rpartition("\n")
    if answer.kind == "sequence":
        places, rows = len(answer.value), len(puzzle.sheet)
        grid = [rows, places // rows] if rows and not places % rows else [1, places]
        return out | {"options": list(range(1, places + 1)), "answer": list(answer.value), "grid": grid}
    return out | {"options": list(answer.choices), "answer": answer.value}


def main():
    arguments = parsed("preview")
    out = Path(arguments.out)
    processors.collect_as_usual()
    torch.set_num_threads(processors.threads())
    try:
        store = ImageStore.scan(arguments.folder, arguments.min_side, fewest=1)
        if store.folder.about:
            print(f"{arguments.folder}: {store.folder.about}")
        sheets, missing = made(store, arguments.puzzle, arguments.level, arguments.count, arguments.seed)
    except (UserError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    for line in missing:
        print(line)
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in sheets.items():
        contact_sheet([(caption(name, level), found) for level, found in rows]).save(out / f"{name}.png")
        print(out / f"{name}.png")
    if store.bad:
        print(f"{arguments.folder}: {store.complaint().removeprefix('; ')}")
    if arguments.html:
        (out / "index.html").write_text(page(sheets, store, missing), encoding="utf-8")
        print(out / "index.html")


if __name__ == "__main__":
    main()
