"""A few steps whose numbers are recorded, against drift from commit to commit: runs are otherwise compared with
themselves alone.

`python -m pytest tests/learner/test_curve.py` prints what it found where that differs; whoever means to change it
writes it into curve.json in a commit of its own that says why.
"""

import json
from pathlib import Path

import pytest

from tests.learner.test_learner import OPTIONS, make_groups, make_learner

RECORDED = json.loads(Path(__file__).with_name("curve.json").read_text())
NAMES = ("loss", "policy_loss", "entropy", "grad_norm", "ratio/max", "sampling/logp_difference/mean", "learning_rate")


@pytest.mark.parametrize("loss_type", RECORDED)
def test_six_steps_are_as_recorded(tiny, photographs, one_process, loss_type):
    loss = OPTIONS.loss.model_copy(update={"loss_type": loss_type, "updates": 2, "entropy_coef": 0.01})
    learner, _ = make_learner(tiny, one_process, 400, loss=loss)
    groups, rewards = make_groups(tiny, photographs, seed=0)
    found = [{name: step.metrics[name] for name in NAMES} for step in (learner.step(groups, rewards) for _ in range(6))]
    for number, (own, recorded) in enumerate(zip(found, RECORDED[loss_type], strict=True)):
        for name, x in own.items():  # a loss is a difference of numbers near 1
            near = pytest.approx(recorded[name], rel=1e-4, abs=1e-5 if name in ("loss", "policy_loss") else 0)
            assert x == near, f"{name} of step {number}; in all {json.dumps(found)}"
