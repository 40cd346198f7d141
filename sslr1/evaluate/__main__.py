"""Held-out puzzles and benchmarks, answered greedily, with confidence intervals.

[torchrun …] -m sslr1.evaluate WHAT [section.key=value …]          held-out puzzles at the configuration's levels
[torchrun …] -m sslr1.evaluate WHAT --levels all --form both       every puzzle at every level, thinking and direct
[torchrun …] -m sslr1.evaluate WHAT --benchmark FILE.tsv           a benchmark in VLMEvalKit's form [--circular]
python -m sslr1.evaluate --probes [FOLDER] [--count N]             what blind solvers score on the puzzles themselves

WHAT: a YAML file, a run folder (its newest checkpoint, its configuration), one of its checkpoints/step-…, or any
Hugging Face folder, an adapter's (PEFT) included. Answers are bit-equal on any number of ranks, unless
rollout.batch_invariant=false is given, which is faster.
"""

import json
import os
from pathlib import Path

from rich.console import Console

from sslr1 import config, puzzles
from sslr1.__main__ import parsed
from sslr1.errors import UserError
from sslr1.evaluate import benchmarks, blind, scoring, tables
from sslr1.evaluate.held_out import ask, batches_at, choose, puzzle_report
from sslr1.evaluate.logs import baseline_of, read_log, write
from sslr1.model.folder import check_folder, holds_adapter
from sslr1.runs import checkpoint
from sslr1.runs.progress import Progress
from sslr1.setup import entry, processors

FORMS = {"direct": ("direct",), "thinking": ("thinking",), "both": ("direct", "thinking")}


def locate(what) -> tuple:
    """(configuration file or None, overrides that name the model, run folder or None) of what is to be evaluated.
    Raises UserError."""
    path = Path(what)
    if not path.is_dir():
        if not path.exists() and path.suffix not in (".yaml", ".yml"):
            check_folder(path)  # says what such a name may be
        return path, [], None
    step = path.parent if path.name == "hf" and path.parent.name.startswith("step-") else path
    if (path / "checkpoints").is_dir():
        step = checkpoint.newest(path / "checkpoints")
        if step is None:
            raise UserError(f"{what} has no checkpoint yet (checkpoints/step-…)")
    if (step / "hf").is_dir():
        run = step.resolve().parent.parent
        given = [f"model.path={json.dumps(str(step / 'hf'), ensure_ascii=False)}"]
        if not (run / "config.yaml").is_file():
            return None, given, None
        config.of_run(run / "config.yaml")
        return run / "config.yaml", given, run
    if (path / "config.json").is_file() or holds_adapter(path):
        return None, [f"model.path={json.dumps(what, ensure_ascii=False)}"], None
    kinds = "no run folder (checkpoints/step-…), no checkpoint (hf/) and no model folder (config.json) or adapter's"
    raise UserError(f"{what} is {kinds}")


def evaluate_puzzles(arguments, console):
    """Answer held-out puzzles and print their table."""
    own_images = any(override.startswith("data.path=") for override in arguments.overrides)
    with entry.one_line():
        source, given, folder = locate(arguments.what)
        if source is None and not own_images:
            raise UserError(f"{arguments.what} is a model: say which images to cut puzzles out of, data.path=FOLDER")
        keys = ("puzzle", "level", "form", "image", "epoch", "attempt", "answer", "score")
        baseline = read_log(arguments.baseline, keys) if arguments.baseline else []
    if folder and (own_images or not (folder / "files.txt").is_file()):
        folder = None  # there is no list of the images that it was started with
    overrides = ["rollout.batch_invariant=true", *given, *arguments.overrides]
    asked = FORMS[arguments.form] if arguments.form else ()
    options = {"forms": asked, "learns": False, "allow_functions": arguments.allow_functions}
    with entry.session(source, overrides, folder=folder, **options) as session:
        c, progress, records = session.config.puzzles, Progress(session.world.main), []
        names = arguments.puzzle or [*(puzzles.NAMES if arguments.levels else c.mixture), *session.tasks]
        known = [*puzzles.NAMES, *session.tasks]
        if unknown := next((name for name in names if name not in known), None):
            raise UserError(f"--puzzle {unknown} is neither a puzzle nor a task; {config.nearest(unknown, known)}")
        forms = asked or (("thinking",) if c.thinking else ("direct",))
        missing = []
        for name in names:
            own = session.levels.get(name) or c.levels[name]
            for level in [own] if name in session.tasks else _levels(arguments.levels, name, own):
                try:
                    chosen = choose(session, name, level)
                except UserError as error:  # images that can't decide one puzzle may well decide the others
                    missing.append(f"not asked: {name}, level {level}: {error}")
                    continue
                for form in forms:
                    progress.start(
                        f"{name}, level {level}, {form}", len(chosen[session.world.rank :: session.world.size])
                    )
                    batches = batches_at(session, chosen, form == "thinking")
                    records += ask(session, batches, lambda done: progress.show(done, {}))
        progress.stop()
        if not records:
            raise UserError("; ".join(missing))
        cells = puzzle_report(records, baseline)
        numbers = {
            "model": str(session.model_path),
            "images": str(session.evaluation.store.folder.root),
            "cells": cells,
        }
        numbers["missing"] = missing
        if session.world.main:
            if arguments.out:
                write(arguments.out, numbers, records)
            trained = {*session.levels.items()} if source else set()
            console.print(f"{session.model_path} on held-out images of {numbers['images']}, greedy", soft_wrap=True)
            for line in session.not_read():
                console.print(line, soft_wrap=True, highlight=False)
            console.print(tables.puzzle_table(cells, trained))
            for line in missing:
                console.print(line, soft_wrap=True, highlight=False)
            for cell in cells:
                if baseline and "difference" not in cell:
                    where = f"{cell['puzzle']}, level {cell['level']}, {cell['form']} form"
                    console.print(f"not compared: {where}: {arguments.baseline} has other puzzles there, or none")


