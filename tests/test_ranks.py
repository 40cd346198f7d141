"""World sizes: the same step on one rank, two and three, and on two copies of the model on two ranks each. Groups are dealt anew
to the ranks on the way, and the model has either family's patch size, a tied and an untied head."""

import pytest
from safetensors.torch import load_file

from sslr1.model.tiny import build_tiny
from tests.conftest import launch


def step(out, seed, folders, ranks, budget=100_000, share="even", replicate=1, recompute=0):
    out.mkdir()
    launch("tests.ranks", out, seed, budget, share, replicate, recompute, *folders, ranks=ranks)
    return load_file(out / "result.safetensors")


def test_one_rank_and_more_take_the_same_step(tmp_path, tiny, seed):
    folders = [tiny, build_tiny(tmp_path / "model", family="qwen3_vl", tie=False)]
    one = step(tmp_path / "1", seed, folders, 1)
    cases = {
        "2": (2, 100_000, "even"),
        "2, uneven, micro-batches, recomputed": (2, 230, "uneven", 1, 1),
        "3": (3, 100_000, "even"),
        "2 copies on 2 ranks each": (4, 100_000, "even", 2, 1),
    }
    for name, case in cases.items():
        other = step(tmp_path / name, seed, folders, *case)
        assert set(other) == set(one)
        for key, expected in one.items():
            found, where = other[key], (name, key)
            if key.startswith("gradients"):  # float64
                assert (found - expected).norm() <= 1e-12 * expected.norm(), where
            elif key == "updates/numbers":  # float64 too, but behind three updates by Adam
                assert expected[1] > 0 and found.tolist() == pytest.approx(expected.tolist(), rel=1e-8), where
            elif key == "two steps/numbers":
                assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-5), where
            else:  # of at most 1e-3 each
                assert (found - expected).abs().max() < 1e-3, where
                assert (found - expected).norm() <= 0.02 * 1e-3 * expected.numel() ** 0.5, where
