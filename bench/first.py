"""What `bench/photos.py` found, as the tables of docs/results.md."""

import json
import math
from pathlib import Path
from statistics import mean, stdev

from learning import STUDENT, each, interval, said, verdict
from shown import table

PUZZLES = ("rotation", "ordering", "similarity", "inpainting", "correspondence")
CALLED = {
    "direct": "direct",
    "thinking": "thinking",
    "grey": "direct, every picture grey",
    "kl": "direct, `loss.kl_coef=0.05`",
    "lora": "direct, LoRA of rank 16 on all linears",
}
WRONG = {"hot": "`optim.lr=1e-3`", "formless": "thinking, `rollout.max_tokens=8`"}
WORDS = 160  # characters of a sample that are shown


def load(results, machine, model="smollm2") -> list:
    """The results files of a machine, by run and seed."""
    found = [json.loads(path.read_text("utf-8")) for path in sorted(Path(results).glob(f"lm-{model}-*-{machine}.json"))]
    return sorted(found, key=lambda run: ([*CALLED, *WRONG].index(run["run"]), run["seed"]))


def of(runs, name) -> list:
    return [run for run in runs if run["run"] == name]


def shares(runs, puzzle, when) -> list:
    """Held-out shares of each seed; when: 0 before GRPO, -1 after."""
    return [run["held_out"][when][puzzle]["exact"] for run in runs]


def accuracy(runs):
    """The direct run, all seeds: a row a puzzle. A seed's puzzles are asked before and after, so that its gain is one
    number; whether intervals are apart is said over the seeds, which begin unequal, and of each alone."""
    own, rows = of(runs, "direct"), []
    for puzzle in PUZZLES if own else ():
        cell = own[0]["held_out"][0][puzzle]
        n, before, after = cell["n"], shares(own, puzzle, 0), shares(own, puzzle, -1)
        level = str(own[0]["config"]["puzzles"]["levels"][puzzle])
        spread = f"{each(before)} → {each(after)}"
        alone = sum(verdict([b], [a], n).startswith("**") for b, a in zip(before, after))
        gains = gained([a - b for b, a in zip(before, after)])
        cells = [puzzle, level, f"{cell['chance']:.1%}", said(before, n), said(after, n), spread, gains]
        rows.append([*cells, verdict(before, after, n), f"{alone} of {len(own)}"])
    head = ["puzzle", "level", "chance", "before GRPO", "after", "seeds", "gain", "intervals apart", "in seeds alone"]
    return head, rows


def gained(shares) -> str:
    """The mean in points, and Student's interval over the seeds where there are several."""
    middle = 100 * mean(shares)
    if len(shares) < 2:
        return f"{middle:+.1f}"
    half = 100 * STUDENT[len(shares)] * stdev(shares) / math.sqrt(len(shares))
    return f"{middle:+.1f} [{middle - half:+.1f}, {middle + half:+.1f}]"


def controls(runs):
    """One row a run: before and after of each puzzle, ± one standard error of the change."""
    rows = []
    for name, called in CALLED.items():
        own = of(runs, name)
        if not own:
            continue
        cells = []
        for puzzle in PUZZLES:
            n = own[0]["held_out"][0][puzzle]["n"] * len(own)
            (before, *_), (after, *_) = (interval(shares(own, puzzle, when), n) for when in (0, -1))
            error = math.sqrt((before * (1 - before) + after * (1 - after)) / n)
            cells.append(f"{before:.0%} → {after:.0%} ({100 * (after - before):+.0f} ± {100 * error:.0f})")
        rows.append([called, str(len(own)), str(own[0]["steps"]), *cells])
    return ["run", "seeds", "GRPO steps", *PUZZLES], rows


def english(runs):
    """Form, length and entropy over a run, and whether English was kept; means over its seeds."""
    rows = []
    for name, called in CALLED.items():
        own = of(runs, name)
        if not own:
            continue
        row = [called]
        for curve, form in (("format", "{:.0%}"), ("length", "{:.1f}"), ("entropy", "{:.2f}")):
            ends = ([ends_of(run["curves"][curve])[i] for run in own] for i in (0, 1))
            row.append(" → ".join(form.format(average(values)) for values in ends))
        stages = [run["stages"] for run in own]
        for key in ("cold", "taught"):
            row.append(f"{average([stage[key]['perplexity'] for stage in stages]):.1f}")
        rows.append([*row, f"{average([run['perplexity_after'] for run in own]):.1f}"])
    head = ["run", "format", "tokens a completion", "entropy, nats a token"]
    return [*head, "perplexity: SmolLM2's own", "before GRPO", "after"], rows


def average(values) -> float:
    return math.fsum(values) / len(values)


def ends_of(curve, n=10) -> tuple:
    """Means of the first and of the last `n` steps."""
    return average(curve[:n]), average(curve[-n:])


def written(runs):
    """What the first seed of the direct and of the thinking run wrote, at the first and the last step that show a
    puzzle."""
    rows = []
    for name in ("direct", "thinking"):
        for run in of(runs, name)[:1]:
            for puzzle, shown in run["samples"].items():
                for when in ("first", "last"):
                    sample = shown[when]
                    text = cell(sample["wrote"][0])
                    rows.append([CALLED[name], puzzle, str(sample["step"]), cell(sample["answer"]), text])
    return ["run", "puzzle", "step", "right", "written"], rows


def cell(text) -> str:
    """A model's words as code in a cell of Markdown, cut."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    text = (text if len(text) <= WORDS else f"{text[:WORDS]}…").replace("|", "\\|").replace("`", "'")
    return f"`{text}`" if text else "(nothing)"


def alarms(runs):
    """At which step each run's alarms were raised."""
    rows = []
    for name, called in (CALLED | WRONG).items():
        for run in of(runs, name):
            raised = [f"{key.removeprefix('alarm/')}, step {step}" for key, step in sorted(run["alarms"].items())]
            rows.append([called, str(run["seed"]), str(run["steps"]), "; ".join(raised) or "none"])
    return ["run", "seed", "steps", "alarms"], rows


def cost(runs):
    """Hours of each stage of each run on the machine that made it."""
    rows = []
    for run in runs:
        hours = run["hours"]
        taught = next((value for key, value in hours.items() if key.startswith("taught")), 0.0)
        stages = [
            sum(hours.get(name, 0.0) for name in ("cold", "matched", "turned")),
            hours.get("seeing", 0.0),
            taught,
            hours.get(run["run"], 0.0),
        ]
        called = (CALLED | WRONG)[run["run"]]
        step = run["mean_s_a_step"]["step"]
        rows.append([called, str(run["seed"]), *(f"{value:.2f}" for value in stages), f"{step:.1f}"])
    return ["run", "seed", "build and words, h", "tower, h", "right answers, h", "GRPO, h", "s a step"], rows


TABLES = {
    "lm_accuracy": accuracy,
    "lm_controls": controls,
    "lm_english": english,
    "lm_written": written,
    "lm_alarms": alarms,
    "lm_cost": cost,
}


def text(make, runs) -> str:
    head, rows = make(runs)
    return table(head, rows) if rows else "Not run yet."
