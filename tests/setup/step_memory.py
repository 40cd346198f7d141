"""What a process takes for a learner's step in bfloat16, every layer recomputed: python -m tests.setup.step_memory
FOLDER RANK, where RANK is of adapters on all linears, 0 for training the model itself. Prints JSON, in bytes."""

import gc
import json
import os
import sys

import torch

from sslr1 import config, distributed, model, ops
from sslr1.learner import Learner
from sslr1.model import lora, parallel
from sslr1.rollout import SamplerWeights
from sslr1.setup import budget


def now(name="VmRSS"):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name)) * 1024


def bytes_of(tensors):
    return sum(parallel.local(t).numel() * t.element_size() for t in tensors)


def alive():
    """{storage: bytes} of every tensor that Python holds, those that wait for a layer's recomputation too."""
    found = [t for t in gc.get_objects() if isinstance(t, torch.Tensor)]
    storages = [parallel.local(t).untyped_storage() for t in found]
    return {storage._cdata: storage.nbytes() for storage in storages}


def inputs_held(policy, groups, text, vision):
    """(bytes held between a forward and a backward pass, those planned: the inputs of all layers and blocks)."""
    packed = model.pack(groups, group_size=4, **policy.pack_options)
    before = alive()
    out = policy(packed, lambda hidden, head: (hidden.float().sum(),))
    held = sum(size for storage, size in alive().items() if storage not in before)
    del out
    tokens, patches = len(packed.input_ids), sum(len(p.pixel_values) for p in packed.prompts)
    planned = tokens * text.num_hidden_layers * text.hidden_size + patches * vision.depth * vision.hidden_size
    return held, 2 * planned


def main(folder, rank):
    if os.environ.get("MALLOC_MMAP_THRESHOLD_") != "65536":  # what is freed goes back to the system at once
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"})
    torch.set_num_threads(2)
    torch.manual_seed(0)
    tree = {"model": {"path": folder, "dtype": "bfloat16", "lora": {"rank": int(rank), "vision": "all-linear"}}}
    c = config.check(tree | {"train": {"recompute": 1}}, data=False)
    world, spec, tokenizer = (
        distributed.start("cpu"),
        ops.PatchSpec.from_pretrained(folder),
        model.load_tokenizer(folder),
    )
    image = torch.randint(0, 256, (1, 320, 320, 3), dtype=torch.uint8)
    from sslr1 import puzzles

    (prompt,) = model.prompts(puzzles.make(image, "rotation", level=2, spec=spec, thinking=False), tokenizer)
    samples = [model.Sample(torch.randint(0, 300, (24,)), torch.zeros(24), "", "length") for _ in range(4)]
    groups, rewards = [model.Group(prompt, samples)], torch.rand(1, 4)
    base = now()

    network = model.skeleton(folder)
    model.freeze(network, "none")
    if adapted := lora.wanted(c.model.lora, network, folder):
        lora.add(network, adapted, torch.bfloat16)
    weights = SamplerWeights(network, torch.bfloat16)
    policy = parallel.shard(model.Policy(network), world, torch.bfloat16, recompute=1)
    parallel.materialize(policy, world.device)
    model.load_weights(policy.model, folder)
    lora.begin(policy.model, 0)
    weights.attach(policy, world)
    learner = Learner(
        policy, world, optim=c.optim, loss=c.loss, temperature=1.0, max_tokens=24, token_budget=16384, steps=10
    )
    learner.step(groups, rewards)  # the optimiser's moments begin here
    found = {"loaded": now() - base}
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak is counted anew
    zero, parameters = learner.optimizer.zero_grad, list(policy.parameters())

    def noted(**options):
        found["gradients"] = bytes_of(p.grad for p in parameters if p.grad is not None)
        zero(**options)

    learner.optimizer.zero_grad = noted
    learner.step(groups, rewards)
    found |= {
        "peak": now("VmHWM") - base,
        "tokens": len(prompt.input_ids) + 4 * 24,
        "patches": len(prompt.pixel_values),
    }
    found["weights"] = bytes_of(parameters)
    found["AdamW's moments"] = bytes_of(
        s[m] for s in learner.optimizer.state.values() for m in ("exp_avg", "exp_avg_sq")
    )
    found["planned"] = {line.what: line.gb * 1e9 for line in budget.plan(c, folder, 1, device="cpu")[0]}
    found["inputs"] = inputs_held(policy, groups, network.config.text_config, network.config.vision_config)
    print(json.dumps(found))
    distributed.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
