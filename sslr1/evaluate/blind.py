"""The table of blind solvers: `evaluate --probes`."""

import itertools
import sys

import torch

from sslr1 import puzzles
from sslr1.evaluate import probes
from sslr1.runs.progress import Progress
from sslr1.setup import processors


def report(folder=None, count=2000, names=puzzles.NAMES) -> int:
    """Print a table of all probes; 0 if every stated bound holds, 1 if not, 2 if the images don't do."""
    from rich.console import Console

    processors.collect_as_usual()
    torch.set_num_threads(processors.threads())
    try:
        images = probes.pictures(folder)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    kinds = [(name, level) for name in names for level in puzzles.LEVELS[name]]
    findings, missing, progress, done = [], [], Progress(True), itertools.count(1)
    progress.start("blind solvers", sum(probes.halves(name) * count for name, _ in kinds))
    for name, level in kinds:
        try:
            findings += probes.probe(
                probes.shown(name, images, count), name, level, count, told=lambda: progress.show(next(done), {})
            )
        except ValueError as error:  # images that give too few of one puzzle may well give the others
            missing.append(f"not probed: {error}")
    progress.stop()
    console = Console(width=140, highlight=False)
    console.print(table(findings, count))
    for line in [*missing, *decided(findings)]:
        console.print(line, markup=False)
    return int(bool(missing) or not all(f.holds for f in findings))


def table(findings, count):
    """Findings as a rich table."""
    from rich.table import Table

    out = Table(
        title=f"Blind solvers, {count} puzzles each: exact answers, and the share of right places for sequences"
    )
    for column in ("puzzle", "level", "probe", "chance", "exact", "95 % limit", "bound", "places"):
        out.add_column(column, justify="left" if column in ("puzzle", "probe") else "right")
    for f in findings:
        bound = "" if f.bound is None else f"{f.bound:.1%} {f.verdict}".strip()
        places = f"{f.accuracy:.1%}" if f.puzzle == "ordering" else ""
        shares = (f"{share:.1%}" for share in (f.chance, f.exact, f.limit))
        out.add_row(f.puzzle, str(f.level), f.probe, *shares, bound, places)
    return out


def decided(findings) -> list:
    """Lines on the bounds: how many hold, and how many puzzles would decide about the others."""
    stated = [f for f in findings if f.bound is not None]
    verdicts = [f.verdict.partition(":")[0] for f in stated]
    count = {word: verdicts.count(word) for word in ("", "broken", "undecided")}
    lines = [f"{len(stated)} stated bounds: {count['']} hold, {count['broken']} broken, {count['undecided']} undecided"]
    few = [f.enough() for f in stated if f.verdict == "undecided: too few"]
    if few:
        needed, images = (max(numbers) for numbers in zip(*few))
        lines.append(
            f"undecided: too few puzzles. --count {needed}, of up to {images:,} images, decides about who guesses"
        )
    return lines
