"""Which charts a run's metrics make: plain data for template/report.js, which draws it. A metric without a chart of its
own gets one at the end, so that a new one is seen without a line here."""

import math

from sslr1.runs.alarms import MESSAGES
from sslr1.sums import plain_sum

POINTS = 300  # of a series; a longer run's are means over stretches of as many steps as it takes
UNDRAWN = ("step", "skipped_steps", "timing_s/step", "timing_s/elapsed")
SHARE = {"percent": True, "range": [0, 1]}
# Title, {name: metric}, options
POLICY = (
    ("Entropy, nats a token", {"entropy": "entropy"}, {"zero": True, "marks": "entropy"}),
    ("Tokens a completion", {"mean": "completions/mean_length"}, {"zero": True}),
    ("Completions", {"right format": "format", "cut off": "completions/clipped_ratio"}, {**SHARE, "marks": "format"}),
    ("Groups with equal rewards, which teach nothing", {"share": "frac_reward_zero_std"}, SHARE),
    ("Standard deviation of a group's rewards", {"mean": "reward_std"}, {"zero": True}),
    ("Clipped tokens", {"low": "clip_ratio/low_mean", "high": "clip_ratio/high_mean"}, {"percent": True, "zero": True}),
    ("KL to the reference, nats a token", {"kl": "kl"}, {"zero": True}),
    ("Gradient norm, before clipping", {"norm": "grad_norm"}, {"zero": True, "marks": "gradient"}),
    ("Learning rate", {"learning rate": "learning_rate"}, {"raw": True, "zero": True}),
)
RATES = {
    "completions, whole step": "perf/tokens_per_second",
    "learner": "perf/learner_tokens_per_second",
    "learner, a prompt counted for each completion": "perf/learner_effective_tokens_per_second",
}
MEMORY = {"GPU, peak": "perf/max_memory_allocated_gb", "host, peak": "perf/max_host_memory_gb"}
SPEED = (
    ("Tokens a second", RATES, {"zero": True}),
    ("Memory of rank 0, GiB", MEMORY, {"raw": True, "zero": True}),
    ("Of the GPU's peak operations", {"learner": "perf/mfu"}, {"percent": True, "zero": True}),
    ("Learner's TFLOP/s a rank", {"learner": "perf/learner_tflops"}, {"zero": True}),
)


def sections(records, mixture) -> list:
    """Charts by section, from metrics.jsonl's records: dicts of "title", "steps" (the last of each stretch), "per"
    (steps a stretch), "folded" and "charts". A chart has "title", "series" (name, colour as a number, values with None
    where there are none) and options; a colour of -1 is the text's. Options: percent, range, zero (the axis begins
    there), stack, raw (not smoothed), points (held-out: name, steps, values, errors), lines (chance: name, colour,
    value), marks (`events`).
    """
    run = _Run(records)
    phases = {k.removeprefix("timing_s/"): k for k in run.keys if k.startswith("timing_s/") and k not in UNDRAWN}
    charts = {
        "Learning": _learning(run, records, mixture),
        "Policy": run.charts(POLICY),
        "Speed": run.charts((("Time a step, s", phases, {"stack": True, "zero": True}), *SPEED)),
    }
    left = [key for key in run.keys if key not in run.seen and not key.startswith("eval/")]
    charts["Everything else"] = run.charts((key, {key: key}, {}) for key in left)
    shared = {"steps": [stretch[-1]["step"] for stretch in run.stretches], "per": run.per}
    return [
        {"title": title, "folded": title == "Everything else", **shared, "charts": found}
        for title, found in charts.items()
        if found
    ]


