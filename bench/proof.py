"""`python bench/proof.py`: whether GRPO teaches a tiny model each puzzle, and what settings change. Trains every run of
RUNS from configs/proof.yaml with three seeds, as many at a time as there are cores, below runs/proof, and then writes
what they found to bench/results/, from which docs/results.md is made. A run that is finished is not made again, one
that was cut off goes on.

python bench/proof.py [--only REGEX] [--jobs N] [--collect]      --collect: train nothing, only write what the run
folders hold
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import yaml
from machine import machine, results_file
from PIL import Image, ImageDraw

from sslr1.data.scenes import scene, write_scenes
from sslr1.files import write_whole
from sslr1.model.tiny import build_tiny
from sslr1.ops import keys
from sslr1.runs.records import JsonLines
from sslr1.setup import processors

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "proof.yaml"
FOLDER = Path("runs") / "proof"
SEEDS = (0, 1, 2)
COLOURS = {"red": "#d02020", "green": "#20b030", "blue": "#2040d0", "yellow": "#e8d020"}
PUZZLES = ("rotation", "ordering", "similarity", "inpainting", "correspondence")
PICTURES = ("similarity", "inpainting")  # which compare pictures' hues


def shares(mixture):
    return "puzzles.mixture={" + ", ".join(f"{name}: {share}" for name, share in mixture.items()) + "}"


def only(*trained, of=PUZZLES):
    """A mixture of these puzzles in equal shares; the others are held out to be asked and never trained on."""
    return shares({name: int(name in trained) for name in of})


TINTED = f"data.path={FOLDER / 'tinted'}"
DISKS = FOLDER / "disks" / "disks.jsonl"  # questions of our own, a made task
# What a model is warmed up to: the settings of the form that it learns, which its runs share.
FORMS = {
    "direct": [only(*PUZZLES)],
    "thinking": ["puzzles.mixture={rotation: 1}", "puzzles.thinking=true", "rollout.max_tokens=32"],
    "levels": [
        "puzzles.mixture={rotation: 1, ordering: 1}",
        "puzzles.levels.ordering=2",
        "puzzles.curriculum=adaptive",
        "rollout.max_tokens=32",
    ],
    "pictures": [shares({name: 1 if name in PICTURES else 0.15 for name in PUZZLES}), TINTED],
    "pictures-near": [only(*PICTURES, of=PICTURES), TINTED],
    "points": ["puzzles.mixture={correspondence: 1}"],
    "qwen3.5": [only(*PUZZLES)],
    "nine": ["puzzles.mixture={ordering: 1}", "puzzles.levels.ordering=3", "rollout.max_tokens=32"],
    "own": ["puzzles.mixture={rotation: 1}", f"tasks.disk={{path: {DISKS}, kind: text, share: 0.3}}"],
}
# Pictures are compared by a model with a third layer and the published models' theta. The tiny one's, of 2, shows where
# in an image something is, and hardly in which of five images.
FAR = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]}
LARGER = {"num_hidden_layers": 3, "rope_parameters": FAR}
MODELS = {"pictures": {"text": LARGER}, "points": {"text": LARGER}, "qwen3.5": {"family": "qwen3_5"}}
# How it is warmed up to it, unless by FORMAT_ONLY. Which picture belongs to another, or nine tiles' order, a model of
# random weights can't begin to guess: it is shown right answers until it does so now and then.
FORMAT_ONLY = ["train.warmup.steps=120"]
SHOWN = "train.warmup.answers=right"
WARMUPS = {
    "levels": ["train.warmup.steps=240"],
    "pictures": [SHOWN, f"train.warmup.right_for=[{', '.join(PICTURES)}]", "train.warmup.steps=300"],
    "pictures-near": [SHOWN, "train.warmup.steps=1000"],
    "points": [SHOWN, "train.warmup.steps=400"],
    "nine": [SHOWN, "train.warmup.steps=150"],
}
# … and on, with other puzzles each time, until this share of the held-out ones of each of these kinds is right: when
# that is depends on the seed.
UNTIL = {"pictures": (PICTURES, 0.5)}
ON = "train.warmup.steps=50"
MOST = 20  # times: a seed that doesn't come to it begins with what it has
BONUS = "loss.entropy_coef=0.01"
MORE = ["rollout.prompts=64", "loss.entropy_coef=0.03", "train.steps=200"]
ADAPTERS = ["model.lora.rank=16", "model.lora.vision=all-linear", "optim.lr=3e-3"]  # on all linears of both towers
FIXED = "puzzles.curriculum=fixed"
# name of a run: its form, and its settings beside that form's
RUNS = {
    "only-rotation": ("direct", [only("rotation")]),
    "lora-rotation": ("direct", [only("rotation"), *ADAPTERS]),
    "qwen3.5-rotation": ("qwen3.5", [only("rotation")]),
    "only-ordering": ("direct", [only("ordering"), BONUS, "train.steps=200"]),
    "thinking-rotation": ("thinking", []),
    "only-similarity": ("pictures", [only("similarity"), *MORE]),
    "only-inpainting": ("pictures", [only("inpainting"), *MORE]),
    "only-correspondence": ("direct", [only("correspondence"), BONUS]),
    "near-similarity": ("pictures-near", [only("similarity", of=PICTURES), *MORE]),
    "shown-correspondence": ("points", [BONUS, "train.steps=100"]),
    "mixed-fixed": ("levels", [BONUS, "train.steps=250", FIXED]),
    "mixed-adaptive": ("levels", [BONUS, "train.steps=250"]),
    "mixed-resampled": ("levels", [BONUS, "train.steps=250", FIXED, "rollout.resample=2"]),
    "nine-default": ("nine", []),
    "nine-exact": ("nine", ["puzzles.rule=exact"]),
    "own-questions": ("own", []),
}


LOCKS = defaultdict(Lock)  # a model is warmed up once
BUILDS = Lock()  # transformers' first import can't be done by several threads at once


def write_disks(path, count=2000, size=128) -> None:
    """A scene with a disk in one of four colours on it and a question about that, for each of `count` rows of a JSONL
    file; a file that is there already is left alone."""
    if path.exists():
        return
    (path.parent / "pictures").mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        rng, picture = keys.generator("disks", number), Image.fromarray(scene(number, size, seed=1))
        colour = sorted(COLOURS)[int(rng.integers(0, len(COLOURS)))]
        radius = rng.uniform(0.18, 0.28) * size
        x, y = rng.uniform(radius, size - radius, 2)
        ImageDraw.Draw(picture).ellipse((x - radius, y - radius, x + radius, y + radius), COLOURS[colour])
        picture.save(path.parent / "pictures" / f"{number:04d}.jpg", quality=92)
        rows.append({"images": f"pictures/{number:04d}.jpg", "question": "What colour is the disk?", "answer": colour})
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def runs():
    """{folder name: (run, seed, form, overrides)} of all runs and seeds."""
    return {f"{name}-seed-{seed}": (name, seed, form, own) for name, (form, own) in RUNS.items() for seed in SEEDS}


def call(module, *arguments, log):
    """`python -m MODULE …` on one thread, its words in a file. Raises RuntimeError if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(log, "w") as out:
        done = subprocess.run([sys.executable, "-m", module, *arguments], stdout=out, stderr=out, env=environment)
    if done.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)} failed; see {log}")


