"""Two runs on one page: their curves over each other, and how much one's held-out accuracy is above the other's.

python -m sslr1.report.compare A B [--out FILE]

Made from the two run folders alone, as a report is. Where both runs were asked the same held-out puzzles (the same
images, settings and addresses: held_out.json, files.txt), the difference is taken puzzle by puzzle, from what
held_out.jsonl says of each.
"""

import json
import sys
from datetime import UTC, datetime
from math import sqrt
from pathlib import Path
from statistics import NormalDist

from sslr1.__main__ import parsed
from sslr1.config import levels as levels_of
from sslr1.config import shares
from sslr1.errors import UserError
from sslr1.report import charts
from sslr1.report.layout import render
from sslr1.report.page import read, replace, summary
from sslr1.runs.records import ANSWERS, JsonLines, held_out

LEVEL = 0.95
UNTOLD = ("log", "checkpoint")  # sections of the settings that say nothing of what was learnt


def write(a, b, out) -> Path:
    """Write the page of two run folders. Returns its path. Raises UserError where one is no run's."""
    return replace(out, page(a, b))


def page(a, b) -> str:
    """The comparison as HTML. Raises UserError where a folder is no run's."""
    folders = [Path(a), Path(b)]
    configs, _, runs = zip(*map(read, folders))
    names = _names(folders)
    mixture = list(dict.fromkeys(name for c in configs for name, part in shares(c).items() if part > 0))
    found = differences(folders, configs, runs, mixture)
    steps = [next((row["found"][i]["step"] for row in found if row["found"][i]), None) for i in (0, 1)]
    return render(
        "compare.html",
        ("charts",),
        names=names,
        folders=folders,
        summaries=[summary(records, config) for records, config in zip(runs, configs)],
        differences=found,
        steps=[f"step {step}" for step in steps if step is not None],
        settings=settings(*configs),
        level=LEVEL,
        written=f"{datetime.now(UTC):%d %B %Y, %H:%M} UTC",
        data={"sections": charts.compared(names, runs, mixture)},
    )


def _names(folders) -> list:
    """What the runs are called on the page: their folders, with as much of the path as tells them apart."""
    paths = [folder.resolve().parts for folder in folders]
    if paths[0] == paths[1]:
        raise UserError(f"{folders[0]} and {folders[1]} are one run: there is nothing to compare")
    length = 1
    while paths[0][-length:] == paths[1][-length:]:
        length += 1
    return ["/".join(path[-length:]) for path in paths]


def settings(first, second) -> list:
    """(key, one's, the other's) of the settings that differ and may matter."""
    flat = [dict(_flat(config)) for config in (first, second)]
    keys = dict.fromkeys(key for one in flat for key in one)
    rows = [(key, *(one.get(key, "not set") for one in flat)) for key in keys]
    return [row for row in rows if row[1] != row[2] and row[0].partition(".")[0] not in UNTOLD]


