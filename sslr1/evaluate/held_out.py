"""Held-out puzzles, answered greedily."""

import json
from dataclasses import astuple
from functools import cached_property

import torch

from sslr1 import distributed, model, puzzles
from sslr1.data import ask_held_out, choose_held_out, make_held_out
from sslr1.errors import UserError
from sslr1.evaluate import scoring
from sslr1.evaluate.logs import gather
from sslr1.files import write_whole
from sslr1.ops import transfer
from sslr1.sums import plain_sum

FROZEN = "held_out.json"


class Evaluator:
    """The same held-out puzzles each time: chosen once a run, drawn at the first evaluation, rendered at each."""

    def __init__(self, session):
        self.session = session
        self.addresses = frozen(session) if session.folder else chosen(session)

    @cached_property
    def batches(self) -> dict:
        """{puzzle: this rank's PuzzleBatches}, of the puzzles that are none of the user's own."""
        thinking = self.session.config.puzzles.thinking
        kept = {name: some for name, some in self.addresses.items() if name not in self.session.tasks}
        return {name: list(batches_at(self.session, some, thinking)) for name, some in kept.items()}

    def run(self) -> tuple[dict, dict]:
        """({eval/<puzzle>/exact, accuracy, format, chance, n} over all ranks, {puzzle: a character for each of its
        addresses, in order: 1 for the exact answer, 0 for another, - where the image can't be read any more})."""
        out, marks = {}, {}
        thinking = self.session.config.puzzles.thinking
        for name, some in self.addresses.items():
            # a task's pictures may be large, and are read again
            batches = self.batches[name] if name in self.batches else batches_at(self.session, some, thinking)
            own = answers(self.session, batches)
            self.session.check_judges()
            marks[name] = self._marks(name, own)
            sums = [plain_sum(r[key] for r in own) for key in ("score", "accuracy", "format", "chance")]
            sums = torch.tensor([*sums, len(own)], dtype=torch.float64)
            sums = transfer.upload(sums, self.session.world.device, "counts")
            *means, n = distributed.all_reduce(sums).tolist()
            for key, total in zip(("exact", "accuracy", "format", "chance"), means):
                out[f"eval/{name}/{key}"] = total / max(n, 1)
            out[f"eval/{name}/n"] = int(n)
        return out, marks

    def _marks(self, name, own) -> str:
        """own: this rank's lines of the log. All ranks must call it."""
        addresses = self.addresses[name]
        places = {(_source(self.session, at), at.epoch, at.attempt): place for place, at in enumerate(addresses)}
        found = torch.zeros(len(addresses), dtype=torch.int64)
        for r in own:
            found[places[r["image"], r["epoch"], r["attempt"]]] = 2 if r["score"] else 1
        found = transfer.upload(found, self.session.world.device, "counts")
        return "".join("-01"[n] for n in distributed.all_reduce(found).tolist())


def chosen(session) -> dict:
    """{puzzle: addresses} of the configured puzzles and levels, and of the tasks."""
    return {name: choose(session, name, level) for name, level in session.levels.items()}


def frozen(session) -> dict:
    """The same, from the run folder's held_out.json, which rank 0 writes where there is none for these images and
    settings: a start need not plan every held-out puzzle again. All ranks must call it. Raises UserError."""
    path, c, spec, problem = session.folder / FROZEN, session.config, session.spec, None
    asked = {
        "rules": puzzles.RULES,
        "levels": session.levels,
        "count": c.eval.count,
        "seed": c.train.seed,
        "pixels": [spec.patch, spec.merge, spec.min_pixels, spec.max_pixels],
        "composed": c.puzzles.composed,
        "images": [session.evaluation.store.folder.files[number][0] for number in session.evaluation.held_out],
    }
    if session.tasks:
        asked["tasks"] = {name: [task.rows.digest, task.held_out] for name, task in session.tasks.items()}
    if session.world.main and _kept(path).get("asked") != asked:
        try:
            addresses = {name: [astuple(each) for each in some] for name, some in chosen(session).items()}
            write_whole(path, json.dumps({"asked": asked, "addresses": addresses}) + "\n")
        except UserError as error:
            problem = error
    distributed.agree(problem, session.world)
    return {name: [puzzles.Address(*each) for each in some] for name, some in _kept(path)["addresses"].items()}


