"""What a run shows while it goes: a bar on a terminal, a plain line now and then elsewhere, nothing on other ranks."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

PLAIN_EVERY_S = 10.0


class Progress:
    """A plain line is written in one piece with its end, so that lines of several processes, and torchrun's prefixes,
    stay whole; a bar needs a terminal that can move its cursor."""

    def __init__(self, main: bool, stderr=False):
        self.console = Console(quiet=not main, highlight=False, soft_wrap=True, stderr=stderr)
        self._moving = self.console.is_interactive and self.console.file.isatty()  # FORCE_COLOR makes a log no terminal
        self._bar = self._task = None

    def start(self, what: str, total: int, done: int = 0):
        """Begin a phase of `total` steps, `done` of which were made before: they don't count for the time that is
        left."""
        self.stop()
        self._what, self._total, self._done = what, total, done
        self._began, self._last = time.monotonic(), 0.0
        if self._moving:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._bar = Bar(*columns, console=self.console)
            self._task = self._bar.add_task(what, total=total, completed=done, note="")
            self._bar.start()

    def show(self, step: int, values: dict):
        """The state after `step`; values by name, floats."""
        note = "  ".join(f"{name.split('/')[-1]} {value:.3f}" for name, value in values.items())
        now = time.monotonic()
        if self._bar:
            self._bar.update(self._task, completed=step, note=note)
        elif step in (self._done + 1, self._total) or now - self._last >= PLAIN_EVERY_S:
            self._last = now
            left = (now - self._began) / max(1, step - self._done) * (self._total - step)
            self.console.print(f"{self._what} {step}/{self._total}  ETA {clock(left)}  {note}")

    def say(self, text: str):
        self.console.print(text, markup=False)

    def table(self, table):
        self.stop()
        self.console.print(table)

    def stop(self):
        if self._bar:
            self._bar.stop()
            self._bar = None


def clock(seconds: float) -> str:
    """Hours, minutes and seconds as 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
