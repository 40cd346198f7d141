"""`python bench/tables.py` writes the measured tables of README.md and docs/ anew from bench/results/, and the learning curve;
`--check` only says which are stale.

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`.
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path

import learning
from curve import svg

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
MACHINE = "amd-epyc-2-cores"  # the one whose results the pages show
PAGES = ("README.md", "docs/benchmarks.md", "docs/puzzles.md", "docs/results.md")
CURVE, PROOF = "docs/pictures/learning.svg", "docs/pictures/proof.svg"
ORDER = ("step", "learner", "rollout", "loss", "sampling", "render", "stream", "decode")


def load(kind):
    return json.loads((RESULTS / f"{kind}-{MACHINE}.json").read_text())


def table(head, rows) -> str:
    """Markdown of a table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


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
    return f"{found}\n\n{n} held-out puzzles each, greedy decoding. Training takes {run['elapsed_s']:.0f} s on {machine}, after installation."


def benchmarks():
    """Every row of `python bench/` that has a figure."""
    found = [r for name in ORDER for r in load("kernels")["rows"] if r["bench"] == name and "ratio" in r]
    rows = []
    for r in found:
        memory = " ({:,} / {:,} MB)".format(*r["extra_mb"]) if "extra_mb" in r else ""
        times = [f"{1e3 * r[side]:,.1f}" for side in ("ours_s", "peer_s")]
        rows.append([r["what"], r["against"] + memory, *times, f"**{r['ratio']:.2f}**", r["goal"]])
    return table(["what", "against (extra memory, ours / theirs)", "ours, ms", "peer, ms", "peer / ours", "goal"], rows)


def unmeasured():
    """Rows that had no figure on that machine, and why."""
    return table(
        ["what", "against", "why not"],
        [[r["what"], r["against"], r["why_not"]] for r in load("kernels")["rows"] if "ratio" not in r],
    )


def probes():
    """What blind solvers score, a column a level; the 95 % limit in brackets where a bound is stated, * where none is."""
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


TABLES = {"demo": demo, "benchmarks": benchmarks, "unmeasured": unmeasured, "probes": probes}
TABLES |= {name: learnt(make) for name, make in learning.TABLES.items()}
PATTERN = re.compile(r"<!-- table: (\w+) -->\n.*?<!-- end of table -->", re.S)


def rewritten(text) -> str:
    """A page with all its tables made anew."""
    return PATTERN.sub(lambda m: f"<!-- table: {m[1]} -->\n{TABLES[m[1]]()}\n<!-- end of table -->", text)


def main():
    parser = argparse.ArgumentParser(prog="python bench/tables.py", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a table is stale")
    arguments = parser.parse_args()
    made = {page: rewritten((ROOT / page).read_text(encoding="utf-8")) for page in PAGES} | {
        CURVE: svg(load("run-demo")),
        PROOF: learning.svg(load("proof")),
    }
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