def _levels(asked, name, own):
    """The levels of a puzzle among those asked for; its own one in the configuration where none is."""
    if asked is None:
        return [own]
    return [level for level in puzzles.LEVELS[name] if "all" in asked or str(level) in asked]


def evaluate_benchmark(arguments, console):
    """Answer a benchmark and print its tables."""
    name = arguments.name or Path(arguments.benchmark).stem
    forms = FORMS[arguments.form or "direct"]
    with entry.one_line():
        source, given, _ = locate(arguments.what)
        rows = benchmarks.read(arguments.benchmark)
        if scoring.paper_name(name) == "MMVP":
            scoring.check_pairs(rows, arguments.benchmark)
        asked = benchmarks.asked(rows, arguments.circular)
        baseline = baseline_of(arguments.baseline, asked, forms) if arguments.baseline else []
    with entry.one_line(alike=False):
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        benchmarks.check_images(rows[rank::size], arguments.benchmark, processors.share())
    overrides = ["rollout.batch_invariant=true", *given, *arguments.overrides]
    with entry.session(source, overrides, data=False, forms=forms) as session:
        limits, records, progress = (arguments.max_pixels, arguments.max_tokens), [], Progress(session.world.main)
        numbers = {"benchmark": name, "file": arguments.benchmark, "model": str(session.model_path)}
        numbers |= dict(zip(("max_pixels", "max_tokens"), limits))
        numbers |= {"without_picture": rows.without_picture, "forms": {}}
        for form in forms:
            progress.start(f"{name}, {form}", len(asked[session.world.rank :: session.world.size]))
            own = benchmarks.ask_benchmark(session, asked, form, *limits, lambda done: progress.show(done, {}))
            theirs = [r for r in baseline if r["form"] == form]
            numbers["forms"][form] = scoring.summarise(own, name, theirs)
            records += own
        progress.stop()
        if session.world.main:
            if arguments.out:
                write(arguments.out, numbers, records)
            console.print(f"{session.model_path} on {arguments.benchmark}, greedy", soft_wrap=True)
            if rows.without_picture:
                console.print(f"left out: {rows.without_picture:,} of its rows, which show no picture", soft_wrap=True)
            for table in tables.benchmark_tables(numbers):
                console.print(table)


def _check(arguments):
    """Raise the UserError of arguments that don't go together."""
    if arguments.count != 2000:
        raise UserError("--count goes with --probes; for held-out puzzles set eval.count")
    if arguments.what is None:
        raise UserError("a configuration or a folder is needed, or --probes")
    if arguments.out and not arguments.out.endswith(".json"):
        raise UserError(f"--out {arguments.out} must end in .json; the log goes beside it, with .jsonl")
    if arguments.out:
        try:  # now, not when all is answered
            Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
            Path(arguments.out).open("a").close()
        except OSError as error:
            raise UserError(f"--out {arguments.out} can't be written: {error.strerror}") from None


def main():
    arguments = parsed("evaluate")
    if arguments.probes is not None:
        with entry.one_line():
            for name in arguments.puzzle or ():
                if name not in puzzles.NAMES:
                    raise UserError(f"--puzzle {name} is not a puzzle; {config.nearest(name, puzzles.NAMES)}")
        raise SystemExit(blind.report(arguments.probes or None, arguments.count, arguments.puzzle or puzzles.NAMES))
    with entry.one_line():
        _check(arguments)
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 140
    if arguments.benchmark:
        evaluate_benchmark(arguments, console)
    else:
        evaluate_puzzles(arguments, console)


if __name__ == "__main__":
    main()
