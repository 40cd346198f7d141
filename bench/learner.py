"""Forward, loss and backward with a prompt shared by its completions, against the same on separate sequences: on a CPU
one group through transformers' own model, on a GPU whole updates of three groups by the learner itself."""

from functools import partial

import torch
from grpo import LARGE, SMALL, TINY, Case
from row import Row, Sides

from sslr1 import model, ops

SHAPES = {
    "cpu": (SMALL, dict(visual=400, prompts=1, group_size=16, new=32)),
    "cuda": (LARGE, dict(visual=38 * 38, prompts=3, group_size=16, new=200)),
    "dry": (TINY, dict(visual=16, prompts=3, group_size=4, new=6)),
}


def rows(mode):
    shape, sizes = SHAPES[mode]
    P, G = sizes["prompts"], sizes["group_size"]
    counted = f"{P} prompt{'s' * (P > 1)} of {sizes['visual']:,} image tokens, G = {G}, {sizes['new']} new tokens"
    if mode == "cpu":
        what, against, goal, sides = (
            f"learner: {counted}",
            f"{G} separate padded sequences, transformers' SDPA",
            "4",
            one_group,
        )
    else:
        what = f"learner, {shape.called}: an update from {counted}, {shape.dtype}"
        against, goal, sides = "the same learner on as many separate sequences", "5", update
    return [Row(what=what, against=against, goal=goal, make=partial(sides, shape, sizes))]


def one_group(shape, sizes):
    case = Case(shape, **sizes)
    G, NEW = case.group_size, case.new
    network = case.plain()
    groups, rewards = case.groups()
    (prompt,), (samples,) = zip(*((group.prompt, group.samples) for group in groups))
    policy = model.Policy(network)
    packed = model.pack(groups, **policy.pack_options)

    def gradients():
        return [p.grad.clone() for p in policy.parameters()]

    def ours():
        policy.zero_grad()

        def loss(hidden, lm_head):
            return (ops.grpo_loss(hidden, lm_head, packed.tokens, packed.sequence, rewards).loss,)

        (value,) = policy(packed, loss)
        value.backward()
        return value.item()

    rows_ids = torch.stack([torch.cat([prompt.input_ids, s.tokens]) for s in samples])
    inputs = dict(
        input_ids=rows_ids,
        attention_mask=torch.ones_like(rows_ids),
        use_cache=False,
        logits_to_keep=NEW + 1,
        mm_token_type_ids=(rows_ids == network.config.image_token_id).int(),
        pixel_values=prompt.pixel_values.repeat(G, 1),
        image_grid_thw=prompt.image_grid_thw.repeat(G, 1),
    )
    advantages = ops.advantages(rewards).reshape(G, 1)

    def peer():
        policy.zero_grad()
        logprobs = network(**inputs).logits[:, :-1].log_softmax(-1)
        picked = logprobs.gather(-1, rows_ids[:, -NEW:, None])[..., 0]
        value = -((picked - picked.detach()).exp() * advantages).sum() / picked.numel()
        value.backward()
        return value.item()

    def check(*_):
        peer()
        theirs = gradients()
        ours()
        for a, b in zip(gradients(), theirs):
            assert (a - b).norm() <= 1e-3 * b.norm() + 1e-8

    return Sides(ours=ours, peer=peer, check=check)


def update(shape, sizes):
    """The peer is the same learner, kernels and all, given a group for each completion: what differs is the shared
    prompt alone."""
    case = Case(shape, **sizes)
    groups, rewards = case.groups()
    advantages = ops.advantages(rewards).reshape(-1, 1)
    alone = [model.Group(group.prompt, [sample]) for group in groups for sample in group.samples]

    def ours():
        return case.learner.step(groups, rewards)

    def peer():
        return case.learner.step(alone, rewards.reshape(-1, 1), advantages=advantages)

    def check(mine, theirs):
        assert mine.tokens == rewards.numel() * case.new and mine.metrics["grad_norm"] > 0
        if theirs:
            assert theirs.tokens == mine.tokens
            assert abs(mine.metrics["grad_norm"] - theirs.metrics["grad_norm"]) <= 0.02 * theirs.metrics["grad_norm"]

    return Sides(ours=ours, peer=peer, check=check, facts=lambda mine: {"flops": mine.flops})
