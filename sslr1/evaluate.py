"""Held-out puzzles and benchmarks, answered greedily, with confidence intervals.

[torchrun …] -m sslr1.evaluate WHAT [section.key=value …]                 held-out puzzles at the configuration's levels
[torchrun …] -m sslr1.evaluate WHAT --levels all --form both              every puzzle at every level, thinking and direct
[torchrun …] -m sslr1.evaluate WHAT --benchmark FILE.tsv [--circular]     a benchmark in VLMEvalKit's form
python -m sslr1.evaluate --probes [FOLDER] [--count N]                    what blind solvers score on the puzzles themselves

WHAT: a YAML file, a run folder (its newest checkpoint, its configuration), one of its checkpoints/step-…, or any Hugging Face
folder. Answers are bit-equal on any number of ranks, unless rollout.batch_invariant=false is given, which is faster.
"""

import json
from dataclasses import astuple
from functools import cached_property
from pathlib import Path

import torch

from sslr1 import benchmarks, model, processors, puzzles, scoring
from sslr1.build import agree
from sslr1.data import choose_held_out, make_held_out
from sslr1.errors import UserError
from sslr1.files import write_whole
from sslr1.model import parallel
from sslr1.sums import plain_sum

FROZEN = "held_out.json"
FORMS = {"direct": ("direct",), "thinking": ("thinking",), "both": ("direct", "thinking")}
# Prompts that are answered at once: so many, and so many patches if all were the largest
CHUNK, CHUNK_PATCHES = 64, 1 << 18


class Evaluator:
    """The same held-out puzzles each time: chosen once a run, drawn at the first evaluation, rendered at each."""

    def __init__(self, built):
        self.built = built
        self.addresses = frozen(built) if built.folder else chosen(built)

    @cached_property
    def batches(self) -> dict:
        """{puzzle: this rank's PuzzleBatches}"""
        world = self.built.world
        return {
            name: list(batches_at(self.built, addresses[world.rank :: world.size], self.built.config.puzzles.thinking))
            for name, addresses in self.addresses.items()
        }

    def run(self) -> dict:
        """{eval/<puzzle>/exact, accuracy, format, chance, n} over all ranks."""
        out = {}
        for name, batches in self.batches.items():
            sums = torch.zeros(5, dtype=torch.float64, device=self.built.world.device)
            for batch in batches:
                for puzzle, (score, _) in zip(batch, _answered(self.built, batch)):
                    sums += sums.new_tensor([score.exact, score.accuracy, score.format_ok, puzzle.chance, 1])
            *means, n = parallel.all_reduce(sums).tolist()
            for key, total in zip(("exact", "accuracy", "format", "chance"), means):
                out[f"eval/{name}/{key}"] = total / max(n, 1)
            out[f"eval/{name}/n"] = int(n)
        return out


def chosen(built) -> dict:
    """{puzzle: addresses} of the configured puzzles and levels."""
    c = built.config.puzzles
    return {name: choose(built, name, c.levels[name]) for name in c.mixture}


def frozen(built) -> dict:
    """The same, from the run folder's held_out.json, which rank 0 writes where there is none for these images and settings: a start
    need not plan every held-out puzzle again. All ranks must call it. Raises UserError."""
    path, c, spec, problem = built.folder / FROZEN, built.config, built.spec, None
    asked = {
        "levels": {name: c.puzzles.levels[name] for name in c.puzzles.mixture},
        "count": c.eval.count,
        "seed": c.train.seed,
        "pixels": [spec.patch, spec.merge, spec.min_pixels, spec.max_pixels],
        "composed": c.puzzles.composed,
        "images": [built.evaluation.store.folder.files[number][0] for number in built.evaluation.held_out],
    }
    if built.world.main and _kept(path).get("asked") != asked:
        try:
            addresses = {name: [astuple(each) for each in some] for name, some in chosen(built).items()}
            write_whole(path, json.dumps({"asked": asked, "addresses": addresses}) + "\n")
        except UserError as error:
            problem = error
    agree(problem, built.world)
    return {name: [puzzles.Address(*each) for each in some] for name, some in _kept(path)["addresses"].items()}