def _kept(path) -> dict:
    """What `frozen` wrote; nothing where that is gone or damaged, and is to be made again."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


def choose(session, name, level) -> list:
    """Addresses of the held-out puzzles of one kind and level, or of a task's questions, the same in both forms. Raises
    UserError where the images make too few."""
    if name in session.tasks:
        return session.tasks[name].held_out_addresses(session.config.eval.count, session.config.train.seed)
    images, c, form = session.evaluation, session.config, session.form(False)
    return choose_held_out(images.store, images.held_out, name, level, c.eval.count, seed=c.train.seed, form=form)


def batches_at(session, addresses, thinking):
    """This rank's share of the puzzles at these addresses, thinking or direct, as PuzzleBatches."""
    images, world = session.evaluation, session.world
    own = addresses[world.rank :: world.size]
    if own and own[0].puzzle in session.tasks:
        return ask_held_out(session.tasks[own[0].puzzle], own, form=session.form(thinking))
    return make_held_out(images.store, images.held_out, own, form=session.form(thinking))


def ask(session, batches, report) -> list:
    """As `answers`, of all ranks, which must all call it."""
    found = answers(session, batches, report)
    session.check_judges()
    return gather(found)


def _source(session, at) -> str:
    """What a puzzle was cut out of: its image, or a task's row."""
    task = session.tasks.get(at.puzzle)
    return task.named(at.index) if task else session.evaluation.store.folder.files[at.index][0]


def answers(session, batches, report=lambda done: None) -> list:
    """A line of the log for the greedy answer to each puzzle of PuzzleBatches. report(done): how many are answered."""
    rule, records = session.config.puzzles.rule, []
    for batch in batches:
        opening = model.opening(session.tokenizer, batch.thinking)
        prompts = model.prompts(batch, session.tokenizer, device=session.world.device)
        groups = session.engine.generate(prompts, group_size=1, temperature=0)
        for puzzle, group in zip(batch, groups):
            at, sample = puzzle.address, group.samples[0]
            score = puzzles.score(puzzle.answer, opening + sample.text, rule, batch.thinking)
            records.append(
                {
                    "puzzle": at.puzzle,
                    "level": at.level,
                    "form": "thinking" if batch.thinking else "direct",
                    "image": _source(session, at),
                    "epoch": at.epoch,
                    "attempt": at.attempt,
                    "rules": puzzles.RULES,
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
        report(len(records))
    return records


def puzzle_report(records, baseline) -> list:
    """A summary of every (puzzle, level, form) among the records."""
    out, theirs = [], _cells(baseline)
    for cell, own in _cells(records).items():
        scores, chances = ({unit: r[field] for unit, r in own.items()} for field in ("score", "chance"))
        same = {unit: r["score"] for unit, r in theirs.get(cell, {}).items()}
        same = same if same.keys() == scores.keys() else None  # of other puzzles: nothing to compare
        found = scoring.summary(scores, chances, same, *cell)
        means = {field: plain_sum(r[field] for r in own.values()) / len(own) for field in ("accuracy", "format")}
        found |= {"places": means["accuracy"], "format": means["format"]}
        out.append({**dict(zip(("puzzle", "level", "form"), cell)), **found})
    return out


def _cells(records) -> dict:
    """{(puzzle, level, form): {unit: record}}"""
    out = {}
    for r in records:
        # by other rules the same address gives another puzzle; logs that don't say are of the first
        unit = f"{r['image']} {r['epoch']} {r['attempt']} {r['answer']} {r.get('rules', 1)}"
        out.setdefault((r["puzzle"], r["level"], r["form"]), {})[unit] = r
    return out
