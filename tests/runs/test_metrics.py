"""What a step's record says of its completions."""

from types import SimpleNamespace

import pytest
import torch

from sslr1.puzzles import LEVELS, Answer, score
from sslr1.puzzles.curriculum import chance_reward
from sslr1.runs import metrics
from sslr1.train import Rollout


def test_every_level_that_was_seen_has_its_own_numbers(one_process):
    """Two puzzles at three levels in one step, as an adaptive curriculum or a fallback makes them."""
    answer, order = Answer("number", 90, (0, 90, 180, 270)), Answer("sequence", (2, 1, 3, 4))
    texts = [
        ("rotation", 1, answer, 1 / 4, ["90", "90"]),
        ("rotation", 2, answer, 1 / 4, ["90", "180"]),
        ("rotation", 2, answer, 1 / 4, ["0", "180"]),
        ("ordering", 2, order, 1 / 24, ["2,1,3,4", "2,1,4,3"]),
    ]
    names, levels, answers, chances, _ = zip(*texts)
    batch = SimpleNamespace(names=names, levels=levels, answers=answers, chance=chances)
    scores = [[score(a, f"\\boxed{{{t}}}", thinking=False) for t in said] for _, _, a, _, said in texts]
    samples = [SimpleNamespace(tokens=[1] * n, finish=f) for n, f in ((3, "stop"), (5, "length"))]
    groups = [SimpleNamespace(samples=samples) for _ in texts]
    mixture = {"rotation": 0.5, "ordering": 0.3, "similarity": 0.2}
    rewards = torch.tensor([[s.reward for s in row] for row in scores])
    drawn = Rollout(groups=groups, scores=scores, rewards=rewards)
    options = {"mixture": mixture, "rule": "default", "device": one_process.device}
    totals = metrics.StepTotals.gather(batch, drawn, drawn, **options)
    found = totals.metrics()
    assert {k for k in found if "/" in k} == {
        "completions/mean_length",
        "completions/clipped_ratio",
        "rewards/rotation/mean",
        "rewards/ordering/mean",
        *(f"{what}/rotation/level{level}" for what in ("accuracy", "exact", "chance") for level in (1, 2)),
        *(f"{what}/ordering/level2" for what in ("accuracy", "exact", "chance")),
    }
    assert found["exact/rotation/level1"] == 1.0 and found["exact/rotation/level2"] == 0.25
    assert (found["accuracy/ordering/level2"], found["exact/ordering/level2"]) == (0.75, 0.5)
    assert (found["chance/rotation/level2"], found["chance/ordering/level2"]) == (0.25, pytest.approx(1 / 24))
    assert found["rewards/rotation/mean"] == pytest.approx((3 * 1.0 + 3 * 0.1) / 6)
    assert (found["frac_reward_zero_std"], found["format"]) == (0.5, 1.0)
    assert (found["completions/mean_length"], found["completions/clipped_ratio"]) == (4.0, 0.5)
    assert {name: tuple(own) for name, own in totals.levels.items()} == {name: LEVELS[name] for name in mixture}
    two = totals.levels["rotation"][2]
    assert two["n"] == 4 and two["gain"] == pytest.approx(1 - 3 / 3, abs=1e-5)
    assert two["margin"] == pytest.approx(1.3 - 4 * chance_reward(answer), abs=1e-5)
    assert totals.levels["ordering"][2]["gain"] == pytest.approx(1 + (0.5 - 1 / 4) / (3 / 4), abs=1e-5)
    assert not any(totals.levels["similarity"][1].values())
    rewards[0, 1] = 0.1  # the first puzzle's group replaced by another puzzle's: only the share of flat groups knows
    trained = Rollout(groups=groups, scores=scores, rewards=rewards, resampled=1)
    again = metrics.StepTotals.gather(batch, drawn, trained, **options)
    assert again.metrics() == {**found, "frac_reward_zero_std": 0.25} and again.levels == totals.levels
    assert (totals.overall["resampled"], again.overall["resampled"]) == (0, 1)
