"""What a GRPO step copies from the host to the device, counted on a stand-in for a GPU (bench/standin.py): the
trainer's own stream, rollout and learner, 64 puzzles of all kinds out of pictures of 448 x 448 px, and the tiny model
in bfloat16.

    python bench/transfers.py [--prompts 64] [--side 448] [--updates 1 3]

Prints a JSON line for each number of updates. Run with another tree's sslr1 before this one's on PYTHONPATH it counts
that one's step, by the same copies.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from inspect import signature
from pathlib import Path

from row import Row, Sides

ROOT = Path(__file__).parent.parent
BEFORE = "96c2c70"  # the last commit that copied patches for the prefill and for every micro-batch of every update


def rows(mode):
    """A CPU's: what is counted is the same everywhere. In a process of its own, where the stand-in stays."""
    what = "bytes from host to device of a step of 64 puzzles of 448 px, loss.updates={}"
    return [
        Row(what=what.format(n), make=lambda n=n: Sides(ours=lambda: counted(n), facts=said, once=True))
        for n in ((1, 3) if mode == "cpu" else ())
    ]


def said(found) -> dict:
    """A row's facts: in MB, and per byte of the pictures. before: what BEFORE's step copies, by what it consists of:
    patches to the prefill and to each update, and what isn't pictures as now. NOTES.md has its own count."""
    mb = {name: found[name] / 1e6 for name in ("pictures", "ids", "copied", "before")}
    share = (mb["copied"] - mb["ids"]) / mb["pictures"]
    return {"copies_mb": {**mb, "share": share, "commit": BEFORE}}


def counted(updates) -> dict:
    command = [sys.executable, __file__, "--updates", str(updates)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    return json.loads(done.stdout.splitlines()[-1])


def session(device, folder, prompts, side, **settings):
    """A Session on the device, of pictures drawn for it."""
    import torch
    import torch.distributed as dist
    import torch.testing._internal.distributed.fake_pg

    from sslr1 import config, distributed
    from sslr1.data.scenes import write_scenes
    from sslr1.puzzles import NAMES
    from sslr1.setup.build import build

    write_scenes(folder / "scenes", 2 * prompts + 70, side)
    values = {
        "model": {"path": "builtin:tiny", "dtype": "bfloat16"},
        "data": {"path": str(folder / "scenes"), "min_side": min(side, 252)},
        "puzzles": {"mixture": dict.fromkeys(NAMES, 0.2), "thinking": False, "max_pixels": side * side},
        "rollout": {"prompts": prompts, "group_size": 2, "max_tokens": 2},
        "log": {"dir": str(folder / "runs")},
        "train": {"threads": 1},
    }
    for section, own in settings.items():
        values.setdefault(section, {}).update(own)
    dist.init_process_group(f"cpu:gloo,{device.type}:fake", rank=0, world_size=1, store=dist.HashStore())
    torch.manual_seed(0)
    return build(config.check(values), distributed.World(0, 1, device))


def step(built, updates):
    """A step's batch and the learner's StepResult, as `sslr1.train` makes them; rewards are drawn, so that every group
    has a gradient."""
    import torch

    from sslr1 import train
    from sslr1.learner import Learner
    from sslr1.run import Clock

    c = built.config
    options = {name: getattr(built, name) for name in ("spec", "keep_seen") if name in signature(Learner).parameters}
    learner = Learner(
        built.policy,
        built.world,
        optim=c.optim,
        loss=c.loss.model_copy(update={"updates": updates}),
        temperature=c.rollout.temperature,
        max_tokens=c.rollout.max_tokens,
        token_budget=c.train.token_budget,
        steps=c.train.steps,
        **options,
    )
    stream = built.stream()
    batch = stream.build(0)  # no step ahead of it
    stream.close()
    drawn = train.roll_out(built, batch, Clock())
    learned = learner.step(drawn.groups, torch.rand(drawn.rewards.shape))
    built.weights.refresh(built.policy)
    return batch, learned


def main():
    parser = argparse.ArgumentParser(prog="python bench/transfers.py", description=__doc__)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--side", type=int, default=448)
    parser.add_argument("--updates", type=int, nargs="+", default=[1, 3])
    options = parser.parse_args()
    import standin

    device = standin.start()
    with tempfile.TemporaryDirectory() as folder:
        built = session(device, Path(folder), options.prompts, options.side)
        if hasattr(built, "keep_seen"):
            standin.render_by_triton(launch=False)
        for updates in options.updates:
            with standin.counting() as (copied, waited):
                batch, _ = step(built, updates)
            print(json.dumps(figures(batch, updates, copied, waited)), flush=True)


def figures(batch, updates, copied, waited) -> dict:
    """pictures: bytes of the step's source images, each once; ids: of what says which token is which; patches: of the
    canvases as the model wants them; copied: from the host to the device, all in all, by the function of ours that
    asked for it; before: what that was when patches were copied."""
    pictures = sum({id(x): x.nbytes for puzzle in batch.puzzles for x in puzzle.images}.values())
    patches = sum(prompt.pixel_values.nbytes for prompt in batch.prompts)
    total = sum(copied.values())
    out = {"updates": updates, "pictures": pictures, "patches": patches, "copied": total}
    try:
        from sslr1.ops import transfer
    except ImportError:
        sent = {}
    else:
        sent = dict(transfer.sent)
        rest = total - sum(sent.get(name, 0) for name in ("images", "plans"))
        out |= {"ids": sent.get("ids", 0), "before": (1 + updates) * patches + rest, "sent": sent}
        transfer.sent.clear()
    return out | {"by": dict(copied), "waits": dict(waited)}


if __name__ == "__main__":
    main()
