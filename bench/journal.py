"""Rows kept as they are measured: JSON lines that survive their process, and the results file that they become.

Each process writes {"process": the machine}, then for each row {"begin": the row's name} and {"row": what was found}. A
row that was begun and not found is one that its process didn't survive.
"""

import json
import os
from pathlib import Path

MACHINE = ("mode", "gpu", "cpu", "cores", "python", "versions")  # rows of one file have these in common
LOST = "its process ended while it was measured"


def name(row) -> list:
    return [row["bench"], row["what"], row["against"]]


def add(path, **line):
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")


def read(path) -> list:
    """Its lines; one that is cut off, as a process that is killed may leave it, is none."""
    found = []
    for line in Path(path).read_text("utf-8").splitlines() if Path(path).exists() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def common(found) -> dict:
    """A GPU's rows may have been measured beside several CPUs."""
    without = ("cpu", "cores") if found.get("mode") == "cuda" else ()
    return {key: found[key] for key in MACHINE if key in found and key not in without}


def gather(lines) -> dict:
    """The machine and its rows, each by its last measurement; ValueError if they were measured on several."""
    machine, rows = {}, {}
    for line in lines:
        if "process" in line:
            if machine not in ({}, common(line["process"])):
                raise ValueError(f"rows of two machines: {machine} and {common(line['process'])}")
            machine = common(line["process"])
        elif "begin" in line:
            lost = dict(zip(("bench", "what", "against"), line["begin"])) | {"goal": "", "failed": LOST}
            rows.setdefault(tuple(line["begin"]), lost)
        elif "row" in line:
            rows[tuple(name(line["row"]))] = line["row"]
    return {**machine, "rows": list(rows.values())}


def lost(path) -> list:
    """Names of rows that were begun and not found."""
    return [name(row) for row in gather(read(path))["rows"] if row.get("failed") == LOST]


def difference(one, other) -> str:
    """In words: what of the machine isn't the same."""
    pairs = {**flat(one)}, {**flat(other)}
    changed = [key for key in dict.fromkeys((*pairs[0], *pairs[1])) if pairs[0].get(key) != pairs[1].get(key)]
    return ", ".join(f"{key} {pairs[0].get(key)}, now {pairs[1].get(key)}" for key in changed)


def flat(found) -> dict:
    found = common(found)
    versions = found.pop("versions", {})
    return {**found, **versions}


def load(path) -> dict:
    return json.loads(Path(path).read_text("utf-8"))


def write(path, found):
    partial = Path(f"{path}.partial")
    partial.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
