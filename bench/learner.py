"""Forward, loss and backward with a prompt shared by its completions, against the same on separate sequences: on a CPU
one group through transformers' own model, on a GPU whole updates of three groups by the learner itself. On a CPU also
the memory that it takes, at a width of 256 and 1,376, whose ratio is the 3B model's.
"""

import os
import statistics
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from grpo import LARGE, SMALL, TINY, Case
from row import Row, Sides

from sslr1 import model, ops

SHAPES = {
    "cpu": (SMALL, dict(visual=400, prompts=1, group_size=16, new=32)),
    "cuda": (LARGE, dict(visual=38 * 38, prompts=3, group_size=16, new=200)),
    "dry": (TINY, dict(visual=16, prompts=3, group_size=4, new=6)),
}
WIDE = replace(
    SMALL, called="6 layers of 256 and 1,376, a vision tower of 4 of 128", text=SMALL.text | {"intermediate_size": 1376}
)


def rows(mode):
    shape, sizes = SHAPES[mode]
    P, G = sizes["prompts"], sizes["group_size"]
    counted = f"{P} prompt{'s' * (P > 1)} of {sizes['visual']:,} image tokens, G = {G}, {sizes['new']} new tokens"
    if mode == "cpu":
        against = f"{G} separate padded sequences, transformers' SDPA"
        held = f"learner's memory above what is held before, {WIDE.called}: {counted}"
        return [
            Row(what=f"learner: {counted}", against=against, goal="4", make=partial(one_group, shape, sizes)),
            Row(what=held, against=against, make=partial(one_group, WIDE, sizes, peak)),
        ]
    what = f"learner, {shape.called}: an update from {counted}, {shape.dtype}"
    return [
        Row(
            what=what,
            against="the same learner on as many separate sequences",
            goal="5",
            make=partial(update, shape, sizes),
        )
    ]


def one_group(shape, sizes, memory=None):
    ours, peer, networks = both(shape, sizes)

    def gradients(run):
        run()
        return [p.grad.clone() for p in networks[run.__name__].parameters()]

    def check(*_):
        for a, b in zip(gradients(ours), gradients(peer)):
            assert (a - b).norm() <= 1e-3 * b.norm() + 1e-8

    return Sides(ours=ours, peer=peer, check=check, memory=memory)


def both(shape, sizes):
    """(ours, peer, {name of either: its network})"""
    case = Case(shape, **sizes)
    G, NEW = case.group_size, case.new
    network, theirs = case.plain(), case.plain()
    model.shared_prefix.plug_in(theirs)  # so that its vision tower attends as ours does
    groups, rewards = case.groups()
    (prompt,), (samples,) = zip(*((group.prompt, group.samples) for group in groups))
    policy = model.Policy(network)
    packed = model.pack(groups, **policy.pack_options)

    def ours():
        network.zero_grad()

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
        theirs.zero_grad()
        logprobs = theirs(**inputs).logits[:, :-1].log_softmax(-1)
        picked = logprobs.gather(-1, rows_ids[:, -NEW:, None])[..., 0]
        value = -((picked - picked.detach()).exp() * advantages).sum() / picked.numel()
        value.backward()
        return value.item()

    return ours, peer, {"ours": network, "peer": theirs}


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


def peak(side) -> float:
    """MB that one call of a side adds at most, gradients included, to a process of its own that has made one before."""
    options = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back to the system at once
    command = [sys.executable, __file__, side.__name__]
    return statistics.median(float(subprocess.check_output(command, env=options)) for _ in range(3))


if __name__ == "__main__":  # in that process

    def status(field):  # not ru_maxrss, which a process takes over from the one that starts it
        (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field)]
        return int(line.split()[1]) / 1024

    torch.manual_seed(0)
    *sides, networks = both(WIDE, SHAPES["cpu"][1])
    (run,) = [side for side in sides if side.__name__ == sys.argv[1]]
    run()
    networks[run.__name__].zero_grad()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    before = status("VmRSS")
    run()
    print(status("VmHWM") - before)
