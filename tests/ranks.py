"""What the ranks of `test_ranks.py` run: learner steps on this rank's share of recorded groups; results go to files."""

import json
import os
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from sslr1 import distributed, model
from sslr1.config.inputs import Lora
from sslr1.learner import dealing
from sslr1.model import lora, parallel
from sslr1.model.cost import cost_of
from sslr1.rollout import SamplerWeights
from tests.exact import keep_dtype
from tests.learner.test_learner import OPTIONS, make_groups, make_learner
from tests.model.test_lora import put, some_values
from tests.model.test_packing import spec_of


def gradients(folder, world, options, groups, rewards):
    """Loss and every gradient of a step in float64, before it is taken."""
    learner, _ = make_learner(folder, world, *options, dtype=torch.float64)
    found = {}
    learner._update = lambda totals: (
        found.update(loss=distributed.all_reduce(totals["loss"].double())) or {"grad_norm": 0.0}
    )
    learner.step(groups, rewards)
    for name, parameter in learner.policy.model.named_parameters():
        found[name] = parallel.whole(parameter.grad)
    return found


def of_adapters(folder, world, options, groups, rewards):
    """Loss and every gradient of adapters in float64; the base lies whole on each rank, and the sampler, which follows,
    has it there."""
    learner, weights = make_learner(
        folder, world, *options, dtype=torch.float64, lora=Lora(rank=3, vision="all-linear")
    )
    network, found = learner.policy.model, {}
    torch.manual_seed(0)  # the same on all ranks
    put(network, some_values(network))
    weights.refresh(learner.policy)
    replica = dict(weights.model.named_parameters())
    for name, parameter in network.named_parameters():
        assert torch.equal(replica[name], parallel.whole(parameter.detach())), name
        same = replica[name].data_ptr() == parallel.local(parameter).data_ptr()
        assert same == (world.size == 1 or not lora.is_adapter(name)), name
    update = learner._update

    def noted(totals):
        found.update(loss=distributed.all_reduce(totals["loss"].double()))
        found.update((name, parallel.whole(p.grad).clone()) for name, p in lora.adapters(network))
        return update(totals)

    learner._update = noted
    learner.step(groups, rewards)
    norm = torch.stack([g.norm() for name, g in found.items() if name != "loss"]).norm()
    return found | {"norm": norm}


def two_steps(folder, world, options, groups, rewards):
    """Numbers of the first and parameters after the second of two steps in float32, and that the sampler follows."""
    learner, weights = make_learner(folder, world, *options)
    found = learner.step(groups, rewards)
    learner.step(groups, rewards)
    weights.refresh(learner.policy)
    whole = dict(parallel.iter_full_params(learner.policy))
    replica = dict(weights.model.named_parameters())
    assert set(replica) == set(whole) and all(torch.equal(replica[n], whole[n]) for n in whole), (
        "the sampler's weights are not the learner's"
    )
    assert weights.shared == (world.size == 1)
    bf16 = SamplerWeights(model.load_model(folder), torch.bfloat16).attach(learner.policy, world)
    assert not bf16.shared and all(torch.equal(p, whole[n].bfloat16()) for n, p in bf16.model.named_parameters())
    numbers = [*(found.metrics[name] for name in ("loss", "grad_norm", "entropy")), found.tokens]
    return {"numbers": torch.tensor(numbers, dtype=torch.float64), **whole}


def updates_with_a_reference(folder, world, options, groups, rewards):
    """Numbers of a second step of two updates each in float64, held to the weights before the first by a KL penalty."""
    # with a bonus for entropy the loss is some tenths: advantages alone would all but cancel
    loss = OPTIONS.loss.model_copy(update={"updates": 2, "kl_coef": 0.1, "entropy_coef": 0.05})
    learner, _ = make_learner(folder, world, *options, dtype=torch.float64, loss=loss)
    learner.set_reference(model.load_reference(folder, world, torch.float64, options[1]))
    learner.step(groups, rewards)
    found = learner.step(groups, rewards)
    names = ("loss", "kl", "grad_norm", "ratio/min", "ratio/max", "clip_ratio/low_mean", "sampling/logp_difference/max")
    return {"numbers": torch.tensor([found.metrics[name] for name in names], dtype=torch.float64)}


