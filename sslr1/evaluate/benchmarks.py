"""Benchmarks in VLMEvalKit's TSV form: read, checked cell by cell before any model is loaded, and put as prompts.

Columns: index; image (base64, or the index of a row that shows the same, or a list of such) or image_path (relative to
the file's folder, or a list); question; A, B, … where it is multiple choice; answer (a letter, else Yes or No); and,
where there are any, hint and context, which go before the question, and category, l2-category and split, by which
results are told apart. Rows that show no picture are left out and counted. Rows that VLMEvalKit added for its circular
evaluation (index + k·10^6, the same options rotated) are left out: `asked` rotates.

Pictures stand before the text, in their order, or where the text says <image>, or <image 1>, <image 2> …
"""

import ast
import base64
import csv
import json
import re
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from string import ascii_uppercase

from PIL import Image

from sslr1 import model
from sslr1.data.decode import decoded
from sslr1.errors import UserError
from sslr1.evaluate.logs import gather
from sslr1.evaluate.scoring import LABELS, read_answer
from sslr1.model.packing import IMAGE_PAD
from sslr1.puzzles.prompts import THINKING

MAX_PIXELS = 12_845_056  # of the protocol: of all pictures of a question together
# Prompts that are answered at once: so many, and so many patches if all were the largest
CHUNK, CHUNK_PATCHES = 64, 1 << 18
REFERENCE = 64  # characters: an image cell up to this long is the index of another row, as in VLMEvalKit
EMPTY = "nan NaN NA N/A n/a null NULL None <NA> #N/A".split()
ROTATION = 10**6
LETTER = "Answer with the option letter directly."
YES_OR_NO = "Answer Yes or No directly."
_PLACE = re.compile(r"<image(?: (\d+))?>")


@dataclass(frozen=True)
class Row:
    """A question. options: texts, A first, empty for a yes-or-no question; answer: a letter, "yes" or "no"; images:
    base64 strings and paths; labels: by column. `rotation` options were moved from the front to the back."""

    index: str
    question: str
    options: tuple
    answer: str
    images: tuple
    labels: dict
    rotation: int = 0

    @property
    def chance(self) -> float:
        return 1 / (len(self.options) or 2)


class Rows(list):
    """Rows of a file. without_picture: how many more it has that show none, which VLMEvalKit leaves out too."""

    without_picture = 0


def read(path) -> Rows:
    """All rows that show a picture. Raises UserError, which names the file, the row (1 is the first below the header)
    and the column, for whatever is missing, empty, twice there or contradictory. Images are looked at by
    `check_images`."""
    path = Path(path)
    header, *cells = _cells(path)
    for column, count in Counter(header).items():
        if count > 1:
            raise UserError(f"{path}: column {column} is there {count} times")
    for column in ("index", "question", "answer"):
        if column not in header:
            raise UserError(f"{path}: column {column} is missing; it has {', '.join(header)}")
    if not {"image", "image_path"} & set(header):
        raise UserError(f"{path}: column image (or image_path) is missing; it has {', '.join(header)}")
    table, without = {}, 0
    for number, values in enumerate(cells, 1):
        if len(values) != len(header):
            raise UserError(f"{path}, row {number}: {len(values)} cells, but the header has {len(header)}")
        row = dict(zip(header, values))
        if not any(_cell(row, column) for column in ("image", "image_path")):
            without += 1
            continue
        for column in ("index", "question", "answer"):
            if not row[column].strip():
                raise UserError(f"{path}, row {number}, column {column}: empty")
        row["index"] = row["index"].strip()
        if row["index"] in table:
            raise UserError(f"{path}, row {number}, column index: {row['index']!r} is there already")
        table[row["index"]] = {**row, "where": f"{path}, row {number}"}
    if not table:
        none = f"none of its {without} rows has a picture" if without else "no rows below the header"
        raise UserError(f"{path}: {none}")
    rows = Rows(_row(row, table, path.parent) for row in table.values() if not _is_rotation(row, table))
    rows.without_picture = without
    return rows


def _cell(row, column):
    """A cell that names pictures; empty for what VLMEvalKit's reader, pandas, takes for an empty one."""
    cell = row.get(column, "").strip()
    return "" if cell in EMPTY else cell


def _cells(path):
    limit = csv.field_size_limit(sys.maxsize)  # a cell may hold many megabytes of base64
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            cells = [values for values in csv.reader(file, delimiter="\t", strict=True) if values]
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except csv.Error as error:
        raise UserError(f"{path} is not a table with tabs between its cells: {error}") from None
    finally:
        csv.field_size_limit(limit)
    if not cells:
        raise UserError(f"{path} is empty")
    return cells


def _letters(row):
    return [letter for letter in ascii_uppercase if row.get(letter, "").strip()]


