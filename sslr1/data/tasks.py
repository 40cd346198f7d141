"""Questions of the user's own, as puzzles: a row's pictures, its question and its answer become one `Puzzle`.

Pictures are decoded as images are, but whole, and resized by Pillow as transformers' image processor does; the plan
copies them, so that the renderer's patches are the processor's.
"""

import math
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from string import ascii_uppercase

import numpy as np
import torch

from sslr1 import puzzles
from sslr1.data.decode import Decoder, formats, why
from sslr1.data.images import LARGEST
from sslr1.data.rows import BadRow
from sslr1.data.shards import open_file
from sslr1.ops import keys
from sslr1.puzzles import answers, prompts
from sslr1.puzzles.picture import Picture
from sslr1.puzzles.plan import Plan
from sslr1.puzzles.puzzle import Puzzle
from sslr1.puzzles.reward import Answer, score
from sslr1.sums import plain_sum

LEVEL = 1  # of all tasks: they have one
MOST_PICTURES = 64  # of a question
MOST_ANSWERS = 32  # different ones in a file; with more, a random one's chance is taken for 0
LONGEST = 200  # times its short side, as the image processor has it
_URL = re.compile(r"[a-z][a-z0-9+.-]*://")


@dataclass(frozen=True)
class Asked:
    """A row as it is asked. pictures: a path, as it was given, or bytes, each; question: `<image>` where each goes."""

    pictures: list
    question: str
    answer: Answer


class Task:
    """Questions by row number. rows: of the file; settings: the configuration's `Task`; judge: its function's `Judge`;
    held_out, train: row numbers; answers: the different values in the file, () where they are many; bad: {row: why its
    picture can't be read}, met so far."""

    def __init__(self, name, settings, rows, judge=None, threads=1):
        self.name, self.settings, self.rows, self.judge = name, settings, rows, judge
        self.key = f"tasks.{name}"
        self.root = Path(settings.root) if settings.root else Path(settings.path).parent
        self.answers, self.train, self.held_out, self.bad, self.refused = (), range(len(rows)), [], {}, ()
        self._decoder = Decoder("pillow", threads, None)

    def named(self, row) -> str:
        return self.rows.where(row)

    def asked(self, row) -> Asked:
        """Raises BadRow, or OSError."""
        return self.understood(self.rows.read(row))

    def understood(self, record) -> Asked:
        """What a row means. Raises BadRow."""
        s = self.settings
        pictures = _pictures(self._column(record, "images"))
        question = self._column(record, "question")
        if not isinstance(question, str) or not question.strip():
            raise BadRow(f"{s.question} is {_shown(question)}, where a question is due")
        options = _options(record.get(s.choices), s.choices)
        if options and s.kind not in ("letter", None):
            raise BadRow(f"it has options in {s.choices}, which are for kind: letter, not {s.kind}")
        lines = [question.strip(), *(f"{letter}. {option}" for letter, option in zip(ascii_uppercase, options))]
        text = "\n".join(lines)
        places = text.count("<image>")
        if places not in (0, len(pictures)):
            raise BadRow(f"it has {len(pictures)} pictures, and <image> stands {places} times in its question")
        text = text if places else "<image>\n" * len(pictures) + text
        return Asked(pictures, text, self._answer(record, options))

    def _column(self, record, which):
        name = getattr(self.settings, which)
        if name not in record:
            there = ", ".join(map(repr, record)) or "none"
            raise BadRow(f"no column {name!r} (it has {there[:300]}): set {self.key}.{which} to the one that is meant")
        if record[name] is None:
            raise BadRow(f"{name} is missing")
        return record[name]

    def _answer(self, record, options) -> Answer:
        value, kind, name = self._column(record, "answer"), self.settings.kind, self.settings.answer
        if isinstance(value, str) and not value.strip():
            raise BadRow(f"{name} is missing")
        value = value.strip() if isinstance(value, str) else value
        if kind is None:
            row = {key: held for key, held in record.items() if key != self.settings.images}
            judge = self.judge and partial(_judged, self.judge, row)
            return Answer("function", value if isinstance(value, str) else str(value), judge=judge)
        made = {"letter": _letter, "number": _number, "yes/no": _yes_or_no, "sequence": _sequence, "text": _text}[kind]
        answer = made(value, options, self)
        if answer is None:
            told = f" of its {len(options)} options" if options else ""
            raise BadRow(f"{name} is {_shown(value)}, which is no {kind}{told}")
        return answer

    def paths(self, asked) -> list:
        """Of its pictures: where a path leads, or the bytes themselves."""
        return [picture if isinstance(picture, bytes) else self.root / picture for picture in asked.pictures]

    def puzzles(self, addresses, form) -> list:
        """The Puzzle of each address, None for a row whose picture, or which itself, can't be read any more."""
        rows, files = {}, {}
        for row in dict.fromkeys(address.index for address in addresses):
            try:
                asked = self.asked(row)
                files[row] = [_bytes(place) for place in self.paths(asked)]
                rows[row] = asked
            except (OSError, BadRow) as error:
                self.bad[row] = f"can't be read: {getattr(error, 'strerror', None) or error}"
        decoded = iter(self._decoder.decode([data for some in files.values() for data in some]))
        shown = {}
        for row, some in files.items():
            images = [next(decoded) for _ in some]
            broken = next((data for data, image in zip(some, images) if image is None), None)
            if broken is not None:
                self.bad[row] = why(broken)
                continue
            try:
                shown[row] = [resized(image, form.spec) for image in images]
            except ValueError as error:
                self.bad[row] = str(error)
        return [
            self._puzzle(address, rows[address.index], shown[address.index], form) if address.index in shown else None
            for address in addresses
        ]

    def _puzzle(self, at, asked, images, form) -> Puzzle:
        plan = Plan()
        for number, image in enumerate(images):
            plan.view(plan.canvas(*image.shape[:2]), number, (1, 0, 0, 0, 1, 0), exact=True)
        picture, *others = map(Picture, images)
        closings = closings_of(form)
        choose = keys.fold("task", at.seed, at.epoch, at.attempt, self.name, at.index) % len(closings)
        return Puzzle(
            plan=plan,
            readings=[({}, asked.answer)],
            chance=chance(asked.answer),
            decidable=True,
            marks=[str(n + 1) for n in range(len(images))],
            sheet=[[n] for n in range(len(images))],
            others=others,
            address=at,
            form=form,
            picture=picture,
            question=f"{asked.question}\n{closings[choose]}",
            answer=asked.answer,
        )

    def held_out_addresses(self, count, seed) -> list:
        """Of `count` held-out questions, or of all where there are fewer; the same whenever asked."""
        rows = sorted(self.held_out, key=lambda row: keys.fold("evaluation", seed, self.name, row))[:count]
        return [puzzles.Address(self.name, LEVEL, keys.fold("evaluation", seed), 0, 0, row) for row in sorted(rows)]

    def substitute(self, seed, epoch, q, attempt) -> int:
        """The row that takes the place of one whose picture can't be read, or that taught nothing."""
        return int(self.train[keys.fold("substitute", seed, epoch, q, attempt, self.name) % len(self.train)])


