"""What a run shows while it goes: a bar on a terminal, a plain line now and then elsewhere, nothing on other ranks."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

PLAIN_EVERY_S = 10.0


class Progress:
    def __init__(self, main: bool):
        self.console = Console(quiet=not main, highlight=False, soft_wrap=True)
        self._bar = self._task = None
        self._what, self._total, self._last = "", 0, 0.0

    def start(self, what: str, total: int):
        self.stop()
        self._what, self._total, self._last = what, total, 0.0
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._bar = Bar(*columns, console=self.console)
            self._task = self._bar.add_task(what, total=total, note="")
            self._bar.start()

    def show(self, step: int, values: dict):
        """The state after `step`; values by name, floats."""
        note = "  ".join(f"{name.split('/')[-1]} {value:.3f}" for name, value in values.items())
        if self._bar:
            self._bar.update(self._task, completed=step, note=note)
        elif step in (1, self._total) or time.monotonic() - self._last >= PLAIN_EVERY_S:
            self._last = time.monotonic()
            self.console.print(f"{self._what} {step}/{self._total}  {note}")

    def say(self, text: str):
        self.console.print(text)

    def table(self, table):
        self.stop()
        self.console.print(table)

    def stop(self):
        if self._bar:
            self._bar.stop()
            self._bar = None
