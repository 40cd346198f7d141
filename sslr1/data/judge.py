"""A function of the user's that judges answers: how it is imported, called, and given up."""

import importlib
import importlib.util
import math
import os
import sys
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from threading import Thread

from sslr1.errors import UserError

LIMIT_S = 10.0  # of one call


class Judge:
    """judge(text, row) -> accuracy from 0 to 1. What is wrong with the function is kept as `failed`, a line for its
    user, and from then on nothing is asked of it and everything is 0: whoever trains on answers looks at `failed`
    before.

    name: the task's; path: "package.module:name"; function: what that is."""

    def __init__(self, name, path, function, limit_s=LIMIT_S):
        self.named, self.function, self.limit_s = f"tasks.{name}.function {path}", function, limit_s
        self.failed = None
        self._asked, self._thread = SimpleQueue(), None

    def __call__(self, text, row) -> float:
        if self.failed is not None:
            return 0.0
        if self._thread is None:  # one that hangs doesn't keep the process from ending
            self._thread = Thread(target=_answer, args=(self._asked, self.function), daemon=True)
            self._thread.start()
        out = SimpleQueue()
        self._asked.put((text, row, out))
        try:
            value, error = out.get(timeout=self.limit_s)
        except Empty:
            return self._fail(f"has not returned after {self.limit_s:g} s", text)
        if error is not None:
            said = " ".join(str(error).split())[:300]
            return self._fail(f"raised {type(error).__name__}{': ' if said else ''}{said}", text)
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            return self._fail(f"returned {_shown(value)}, which is no number", text)
        if not math.isfinite(number) or not 0 <= number <= 1:
            return self._fail(f"returned {number:g}, where a number from 0 to 1 is due", text)
        return number

    def _fail(self, what, text):
        self.failed = f"{self.named} {what}; the answer was {_shown(text)}"
        return 0.0


def _answer(asked, function):
    while True:
        text, row, out = asked.get()
        try:
            out.put((function(text, row), None))
        except BaseException as error:  # SystemExit, too: it is the thread's, and nobody else would hear of it
            out.put((None, error))


def _shown(value):
    try:
        text = repr(value)
    except Exception:
        text = f"a {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:100]}…"


def imported(key, path, barred=()):
    """The function that "package.module:name" names. key: of the setting; barred: folders that no part of it may come
    from: of runs and models, whose files are somebody else's. Raises UserError."""
    module, _, name = path.partition(":")
    barred = [os.path.realpath(folder) for folder in barred]
    parts = module.split(".")
    with _without(barred):
        for end in range(1, len(parts) + 1):
            part = ".".join(parts[:end])
            try:
                known = sys.modules.get(part)
                spec = known.__spec__ if known is not None else importlib.util.find_spec(part)
                places = [spec.origin, *(spec.submodule_search_locations or ())] if spec else None
                if places is None and known is None:
                    raise ModuleNotFoundError(
                        f"no module {part!r} is installed, on PYTHONPATH, or in the folder where this was started"
                    )
                if inside := next((place for place in places or () if place and _within(place, barred)), None):
                    raise UserError(
                        f"{key} {path}: {inside} is in a run's or a model's folder, of which nothing is run"
                    )
                importlib.import_module(part)
            except UserError:
                raise
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                said = " ".join(str(error).split())[:300]
                raise UserError(f"{key} {path} can't be imported: {type(error).__name__}: {said}") from None
    found = getattr(sys.modules[module], name, None)
    if not callable(found):
        what = "has no such name" if found is None else f"holds a {type(found).__name__} of that name"
        raise UserError(f"{key} {path}: the module {what}; a function of (text, row) is needed")
    return found


@contextmanager
def _without(barred):
    """The import path without these folders and what is in them, and with the working folder at its end."""
    before = sys.path
    kept = [place for place in before if not _within(place or os.getcwd(), barred)]
    here = os.getcwd()
    sys.path = kept if here in kept or "" in kept or _within(here, barred) else [*kept, here]
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path = before


def _within(place, folders):
    real = os.path.realpath(place)
    return any(real == folder or real.startswith(folder.rstrip("/") + "/") for folder in folders)
