"""Adapters on every linear of the language model against training the model itself, the vision tower frozen on both
sides: the learner's part of a step (forward, backward, optimiser), a whole step, and the sampler with adapters beside
its matrices against one without, as it would be with adapters merged into them. On a CPU, at a width where products
with the matrices are most of the work, as they are in published models.
"""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import torch
from grpo import Case, Shape
from row import Row, Sides, clock
from step import one_step

from sslr1 import model
from sslr1.model import lora

RANK = 16
WIDE = Shape(
    "4 layers of 1,024, a vision tower of 2 layers of 128",
    dict(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=4,
        num_attention_heads=8,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [16, 24, 24]},
        initializer_range=0.02,
    ),
    dict(depth=2, hidden_size=128, intermediate_size=256, out_hidden_size=1024, fullatt_block_indexes=[1]),
    frozen="vision",
)
ADAPTED = replace(WIDE, lora=SimpleNamespace(rank=RANK, alpha=None, rslora=False, targets="all-linear", vision=None))
SIZES = dict(visual=256, prompts=1, group_size=8, new=32)


def rows(mode):
    if mode != "cpu":
        return []
    what = f"LoRA of rank {RANK} on all linears, {WIDE.called}, G = {SIZES['group_size']}: "
    trained, plain = "the same with all of the language model trained", "the same without adapters, as if merged"
    return [
        Row(what=f"{what}learner", against=trained, goal="1.33", make=partial(learners, 0)),
        Row(what=f"{what}learner, layers recomputed", against=trained, goal="1.11", make=partial(learners, 1)),
        Row(what=f"{what}a whole step", against=trained, make=steps),
        Row(what=f"{what}rollout", against=plain, make=rollouts),
    ]


def pair(recompute=0):
    """A case with adapters and one without, and the same groups and rewards for both."""
    cases = [Case(replace(shape, recompute=recompute), **SIZES) for shape in (ADAPTED, WIDE)]
    return cases, cases[0].groups()


def check(mine, theirs):
    assert mine.metrics["grad_norm"] > 0 and (theirs is None or mine.computed == theirs.computed)


def learners(recompute):
    cases, given = pair(recompute)
    ours, peer = (partial(case.learner.step, *given) for case in cases)
    return Sides(ours=ours, peer=peer, check=check, facts=lambda mine: {"flops": mine.flops})


def steps():
    cases, _ = pair()
    ours, peer = (partial(one_step, case, case.engine(case.weights.model)) for case in cases)
    return Sides(ours=ours, peer=peer, check=lambda mine, theirs: check(mine[1], theirs and theirs[1]))


def rollouts():
    """Facts: seconds that merging every adapter into its matrix takes and taking the kept bits back, MB to keep them,
    and the largest difference that merging into bfloat16 matrices makes to their product, relative to the adapter's own
    part of it."""
    cases, _ = pair()
    prompts = model.prompts(cases[0].draw(), cases[0].tokenizer)
    engines = [case.engine(case.weights.model) for case in cases]
    ours, peer = (partial(engine.generate, prompts, group_size=SIZES["group_size"]) for engine in engines)

    def facts(_):
        network = cases[0].weights.model
        places = [network.get_submodule(name) for name in lora.lora_of(network).names]
        kept = [place.weight.detach().clone() for place in places]
        deltas = [place.scale * place.lora_B.weight @ place.lora_A.weight for place in places]

        def merge_and_back():
            for place, delta in zip(places, deltas):
                place.weight.data.add_(delta)
            for place, weight in zip(places, kept):
                place.weight.data.copy_(weight)

        small = [1e-3 * torch.randn_like(delta) * weight.std() for delta, weight in zip(deltas, kept)]
        lost = [
            ((w.bfloat16() + d.bfloat16()).float() - w.bfloat16().float() - d).norm() / d.norm()
            for w, d in zip(kept, small)
        ]
        return {
            "merge_and_back_s": clock(merge_and_back)[1],
            "kept_mb": round(sum(weight.nbytes for weight in kept) / 1e6),
            "lost_in_bfloat16": float(max(lost)),
        }

    return Sides(ours=ours, peer=peer, facts=facts)
