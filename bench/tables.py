"""`python bench/tables.py` writes the measured tables of README.md and docs/ anew from bench/results/, and the learning
curves; `--check` only says which are stale.

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`.
"""

import argparse
import json
import math
import re
import sys
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import first
import journal
import learning
from counters import ROW as COUNTERS
from shown import compared, counted, on_gpu, table, wanting

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
MACHINE = "amd-epyc-2-cores"  # the one whose results the pages show
PAGES = ("README.md", "docs/benchmarks.md", "docs/puzzles.md", "docs/results.md")
PROOF, PHOTOS = "docs/pictures/proof.svg", "docs/pictures/photos.svg"
ORDER = ("step", "learner", "rollout", "loss", "sampling", "render", "stream", "decode")  # the others follow


def load(kind):
    return json.loads((RESULTS / f"{kind}-{MACHINE}.json").read_text())


def demo():
    """Held-out accuracy of `make demo` before and after, with the standard error of the change; and what it took."""
    run = load("run-demo")
    first, last = run["held_out"][0], run["held_out"][-1]
    rows = []
    for name in run["config"]["puzzles"]["mixture"]:
        chance, n = last[f"eval/{name}/chance"], last[f"eval/{name}/n"]
        before, after = first[f"eval/{name}/exact"], last[f"eval/{name}/exact"]
        error = math.sqrt((before * (1 - before) + after * (1 - after)) / n)
        level = run["config"]["puzzles"]["levels"][name]
        change = f"{100 * (after - before):+.1f} ± {100 * error:.1f}"
        rows.append([name, str(level), f"{chance:.1%}", f"{before:.1%}", f"**{after:.1%}**", change])
    steps, machine = last["step"], f"{run['cores']} cores ({run['cpu']})"
    found = table(
        ["puzzle", "level", "chance", "after format warm-up", f"after {steps} steps of GRPO", "change ± s.e."], rows
    )
    took = f"Training takes {run['elapsed_s']:.0f} s on {machine}, after installation."
    return f"{found}\n\n{n} held-out puzzles each, greedy decoding. {took}"


def photos_runs() -> list:
    """configs/photos.yaml with several seeds."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"run-photos-?-{MACHINE}.json"))]


def sampled(run) -> dict:
    """A run as `learning.svg` takes it."""
    last = run["held_out"][-1]
    chance = {name: {"chance": last[f"eval/{name}/chance"]} for name in run["sampled"]}
    return {"steps": last["step"], "held_out": [chance, chance], "sampled": run["sampled"]}


def photos():
    """Held-out accuracy of each seed over the steps, their mean and how far they lie from it."""
    runs = photos_runs()
    if not runs:
        return "Not run yet."
    steps = [row["step"] for row in runs[0]["held_out"]]
    shares = [[row["eval/rotation/exact"] for row in run["held_out"]] for run in runs]
    rows = [[f"seed {seed}", *map(share, own)] for seed, own in enumerate(shares)]
    at = list(zip(*shares))
    rows.append(["**mean ± s.d.**", *(f"**{mean(x):.1%}** ± {100 * stdev(x):.1f}" for x in at)])
    last, first = runs[0]["held_out"][-1], runs[0]
    n, chance = last["eval/rotation/n"], last["eval/rotation/chance"]
    found = table(["held-out accuracy after", *(f"{step} steps" for step in steps)], rows)
    return f"{found}\n\n{first['images']} photographs, {n} held-out puzzles a seed, greedy; chance is {chance:.1%}."


def kernels():
    """Rows of `python bench/`, in the pages' order."""
    return sorted(load("kernels")["rows"], key=lambda row: (*ORDER, row["bench"]).index(row["bench"]))


def benchmarks():
    return compared(kernels())


def unmeasured():
    """Rows that had no figure on that machine, and why."""
    return wanting(kernels())


def counts():
    """Rows that count and have no peer."""
    return counted(kernels())