def _flat(tree, path=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def differences(folders, configs, runs, mixture) -> list:
    """Of each puzzle that either run trains on: dicts of "puzzle", "level", "chance", "n", "found" (each run's last
    held-out accuracy, None where it was not asked, with its standard error and step), and, where both were asked the
    same ones, "paired": the difference (second less first), its interval and how many only one of them solved; else
    "why" there is none, in words."""
    tables = [
        {row["puzzle"]: row for row in held_out(records, shares(config), levels_of(config))}
        for config, records in zip(configs, runs)
    ]
    asked = [_asked(folder, config) for folder, config in zip(folders, configs)]
    marks = [_marks(folder, records) for folder, records in zip(folders, runs)]
    out = []
    for name in mixture:
        rows = [table.get(name) for table in tables]
        found = [row and {"exact": row["after"], "error": row["after_error"], "step": row["steps"][1]} for row in rows]
        levels = sorted({row["level"] for row in rows if row})
        chances = [row["chance"] for row in rows if row]
        one = {"puzzle": name, "levels": levels, "chances": chances, "found": found, "paired": None}
        one["why"] = _why_not(name, rows, asked, marks)
        if not one["why"]:
            one["paired"] = paired(*_answers(name, asked, marks))
        out.append(one)
    return out


def _asked(folder, config) -> dict | None:
    """What a run's held-out puzzles are: of each kind its addresses, and all that they were cut out of and by; None
    where its folder doesn't say."""
    try:
        kept = json.loads((folder / "held_out.json").read_text(encoding="utf-8"))
        listed = (folder / "files.txt").read_bytes()
        asked, addresses = kept["asked"], kept["addresses"]
        same = [asked[key] for key in ("seed", "pixels", "composed", "images")]
        same += [asked.get("rules", 1), config["eval"]["path"], config["data"]["min_side"], config["data"]["max_side"]]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return {"cut_from": [*same, listed], "tasks": asked.get("tasks") or {}, "addresses": addresses}


def _marks(folder, records) -> dict:
    """held_out.jsonl's line of a run's last evaluation; {} where there is none."""
    evaluated = [r["step"] for r in records if any(key.startswith("eval/") for key in r)]
    lines = JsonLines(folder / ANSWERS).read()
    return next((line for line in reversed(lines) if evaluated and line["step"] == evaluated[-1]), {})


def _why_not(name, rows, asked, marks) -> str:
    """Why a puzzle's difference can't be taken question by question; "" where it can."""
    for which, row in zip(("first", "second"), rows):
        if row is None:
            return f"the {which} run was not asked it"
    if rows[0]["level"] != rows[1]["level"]:
        return f"level {rows[0]['level']} in the first run, level {rows[1]['level']} in the second"
    for which, own, answered in zip(("first", "second"), asked, marks):
        if own is None or name not in own["addresses"] or name not in answered:
            return f"the {which} run's folder doesn't say which puzzles it solved (held_out.json, {ANSWERS})"
    if asked[0]["cut_from"] != asked[1]["cut_from"]:
        return "held-out puzzles of other images, or of another train.seed or size, or by other rules"
    if asked[0]["tasks"].get(name) != asked[1]["tasks"].get(name):
        return "questions of another file, or others of it held out"
    if not set(map(tuple, asked[0]["addresses"][name])) & set(map(tuple, asked[1]["addresses"][name])):
        return "other held-out puzzles"
    return ""


def _answers(name, asked, marks) -> tuple[list, list]:
    """Whether each run solved each puzzle that both have answered."""
    kept = [
        {tuple(at): mark == "1" for at, mark in zip(own["addresses"][name], answered[name]) if mark != "-"}
        for own, answered in zip(asked, marks)
    ]
    both = [at for at in kept[0] if at in kept[1]]
    return [kept[0][at] for at in both], [kept[1][at] for at in both]


def paired(first, second, level=LEVEL) -> dict:
    """The difference of two shares of the same questions (second less first), with its interval: Wald's for matched
    pairs after half a pair is added to each of the four cells, which keeps its level in small samples too, and has a
    width where no pair differs (Agresti and Min, Statistics in Medicine 24, 2005). first, second: booleans, one a
    question."""
    n = len(first)
    lost = sum(a and not b for a, b in zip(first, second))
    won = sum(b and not a for a, b in zip(first, second))
    z = NormalDist().inv_cdf((1 + level) / 2)
    middle = (won - lost) / (n + 2)
    half = z * sqrt((won + lost + 1) / (n + 2) - middle**2) / sqrt(n + 2)
    out = {"n": n, "won": won, "lost": lost, "difference": (won - lost) / n if n else 0.0}
    return out | {"low": max(-1.0, middle - half), "high": min(1.0, middle + half)}


def main():
    arguments = parsed("compare")
    try:
        print(write(arguments.first, arguments.second, arguments.out))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