def warmed_up(form, seed) -> Path:
    """A tiny model of this seed that knows its puzzles' form, and as much of their answers as its warm-up has shown
    it."""
    folder = FOLDER / f"warm-{form}-seed-{seed}"
    if complete(folder):
        return folder
    with BUILDS:
        model = build_tiny(FOLDER / f"cold-{form}-seed-{seed}", seed=seed, **MODELS.get(form, {}))
    for turn in range(MOST if form in UNTIL else 1):
        part = FOLDER / f"warm-{form}-seed-{seed}-part-{turn}"
        if not complete(part):
            own = [f"model.path={model}", f"train.seed={seed + 1000 * turn}", f"log.dir={FOLDER}"]
            options = [*own, *FORMS[form], *WARMUPS.get(form, FORMAT_ONLY), *([ON] if turn else [])]
            call("sslr1.warmup", str(CONFIG), str(part), *options, log=FOLDER / f"{part.name}.log")
        model = part
        if form in UNTIL and held_out(model, form, seed) >= UNTIL[form][1]:
            break
    os.replace(model, folder)
    return folder


def warmed_up_for(form, seed) -> int:
    """The steps that it took."""
    turns = len(list(FOLDER.glob(f"warm-{form}-seed-{seed}-part-*.json")))  # one where nothing was asked in between
    first, further = (
        next(int(option.rpartition("=")[2]) for option in options if option.startswith("train.warmup.steps="))
        for options in (WARMUPS.get(form, FORMAT_ONLY), [ON])
    )
    return first + further * max(0, turns - 1)


def complete(folder) -> bool:
    return (folder / "preprocessor_config.json").exists()


def held_out(model, form, seed) -> float:
    """The share of held-out puzzles that a model solves, of the kind in UNTIL that it solves fewest of."""
    out, asked = model.with_suffix(".json"), only(*UNTIL[form][0], of=UNTIL[form][0])
    options = [f"model.path={model}", f"train.seed={seed}", f"log.dir={FOLDER}", *FORMS[form], asked, "--out", str(out)]
    call("sslr1.evaluate", str(CONFIG), *options, log=FOLDER / f"{model.name}-asked.log")
    return min(cell["accuracy"] for cell in json.loads(out.read_text())["cells"])