class _Run:
    """A run's steps, and charts of them. seen: the metrics that need no chart of their own any more."""

    def __init__(self, records):
        self.rows = [r for r in records if "reward" in r]
        self.per = max(1, math.ceil(len(self.rows) / POINTS))
        self.stretches = [self.rows[i : i + self.per] for i in range(0, len(self.rows), self.per)]
        self.keys = list(dict.fromkeys(key for row in self.rows for key in row))
        self.events = events(self.rows)
        marked = (key for key in self.keys if key.startswith("alarm/") or key.endswith("/plateau"))
        self.seen = {*UNDRAWN, *marked}

    def chart(self, title, named, marks=None, **options) -> list:
        """named: {name: metric}; those that the run doesn't have are left out, and so is a chart without any. marks:
        what the events to mark are about."""
        self.seen.update(named.values())
        series = [
            {
                "name": name,
                "colour": i - ("all" in named),
                "values": [mean(r.get(key) for r in stretch) for stretch in self.stretches],
            }
            for i, (name, key) in enumerate(named.items())
            if key in self.keys
        ]
        options |= {"marks": [e for e in self.events if e["about"] == marks]} if marks else {}
        return [{"title": title, "series": series, **options}] if series else []

    def charts(self, rows) -> list:
        return [chart for title, named, options in rows for chart in self.chart(title, named, **options)]


def _learning(run, records, mixture) -> list:
    """The reward, every puzzle's answers beside chance and the held-out ones', and the curriculum."""
    rewards = {"all": "reward", **{name: f"rewards/{name}/mean" for name in mixture}}
    out = run.chart("Reward", rewards, range=[0, 1], marks="reward")
    for name in mixture:
        exact, accuracy, chance = (_levels(run.keys, what, name) for what in ("exact", "accuracy", "chance"))
        run.seen.update(chance.values())
        lines = [
            {"name": f"chance, {level}", "colour": i, "value": mean(r.get(key) for r in run.rows)}
            for i, (level, key) in enumerate(chance.items())
        ]
        points = {what: _held_out(records, name, what) for what in ("exact", "accuracy")}
        out += run.chart(f"{name}: exact answers", exact, points=points["exact"], lines=lines, **SHARE, marks=name)
        places = run.chart(f"{name}: places right", accuracy, points=points["accuracy"], **SHARE, marks=name)
        if any(r.get(a) != r.get(e) for a, e in zip(accuracy.values(), exact.values()) for r in run.rows):
            out += places  # single answers are exact or not: one chart does
    moving = {name: f"curriculum/{name}/level" for name in mixture}
    level = run.chart("Level of the curriculum", moving, raw=True, zero=True)
    moved = any(r[key] != run.rows[0][key] for key in moving.values() for r in run.rows if key in r)
    means = {name: f"curriculum/{name}/mean" for name in mixture}
    return out + level * moved + run.chart("The curriculum's gain over chance", means)


def events(records) -> list:
    """What a reader should know of, in order: dicts of "step", "words", "about" (a puzzle, or a kind of alarm of the
    whole run) and "alarm"; alarms, levels that moved, updates that were skipped."""
    out, before = [], {}

    def note(words, about, alarm=True):
        out.append({"step": record["step"], "words": words, "about": about, "alarm": alarm})

    for record in records:
        for key in (k for k in record if k.startswith(("curriculum/", "alarm/")) or k == "skipped_steps"):
            value, (kind, *name) = record[key], key.split("/")
            if kind == "alarm":
                note(MESSAGES[name[0]], name[0])
            elif name[1:] == ["plateau"]:
                note(f"{name[0]} earns what guessing earns", name[0])
            elif name[1:] == ["level"] and before.get(key, value) != value:
                note(f"{name[0]} moves from level {before[key]} to level {value}", name[0], alarm=False)
            elif key == "skipped_steps" and value > before.get(key, 0):
                note("update skipped: its gradient was not finite", "gradient")
        before |= record
    return out


def mean(values) -> float | None:
    """Of those that are finite numbers, to four digits; None where there are none."""
    found = [v for v in values if v is not None and math.isfinite(v)]
    return float(f"{plain_sum(found) / len(found):.4g}") if found else None


def _levels(keys, what, name):
    return {f"level {key[-1]}": key for key in sorted(keys) if key.startswith(f"{what}/{name}/level")}


def _held_out(records, name, what):
    """Held-out accuracies; of exact answers with the standard error of a share."""
    found = [r for r in records if f"eval/{name}/{what}" in r]
    values = [r[f"eval/{name}/{what}"] for r in found]
    points = {"name": "held out", "steps": [r["step"] for r in found], "values": values}
    if what == "exact":  # places of one puzzle are not independent, so their error is not that of a share
        errors = [math.sqrt(p * (1 - p) / r[f"eval/{name}/n"]) for p, r in zip(values, found)]
        points |= {"name": "held out ± s.e.", "errors": errors}
    return points
