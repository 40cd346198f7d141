"""World sizes: the same step on one rank, two and three, and on two copies of the model on two ranks each. Groups are dealt anew
to the ranks on the way, and the model has either family's patch size, a tied and an untied head."""

import pytest
from safetensors.torch import load_file

from sslr1.model.tiny import build_tiny
from tests.conftest import launch


def step(out, seed, folders, ranks, budget=100_000, share="even", replicate=1, recompute=0, device="cpu"):
    out.mkdir()
    launch("tests.ranks", out, seed, budget, share, replicate, recompute, device, *folders, ranks=ranks)
    return load_file(out / "result.safetensors")


def compare(one, other, name, exact=1e-12, updated=1e-8, close=1e-5):
    """Two runs' results: gradients in float64 to `exact`, what three updates lead to in float64 to `updated`, a step's numbers in
    float32 to `close`."""
    assert set(other) == set(one)
    for key, expected in one.items():
        found, where = other[key], (name, key)
        if key.startswith("gradients"):  # float64
            assert (found - expected).norm() <= exact * expected.norm(), where
        elif key == "updates/numbers":  # float64 too, but behind three updates by Adam
            assert expected[1] > 0 and found.tolist() == pytest.approx(expected.tolist(), rel=updated), where
        elif key == "two steps/numbers":
            assert found.tolist() == pytest.approx(expected.tolist(), rel=close), where
        else:  # of at most 1e-3 each
            assert (found - expected).abs().max() < 1e-3, where
            assert (found - expected).norm() <= 0.02 * 1e-3 * expected.numel() ** 0.5, where


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
        compare(one, step(tmp_path / name, seed, folders, *case), name)


@pytest.mark.gpu
def test_two_ranks_on_one_gpu(tmp_path, tiny, seed):
    """FSDP2 on CUDA tensors, by gloo; and the GPU's step is the CPU's."""
    pytest.importorskip("pydantic")
    one = step(tmp_path / "cpu", seed, [tiny], 1)
    for name, ranks in (("one rank", 1), ("two ranks", 2)):
        found = step(tmp_path / name, seed, [tiny], ranks, device="cuda")
        compare(one, found, name, exact=1e-10, updated=1e-6, close=1e-4)
