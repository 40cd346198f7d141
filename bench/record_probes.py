"""`python bench/record_probes.py`: what blind solvers score on every puzzle at every level, for bench/results/ and the
README. Most of an hour; `--count N` for fewer than 2,000 puzzles a cell."""

import argparse
import json
import time
from dataclasses import asdict

from machine import machine, results_file

from sslr1 import puzzles
from sslr1.evaluate import probes
from sslr1.evaluate.textures import SUBSAMPLING, Textures


def rows(count, pictures):
    """A row a finding; `shown` says what the puzzles were cut from."""
    for name in puzzles.NAMES:
        images, shown = probes.shown(name, pictures, count), "procedural scenes"
        if name == "rotation":
            images, shown = list(images), "textures"  # drawn once for all levels
        for level in puzzles.LEVELS[name]:
            for found in probes.probe(images, name, level, count):
                yield {"shown": shown, **asdict(found)}
    for jpeg in SUBSAMPLING:  # what a file brings with it; the bound is on what the puzzle adds
        images = list(Textures(range(2 * count), jpeg))
        for level in puzzles.LEVELS["rotation"]:
            for found in probes.probe(images, "rotation", level, count):
                yield {"shown": f"textures through JPEG, {jpeg}", **asdict(found), "bound": None}


def main():
    parser = argparse.ArgumentParser(prog="python bench/record_probes.py", description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    arguments = parser.parse_args()
    found = {**machine(), "date": time.strftime("%Y-%m-%d"), "rows": []}
    for row in rows(arguments.count, probes.pictures()):
        found["rows"].append(
            {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
        )
        print(*(row[key] for key in ("shown", "puzzle", "level", "probe")), f"{row['exact']:.1%}", flush=True)
    path = results_file("probes", found)
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    print(path)


if __name__ == "__main__":
    main()
