"""Which charts a run's metrics make, or two runs': plain data for template/charts.js, which draws it. A metric without
a chart of its own gets one at the end, so that a new one is seen without a line here."""

import math

from sslr1.config import shares
from sslr1.report.mends import events
from sslr1.sums import plain_sum

POINTS = 300  # of a series; a longer run's are means over stretches of as many steps as it takes
DECADES = 100.0  # largest over smallest value from which on an axis is logarithmic
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
SPEED = (
    ("Tokens a second", RATES, {"zero": True}),
    ("Learner's TFLOP/s a rank", {"learner": "perf/learner_tflops"}, {"zero": True}),
)
MEMORY = {
    "GPU, peak": "perf/max_memory_allocated_gb",
    "host, peak": "perf/max_host_memory_gb",
    "host, now": "perf/host_memory_gb",
}
HARDWARE = (
    ("Processors kept busy by rank 0", {"processors": "perf/cpu_cores"}, {"zero": True}),
    ("Memory of rank 0, GiB", MEMORY, {"raw": True, "zero": True}),
    ("Of the GPU's peak operations", {"learner": "perf/mfu"}, {"percent": True, "zero": True}),
    ("Copied to the GPU of rank 0, MB a step", {"copied": "perf/host_to_device_mb"}, {"zero": True}),
)


def sections(records, config) -> list:
    """Charts by section, from metrics.jsonl's records and config.yaml's settings: dicts of "title", "steps" (the last
    of each stretch), "per" (steps a stretch), "folded" and "charts". A chart has "title", "series" (name, colour as a
    number, values with None where there are none) and options; a colour of -1 is the text's. Options: percent, range,
    zero (the axis begins there), log (it is logarithmic), stack, raw (not smoothed), points (held-out: a list of name,
    colour, steps, values, errors), lines (chance: name, colour, value), marks (`events`).
    """
    mixture = [name for name, part in shares(config).items() if part > 0]
    run = _Run(records)
    phases = _phases(run.keys)
    charts = {
        "Learning": _learning(run, records, mixture, config["puzzles"]["curriculum"] == "adaptive"),
        "Policy": run.charts(POLICY),
        "Speed": run.charts((("Time a step, s", phases, {"stack": True, "zero": True}), *SPEED)),
        "Hardware": run.charts(HARDWARE),
    }
    left = [key for key in run.keys if key not in run.seen and not key.startswith("eval/")]
    charts["Everything else"] = run.charts((key, {key: key}, {}) for key in left)
    return _titled(charts, [stretch[-1]["step"] for stretch in run.stretches], run.per)


def compared(names, runs, mixture) -> list:
    """The same of two runs, a chart a metric with both runs' curves. names, runs: of each its name and records."""
    per = max(_Run(records).per for records in runs)
    both = [_Run(records, per) for records in runs]
    longest = max((run.stretches for run in both), key=len)
    if not longest:
        return []
    keys = list(dict.fromkeys(key for run in both for key in run.keys))
    seen = set()

    def charts(rows):
        return [
            _pair(title if len(named) == 1 else f"{title}: {name}", key, names, both, options)
            for title, named, options in rows
            for name, key in named.items()
            if key in keys and not seen.add(key)
        ]

    learning = charts([("Reward", {"": "reward"}, {"range": [0, 1]})])
    for name in mixture:
        for key in (key for key in sorted(keys) if key.startswith(f"exact/{name}/level")):
            level = f"level{key[-1]}"
            lines = [
                {"name": "chance", "colour": -1, "value": value}
                for value in [mean(r.get(f"chance/{name}/{level}") for run in both for r in run.rows)]
                if value is not None
            ]
            learning += charts([(f"{name}, level {key[-1]}: exact answers", {"": key}, {**SHARE, "lines": lines})])
        points = [
            {**_held_out(records, name, "exact"), "name": f"{run}, ± s.e.", "colour": i}
            for i, (run, records) in enumerate(zip(names, runs))
        ]
        points = [each for each in points if each["steps"]]
        if points:
            learning.append({"title": f"{name}: held out, exact answers", "series": [], "points": points, **SHARE})
    found = {
        "Learning": learning,
        "Policy": charts(POLICY),
        "Speed": charts([("Time a step, s", {"": "timing_s/step"}, {"zero": True}), *SPEED]),
        "Hardware": charts(HARDWARE),
    }
    return _titled(found, [stretch[-1]["step"] for stretch in longest], per)


