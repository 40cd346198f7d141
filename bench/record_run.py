"""`python bench/record_run.py runs/demo`: a run's held-out accuracies, its curves and times, for bench/results/ and the
README."""

import json
import sys
from pathlib import Path

import yaml
from machine import machine, results_file


def main(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "timing_s/step" in row]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    del config["log"]  # where it ran, and on whose pictures, is nobody's business
    if not config["data"]["path"].startswith("builtin:"):
        del config["data"]["path"]
    found = {
        **machine(),
        "config": config,
        "images": len((folder / "files.txt").read_text().splitlines()),
        "held_out": [
            {k: v for k, v in row.items() if k == "step" or k.startswith("eval/")}
            for row in rows
            if "eval/rotation/n" in row
        ],
        "mean_s_a_step": {
            phase: sum(row[f"timing_s/{phase}"] for row in steps) / len(steps)
            for phase in ("stream", "rollout", "reward", "learner", "weights", "step")
        },
    }
    found["sampled"] = {
        name.split("/")[1]: [row[name] for row in steps if name in row]
        for name in steps[-1]
        if name.startswith("exact/")
    }
    found["elapsed_s"] = steps[-1]["timing_s/elapsed"]
    path = results_file(f"run {folder.name}", found)
    path.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    print(path)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