def train(folder):
    _, seed, form, own = runs()[folder]
    with LOCKS[form, seed]:
        warm = warmed_up(form, seed)
    options = [
        f"model.path={warm}",
        f"train.seed={seed}",
        f"log.dir={FOLDER}",
        f"log.name={folder}",
        *FORMS[form],
        *own,
    ]
    began = time.monotonic()
    call("sslr1.train", str(CONFIG), *options, log=FOLDER / f"{folder}.log")
    return time.monotonic() - began


def found_in(folder) -> dict:
    """What a finished run's folder says: held-out counts before and after, and what was sampled on the way."""
    rows = JsonLines(FOLDER / folder / "metrics.jsonl").read()
    from sslr1 import config  # needs pydantic, which the rest of bench/ goes without

    settings = yaml.safe_load((FOLDER / folder / "config.yaml").read_text())
    held_out = [row for row in rows if evaluated(row)]
    steps = [row for row in rows if "timing_s/step" in row]
    shares = {"mixture": config.shares(settings), "levels": config.levels(settings)}
    return {
        **shares,
        "steps": settings["train"]["steps"],
        "held_out": [
            {
                name: {
                    key: round(row[f"eval/{name}/{key}"], 4) for key in ("exact", "accuracy", "format", "chance", "n")
                }
                for name in shares["mixture"]
            }
            for row in (held_out[0], held_out[-1])
        ],
        "sampled": {
            name: [round(row[key], 3) for row in steps if key in row]
            for name, share in shares["mixture"].items()
            if share and (key := f"exact/{name}/level{shares['levels'][name]}")
        },
        "reached": {
            name: row[key]
            for row in steps[-1:]
            for name in shares["mixture"]
            if (key := f"curriculum/{name}/level") in row
        },
        "entropy": [round(row["entropy"], 3) for row in steps],
        "drawn": sum(row.get("rollout/resampled", 0) for row in steps),
        "elapsed_s": round(sum(row["timing_s/step"] for row in steps)),
    }


def evaluated(row) -> bool:
    return any(key.startswith("eval/") for key in row)


def finished(folder) -> bool:
    rows, settings = JsonLines(FOLDER / folder / "metrics.jsonl").read(), FOLDER / folder / "config.yaml"
    return (
        bool(rows)
        and evaluated(rows[-1])
        and rows[-1]["step"] == yaml.safe_load(settings.read_text())["train"]["steps"]
    )


def collect() -> Path:
    """Write the results of all finished runs."""
    base = yaml.safe_load(CONFIG.read_text())
    done = {folder: (name, seed) for folder, (name, seed, *_) in runs().items() if finished(folder)}
    found = {
        **machine(),
        "config": base,
        "forms": FORMS,
        "warmups": {"": FORMAT_ONLY, **WARMUPS},
        "further": [ON],
        "until": UNTIL,
        "models": MODELS,
        "overrides": RUNS,
        "runs": [],
    }
    path = results_file("proof", found)
    made = {
        folder: {"run": name, "seed": seed, "warmed_up_for": warmed_up_for(RUNS[name][0], seed), **found_in(folder)}
        for folder, (name, seed) in done.items()
    }
    made = recorded(path, found) | made
    lines = [json.dumps(made[folder], ensure_ascii=False) for folder in runs() if folder in made]
    head, tail = json.dumps(found, indent=1, ensure_ascii=False).rsplit("[]", 1)  # a line a run
    path.write_text(head + "[\n" + ",\n".join(lines) + "\n ]" + tail + "\n")
    return path


def recorded(path, now) -> dict:
    """{folder name: what was found} of the runs that `path` holds from before and whose settings are still the same."""
    if not path.exists():
        return {}
    then = json.loads(path.read_text())

    def settings(found, name):
        form, own = found["overrides"][name]
        warmup = found["warmups"].get(form, found["warmups"][""])
        parts = (found["forms"].get(form), warmup, found["until"].get(form), found["models"].get(form), found["config"])
        return json.dumps([form, own, parts, found["further"]])

    kept = [
        run
        for run in then["runs"]
        if run["run"] in now["overrides"] and settings(then, run["run"]) == settings(now, run["run"])
    ]
    return {f"{run['run']}-seed-{run['seed']}": run for run in kept}


def main():
    parser = argparse.ArgumentParser(prog="python bench/proof.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", default="", metavar="REGEX", help="runs whose folders' names match")
    parser.add_argument("--jobs", type=int, default=processors.share(), help="runs at a time, a thread each")
    parser.add_argument("--collect", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    todo = [f for f in runs() if re.search(arguments.only, f) and not arguments.collect and not finished(f)]
    write_scenes(FOLDER / "builtin" / "scenes-2000", 2000)
    write_scenes(FOLDER / "tinted", 2000, tint=True)
    write_disks(DISKS)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for folder, seconds in zip(todo, pool.map(train, todo)):
            print(f"{folder}: {seconds:.0f} s", flush=True)
    print(collect())


if __name__ == "__main__":
    main()
