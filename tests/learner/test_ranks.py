"""World sizes: the same step on one rank, two and three, and on two copies of the model on two ranks each. Groups are
dealt anew to the ranks on the way, and the model has either family's patch size, a tied and an untied head."""

import json

import pytest
from safetensors.torch import load_file

from sslr1.model.tiny import build_tiny
from tests.conftest import launch_anew
from tests.forks import launch


def steps(folder, seed, models, cases, launch=launch):
    """{name: results} of each {name: case}."""
    asked = [
        {"out": str(folder / f"{n}.safetensors"), "seed": seed, "folders": [str(m) for m in models], **case}
        for n, case in enumerate(cases.values())
    ]
    (folder / "cases.json").write_text(json.dumps(asked))
    launch("tests.ranks", folder / "cases.json", timeout=600)
    return {name: load_file(one["out"]) for name, one in zip(cases, asked)}


def expected(one, case):
    """Of one rank's results those that the case has, too."""
    left_out = [] if case.get("updates", True) else ["updates/"]
    if (chosen := case.get("gradients_of")) is not None:
        left_out += [f"gradients{of} {n}/" for of in ("", " of adapters") for n in range(3) if n not in chosen]
    return {key: x for key, x in one.items() if not key.startswith(tuple(left_out))}


def compare(one, other, name, exact=1e-12, updated=1e-8, close=1e-5):
    """Two runs' results: gradients in float64 to `exact`, what three updates lead to in float64 to `updated`, a step's
    numbers in float32 to `close`."""
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


# Two devices' cosines and sines of float32 angles, which rotary embeddings are made of in every dtype, differ in the
# last bit.
ANOTHER_DEVICE = {"exact": 1e-6, "updated": 1e-6, "close": 1e-4}


CASES = {
    "1": dict(size=1),
    "2": dict(size=2),
    "2, uneven, micro-batches, recomputed": dict(size=2, budget=230, share="uneven", recompute=1),
    "3": dict(size=3),
    "2 copies on 2 ranks each, micro-batches": dict(size=4, budget=230, replicate=2, recompute=1),
    "another's cosines": dict(size=1, cosines="rounded"),
}
# The ordinary run: each family's gradients in one of the worlds
FEWER = {
    "1": {},
    "2, uneven, micro-batches, recomputed": dict(gradients_of=[2]),
    "3": dict(gradients_of=[1], updates=False),
    "2 copies on 2 ranks each, micro-batches": dict(gradients_of=[0]),
    "another's cosines": dict(gradients_of=[0]),
}


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param({name: CASES[name] | less for name, less in FEWER.items()}, id="a family each"),
        pytest.param(CASES, id="all families", marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
    ],
)
def test_one_rank_and_more_take_the_same_step(tmp_path, tiny, seed, cases):
    families = ("qwen3_vl", False), ("qwen3_5", True)
    others = [build_tiny(tmp_path / name, family=name, tie=tie) for name, tie in families]
    found = steps(tmp_path, seed, [tiny, *others], cases)
    ones = {name: expected(found["1"], case) for name, case in cases.items()}
    another = found.pop("another's cosines")
    for name in list(found)[1:]:
        compare(ones[name], found[name], name)
    compare(ones["another's cosines"], another, "another's cosines", **ANOTHER_DEVICE)
    with pytest.raises(AssertionError):  # and no tighter
        compare(ones["another's cosines"], another, "another's cosines", **{**ANOTHER_DEVICE, "exact": 1e-10})


@pytest.mark.gpu
def test_two_ranks_on_one_gpu(tmp_path, tiny, seed):
    """FSDP2 on CUDA tensors, by gloo; and the GPU's step is the CPU's. Not by tests.forks, which can't start where an
    import has started a thread."""
    pytest.importorskip("pydantic")
    cases = {"cpu": dict(size=1), "1": dict(size=1, device="cuda"), "2": dict(size=2, device="cuda")}
    cases["groups move"] = dict(size=2, device="cuda", share="uneven", budget=230)
    found = steps(tmp_path, seed, [tiny], cases, launch_anew)
    for name in ("1", "2", "groups move"):
        compare(found["cpu"], found[name], name, **ANOTHER_DEVICE)
    compare(found["1"], found["2"], "1 and 2", exact=1e-10, updated=1e-6, close=1e-4)
