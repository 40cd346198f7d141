"""The KL penalty's reference: its place in the loss, what it costs, and where a run has it from."""

import re
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from torch.distributed.tensor import DTensor

from sslr1 import config, model
from sslr1.errors import UserError
from sslr1.model import cost
from sslr1.model.gated_delta_net import dtypes_of
from sslr1.runs import checkpoint
from sslr1.runs.checkpointer import Checkpointer
from sslr1.setup import budget
from sslr1.setup.session import Session
from tests.learner.test_learner import OPTIONS, make_groups, make_learner, parameters
from tests.learner.test_updates import by_hand

KL = OPTIONS.loss.model_copy(update={"kl_coef": 0.3, "updates": 2})


def test_equal_to_a_loop_by_hand(any_tiny, photographs, seed, one_process, exact_norms):
    """The first update's KL is 0, the second's pulls back; in micro-batches that split groups."""
    groups, rewards = make_groups(any_tiny, photographs, seed)
    rewards = rewards.double()
    expected, losses, norms = by_hand(any_tiny, groups, rewards, 2, kl_coef=0.3)
    without, _, _ = by_hand(any_tiny, groups, rewards, 2)
    tokens = max(len(g.prompt.input_ids) for g in groups) + 7
    learner, _ = make_learner(any_tiny, one_process, tokens, loss=KL, dtype=torch.float64)
    learner.set_reference(model.load_reference(any_tiny, one_process, torch.float64))
    found = learner.step(groups, rewards).metrics
    after = parameters(learner)
    assert all((after[n] - expected[n]).abs().max() <= 1e-9 for n in expected)
    assert any((after[n] - without[n]).abs().max() > 1e-6 for n in expected)
    assert losses[0].stats["kl"] < 1e-20 < 1e-9 < losses[1].stats["kl"]
    assert found["kl"] == pytest.approx(float(losses[1].stats["kl"]) / 2, rel=1e-6)
    assert found["grad_norm"] == pytest.approx(float(sum(norms)) / 2, rel=1e-9)


@pytest.mark.parametrize(
    "any_tiny, frozen",
    [
        ("qwen2_5_vl", "none"),
        pytest.param("qwen2_5_vl", "vision", marks=pytest.mark.slow),
        pytest.param("qwen3_vl", "none", marks=pytest.mark.slow),
        ("qwen3_vl", "vision"),
        ("qwen3_5", "none"),
        pytest.param("qwen3_5", "vision", marks=pytest.mark.slow),
    ],
    indirect=["any_tiny"],
)
def test_a_frozen_copy_and_nothing_more(any_tiny, photographs, seed, one_process, frozen):
    """Half the weights' bytes in bfloat16, as the planner says; no gradients; nothing stays gathered; it never
    moves."""
    learner, _ = make_learner(any_tiny, one_process, loss=KL, frozen=frozen)
    reference = model.load_reference(any_tiny, one_process, torch.bfloat16)
    learner.set_reference(reference)
    before, start = parameters(SimpleNamespace(policy=reference)), parameters(learner)
    dtypes = dtypes_of(reference.model, torch.bfloat16)
    assert before.keys() == start.keys() == dtypes.keys()
    assert all(before[n].dtype == dtypes[n] and torch.equal(before[n], start[n].to(dtypes[n])) for n in start)
    assert "kl" in learner.step(*make_groups(any_tiny, photographs, seed)).metrics
    assert all(torch.equal(p, before[n]) for n, p in parameters(SimpleNamespace(policy=reference)).items())
    held = list(reference.parameters())
    assert all(isinstance(p, DTensor) and p.grad is None and not p.requires_grad for p in held)
    assert all(b.dtype == torch.float32 for name, b in reference.named_buffers() if "inv_freq" in name)
    tree = {"model": {"path": "m", "frozen": frozen}, "data": {"path": "d"}, "loss": {"kl_coef": 0.3}}
    lines, traffic = budget.plan(config.check(tree), any_tiny, 1)
    planned = {line.what: line.gb * 1e9 for line in lines}
    assert planned["reference's weights"] == pytest.approx(sum(p.numel() * p.element_size() for p in held), rel=1e-9)
    assert planned["reference's weights"] == pytest.approx(planned["weights"] / 2, rel=1e-3)
    of_two = {line.what: line.gb for line in budget.plan(config.check(tree), any_tiny, 2)[1]}
    assert of_two["reference's weights gathered, a micro-batch"] * 2 == of_two["weights gathered, a micro-batch"]
    plain, _ = budget.plan(config.check(tree | {"loss": {}}), any_tiny, 1)
    assert "reference's weights" not in {line.what for line in plain}


def test_its_forward_pass_is_counted(tiny, photographs, seed, one_process):
    groups, rewards = make_groups(tiny, photographs, seed)
    plain, _ = make_learner(tiny, one_process)
    near, _ = make_learner(tiny, one_process, loss=KL.model_copy(update={"updates": 1}))
    near.set_reference(model.load_reference(tiny, one_process))
    without, found = plain.step(groups, rewards), near.step(groups, rewards)
    assert found.flops == pytest.approx(without.flops * 4 / 3, rel=1e-9)  # a backward pass is two forward ones
    assert cost.cost_of(near.reference.model).token * 3 == near.cost.token
    assert "kl" not in without.metrics and found.metrics["kl"] < 1e-9 and found.computed == without.computed


def test_a_penalty_without_a_reference_is_an_error(tiny, photographs, seed, one_process):
    learner, _ = make_learner(tiny, one_process, loss=KL)
    with pytest.raises(ValueError, match=r"kl_coef is 0\.3: give ref_logprobs"):
        learner.step(*make_groups(tiny, photographs, seed))


def test_a_reference_that_is_gone(tmp_path, one_process):
    session = SimpleNamespace(config=config.check({"model": {"path": "m"}, "data": {"path": "d"}}), world=one_process)
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'hf'} is gone") + ".*log.name"):
        Session.reference(session, tmp_path / "hf")


def test_checkpoints_kept_besides_the_newest(tmp_path, tiny, one_process):
    learner, weights = make_learner(tiny, one_process)
    options = dict(tokenizer=model.load_tokenizer(tiny), source=tiny, world=one_process, trainer={}, keep=1)
    for step in range(4):
        checkpoint.save(tmp_path, step, learner=learner, sampler=weights.model, also=[0, 2], **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000", "step-000002", "step-000003"]


@pytest.mark.parametrize("kl_coef, kept", [(0.0, [7]), (0.1, [7, 0])])
def test_its_checkpoint_is_kept(tmp_path, monkeypatch, kl_coef, kept):
    seen = {}
    monkeypatch.setattr(checkpoint, "Snapshot", lambda *_, **options: seen.update(options) or MagicMock())
    tree = {"model": {"path": "m"}, "data": {"path": "d"}, "loss": {"kl_coef": kl_coef}}
    this = MagicMock(session=MagicMock(config=config.check(tree)), folder=tmp_path)
    Checkpointer.save(this, 9, 7, {})
    assert seen["also"] == kept
