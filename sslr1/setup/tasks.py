"""The tasks of a configuration, opened: every row looked at before a model is loaded, and what was found kept in the
run's folder, so that a later start need not look again."""

import hashlib
import json
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np

from sslr1 import model
from sslr1.data.images import FEWEST, Rest
from sslr1.data.judge import Judge, imported
from sslr1.data.rows import BadRow, open_rows
from sslr1.data.tasks import MOST_ANSWERS, Task, closings_of, size_of, smart_resize
from sslr1.errors import UserError
from sslr1.files import write_whole
from sslr1.ops import keys
from sslr1.setup.session import form_of

FROZEN = "tasks.json"  # in a run's folder: of each task its file's digest, what is held out, and how long it gets
HELD_OUT = (64, 2000)  # questions held out at least, where that is no more than half, and at most


def functions(config, folders=()) -> dict:
    """{task: the function that judges its answers}, imported. folders: of a run, or that the configuration was found
    in, None for none; nothing is imported from these, from the model's or from the run's that that one is of. Raises
    UserError."""
    places = [Path(place).absolute() for place in (*folders, config.model.path) if place is not None]
    runs = [parent for place in places for parent in place.parents if (parent / "checkpoints").is_dir()]
    return {
        name: imported(f"tasks.{name}.function", task.function, [*places, *runs])
        for name, task in config.tasks.items()
        if task.function
    }


def open_tasks(config, tokenizer, spec, functions=(), folder=None, keep=False, report=None) -> dict:
    """{name: Task} of a configuration's tasks. functions: as above; folder: the run's, whose FROZEN is used where it is
    of these rows and settings, and with `keep` written; report(name): makes what is told how many rows have been looked
    at. Raises UserError, which names the first row that won't do."""
    found, kept = {}, _kept(folder)
    started = folder is not None and any((folder / "checkpoints").glob("step-*"))
    for name, settings in config.tasks.items():
        rows = open_rows(settings.path, f"tasks.{name}.path")
        judge = Judge(name, settings.function, functions[name]) if name in functions else None
        task = found[name] = Task(name, settings, rows, judge, config.train.threads)
        asked = _asked(config, task, spec)
        known = kept.get(name, {})
        before = known.get("asked", {}).get("file", rows.digest)
        if started and keep and before != rows.digest and not config.checkpoint.allow_change:
            raise UserError(
                f"tasks.{name}.path {settings.path!r} has changed since {folder} was started: put the file back, give "
                "this run a log.name of its own, or set checkpoint.allow_change=true"
            )
        if known.get("asked") != asked:
            known = kept[name] = {
                "asked": asked,
                **_looked_through(task, config, tokenizer, spec, report and report(name)),
            }
        task.answers, task.held_out = tuple(known["answers"]), known["held_out"]
        task.train = Rest(len(rows), task.held_out)
        task.longest = known["longest"]  # (tokens, row)
    if keep and folder is not None and found and kept != _kept(folder):
        with suppress(UserError):
            write_whole(folder / FROZEN, json.dumps(kept) + "\n")
    return found


def check_token_budget(config, tasks) -> None:
    """Raises UserError for a task whose longest prompt leaves no room for the longest completion."""
    most, budget = config.rollout.max_tokens, config.train.token_budget
    for task in tasks.values():
        tokens, row = task.longest
        if tokens + most > budget:
            raise UserError(
                f"{task.named(row)}: its prompt has up to {tokens:,} tokens, and with a completion of "
                f"rollout.max_tokens={most} they don't fit into train.token_budget={budget}: set that to "
                f"{tokens + most} or more, or lower puzzles.max_pixels, or leave the row out of {task.key}"
            )


def _asked(config, task, spec) -> dict:
    """What the findings follow from."""
    settings = task.settings.model_dump(mode="json", exclude={"path", "root", "share"})
    pixels = [spec.patch, spec.merge, spec.min_pixels, spec.max_pixels]
    puzzles = config.puzzles.thinking, config.puzzles.wordings
    return {
        "file": task.rows.digest,
        "settings": settings,
        "pixels": pixels,
        "form": list(puzzles),
        "holdout": config.data.holdout,
    }


def _kept(folder) -> dict:
    try:
        return json.loads((folder / FROZEN).read_text("utf-8")) if folder is not None else {}
    except (OSError, ValueError):
        return {}


def _looked_through(task, config, tokenizer, spec, report) -> dict:
    """Every row of a task, understood, and its pictures' headers read. Nothing is kept of a row but 8 bytes."""
    if len(task.rows) < FEWEST:
        raise UserError(
            f"{task.key}.path {task.settings.path!r} has {len(task.rows)} rows; at least {FEWEST} are needed, some to "
            "train on and some to hold out"
        )
    measured = lru_cache(1024)(size_of)  # rows of one picture are often neighbours
    form = form_of(config.puzzles, spec)
    pictures, values, longest = np.empty(len(task.rows), np.uint64), {}, (0, 0)
    ending = max(closings_of(form), key=len)
    specials = [*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()]
    for row, read in task.rows.each():
        if report and row % 256 == 0:
            report(row)
        try:
            asked = task.understood(read())
            places = task.paths(asked)
            sizes = [smart_resize(*measured(place), spec) for place in places]
            if word := next((word for word in specials if word in asked.question), None):
                raise BadRow(f"its question holds {word}, which means something else to the model")
        except (BadRow, ValueError) as error:
            raise UserError(f"{task.key}: {task.named(row)}: {error}") from None
        except OSError as error:
            raise UserError(f"{task.key}: {task.named(row)} can't be read: {error.strerror or error}") from None
        pictures[row] = keys.fold("holdout", *map(_digest, asked.pictures))
        if len(values) <= MOST_ANSWERS:
            values[asked.answer.value] = None
        # of no byte more than one token is made
        visual = sum(high * wide for high, wide in sizes) // spec.unit**2
        text = f"{asked.question}\n{ending}"
        if visual + len(text.encode()) + 200 > longest[0]:
            words = len(model.question_ids(text, tokenizer, form.thinking)) - len(places)
            longest = max(longest, (visual + words, row))
    counted = task.settings.kind in ("letter", "number", "text") and 2 <= len(values) <= MOST_ANSWERS
    return {
        "answers": sorted(values, key=str) if counted else [],
        "held_out": held_out(pictures, config.data.holdout),
        "longest": list(longest),
    }


def _digest(picture) -> str:
    """Of a picture as its row names it: wherever the file and its pictures lie, the same rows are held out."""
    return hashlib.blake2b(picture, digest_size=8).hexdigest() if isinstance(picture, bytes) else picture


def held_out(pictures, share) -> list:
    """Rows that are held out, by a hash of each row's pictures: all rows of some pictures, so that none is trained on
    that is asked about; `share` of the rows, at least HELD_OUT[0] and at most HELD_OUT[1], and never more than half.
    Where few pictures serve all rows, single rows."""
    n = len(pictures)
    count = min(max(round(share * n), HELD_OUT[0]), HELD_OUT[1], n // 2)
    order = np.lexsort((np.arange(n), pictures))
    ordered = pictures[order]
    end = count
    while end < n and ordered[end] == ordered[end - 1]:
        end += 1
    if end > n // 2:
        end = count
        while end and ordered[end] == ordered[end - 1]:
            end -= 1
    if not end:
        order = np.argsort(
            keys.fold_digests("holdout", digests=pictures + np.arange(n, dtype=np.uint64)), kind="stable"
        )
        end = count
    return sorted(order[:end].tolist())
