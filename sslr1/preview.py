"""Look at the puzzles that a folder of images gives.

python -m sslr1.preview FOLDER [--out DIR] [--puzzle NAME …] [--level 1 …] [--count 2] [--seed 0] [--html]

One PNG contact sheet a puzzle, every level asked for on it, each with its question and answer; --html adds a page of
them.
"""

import base64
import io
import sys
import textwrap
from itertools import islice
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from sslr1 import ops, puzzles
from sslr1.__main__ import parsed
from sslr1.data import ImageStore, Pool
from sslr1.errors import UserError
from sslr1.puzzles import sheet
from sslr1.puzzles.series import decidable
from sslr1.report.page import template
from sslr1.setup import processors

WIDTH = 1200  # px of a contact sheet
TALLEST = 380  # px of one puzzle on it


def examples(store, name, level, count, seed) -> list:
    """`count` decidable Puzzles of one kind from a store's images. Raises UserError if there are too few images for
    them."""
    pool = Pool(store, list(range(len(store.folder))))
    order = ops.generator("preview", seed).permutation(len(pool)).tolist()
    addresses = (puzzles.Address(name, level, seed, 0, 0, number) for number in order)
    form = puzzles.Form(spec=ops.PatchSpec(max_pixels=640 * 640))
    found = list(islice(decidable(lambda number: store.pictures([number])[0], addresses, form, pool), count))
    if len(found) < count:
        gives = f"{str(store.folder.root)!r} gives {len(found)} {name} puzzles of level {level}"
        raise UserError(f"{gives}, not {count}{store.complaint()}")
    return found


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


def page(sheets) -> str:
    """One self-contained HTML page from {puzzle: rows}."""

    def source(puzzle):
        png = io.BytesIO()
        picture(puzzle).save(png, "PNG")
        return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"

    return template("preview.html").render(sheets=sheets, source=source, words=words)


def main():
    arguments = parsed("preview")
    out = Path(arguments.out)
    torch.set_num_threads(processors.threads())
    try:
        store = ImageStore.scan(arguments.folder, arguments.min_side)
        if store.folder.about:
            print(f"{arguments.folder}: {store.folder.about}")
        sheets = {
            name: [
                (caption(name, level), examples(store, name, level, arguments.count, arguments.seed))
                for level in arguments.level
            ]
            for name in arguments.puzzle
        }
    except (UserError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in sheets.items():
        contact_sheet(rows).save(out / f"{name}.png")
        print(out / f"{name}.png")
    if store.bad:
        print(f"{arguments.folder}: {store.complaint().removeprefix('; ')}")
    if arguments.html:
        (out / "index.html").write_text(page(sheets), encoding="utf-8")
        print(out / "index.html")


if __name__ == "__main__":
    main()
