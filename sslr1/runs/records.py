"""Records on disk, one JSON line each, and what a run's held-out evaluations say. Imports no torch."""

import json
import math
from pathlib import Path

from sslr1.files import unwritable, write_whole

ANSWERS = "held_out.jsonl"  # a line an evaluation: which of held_out.json's puzzles it solved


class JsonLines:
    """An append-only file of records that all have `step`; `cut(step)` drops those beyond a step, for resuming."""

    def __init__(self, path):
        self.path = Path(path)
        self._file = None

    def write(self, record: dict) -> None:
        """Append a record; the operating system has it on return. Raises UserError where it can't be written."""
        line = memoryview((json.dumps(record, ensure_ascii=False) + "\n").encode())
        try:
            self._file = self._file or self.path.open("ab", buffering=0)
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise unwritable(self.path, error) from None

    def read(self) -> list:
        if not self.path.exists():
            return []
        out = []
        with self.path.open(
            "rb"
        ) as file:  # as bytes, where only \n ends a line: completions hold all kinds of separators
            for line in file:
                try:
                    out.append(json.loads(line))
                except ValueError:
                    break  # a line cut short by a kill, perhaps within a character; nothing after it is whole
        return out

    def cut(self, step: int) -> None:
        self.close()
        kept = [record for record in self.read() if record["step"] <= step]
        write_whole(self.path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept))

    def close(self):
        if self._file:
            self._file.close()
            self._file = None


def standard_error(p: float, n: int) -> float:
    """Of a share p among n independent draws."""
    return math.sqrt(p * (1 - p) / n)


def first_called(warmup_steps) -> str:
    """What the first held-out accuracy is of: of the model as it was given, or as train.warmup has left it."""
    return "after warm-up" if warmup_steps else "before"


def held_out(records, mixture, levels) -> list:
    """What the first and the last held-out evaluation found: a dict for each puzzle, accuracies as shares of exact
    answers, each with its standard error. Empty before the first evaluation."""
    evaluated = [r for r in records if any(k.startswith("eval/") for k in r)]
    out = []
    for name in mixture if evaluated else ():
        before, after = (
            {k: r[f"eval/{name}/{k}"] for k in ("exact", "chance", "n")} for r in (evaluated[0], evaluated[-1])
        )
        errors = [standard_error(found["exact"], found["n"]) for found in (before, after)]
        out.append(
            {
                "puzzle": name,
                "level": levels[name],
                "chance": after["chance"],
                "before": before["exact"],
                "before_error": errors[0],
                "after": after["exact"],
                "after_error": errors[1],
                "change": after["exact"] - before["exact"],
                "change_error": math.hypot(*errors),
                "n": after["n"],
                "steps": (evaluated[0]["step"], evaluated[-1]["step"]),
            }
        )
    return out


def final_table(records, mixture, levels, warmup_steps):
    """`held_out` as a rich table."""
    from rich.table import Table

    found = held_out(records, mixture, levels)
    first, last = found[0]["steps"]
    table = Table(title=f"Held-out accuracy (exact, greedy), step {first} to {last}")
    before = first_called(warmup_steps)
    for column in ("puzzle", "level", "chance", before, "after", "change ± s.e.", "puzzles"):
        table.add_column(column, justify="left" if column == "puzzle" else "right", no_wrap=column == "puzzle")
    for row in found:
        table.add_row(
            row["puzzle"],
            str(row["level"]),
            f"{row['chance']:.1%}",
            f"{row['before']:.1%}",
            f"{row['after']:.1%}",
            f"{100 * row['change']:+.1f} ± {100 * row['change_error']:.1f}",
            str(row["n"]),
        )
    return table