def check_dealing(folder, world, groups, rewards, mine, uneven):
    """Every group is dealt to somebody, whole, with its own rewards, and evenly."""
    cost = cost_of(model.skeleton(folder))
    dealt, rows = dealing.even_out([groups[n] for n in mine], rewards[mine], cost, world, spec_of(folder))
    assert not uneven or len(dealt) == 2  # they were three and one
    tokens = 0
    for group, row in zip(dealt, rows):
        original = groups[(rewards == row).all(1).nonzero().item()]
        for name in ("input_ids", "pixel_values", "image_grid_thw"):
            assert torch.equal(getattr(group.prompt, name).cpu(), getattr(original.prompt, name).cpu()), name
        for sample, before in zip(group.samples, original.samples):
            if len(sample.tokens):
                assert torch.equal(sample.tokens, before.tokens) and torch.equal(sample.logprobs, before.logprobs)
            tokens += len(sample.tokens)
    assert distributed.all_reduce(torch.tensor(tokens)) == sum(len(s.tokens) for g in groups for s in g.samples)


def check_copies(folder, world, options, groups, rewards):
    """Copies of the model stay the same where moments are rounded at random."""
    optim = OPTIONS.optim.model_copy(update={"moments": "bfloat16"})
    learner, _ = make_learner(folder, world, *options, optim=optim)
    before = {name: parallel.local(p).clone() for name, p in learner.policy.model.named_parameters()}
    for _ in range(2):
        learner.step(groups, rewards)
    for name, p in learner.policy.model.named_parameters():
        assert not p.numel() or not before[name].numel() or not torch.equal(parallel.local(p), before[name]), name
        sums = torch.stack([parallel.whole(p.detach()).double().sum()] * 2)
        assert distributed.all_reduce(sums[:1].clone(), "max") == distributed.all_reduce(sums[1:].clone(), "min"), name


def start(rank, size, store, device):
    """As torchrun would have it, but that gloo is chosen for ranks that share one GPU, which NCCL refuses."""
    if size > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK="0")
        dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
    return distributed.start(device)


def round_cosines():
    """Cosines and sines of float32 are rounded rightly from here on, which the CPU's (and a GPU's) are but nearly
    always."""
    for name in ("cos", "sin"):
        inner = getattr(torch.Tensor, name)
        setattr(torch.Tensor, name, lambda x, inner=inner: inner(x.double()).to(x.dtype))


def run(
    rank,
    size,
    store,
    out,
    seed,
    folders,
    budget=100_000,
    share="even",
    replicate=1,
    recompute=0,
    device="cpu",
    cosines="own",
    gradients_of=None,
    updates=True,
):
    """One rank of one case. gradients_of: numbers of the folders whose gradients are taken, None for all; updates:
    whether steps of several are."""
    from skimage import data

    if cosines == "rounded":
        round_cosines()

    photographs = [torch.from_numpy(f().copy()) for f in (data.astronaut, data.coffee, data.chelsea, data.rocket)]
    world = start(rank, size, store, device)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(device == "cpu")
    own = {"even": lambda n: n % world.size == world.rank, "uneven": lambda n: (n == 3) == (world.rank == 1)}[share]
    mine = [n for n in range(4) if world.size == 1 or own(n)]
    options, results = (budget, replicate, recompute), {}
    chosen = range(len(folders)) if gradients_of is None else gradients_of
    recorded = {n: make_groups(folders[n], photographs, seed) for n in {0, *chosen}}
    parts = {n: ([groups[m] for m in mine], rewards[mine].double()) for n, (groups, rewards) in recorded.items()}
    results["two steps"] = two_steps(folders[0], world, options, parts[0][0], parts[0][1].float())
    if replicate > 1:
        check_copies(folders[0], world, options, *parts[0])
    check_dealing(folders[0], world, recorded[0][0], recorded[0][1], mine, share == "uneven")
    keep_dtype()
    for n in chosen:
        results[f"gradients {n}"] = gradients(folders[n], world, options, *parts[n])
        results[f"gradients of adapters {n}"] = of_adapters(folders[n], world, options, *parts[n])
    if updates:
        results["updates"] = updates_with_a_reference(folders[0], world, options, *parts[0])
    if world.main:
        flat = {f"{part}/{name}": x.cpu().contiguous() for part, found in results.items() for name, x in found.items()}
        save_file(flat, out)
    distributed.stop()


def main(path):
    """Cases, as {out, size, …}, one after the other; ranks are forks of this process, which spares each its imports,
    but where they use CUDA, which a fork may not."""
    for case in json.loads(Path(path).read_text()):
        size, out = case.pop("size"), case["out"]
        call = partial(run, size=size, store=f"{out}.store", **case)
        method = "spawn" if case.get("device") == "cuda" else "fork"
        torch.multiprocessing.start_processes(call, nprocs=size, start_method=method)


if __name__ == "__main__":
    main(*sys.argv[1:])
