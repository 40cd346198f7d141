"""Several updates from one step's completions, against a loop written by hand in float64."""

import math

import pytest
import torch

from sslr1 import model, ops
from sslr1.runs import checkpoint
from tests.learner.test_learner import OPTIONS, make_groups, make_learner, parameters


def by_hand(folder, groups, rewards, updates, max_logp_gap=None, **loss):
    """(parameters, a list of GrpoLoss, a list of gradient norms) of `updates` updates of all groups at once; the
    reference is the model as the folder has it."""
    policy = model.Policy(model.load_model(folder, torch.float64))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=OPTIONS.optim.lr / 2, betas=(0.9, 0.99), weight_decay=0)
    packed = model.pack(groups, **policy.pack_options)
    drawn = torch.cat([s.logprobs for g in groups for s in g.samples])
    found, norms = [], []
    with torch.no_grad():
        (now,) = policy(packed, lambda h, w: ops.token_logprobs(h, w, packed.tokens)[:1])
    fixed = {"ref_logprobs": now}
    if max_logp_gap is not None:
        gap = now - drawn
        fixed["token_weights"] = torch.where(gap.abs() > max_logp_gap, gap.exp(), 1.0).clamp(max=OPTIONS.loss.is_cap)
    for _ in range(updates):
        optimizer.zero_grad()

        def apply(h, w):
            found.append(ops.grpo_loss(h, w, packed.tokens, packed.sequence, rewards, **fixed, **loss))
            return (found[-1].loss,)

        policy(packed, apply)[0].backward()
        fixed.setdefault("old_logprobs", found[0].logprobs)
        norms.append(torch.nn.utils.clip_grad_norm_(policy.parameters(), OPTIONS.optim.clip_norm))
        optimizer.step()
    return dict(policy.model.named_parameters()), found, norms


@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
def test_equal_to_updates_by_hand(tiny, photographs, seed, one_process, exact_norms, loss_type):
    """In micro-batches that split groups, with tokens weighted by the sampler's log-probs."""
    groups, rewards = make_groups(tiny, photographs, seed)
    rewards = rewards.double()
    for group in groups:
        for sample in group.samples:
            sample.logprobs = torch.rand(len(sample.tokens)) - 6.5  # around the log-prob of one token in 768
    changes = {"loss_type": loss_type, "clip_low": 1e-3, "clip_high": 1e-3}
    expected, losses, norms = by_hand(tiny, groups, rewards, 2, max_logp_gap=0.3, **changes)
    budget = max(len(g.prompt.input_ids) for g in groups) + 7
    loss = OPTIONS.loss.model_copy(update=changes | {"updates": 2})
    learner, _ = make_learner(tiny, one_process, budget, loss=loss, max_logp_gap=0.3, dtype=torch.float64)
    found = learner.step(groups, rewards).metrics
    after = parameters(learner)
    assert all((after[n] - expected[n]).abs().max() <= 1e-9 for n in expected)
    means = {"loss": "policy_loss", "clip_ratio/low_mean": "clip_low", "clip_ratio/high_mean": "clip_high"}
    for name, stat in {**means, "ratio/mean": "ratio_mean", "entropy": "entropy"}.items():
        mean = sum(float(one.stats[stat]) for one in losses) / 2
        assert found[name] == pytest.approx(mean, rel=1e-9, abs=1e-12), name
    assert found["grad_norm"] == pytest.approx(float(sum(norms)) / 2, rel=1e-9)
    assert found["ratio/min"] == pytest.approx(float(losses[1].stats["ratio_min"]), rel=1e-9) and found["ratio/min"] < 1
    assert found["ratio/max"] == pytest.approx(float(losses[1].stats["ratio_max"]), rel=1e-9) and found["ratio/max"] > 1
    assert found["clip_ratio/low_mean"] + found["clip_ratio/high_mean"] > 0
    assert learner.step_number == 1 and found["learning_rate"] == OPTIONS.optim.lr / 2


def test_the_first_updates_log_probs_are_the_old_ones(tiny, photographs, seed, one_process, monkeypatch):
    """Ratios of exactly 1 in the first update of every step; each micro-batch keeps its own tokens' log-probs."""
    groups, rewards = make_groups(tiny, photographs, seed)
    seen = []
    inner = ops.grpo_loss

    def spy(*arguments, old_logprobs=None, **options):
        out = inner(*arguments, old_logprobs=old_logprobs, **options)
        seen.append((arguments[2], old_logprobs, out))
        return out

    monkeypatch.setattr(ops, "grpo_loss", spy)
    budget = max(len(g.prompt.input_ids) for g in groups) + 7
    learner, _ = make_learner(tiny, one_process, budget, loss=OPTIONS.loss.model_copy(update={"updates": 3}))
    once, _ = make_learner(tiny, one_process, budget)
    for step in (1, 2):
        seen.clear()
        found = learner.step(groups, rewards)
        count = len(seen) // 3
        assert count > 1 and len(seen) == 3 * count
        for n, (tokens, old, out) in enumerate(seen):
            first = seen[n % count]
            assert torch.equal(tokens, first[0])
            assert (old is None and out.stats["ratio_max"] == 1) if n < count else torch.equal(old, first[2].logprobs)
        states = learner.optimizer.state.values()
        assert learner.step_number == step and {int(s["step"]) for s in states} == {3 * step}
        if step == 1:
            single = once.step(groups, rewards)
            for name in ("computed", "unshared", "flops"):
                assert getattr(found, name) == 3 * getattr(single, name)
            assert found.tokens == single.tokens == 34
            for name in ("mean", "max"):
                key = f"sampling/logp_difference/{name}"
                assert found.metrics[key] == single.metrics[key]


def test_what_is_not_finite_ends_the_step(tiny, photographs, seed, one_process):
    learner, _ = make_learner(tiny, one_process, loss=OPTIONS.loss.model_copy(update={"updates": 3}))
    groups, rewards = make_groups(tiny, photographs, seed)
    before = parameters(learner)
    found = learner.step(groups, rewards, advantages=torch.full((4, 3), float("nan"))).metrics
    assert (learner.skipped, learner.skipped_in_a_row, found["skipped_steps"], learner.step_number) == (1, 1, 1, 1)
    assert all(torch.equal(before[n], p) for n, p in parameters(learner).items())
    assert not learner.optimizer.state
    update, norms = learner._update, iter([1.0, math.inf])
    learner._update = lambda totals: update(totals) | {"grad_norm": next(norms)}
    learner.step(groups, rewards)  # the second of three is not finite: the third is left out
    assert (learner.skipped, learner.skipped_in_a_row, learner.step_number) == (2, 2, 2)


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_a_resumed_learner_goes_on_bit_for_bit(tmp_path, tiny, photographs, seed, one_process, moments):
    changes = dict(
        loss=OPTIONS.loss.model_copy(update={"updates": 2}), optim=OPTIONS.optim.model_copy(update={"moments": moments})
    )
    groups, rewards = make_groups(tiny, photographs, seed)
    learner, weights = make_learner(tiny, one_process, **changes)
    learner.step(groups, rewards)
    options = dict(tokenizer=model.load_tokenizer(tiny), source=tiny, world=one_process, trainer={})
    path = checkpoint.save(tmp_path, 1, learner=learner, sampler=weights.model, **options)
    other, _ = make_learner(tiny, one_process, **changes)
    checkpoint.load(path, learner=other)
    assert learner.step(groups, rewards) == other.step(groups, rewards)
    after, again = parameters(learner), parameters(other)
    assert all(torch.equal(after[n], again[n]) for n in after)
