"""Look at the puzzles that a folder of images gives.

python -m sslr1.preview FOLDER [--out DIR] [--puzzle NAME …] [--level 1 …] [--count 2] [--seed 0] [--html]

One PNG contact sheet a puzzle, every level asked for on it, each with its question and answer; --html adds a page of
them.
"""

import argparse
import base64
import html
import io
import textwrap
from itertools import islice
from pathlib import Path

import torch

from sslr1 import ops, puzzles
from sslr1.data import Decoder, ImageFolder, ImageStore, Pool
from sslr1.errors import UserError
from sslr1.puzzles import sheet
from sslr1.puzzles.series import decidable
from sslr1.setup import processors

WIDTH = 1200  # px of a contact sheet
TALLEST = 380  # px of one puzzle on it


def images(folder, min_side=252) -> ImageStore:
    """What puzzles are cut from. Raises UserError as `ImageFolder.scan` does."""
    return ImageStore(ImageFolder.scan(folder), Decoder(max_side=768), min_side)


def examples(store, name, level, count, seed, spec=None):
    """`count` decidable puzzles of one kind from a store's images: a list of (uint8 [H, W, 3] picture of all its
    canvases, question, Answer, chance). Raises UserError if there are too few images for them."""
    spec = spec or ops.PatchSpec(max_pixels=640 * 640)
    pool = Pool(store, list(range(len(store.folder))))
    order = ops.generator("preview", seed).permutation(len(pool)).tolist()
    addresses = (puzzles.Address(name, level, seed, 0, 0, number) for number in order)
    made = decidable(lambda number: store.pictures([number])[0], addresses, puzzles.Form(spec=spec), pool)
    found = [(picture(puzzle), puzzle.question, puzzle.answer, puzzle.chance) for puzzle in islice(made, count)]
    if len(found) < count:
        raise UserError(
            f"{str(store.folder.root)!r} gives {len(found)} {name} puzzles of level {level}, not {count}{store.complaint()}"
        )
    return found


def picture(puzzle):
    """All canvases of a puzzle side by side, as they are rendered, with their marks; uint8 [H, W, 3]."""
    plan = puzzle.plan
    if len(puzzle.marks) > 1:
        unbounded = ops.PatchSpec(min_pixels=1, max_pixels=1 << 40)
        plan = sheet.compose(plan, puzzle.marks, puzzle.sheet, unbounded)
    return ops.render(puzzle.images, plan)[0]


def contact_sheet(rows):
    """A PIL image of rows (caption, examples)."""
    from PIL import Image, ImageDraw, ImageFont

    font, bold = ImageFont.load_default(15), ImageFont.load_default(20)
    blocks = []
    for caption, found in rows:
        blocks.append((caption, None, None))
        blocks += [(None, image, _words(question, answer, chance)) for image, question, answer, chance in found]
    placed, y = [], 10
    for caption, image, words in blocks:
        if caption:
            placed.append((y, caption, None, None))
            y += 34
            continue
        shown = Image.fromarray(image.numpy())
        scale = min(TALLEST / shown.height, 0.62 * WIDTH / shown.width, 1.0)
        shown = shown.resize((round(shown.width * scale), round(shown.height * scale)), Image.Resampling.LANCZOS)
        lines = [line for part in words for line in textwrap.wrap(part, (WIDTH - shown.width - 40) // 8) or [""]]
        placed.append((y, None, shown, "\n".join(lines)))
        y += max(shown.height, 19 * len(lines)) + 16
    out = Image.new("RGB", (WIDTH, y), "white")
    pen = ImageDraw.Draw(out)
    for y, caption, shown, text in placed:
        if caption:
            pen.text((10, y), caption, "black", bold)
        else:
            out.paste(shown, (10, y))
            pen.text((shown.width + 24, y), text, "black", font)
    return out


def _words(question, answer, chance):
    return [
        *question.replace("<image>", "[image]").split("\n"),
        "",
        f"answer: {answer.text}    chance: 1 in {round(1 / chance):,}",
    ]


def page(sheets):
    """One self-contained HTML page from {puzzle: rows}."""
    from PIL import Image

    parts = [
        "<!doctype html><meta charset=utf-8><title>SSL-R1 puzzles</title><style>body{font:15px sans-serif;margin:2em}"
    ]
    parts.append("figure{display:flex;gap:1.5em;margin:1.5em 0}img{max-width:60%;height:auto;align-self:start}</style>")
    for name, rows in sheets.items():
        parts.append(f"<h1>{html.escape(name)}</h1>")
        for caption, found in rows:
            parts.append(f"<h2>{html.escape(caption)}</h2>")
            for image, question, answer, chance in found:
                png = io.BytesIO()
                Image.fromarray(image.numpy()).save(png, "PNG")
                words = "<br>".join(map(html.escape, _words(question, answer, chance)))
                code = base64.b64encode(png.getvalue()).decode()
                parts.append(
                    f"<figure><img src='data:image/png;base64,{code}'><figcaption>{words}</figcaption></figure>"
                )
    return "\n".join(parts)


def main():
    parser = argparse.ArgumentParser(prog="python -m sslr1.preview", description="Contact sheets of puzzles.")
    parser.add_argument("folder", help="a folder of images")
    parser.add_argument("--out", default="preview", help="folder for the PNG files (default: preview)")
    parser.add_argument("--puzzle", nargs="+", choices=puzzles.NAMES, default=puzzles.NAMES)
    parser.add_argument("--level", nargs="+", type=int, choices=(1, 2, 3, 4), default=(1, 2, 3, 4))
    parser.add_argument("--count", type=int, default=2, help="puzzles of each level")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--min-side", type=int, default=252, help="images whose shorter side is under this many px are passed over"
    )
    parser.add_argument("--html", action="store_true", help="also write index.html")
    arguments = parser.parse_args()
    out = Path(arguments.out)
    torch.set_num_threads(processors.threads())
    try:
        store = images(arguments.folder, arguments.min_side)
        if store.folder.about:
            print(f"{arguments.folder}: {store.folder.about}")
        sheets = {
            name: [
                (
                    f"{name}, level {level}: {puzzles.describe(name, level)}",
                    examples(store, name, level, arguments.count, arguments.seed),
                )
                for level in arguments.level
            ]
            for name in arguments.puzzle
        }
    except (UserError, ValueError) as error:
        raise SystemExit(f"sslr1.preview: {error}") from None
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
