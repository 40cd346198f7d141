"""World sizes: the same step on one rank, two and three, and on two copies of the model on two ranks each."""

import pytest
import torch
from safetensors.torch import load_file

from sslr1.model.tiny import build_tiny
from tests.conftest import launch
from tests.test_learner import make_groups, make_learner, parameters


def step(folder, tiny, seed, ranks, budget=100_000, share="even", replicate=1, recompute=0):
    folder.mkdir()
    launch("tests.ranks", folder, tiny, seed, budget, share, replicate, recompute, ranks=ranks)
    return load_file(folder / "result.safetensors")


def assert_same(one, other, name):
    assert other["numbers"].tolist() == pytest.approx(one["numbers"].tolist(), rel=1e-5), name
    for key in one:
        if key != "numbers":
            assert (one[key] - other[key]).abs().max() < 1e-3, (name, key)  # two Adam steps of at most 1e-3 each
            assert (one[key] - other[key]).norm() <= 0.02 * 1e-3 * one[key].numel() ** 0.5, (name, key)


def test_one_rank_and_more_take_the_same_step(tmp_path, tiny, seed):
    one = step(tmp_path / "1", tiny, seed, 1)
    cases = {
        "2": (2, 100_000, "even"),
        "2, micro-batches": (2, 230, "even"),
        "2, uneven": (2, 230, "uneven"),
        "3": (3, 100_000, "even"),
        "2 copies on 2 ranks each": (4, 100_000, "even", 2, 1),
    }
    for name, case in cases.items():
        other = step(tmp_path / name, tiny, seed, *case)
        assert_same(one, other, name)


def test_qwen3_vl_takes_the_same_step_on_two_ranks(tmp_path, photographs, seed, one_process):
    folder = build_tiny(tmp_path / "model", family="qwen3_vl")
    learner, _ = make_learner(folder, one_process)
    recorded = make_groups(folder, photographs, seed)
    found = learner.step(*recorded)
    learner.step(*recorded)
    numbers = torch.tensor([found[key] for key in ("loss", "grad_norm", "entropy", "tokens")], dtype=torch.float64)
    two = step(tmp_path / "2", folder, seed, 2, 230, "uneven", recompute=1)
    assert_same({"numbers": numbers, **parameters(learner)}, two, "2, uneven, recomputed")