def _is_rotation(row, table):
    """Whether this is one of VLMEvalKit's rotations of another row."""
    if not row["index"].isdecimal() or int(row["index"]) < ROTATION:
        return False
    base = table.get(str(int(row["index"]) % ROTATION))
    return (
        base is not None
        and base["question"] == row["question"]
        and sorted(base[letter] for letter in _letters(base)) == sorted(row[letter] for letter in _letters(row))
    )


def _row(row, table, folder):
    where, letters = row["where"], _letters(row)
    if letters != list(ascii_uppercase[: len(letters)]):
        gap = next(letter for letter in ascii_uppercase if letter not in letters)
        raise UserError(f"{where}, column {gap}: empty, though there is an option {letters[-1]}")
    if len(letters) == 1:
        raise UserError(f"{where}, column B: empty, though there is an option A")
    answer = row["answer"].strip()
    allowed = letters or ["Yes", "No"]
    if answer.lower() not in [a.lower() for a in allowed]:
        raise UserError(f"{where}, column answer: {answer!r} is not one of {', '.join(allowed)}")
    texts = [row["question"], *(row[letter] for letter in letters)]
    for column, opening in (("hint", "Hint: "), ("context", "")):
        if row.get(column, "").strip():
            texts[0] = f"{opening}{row[column]}\n{texts[0]}"
    images = _images(row, table, folder)
    texts = _numbered(texts, ["question", *letters], len(images), where)
    labels = {label: row[label] for label in LABELS if label in row}
    answer = answer.upper() if letters else answer.lower()
    return Row(row["index"], texts[0], tuple(texts[1:]), answer, images, labels)


def _numbered(texts, columns, images, where):
    """The texts with every <image> as <image k>, so that options can be rotated and keep theirs."""
    bare = sum(text.count("<image>") for text in texts)
    for text, column in zip(texts, columns):
        if IMAGE_PAD in text:
            raise UserError(
                f"{where}, column {column}: {IMAGE_PAD} is the model's own mark; write <image> for a picture"
            )
        for place in _PLACE.findall(text):
            if (bare and bare != images) or (place and not 1 <= int(place) <= images):
                mark = f"<image {place}>" if place else f"<image>, of {bare},"
                raise UserError(f"{where}, column {column}: {mark} does not fit the row's pictures, which are {images}")
    count = iter(range(1, bare + 1))
    return [_PLACE.sub(lambda m: f"<image {m[1] or next(count)}>", text) for text in texts]


def _images(row, table, folder):
    column = "image" if _cell(row, "image") else "image_path"
    where = f"{row['where']}, column {column}"
    if column == "image":
        return tuple(_pictures(row, table, where, [row["index"]]))
    found = [folder / name for name in _listed(row[column], where)]
    for path in found:
        if not path.is_file():
            raise UserError(f"{where}: {path} is not a file")
    return tuple(found)


def _pictures(row, table, where, through):
    """The base64 strings of a row's image cell, those of other rows that it names by index included. through: the
    indices that led here."""
    for image in _listed(row["image"], f"{row['where']}, column image"):
        if len(image) > REFERENCE:
            yield image
            continue
        other = table.get(image)
        if image in through:
            raise UserError(f"{where}: it leads round to row {image!r} again")
        if other is None:
            raise UserError(f"{where}: {image!r} is neither base64 nor the index of another row with a picture")
        if not _cell(other, "image"):
            raise UserError(f"{where}: row {image!r} has no picture in its column image")
        yield from _pictures(other, table, where, [*through, image])


def _listed(cell, where):
    """A cell's strings: itself, or those of the list that it is (in JSON's or Python's form)."""
    cell = cell.strip()
    values = [cell]
    if cell.startswith("[") and cell.endswith("]"):
        try:
            values = json.loads(cell)
        except ValueError:
            try:
                values = ast.literal_eval(cell)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                raise UserError(f"{where}: starts with [ but is not a list of strings") from None
    if not values or not all(isinstance(value, str) for value in values):
        raise UserError(f"{where}: not a list of strings")
    if not all(value.strip() for value in values):
        raise UserError(f"{where}: empty")
    return [value.strip() for value in values]


def decode(source) -> Image.Image:
    """An image in RGB from base64 or a path, decoded as training decodes. Raises OSError or ValueError."""
    if isinstance(source, Path):
        data = source.read_bytes()
    else:
        text = source.partition(",")[2] if source.startswith("data:") else source
        data = base64.b64decode("".join(text.split()), validate=True)
    image = Image.fromarray(decoded(data))
    if max(image.size) > 200 * min(image.size):
        raise ValueError(f"{image.width}x{image.height} px is longer than the model takes, 200 times its width")
    return image


