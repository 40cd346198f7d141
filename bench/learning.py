"""What `bench/proof.py` found, as the tables and the picture of docs/results.md."""

import math
from statistics import mean, stdev

from sslr1.evaluate.intervals import wilson
from sslr1.sums import plain_sum

STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # t of 95 %, two-sided, for so many runs
LONG = ("rotation", "ordering", "similarity", "inpainting", "correspondence")


def of(found, name) -> list:
    """The runs of one name, by seed."""
    return sorted((run for run in found["runs"] if run["run"] == name), key=lambda run: run["seed"])


def shares(runs, puzzle, when, key="exact") -> list:
    """Held-out shares of each seed; when: 0 before, 1 after."""
    return [run["held_out"][when][puzzle][key] for run in runs]


def interval(values, n):
    """(mean, low, high): Student's over the seeds, and no narrower than Wilson's over all their puzzles; of one seed
    alone Wilson's."""
    p = mean(values)
    low, high = wilson(round(p * n * len(values)), n * len(values))
    if len(values) < 2:
        return p, low, high
    half = STUDENT[len(values)] * stdev(values) / math.sqrt(len(values))
    return p, max(0.0, min(p - half, low)), min(1.0, max(p + half, high))


def said(values, n) -> str:
    p, low, high = interval(values, n)
    return f"{p:.1%} [{100 * low:.1f}, {100 * high:.1f}]"


def each(values) -> str:
    return " · ".join(f"{100 * value:.1f}" for value in values)


def verdict(before, after, n) -> str:
    *_, top = interval(before, n)
    _, bottom, _ = interval(after, n)
    return ("**yes**" if bottom > top else "no") + (", of one seed's puzzles" if len(before) == 1 else "")


def alone(names):
    """A table of runs on one puzzle each: name: (what it is called, puzzle)."""

    def make(found):
        rows = []
        for name, (called, puzzle) in names.items():
            runs = of(found, name)
            if not runs:
                continue
            n, chance = runs[0]["held_out"][1][puzzle]["n"], runs[0]["held_out"][1][puzzle]["chance"]
            before, after = shares(runs, puzzle, 0), shares(runs, puzzle, 1)
            form = found["overrides"][name][0]
            warm = (
                "right answers shown" if "train.warmup.answers=right" in found["warmups"].get(form, []) else "form only"
            )
            steps = [f"{run['warmed_up_for']:,}" for run in runs]
            warm += f", {steps[0] if len(set(steps)) == 1 else ' · '.join(steps)} steps"
            cells = [called, str(runs[0]["levels"][puzzle]), warm, str(runs[0]["steps"]), f"{chance:.1%}"]
            rows.append(
                [*cells, said(before, n), said(after, n), f"{each(before)} → {each(after)}", verdict(before, after, n)]
            )
        head = ["puzzle", "level", "warm-up", "GRPO steps", "chance", "before", "after", "seeds", "intervals apart"]
        return head, rows

    return make


def together(name, asked):
    """A table of what one run trains on. asked: {puzzle or task: what it is called}."""

    def make(found):
        rows = []
        for kind, called in asked.items() if (runs := of(found, name)) else ():
            n, chance = runs[0]["held_out"][1][kind]["n"], runs[0]["held_out"][1][kind]["chance"]
            before, after = shares(runs, kind, 0), shares(runs, kind, 1)
            cells = [called, f"{runs[0]['mixture'][kind]:.0%}", str(runs[0]["steps"]), f"{chance:.1%}"]
            cells += [said(before, n), said(after, n), f"{each(before)} → {each(after)}", verdict(before, after, n)]
            rows.append(cells)
        return ["", "of the slots", "steps", "chance", "before", "after", "seeds", "intervals apart"], rows

    return make


def transfer(found):
    """What training on one puzzle (rows) does to each (columns): points of held-out accuracy gained, and the answers
    that keep the form afterwards, means over the seeds."""
    rows = []
    for trained in LONG:
        runs = of(found, f"only-{trained}")
        if not runs:
            continue
        row = [trained]
        for asked in LONG:
            if asked not in runs[0]["mixture"]:
                row.append("–")
                continue
            n = runs[0]["held_out"][1][asked]["n"]
            gained = [b - a for a, b in zip(shares(runs, asked, 0), shares(runs, asked, 1))]
            error = mean(
                math.sqrt((a * (1 - a) + b * (1 - b)) / n)
                for a, b in zip(shares(runs, asked, 0), shares(runs, asked, 1))
            )
            text = f"{100 * mean(gained):+.1f} ± {100 * error / math.sqrt(len(runs)):.1f}"
            kept = f" ({mean(shares(runs, asked, 1, 'format')):.0%})"
            row.append((f"**{text}**" if asked == trained else text) + kept)
        rows.append(row)
    return ["trained on", *LONG], rows


