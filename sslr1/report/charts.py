"""Which charts a run's metrics make: plain data for template/report.js, which draws it. A metric without a chart of its own gets one
at the end, so that a new one is seen without a line here."""

import math

from sslr1.runs.alarms import ADVICE
from sslr1.sums import plain_sum

POINTS = 300  # of a series; a longer run's are means over stretches of as many steps as it takes
UNDRAWN = ("step", "skipped_steps", "timing_s/step", "timing_s/elapsed")


def sections(records, mixture) -> list:
    """Charts by section, from metrics.jsonl's records: dicts of "title", "steps" (the last of each stretch), "per" (steps a
    stretch), "folded" and "charts". A chart has "title", "series" (name, colour as a number, values with None where there are none) and
    options; a colour of -1 is the text's. Options: percent, range, zero (the axis begins there), stack, raw (not smoothed), points (held-out: name, steps, values, errors), lines
    (chance: name, colour, value), marks (`events`)."""
    rows = [r for r in records if "reward" in r]
    per = max(1, math.ceil(len(rows) / POINTS))
    stretches = [rows[i : i + per] for i in range(0, len(rows), per)]
    happened = events(rows)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    seen = {
        *UNDRAWN,
        *(key for key in keys if key.startswith("alarm/") or key.endswith("/plateau")),
    }  # alarms are marks
    marks = {about: [e for e in happened if e["about"] == about] for about in (*mixture, *ADVICE, "gradient")}

    def chart(title, named, **options):
        """named: {name: metric}; those that the run doesn't have are left out, and so is a chart without any."""
        seen.update(named.values())
        series = [
            {
                "name": name,
                "colour": i - ("all" in named),
                "values": [mean(r.get(key) for r in stretch) for stretch in stretches],
            }
            for i, (name, key) in enumerate(named.items())
            if key in keys
        ]
        return [{"title": title, "series": series, **options}] if series else []

    rewards = {"all": "reward", **{name: f"rewards/{name}/mean" for name in mixture}}
    learnt = chart("Reward", rewards, range=[0, 1], marks=marks["reward"])
    for name in mixture:
        exact, accuracy, chance = (_levels(keys, what, name) for what in ("exact", "accuracy", "chance"))
        seen.update(chance.values())
        lines = [
            {"name": f"chance, {level}", "colour": i, "value": mean(r.get(key) for r in rows)}
            for i, (level, key) in enumerate(chance.items())
        ]
        options = {"percent": True, "range": [0, 1], "marks": marks[name]}
        points = _held_out(records, name, "exact")
        learnt += chart(f"{name}: exact answers", exact, points=points, lines=lines, **options)
        places = chart(f"{name}: places right", accuracy, points=_held_out(records, name, "accuracy"), **options)
        if any(r.get(a) != r.get(e) for a, e in zip(accuracy.values(), exact.values()) for r in rows):
            learnt += places  # single answers are exact or not: one chart does
    moving = {name: f"curriculum/{name}/level" for name in mixture}
    level = chart("Level of the curriculum", moving, raw=True, zero=True)
    learnt += level if any(r[key] != rows[0][key] for key in moving.values() for r in rows if key in r) else []
    learnt += chart("The curriculum's gain over chance", {name: f"curriculum/{name}/mean" for name in mixture})

    share = {"percent": True, "range": [0, 1]}
    policy = [
        *chart("Entropy, nats a token", {"entropy": "entropy"}, zero=True, marks=marks["entropy"]),
        *chart("Tokens a completion", {"mean": "completions/mean_length"}, zero=True),
        *chart(
            "Completions",
            {"right format": "format", "cut off": "completions/clipped_ratio"},
            marks=marks["format"],
            **share,
        ),
        *chart("Groups with equal rewards, which teach nothing", {"share": "frac_reward_zero_std"}, **share),
        *chart("Standard deviation of a group's rewards", {"mean": "reward_std"}, zero=True),
        *chart(
            "Clipped tokens", {"low": "clip_ratio/low_mean", "high": "clip_ratio/high_mean"}, percent=True, zero=True
        ),
        *chart("KL to the reference, nats a token", {"kl": "kl"}, zero=True),
        *chart("Gradient norm, before clipping", {"norm": "grad_norm"}, zero=True, marks=marks["gradient"]),
        *chart("Learning rate", {"learning rate": "learning_rate"}, raw=True, zero=True),
    ]
    phases = {key.removeprefix("timing_s/"): key for key in keys if key.startswith("timing_s/") and key not in UNDRAWN}
    rates = {
        "completions, whole step": "perf/tokens_per_second",
        "learner": "perf/learner_tokens_per_second",
        "learner, a prompt counted for each completion": "perf/learner_effective_tokens_per_second",
    }
    memory = {"GPU, peak": "perf/max_memory_allocated_gb", "host, peak": "perf/max_host_memory_gb"}
    speed = [
        *chart("Time a step, s", phases, stack=True, zero=True),
        *chart("Tokens a second", rates, zero=True),
        *chart("Memory of rank 0, GiB", memory, raw=True, zero=True),
        *chart("Of the GPU's peak operations", {"learner": "perf/mfu"}, percent=True, zero=True),
        *chart("Learner's TFLOP/s a rank", {"learner": "perf/learner_tflops"}, zero=True),
    ]
    others = [c for key in keys if key not in seen and not key.startswith("eval/") for c in chart(key, {key: key})]
    steps = [stretch[-1]["step"] for stretch in stretches]
    titled = (("Learning", learnt), ("Policy", policy), ("Speed", speed), ("Everything else", others))
    return [
        {"title": title, "folded": charts is others, "steps": steps, "per": per, "charts": charts}
        for title, charts in titled
        if charts
    ]


def events(records) -> list:
    """What a reader should know of, in order: dicts of "step", "words", "about" (a puzzle, or a kind of alarm of the whole run) and
    "alarm"; alarms, levels that moved, updates that were skipped."""
    out, before = [], {}

    def note(words, about, alarm=True):
        out.append({"step": record["step"], "words": words, "about": about, "alarm": alarm})

    for record in records:
        for key in (k for k in record if k.startswith(("curriculum/", "alarm/")) or k == "skipped_steps"):
            value, (kind, *name) = record[key], key.split("/")
            if kind == "alarm":
                note(ADVICE[name[0]], name[0])
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
