"""Held-out puzzles, answered greedily."""

import json
from dataclasses import astuple
from functools import cached_property

import torch

from sslr1 import distributed, model, puzzles
from sslr1.data import choose_held_out, make_held_out
from sslr1.errors import UserError
from sslr1.evaluate import scoring
from sslr1.evaluate.logs import gather
from sslr1.files import write_whole
from sslr1.sums import plain_sum

FROZEN = "held_out.json"
CHUNK = 64  # prompts that are answered at once


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
            *means, n = distributed.all_reduce(sums).tolist()
            for key, total in zip(("exact", "accuracy", "format", "chance"), means):
                out[f"eval/{name}/{key}"] = total / max(n, 1)
            out[f"eval/{name}/n"] = int(n)
        return out


def chosen(built) -> dict:
    """{puzzle: addresses} of the configured puzzles and levels."""
    c = built.config.puzzles
    return {name: choose(built, name, c.levels[name]) for name in c.mixture}


def frozen(built) -> dict:
    """The same, from the run folder's held_out.json, which rank 0 writes where there is none for these images and
    settings: a start need not plan every held-out puzzle again. All ranks must call it. Raises UserError."""
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
    distributed.agree(problem, built.world)
    return {name: [puzzles.Address(*each) for each in some] for name, some in _kept(path)["addresses"].items()}


def _kept(path) -> dict:
    """What `frozen` wrote; nothing where that is gone or damaged, and is to be made again."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


def choose(built, name, level) -> list:
    """Addresses of the held-out puzzles of one kind and level, the same in both forms. Raises UserError where the
    images make too few."""
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
    """A line of the log for every chosen puzzle in each form, over all ranks. report(done): how many of this rank's are
    answered."""
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
