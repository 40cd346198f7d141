"""What the ranks of test_world.py run: one step on this rank's share of recorded groups, from a checkpoint."""

import sys

import torch
from safetensors.torch import save_file

from sslr1 import distributed
from sslr1.config.inputs import Lora
from sslr1.runs import checkpoint
from tests.learner.test_learner import make_groups, make_learner


def main(out, seed, folder, path, rank):
    from skimage import data

    photographs = [torch.from_numpy(f().copy()) for f in (data.astronaut, data.coffee, data.chelsea, data.rocket)]
    world = distributed.start("cpu")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    adapters = Lora(rank=int(rank), vision="all-linear") if int(rank) else None
    learner, _ = make_learner(folder, world, lora=adapters)
    checkpoint.load(path, learner=learner)
    groups, rewards = make_groups(folder, photographs, int(seed))
    mine = range(world.rank, len(groups), world.size)
    found = learner.step([groups[n] for n in mine], rewards[list(mine)]).metrics
    numbers = torch.tensor([found[k] for k in ("loss", "grad_norm", "entropy", "learning_rate")], dtype=torch.float64)
    if world.main:
        save_file({"numbers": numbers}, out)
    distributed.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