def _pair(title, key, names, runs, options) -> dict:
    """A chart of one metric in two runs."""
    options = {name: value for name, value in options.items() if name != "marks"}
    series = [
        {"name": name, "colour": i, "values": [mean(r.get(key) for r in stretch) for stretch in run.stretches]}
        for i, (name, run) in enumerate(zip(names, runs))
    ]
    length = max(len(one["values"]) for one in series)
    for one in series:
        one["values"] += [None] * (length - len(one["values"]))
    return {"title": title.removesuffix(": "), "series": series, **_axis(series, options)}


def _titled(charts, steps, per) -> list:
    """Sections of {title: charts}, without empty ones."""
    return [
        {"title": title, "folded": title == "Everything else", "steps": steps, "per": per, "charts": found}
        for title, found in charts.items()
        if found
    ]


class _Run:
    """A run's steps, and charts of them. per: steps a stretch; seen: the metrics that need no chart of their own any
    more."""

    def __init__(self, records, per=None):
        self.rows = [r for r in records if "reward" in r]
        self.per = per or max(1, math.ceil(len(self.rows) / POINTS))
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
        return [{"title": title, "series": series, **_axis(series, options)}] if series else []

    def charts(self, rows) -> list:
        return [chart for title, named, options in rows for chart in self.chart(title, named, **options)]


def _axis(series, options) -> dict:
    """The options of a chart, with "log" where its values span decades. Shares, stacks and what is set rather than
    found (a learning rate) keep their linear axis, and so does what is below 0 somewhere, or 0 most of the time."""
    if {"range", "percent", "stack", "raw"} & options.keys():
        return options
    values = [value for one in series for value in one["values"] if value is not None]
    positive = [value for value in values if value > 0]
    if not positive or min(values) < 0 or 2 * len(positive) < len(values) or max(positive) < DECADES * min(positive):
        return options
    return {name: value for name, value in options.items() if name != "zero"} | {"log": True}


def _phases(keys) -> dict:
    return {k.removeprefix("timing_s/"): k for k in keys if k.startswith("timing_s/") and k not in UNDRAWN}


def _learning(run, records, mixture, adaptive) -> list:
    """The reward, every puzzle's answers beside chance and the held-out ones', and an adaptive curriculum."""
    rewards = {"all": "reward", **{name: f"rewards/{name}/mean" for name in mixture}}
    out = run.chart("Reward", rewards, range=[0, 1], marks="reward")
    for name in mixture:
        exact, accuracy, chance = (_levels(run.keys, what, name) for what in ("exact", "accuracy", "chance"))
        run.seen.update(chance.values())
        lines = [
            {"name": f"chance, {level}", "colour": i, "value": mean(r.get(key) for r in run.rows)}
            for i, (level, key) in enumerate(chance.items())
        ]
        points = {what: [_held_out(records, name, what)] for what in ("exact", "accuracy")}
        out += run.chart(f"{name}: exact answers", exact, points=points["exact"], lines=lines, **SHARE, marks=name)
        places = run.chart(f"{name}: places right", accuracy, points=points["accuracy"], **SHARE, marks=name)
        if any(r.get(a) != r.get(e) for a, e in zip(accuracy.values(), exact.values()) for r in run.rows):
            out += places  # single answers are exact or not: one chart does
    moving = {name: f"curriculum/{name}/level" for name in mixture}
    level = run.chart("Level of the curriculum", moving, raw=True, zero=True)
    moved = any(r[key] != run.rows[0][key] for key in moving.values() for r in run.rows if key in r)
    means = {name: f"curriculum/{name}/mean" for name in mixture}
    gain = run.chart("The curriculum's gain over chance", means)
    return out + (level * moved + gain) * adaptive


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
    points = {"name": "held out", "colour": -1, "steps": [r["step"] for r in found], "values": values}
    if what == "exact":  # places of one puzzle are not independent, so their error is not that of a share
        errors = [math.sqrt(p * (1 - p) / r[f"eval/{name}/n"]) for p, r in zip(values, found)]
        points |= {"name": "held out ± s.e.", "errors": errors}
    return points
