"""A small Qwen3.5, three of four layers a gated delta net: learner, rollout and step as learner.py, rollout.py and
step.py have them of Qwen2.5-VL, and the learner without shared prompts. Peers run transformers' own modules, whose rule
is torch's where fla is not installed."""

from functools import partial

import learner
import rollout
import step
import torch
from grpo import Case, Shape
from row import Row, Sides

from sslr1 import model, ops

HYBRID = Shape(
    "Qwen3.5 of 8 layers of 256, a vision tower of 4 layers of 128",
    dict(hidden_size=256, intermediate_size=512, num_hidden_layers=8, num_attention_heads=8),
    dict(depth=4, hidden_size=128, intermediate_size=256, out_hidden_size=256),
    family="qwen3_5",
)
SIZES = dict(visual=400, prompts=1, group_size=16, new=32)


def rows(mode):
    if mode != "cpu":  # what a GPU has of it is in "delta"
        return []
    shape, sizes = HYBRID, SIZES
    counted = f"1 prompt of {sizes['visual']} image tokens, G = {sizes['group_size']}, {sizes['new']} new tokens"
    own, two = f"{shape.called}: {counted}", {**sizes, "prompts": 2}
    return [
        Row(
            what=f"learner, {own}",
            against=f"{sizes['group_size']} separate sequences, transformers' modules",
            goal="8",
            make=partial(learner.one_group, shape, sizes),
        ),
        Row(
            what=f"learner, {own}",
            against="the same learner and rule on separate sequences",
            goal="5",
            make=partial(unshared, shape, sizes),
        ),
        Row(
            what=f"rollout, {own}",
            against="model.generate on the repeated prompt",
            goal="6",
            make=partial(rollout.sides, shape, sizes, True),
        ),
        Row(
            what=f"GRPO step, {shape.called}: 2 prompts of {sizes['visual']} image tokens, G = {sizes['group_size']}, "
            f"{sizes['new']} new tokens, one optimiser step",
            against="TRL's GRPOTrainer with model.generate",
            goal="8",
            make=partial(step.against_trl, shape, two, mode),
        ),
    ]


def unshared(shape, sizes):
    """The peer packs each completion behind a prompt of its own."""
    case = Case(shape, **sizes)
    policy = model.Policy(case.plain())
    (group,), rewards = case.groups()
    alone = [model.Group(group.prompt, [sample]) for sample in group.samples]
    advantages = ops.advantages(rewards)

    def run(groups, advantages):
        packed = model.pack(groups, **policy.pack_options)

        def call():
            policy.zero_grad()

            def loss(hidden, lm_head):
                given = hidden, lm_head, packed.tokens, packed.sequence, torch.zeros_like(advantages)
                return (ops.grpo_loss(*given, advantages=advantages).loss,)

            (value,) = policy(packed, loss)
            value.backward()
            return [p.grad.clone() for p in policy.parameters()]

        return call

    def check(mine, theirs):
        for a, b in zip(mine, theirs):
            assert (a - b).norm() <= 1e-3 * b.norm() + 1e-8

    return Sides(ours=run([group], advantages), peer=run(alone, advantages.reshape(-1, 1)), check=check)
