"""What the ranks of `test_ranks.py` run: one learner step on this rank's share of recorded groups; results go to a folder."""

import sys

import torch
from safetensors.torch import save_file

from sslr1 import model
from sslr1.model import parallel
from tests.test_learner import make_groups, make_learner


def main(folder, tiny, seed, budget, share, replicate="1", recompute="0"):
    from skimage import data

    photographs = [torch.from_numpy(f().copy()) for f in (data.astronaut, data.coffee, data.chelsea, data.rocket)]
    world = parallel.start("cpu")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    learner, weights = make_learner(tiny, world, int(budget), int(replicate), int(recompute))
    groups, rewards = make_groups(tiny, photographs, int(seed))
    mine = [
        n
        for n in range(4)
        if (share == "even" and n % world.size == world.rank) or (share == "uneven" and (n == 3) == (world.rank == 1))
    ]
    if world.size == 1:
        mine = range(4)
    found = learner.step([groups[n] for n in mine], rewards[list(mine)])
    learner.step([groups[n] for n in mine], rewards[list(mine)])
    weights.refresh(learner.policy)
    whole = dict(parallel.iter_full_params(learner.policy))
    replica = dict(weights.model.named_parameters())
    assert set(replica) == set(whole) and all(torch.equal(replica[n], whole[n]) for n in whole), (
        "the sampler's weights are not the learner's"
    )
    assert weights.shared == (world.size == 1)
    half = model.load_model(tiny)
    from sslr1.rollout import SamplerWeights

    bf16 = SamplerWeights(half, torch.bfloat16).attach(learner.policy, world)
    assert not bf16.shared and all(torch.equal(p, whole[n].bfloat16()) for n, p in bf16.model.named_parameters())
    if world.main:
        numbers = torch.tensor(
            [found["loss"], found["grad_norm"], found["entropy"], found["tokens"]], dtype=torch.float64
        )
        save_file({"numbers": numbers, **{n: p.contiguous() for n, p in whole.items()}}, f"{folder}/result.safetensors")
    parallel.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