def gpu():
    """A table for each card that was measured, with the tests' count; and all rows that a GPU has, where none was."""
    from benches import rows_of  # which takes torch

    listed = [
        {"bench": bench, "what": row.what, "against": row.against, "goal": row.goal} for bench, row in rows_of("cuda")
    ]
    listed.append(COUNTERS)
    parts = []
    for path in sorted(RESULTS.glob("kernels-*.json")):
        found = journal.load(path)
        if found["mode"] == "cuda":
            by_name = {tuple(journal.name(row)): row for row in [*listed, *found["rows"]]}
            tests = found["tests"]
            failed = "".join(f"\n- `{test}`: {how}" for test, how in tests["others"].items())
            parts.append(
                f"{found['card']}; {versions(found)}\n\n{on_gpu(by_name.values())}\n\n{tests['passed']} tests marked "
                f"gpu passed; {len(tests['others'])} did not{failed}"
            )
    return "\n\n".join(parts) or on_gpu(listed)


def versions(found):
    return ", ".join(f"{name} {found['versions'][name]}" for name in ("torch", "triton", "transformers"))


def probes():
    """What blind solvers score, a column a level; the 95 % limit in brackets where a bound is stated, * where none
    is."""
    cells, chance = {}, {}
    for row in load("probes")["rows"]:
        puzzle, probe, level, (_, _, jpeg) = (
            row["puzzle"],
            row["probe"],
            row["level"],
            row["shown"].partition(" through "),
        )
        if probe in ("constant", "random") or (jpeg and probe != "grid phase"):  # at chance
            continue
        probe += f", through {jpeg}" if jpeg else ""
        note = " *" if row["bound"] is None else f" (≤ {row['limit']:.1%})"
        cells.setdefault(puzzle, {}).setdefault(probe, {})[level] = share(row["exact"]) + note
        chance.setdefault(puzzle, {})[level] = share(row["chance"])
    rows = []
    for puzzle in ("rotation", "similarity", "inpainting", "ordering", "correspondence"):
        rows.append([f"**{puzzle}**: chance", *(chance[puzzle][level] for level in (1, 2, 3, 4))])
        rows += [[probe, *(found[level] for level in (1, 2, 3, 4))] for probe, found in cells[puzzle].items()]
    return table(["blind solver", "level 1", "level 2", "level 3", "level 4"], rows)


def share(p) -> str:
    return "<0.1%" if p < 0.0005 else f"{p:.1%}"


def learnt(make):
    """A table of what bench/proof.py found."""

    def text():
        head, rows = make(load("proof"))
        return table(head, rows) if rows else "Not run yet."

    return text


TABLES = {
    "demo": demo,
    "photos": photos,
    "benchmarks": benchmarks,
    "unmeasured": unmeasured,
    "counts": counts,
    "gpu": gpu,
    "probes": probes,
}
TABLES |= {name: learnt(make) for name, make in learning.TABLES.items()}
TABLES |= {
    name: partial(lambda make: first.text(make, first.load(RESULTS, MACHINE)), make)
    for name, make in first.TABLES.items()
}
PATTERN = re.compile(r"<!-- table: (\w+) -->\n.*?<!-- end of table -->", re.S)


def rewritten(text) -> str:
    """A page with all its tables made anew."""
    return PATTERN.sub(lambda m: f"<!-- table: {m[1]} -->\n{TABLES[m[1]]()}\n<!-- end of table -->", text)


def main():
    parser = argparse.ArgumentParser(prog="python bench/tables.py", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a table is stale")
    arguments = parser.parse_args()
    made = {page: rewritten((ROOT / page).read_text(encoding="utf-8")) for page in PAGES} | {
        PROOF: learning.svg(learning.panels(load("proof"))),
    }
    if runs := photos_runs():
        made[PHOTOS] = learning.svg([("rotation", [sampled(run) for run in runs])])
    stale = [
        name for name, text in made.items() if not (ROOT / name).exists() or (ROOT / name).read_text("utf-8") != text
    ]
    if not arguments.check:
        for name in stale:
            (ROOT / name).write_text(made[name], encoding="utf-8")
    print(f"{'stale' if arguments.check else 'written'}: {', '.join(stale) or 'none'}")
    sys.exit(bool(stale and arguments.check))


if __name__ == "__main__":
    main()