def closings_of(form):
    """What a question may end with."""
    return (prompts.THINKING if form.thinking else prompts.DIRECT)[: form.wordings]


def chance(answer) -> float:
    """Of a random one of an answer's choices to be right; 0 where they can't be counted. Of K! sequences one is."""
    if answer.kind == "sequence":
        return 1 / math.factorial(len(answer.value))
    if not answer.choices:
        return 0.0
    return _chance(answer) if answer.kind == "quantity" else 1 / len(answer.choices)


def _chance(answer):
    right = [score(answer, f"\\boxed{{{choice}}}", thinking=False).exact for choice in answer.choices]
    return plain_sum(right) / len(right)


def _judged(judge, row, text):
    return judge(text, dict(row))


# --- pictures ---------------------------------------------------------------------------------------------------------


def smart_resize(height, width, spec) -> tuple:
    """(height, width) that the Qwen-VL image processor resizes a picture to; transformers' `smart_resize`. ValueError
    for a picture that is too long."""
    unit, pixels = spec.unit, height * width
    if max(height, width) > LONGEST * min(height, width):
        raise ValueError(f"{width}x{height} px is longer than the model takes, {LONGEST} times its width")
    tall, wide = round(height / unit) * unit, round(width / unit) * unit
    if tall * wide > spec.max_pixels:
        beta = math.sqrt(pixels / spec.max_pixels)
        tall, wide = (max(unit, math.floor(side / beta / unit) * unit) for side in (height, width))
    elif tall * wide < spec.min_pixels:
        beta = math.sqrt(spec.min_pixels / pixels)
        tall, wide = (math.ceil(side * beta / unit) * unit for side in (height, width))
    return tall, wide