def check_images(rows, path, threads=1) -> None:
    """Decode every image of the rows. Raises UserError for the first that can't be."""

    def complaint(item):
        index, source = item
        try:
            decode(source)
        except Exception as error:  # what a broken file makes a decoder raise is not to be foreseen
            what = "image_path" if isinstance(source, Path) else "image"
            why = " ".join(str(error).split())[:200]
            return f"{path}, row with index {index!r}, column {what}: can't be decoded: {why}"

    first = {}  # an image that rows share is decoded once
    for row in rows:
        for source in row.images:
            first.setdefault(source, row.index)
    with ThreadPoolExecutor(threads) as pool:
        for problem in pool.map(complaint, ((index, source) for source, index in first.items())):
            if problem:
                raise UserError(problem)


def asked(rows, circular=False) -> list[Row]:
    """The questions to put: each row, and with `circular` every rotation of its options after it."""
    return [rotated(row, k) for row in rows for k in range(len(row.options) if circular and row.options else 1)]


def rotated(row, k) -> Row:
    """The row with its options moved k places forward, so that A is what was the k-th after it, and its answer's
    letter too."""
    if k == 0:
        return row
    at = ascii_uppercase.index(row.answer)
    options = row.options[k:] + row.options[:k]
    return replace(row, options=options, answer=ascii_uppercase[(at - k) % len(options)], rotation=k)


def question(row, thinking=False) -> tuple[str, list]:
    """(text with `<image>` where each picture goes, numbers of these pictures from 0). The wording of the direct form
    is the protocol's: the question, a line an option, and what to answer with."""
    lines = [row.question, *(f"{letter}. {option}" for letter, option in zip(ascii_uppercase, row.options))]
    if thinking:
        lines.append(("Answer with the option letter. " if row.options else "Answer Yes or No. ") + THINKING[0])
    elif row.options or "yes or no" not in row.question.lower():
        lines.append(LETTER if row.options else YES_OR_NO)
    text = "\n".join(lines)
    placed = [int(k) - 1 for k in _PLACE.findall(text)]
    first = [k for k in range(len(row.images)) if k not in placed]
    return "<image>\n" * len(first) + _PLACE.sub("<image>", text), first + placed


def image_processor(spec, max_pixels=MAX_PIXELS):
    """transformers' own image processor for a model's PatchSpec: a function of the pictures of a question, among which
    max_pixels are shared evenly, to (pixel_values of spec.dtype, image_grid_thw)."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(
        patch_size=spec.patch,
        merge_size=spec.merge,
        temporal_patch_size=spec.temporal,
        image_mean=list(spec.mean),
        image_std=list(spec.std),
        size={"shortest_edge": spec.min_pixels, "longest_edge": max_pixels},
    )

    def process(images):
        size = {"shortest_edge": spec.min_pixels, "longest_edge": round(max_pixels / len(images))}
        made = processor(images, size=size, return_tensors="pt")
        return made["pixel_values"].to(spec.dtype), made["image_grid_thw"]

    return process


def prompt(row, tokenizer, merge, process, thinking=False) -> model.Prompt:
    """What the model is given. process: `image_processor`'s function; merge: the PatchSpec's."""
    text, places = question(row, thinking)
    pixel_values, grids = process([decode(row.images[k]) for k in places])
    return model.prompt(text, pixel_values, grids, tokenizer, merge, thinking)


def record(row, form, sample, opening="") -> dict:
    """A line of the log: what was asked, answered and read, and whether it is right. opening: what the chat template
    has written of every answer."""
    extracted = read_answer(opening + sample.text, row.options)
    return {
        "index": row.index,
        "rotation": row.rotation,
        "form": form,
        **row.labels,
        "question": question(row, form == "thinking")[0],
        "answer": row.answer,
        "completion": sample.text,
        "finish": sample.finish,
        "extracted": extracted,
        "score": float(extracted == row.answer),
        "chance": row.chance,
    }


def ask_benchmark(session, asked, form, max_pixels, max_tokens, report) -> list:
    """A line of the log for each of `asked` rows, over all ranks. report(done): how many of this rank's are
    answered."""
    world, spec = session.world, session.spec
    process = image_processor(spec, max_pixels)
    opening = model.opening(session.tokenizer, form == "thinking")
    own, prompts, records = asked[world.rank :: world.size], [], []

    def answer():
        groups = session.engine.generate(prompts, group_size=1, temperature=0, max_tokens=max_tokens)
        rows = own[len(records) :]
        records.extend(record(row, form, group.samples[0], opening) for row, group in zip(rows, groups))
        prompts.clear()
        report(len(records))

    for row in own:
        question = prompt(row, session.tokenizer, spec.merge, process, form == "thinking")
        largest = max(len(p.pixel_values) for p in [*prompts, question])
        if len(prompts) == CHUNK or (prompts and largest * (len(prompts) + 1) > CHUNK_PATCHES):
            answer()
        prompts.append(question)
    if prompts:
        answer()
    return gather(records)