def compared(names, puzzles, key="exact", levels=False):
    """A table of runs that differ in one thing: name: what it is called. levels: with those that training had come
    to."""

    def make(found):
        rows = []
        for name, called in names.items():
            runs = of(found, name)
            if not runs:
                continue
            row = [called]
            for puzzle in puzzles:
                n = runs[0]["held_out"][1][puzzle]["n"]
                row += [said(shares(runs, puzzle, 0, key), n), said(shares(runs, puzzle, 1, key), n)]
            if levels:
                row.append(", ".join(f"{p} " + " · ".join(str(run["reached"][p]) for run in runs) for p in puzzles))
            drawn = sum(run["drawn"] for run in runs) / len(runs)
            rows.append(
                [*row, str(runs[0]["steps"]), f"{drawn:,.0f}", f"{mean(run['elapsed_s'] for run in runs):,.0f}"]
            )
        head = [f"{puzzle} {when}" for puzzle in puzzles for when in ("before", "after")]
        return ["", *head, *["levels at the end"] * levels, "steps", "groups drawn again", "s a run"], rows

    return make


TABLES = {
    "accuracy": alone({f"only-{puzzle}": (puzzle, puzzle) for puzzle in LONG}),
    "tried": alone(
        {
            "near-similarity": ("similarity, two layers and theta 2", "similarity"),
            "shown-correspondence": ("correspondence, three layers and theta 10,000", "correspondence"),
        }
    ),
    "transfer": transfer,
    "thinking": compared({"only-rotation": "direct", "thinking-rotation": "thinking"}, ["rotation"]),
    "lora": compared(
        {"only-rotation": "the whole model", "lora-rotation": "adapters of rank 16 on every linear"}, ["rotation"]
    ),
    "families": compared({"only-rotation": "Qwen2.5-VL", "qwen3.5-rotation": "Qwen3.5"}, ["rotation"]),
    "curriculum": compared(
        {
            "mixed-fixed": "fixed levels",
            "mixed-adaptive": "adaptive levels",
            "mixed-resampled": "fixed levels, resampling",
        },
        ["rotation", "ordering"],
        levels=True,
    ),
    "own": together("own-questions", {"rotation": "rotation, level 2", "disk": "the disk's colour"}),
    "nine": compared({"nine-default": "`default`", "nine-exact": "`exact`"}, ["ordering"], "accuracy"),
}

WIDTH, HEIGHT, GAP, LEFT, TOP = 250, 150, 22, 40, 26  # px
COLOURS = {
    "rotation": "#3b82c4",
    "ordering": "#d97a1f",
    "similarity": "#2f9e62",
    "inpainting": "#b0479a",
    "correspondence": "#a3812b",
}
WINDOW = 5  # steps that the mean of a point is over, as far as there are so many


def smoothed(values):
    """The mean of each value and those around it."""
    half = WINDOW // 2
    near = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [plain_sum(some) / len(some) for some in near]


def panels(found) -> list:
    """(puzzle, its runs alone) of what bench/proof.py found."""
    return [(name, of(found, f"only-{name}")) for name in LONG if of(found, f"only-{name}")]


def svg(panels) -> str:
    """Sampled accuracy of every seed over the steps, a panel a puzzle. panels: (puzzle, runs), a run being a dict of
    "steps", "held_out" and "sampled"."""
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    width, height = LEFT + columns * (WIDTH + GAP), rows * (HEIGHT + TOP + GAP)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="system-ui, sans-serif" font-size="12" '
        'fill="#808080" role="img" aria-label="sampled accuracy of each puzzle over steps, three seeds">'
    ]
    for place, (name, runs) in enumerate(panels):
        left, top = LEFT + place % columns * (WIDTH + GAP), TOP + place // columns * (HEIGHT + TOP + GAP)
        steps, chance = runs[0]["steps"], runs[0]["held_out"][1][name]["chance"]
        out.append(f'<text x="{left}" y="{top - 9}" fill="{COLOURS[name]}">{name}, {steps} steps</text>')
        for share in (0, 0.5, 1):
            y = top + HEIGHT * (1 - share)
            out.append(f'<path d="M{left} {y:.1f}h{WIDTH}" stroke="#808080" stroke-opacity=".25"/>')
            if place % columns == 0:
                out.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{share:.0%}</text>')
        y = top + HEIGHT * (1 - chance)
        out.append(f'<path d="M{left} {y:.1f}h{WIDTH}" stroke="{COLOURS[name]}" stroke-dasharray="2 4"/>')
        for run in runs:
            points = " ".join(
                f"{left + WIDTH * step / steps:.1f},{top + HEIGHT * (1 - share):.1f}"
                for step, share in enumerate(smoothed(run["sampled"][name]), 1)
            )
            out.append(
                f'<polyline points="{points}" fill="none" stroke="{COLOURS[name]}" '
                'stroke-width="1.3" stroke-opacity=".75"/>'
            )
    return "\n".join([*out, "</svg>", ""])