def _kept(path) -> dict:
    """What `frozen` wrote; nothing where that is gone or damaged, and is to be made again."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


def choose(built, name, level) -> list:
    """Addresses of the held-out puzzles of one kind and level, the same in both forms. Raises UserError where the images make too
    few."""
    images, c = built.evaluation, built.config
    return choose_held_out(
        images.store, images.held_out, name, level, c.eval.count, seed=c.train.seed, form=built.form(False)
    )


def batches_at(built, addresses, thinking):
    """The puzzles at these addresses, thinking or direct, as PuzzleBatches of at most CHUNK."""
    images = built.evaluation
    return make_held_out(images.store, images.held_out, addresses, form=built.form(thinking), chunk=CHUNK)


def _answered(built, batch) -> list:
    """(Score, Sample) of each puzzle's greedy answer."""
    opening = model.opening(built.tokenizer, batch.thinking)
    groups = built.engine.generate(model.prompts(batch, built.tokenizer), group_size=1, temperature=0)
    samples = [group.samples[0] for group in groups]
    rule = built.config.puzzles.rule
    return [
        (puzzles.score(puzzle.answer, opening + sample.text, rule, batch.thinking), sample)
        for puzzle, sample in zip(batch, samples)
    ]


def ask_puzzles(built, forms, chosen, report) -> list:
    """A line of the log for every chosen puzzle in each form, over all ranks. report(done): how many of this rank's are answered."""
    files, world = built.evaluation.store.folder.files, built.world
    out, done = [], 0
    for form in forms:
        records = []
        for batch in batches_at(built, chosen[world.rank :: world.size], form == "thinking"):
            for puzzle, (score, sample) in zip(batch, _answered(built, batch)):
                at = puzzle.address
                records.append(
                    {
                        "puzzle": at.puzzle,
                        "level": at.level,
                        "form": form,
                        "image": files[at.index][0],
                        "epoch": at.epoch,
                        "attempt": at.attempt,
                        "question": puzzle.question,
                        "answer": puzzle.answer.text,
                        "completion": sample.text,
                        "finish": sample.finish,
                        "score": score.exact,
                        "accuracy": score.accuracy,
                        "format": score.format_ok,
                        "chance": puzzle.chance,
                    }
                )
            done += len(batch)
            report(done)
        out += gather(records, world)
    return out


def ask_benchmark(built, asked, form, max_pixels, max_tokens, report) -> list:
    """A line of the log for each of `asked` rows, over all ranks. report(done): how many of this rank's are answered."""
    world, spec = built.world, built.spec
    process = benchmarks.image_processor(spec, max_pixels)
    opening = model.opening(built.tokenizer, form == "thinking")
    rows, prompts, records = [], [], []

    def answer():
        groups = built.engine.generate(prompts, group_size=1, temperature=0, max_tokens=max_tokens)
        records.extend(benchmarks.record(row, form, group.samples[0], opening) for row, group in zip(rows, groups))
        rows.clear()
        prompts.clear()
        report(len(records))

    for row in asked[world.rank :: world.size]:
        prompt = benchmarks.prompt(row, built.tokenizer, spec.merge, process, form == "thinking")
        largest = max(len(p.pixel_values) for p in [*prompts, prompt])
        if len(rows) == CHUNK or (rows and largest * (len(rows) + 1) > CHUNK_PATCHES):
            answer()
        rows.append(row)
        prompts.append(prompt)
    if rows:
        answer()
    return gather(records, world)


