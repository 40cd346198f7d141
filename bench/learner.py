"""Forward, loss and backward with a prompt shared by its completions, against the same on separate sequences: on a CPU one group
through transformers' own model, on a GPU whole updates of three groups by the learner itself."""

import torch
from grpo import SMALL, Case, shape

from sslr1 import model, ops

G, NEW = 16, 32


def rows():
    if shape() is SMALL:
        yield from one_group()
    else:
        yield from updates(Case(shape(), visual=38 * 38, prompts=3, group_size=16, new=200))


def one_group():
    case = Case(SMALL, visual=400, prompts=1, group_size=G, new=NEW)
    network = case.plain()
    groups, rewards = case.groups()
    (prompt,), (samples,) = zip(*((group.prompt, group.samples) for group in groups))
    policy = model.Policy(network)
    packed = model.pack(groups, **policy.pack_options)

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

    ours()
    gradients = [p.grad.clone() for p in policy.parameters()]
    peer()
    for a, p in zip(gradients, policy.parameters()):
        assert (a - p.grad).norm() <= 1e-3 * p.grad.norm() + 1e-8
    yield {
        "what": f"learner: 1 prompt of 400 image tokens, G = {G}, {NEW} new tokens",
        "against": "16 separate padded sequences, transformers' SDPA",
        "ours": ours,
        "peer": peer,
        "goal": "4",
    }


def updates(case):
    """The peer is the same learner, kernels and all, given a group for each completion: what differs is the shared prompt alone."""
    groups, rewards = case.groups()
    advantages = ops.advantages(rewards).reshape(-1, 1)
    alone = [model.Group(group.prompt, [sample]) for group in groups for sample in group.samples]

    def ours():
        return case.learner.step(groups, rewards)

    def peer():
        return case.learner.step(alone, rewards.reshape(-1, 1), advantages=advantages)

    mine, theirs = ours(), peer()
    assert mine["tokens"] == theirs["tokens"] == rewards.numel() * case.new
    assert abs(mine["grad_norm"] - theirs["grad_norm"]) <= 0.02 * theirs["grad_norm"] and mine["grad_norm"] > 0
    length = len(groups[0].prompt.input_ids)
    yield {
        "what": f"learner, {case.shape.called}: an update from {case.prompts} prompts of {length:,} tokens, G = {case.group_size}, "
        f"{case.new} new tokens, {case.shape.dtype}",
        "against": "the same learner on as many separate sequences",
        "ours": ours,
        "peer": peer,
        "goal": "5",
        "flops": mine["flops"],
        "device": case.shape.device,
    }