def resized(image, spec) -> torch.Tensor:
    """A picture, uint8 [H, W, 3], as the processor resizes it: by Pillow, bicubic."""
    from PIL import Image

    height, width = smart_resize(*image.shape[:2], spec)
    if (height, width) == tuple(image.shape[:2]):
        return image.contiguous()
    small = Image.fromarray(image.numpy()).resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(small))


def size_of(place) -> tuple:
    """(height, width) of a picture at a path, or of its bytes, by its header. Raises BadRow."""
    import io

    from PIL import Image

    try:
        with open_file(place) if isinstance(place, Path) else io.BytesIO(place) as file:
            with Image.open(file, formats=formats()) as image:
                return image.height, image.width
    except OSError as error:
        if error.strerror:  # PIL's own have none
            raise BadRow(f"picture {str(place)!r} can't be read: {error.strerror}") from None
    except Exception:  # damaged files make Pillow raise nearly anything
        pass
    named = f"picture {str(place)!r}" if isinstance(place, Path) else "a picture"
    raise BadRow(f"{named} can't be read: {why(_bytes(place))}") from None


def _bytes(place) -> bytes:
    if isinstance(place, bytes):
        return place
    with open_file(place) as file:
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise OSError(f"more than {LARGEST:,} bytes")
    return data


def _pictures(value) -> list:
    found = [_picture(one) for one in (value if isinstance(value, list) else [value])]
    if not 1 <= len(found) <= MOST_PICTURES:
        raise BadRow(f"it has {len(found)} pictures; a question has 1 to {MOST_PICTURES}")
    return found


def _picture(value):
    if isinstance(value, dict):  # Hugging Face's struct
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return value
    if isinstance(value, str) and value.strip() and "\0" not in value:
        if _URL.match(value):
            raise BadRow(f"picture {_shown(value)} is an address, not a file: download it first")
        return value
    raise BadRow(f"a picture is {_shown(value)}, where a path or a file's bytes are due")


# --- answers ----------------------------------------------------------------------------------------------------------


def _options(value, name) -> list:
    if value is None or value == []:
        return []
    if not isinstance(value, list) or not all(isinstance(one, str | int | float) for one in value):
        raise BadRow(f"{name} is {_shown(value)}, where a list of texts is due")
    if not 2 <= len(value) <= len(ascii_uppercase):
        raise BadRow(f"{name} has {len(value)} options; 2 to {len(ascii_uppercase)} are due")
    return [str(one).strip() for one in value]


def _letter(value, options, task):
    letters = tuple(ascii_uppercase[: len(options)]) if options else ()
    if not isinstance(value, str):
        return None
    named = value.upper() if len(value) == 1 and value.upper() in (letters or ascii_uppercase) else None
    texts = [letter for letter, option in zip(letters, options) if option == value]
    meant = {*([named] if named else []), *texts}
    if len(meant) > 1:
        raise BadRow(f"{task.settings.answer} is {value!r}, which may be option {' or '.join(sorted(meant))}")
    return Answer("choice", meant.pop(), letters or task.answers) if meant else None


def _number(value, options, task):
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    value = answers.quantity(value if isinstance(value, str) else repr(value))
    return None if value is None else Answer("quantity", value, task.answers, tolerance=task.settings.tolerance)


def _yes_or_no(value, options, task):
    value = {True: "yes", False: "no"}[value] if isinstance(value, bool) else value
    value = answers.yes_or_no(value) if isinstance(value, str) else None
    return None if value is None else Answer("yes/no", value, ("yes", "no"))


def _sequence(value, options, task):
    value = answers.sequence(value) if isinstance(value, str) else value
    try:
        whole = isinstance(value, list | tuple) and len(value) > 1 and all(type(v) is int for v in value)
        return Answer("sequence", value) if whole else None
    except ValueError:
        return None


def _text(value, options, task):
    value = str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
    if not isinstance(value, str) or answers.words(value) is None:
        return None
    if score(Answer("text", value), f"\\boxed{{{value}}}", thinking=False).exact != 1:
        raise BadRow(f"{task.settings.answer} is {_shown(value)}, which can't be read out of a box again")
    return Answer("text", value, task.answers)


def _shown(value) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