def gather(records, world) -> list:
    """All ranks' records, where each has every world.size-th. All ranks must call it."""
    data = torch.frombuffer(bytearray(json.dumps(records).encode()), dtype=torch.uint8)
    ranks = [json.loads(part.numpy().tobytes()) for part in parallel.all_gather_rows(data[:, None])]
    return [ranks[i % world.size][i // world.size] for i in range(sum(map(len, ranks)))]


def puzzle_report(records, baseline) -> list:
    """A summary of every (puzzle, level, form) among the records."""
    cells, out = {}, []
    for r in records:
        cells.setdefault((r["puzzle"], r["level"], r["form"]), []).append(r)
    theirs = {}
    for r in baseline:
        theirs.setdefault((r["puzzle"], r["level"], r["form"]), {})[_unit(r)] = r["score"]
    for (name, level, form), own in cells.items():
        scores, chances = ({_unit(r): r[field] for r in own} for field in ("score", "chance"))
        same = theirs.get((name, level, form))
        same = same if same and same.keys() == scores.keys() else None  # of other puzzles: nothing to compare
        found = scoring.summary(scores, chances, same, name, level, form)
        means = {field: plain_sum(r[field] for r in own) / len(own) for field in ("accuracy", "format")}
        found |= {"places": means["accuracy"], "format": means["format"]}
        out.append({"puzzle": name, "level": level, "form": form, **found})
    return out


def _unit(r):
    return f"{r['image']} {r['epoch']} {r['attempt']} {r['answer']}"


def read_log(path, keys) -> list:
    """Records of a per-sample log that an earlier evaluation wrote, each with these keys. Raises UserError."""
    try:
        records = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"--baseline {path} can't be read as JSON lines: {error}") from None
    for number, r in enumerate(records, 1):
        for key in keys:
            if not isinstance(r, dict) or key not in r:
                raise UserError(f"--baseline {path}, line {number}: no {key!r}; it must be a log that --out wrote")
    return records


def baseline_of(path, asked, forms) -> list:
    """Records of another model's log of the same questions. Raises UserError where they are others."""
    records = read_log(path, ("index", "rotation", "form", "answer", "score", "chance"))
    for form in forms:
        theirs = {(r["index"], r["rotation"]): r["answer"] for r in records if r["form"] == form}
        for row in asked:
            answer = theirs.pop((row.index, row.rotation), None)
            if answer != row.answer:
                what = f"the answer {answer!r}" if answer else "nothing"
                raise UserError(
                    f"--baseline {path} has {what} in the {form} form for index {row.index!r}, rotation {row.rotation}, "
                    f"where {row.answer!r} is right: it must be a log of the same questions"
                )
        if theirs:
            raise UserError(
                f"--baseline {path} has {len(theirs)} questions more in the {form} form: it must have the same"
            )
    return records


def locate(what) -> tuple:
    """(configuration file or None, overrides that name the model, run folder or None) of what is to be evaluated. Raises UserError."""
    from sslr1 import checkpoint, config

    path = Path(what)
    if not path.is_dir():
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
    if (path / "config.json").is_file():
        return None, [f"model.path={json.dumps(what, ensure_ascii=False)}"], None
    raise UserError(
        f"{what} is no run folder (checkpoints/step-…), no checkpoint (hf/) and no model folder (config.json)"
    )


def write(out, numbers, records) -> None:
    """`out` as JSON, and the log beside it as JSON lines."""
    out = Path(out)
    out.with_suffix(".jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")
    out.write_text(json.dumps(numbers, indent=2, ensure_ascii=False) + "\n", "utf-8")


def evaluate_puzzles(arguments, console):
    """Answer held-out puzzles and print their table."""
    from sslr1 import entry, tables
    from sslr1.progress import Progress

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
    with entry.built(source, overrides, folder=folder, forms=asked) as built:
        c, progress, records = built.config.puzzles, Progress(built.world.main), []
        names = arguments.puzzle or (puzzles.NAMES if arguments.levels else list(c.mixture))
        forms = asked or (("thinking",) if c.thinking else ("direct",))
        missing = []
        for name in names:
            for level in _levels(arguments.levels, name, c.levels[name]):
                try:
                    chosen = choose(built, name, level)
                except UserError as error:  # images that can't decide one puzzle may well decide the others
                    missing.append(f"not asked: {name}, level {level}: {error}")
                    continue
                mine = len(range(built.world.rank, len(chosen), built.world.size))
                progress.start(f"{name}, level {level}", mine * len(forms))
                records += ask_puzzles(built, forms, chosen, lambda done: progress.show(done, {}))
        progress.stop()
        if not records:
            raise UserError("; ".join(missing))
        cells = puzzle_report(records, baseline)
        numbers = {"model": str(built.model_path), "images": str(built.evaluation.store.folder.root), "cells": cells}
        numbers["missing"] = missing
        if built.world.main:
            if arguments.out:
                write(arguments.out, numbers, records)
            trained = {(name, c.levels[name]) for name in c.mixture} if source else set()
            console.print(f"{built.model_path} on held-out images of {numbers['images']}, greedy", soft_wrap=True)
            for line in built.not_read():
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
    import os

    from sslr1 import entry, tables
    from sslr1.progress import Progress

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
    overrides = ["rollout.batch_invariant=true", "data.path=none", *given, *arguments.overrides]
    with entry.built(source, overrides, data=False, forms=forms) as built:
        limits, records, progress = (arguments.max_pixels, arguments.max_tokens), [], Progress(built.world.main)
        numbers = {"benchmark": name, "file": arguments.benchmark, "model": str(built.model_path)}
        numbers |= {
            "max_pixels": limits[0],
            "max_tokens": limits[1],
            "without_picture": rows.without_picture,
            "forms": {},
        }
        for form in forms:
            progress.start(f"{name}, {form}", len(asked[built.world.rank :: built.world.size]))
            own = ask_benchmark(built, asked, form, *limits, lambda done: progress.show(done, {}))
            theirs = [r for r in baseline if r["form"] == form]
            numbers["forms"][form] = scoring.summarise(own, name, theirs)
            records += own
        progress.stop()
        if built.world.main:
            if arguments.out:
                write(arguments.out, numbers, records)
            console.print(f"{built.model_path} on {arguments.benchmark}, greedy", soft_wrap=True)
            if rows.without_picture:
                console.print(f"left out: {rows.without_picture:,} of its rows, which show no picture", soft_wrap=True)
            for table in tables.benchmark_tables(numbers):
                console.print(table)


def main():
    import argparse

    from rich.console import Console

    parser = argparse.ArgumentParser(
        prog="python -m sslr1.evaluate", description="Accuracy on held-out puzzles and on benchmarks."
    )
    parser.add_argument(
        "what", nargs="?", help="a YAML file, a run folder, a checkpoint of one, or a Hugging Face folder"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--levels", nargs="+", choices=("all", "1", "2", "3", "4"), help="of all puzzles")
    parser.add_argument("--puzzle", nargs="+", choices=puzzles.NAMES, help="of these")
    parser.add_argument("--form", choices=FORMS, help="the configuration's, and direct for a benchmark, unless given")
    parser.add_argument("--benchmark", metavar="FILE.tsv", help="a benchmark in VLMEvalKit's form")
    parser.add_argument("--name", help="the benchmark's; the file's unless given")
    parser.add_argument("--circular", action="store_true", help="also with the options rotated: right if all are")
    parser.add_argument(
        "--max-pixels", type=int, default=benchmarks.MAX_PIXELS, help="of a benchmark's question, all pictures together"
    )
    parser.add_argument("--max-tokens", type=int, default=benchmarks.MAX_TOKENS, help="of an answer to a benchmark")
    parser.add_argument(
        "--out", metavar="FILE.json", help="write the numbers there, and a log of every sample to FILE.jsonl"
    )
    parser.add_argument("--baseline", metavar="FILE.jsonl", help="such a log, to compare with question by question")
    parser.add_argument(
        "--probes",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="score blind solvers on puzzles from a folder of images (procedural scenes unless given); no model is loaded; "
        "exit status 1 if a bound does not hold",
    )
    parser.add_argument("--count", type=int, default=2000, help="puzzles a probe and level")
    arguments = parser.parse_intermixed_args()
    if arguments.probes is not None:
        from sslr1 import probes

        raise SystemExit(probes.report(arguments.probes or None, arguments.count, arguments.puzzle or puzzles.NAMES))
    if arguments.count != 2000:
        parser.error("--count goes with --probes; for held-out puzzles set eval.count")
    if arguments.what is None:
        parser.error("a configuration or a folder is needed, or --probes")
    if arguments.out and not arguments.out.endswith(".json"):
        parser.error(f"--out {arguments.out} must end in .json; the log goes beside it, with .jsonl")
    if arguments.out:
        try:  # now, not when all is answered
            Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
            Path(arguments.out).open("a").close()
        except OSError as error:
            parser.error(f"--out {arguments.out} can't be written: {error.strerror}")
    if min(arguments.max_pixels, arguments.max_tokens) < 1:
        parser.error("--max-pixels and --max-tokens are 1 or more")
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 140
    if arguments.benchmark:
        evaluate_benchmark(arguments, console)
    else:
        evaluate_puzzles(arguments, console)


if __name__ == "__main__":
    main()
