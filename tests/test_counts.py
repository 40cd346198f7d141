"""bench/counts.py: a decode step's kernels and bytes, exactly, and what counting them means."""

import pytest
import torch
import yaml

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def counts():
    import importlib
    import sys

    sys.path.insert(0, str(ROOT / "bench"))
    yield importlib.import_module("counts")
    sys.path.remove(str(ROOT / "bench"))


@pytest.mark.parametrize(
    "name, full, linear",
    [("qwen2.5-vl-3b", 10, None), ("qwen3-vl-4b", 10, None), ("qwen3.5-4b", 11, 10)],
)
def test_a_decode_layers_kernels(counts, name, full, linear):
    """The attention's two included; transformers' own step has four times as many."""
    found = counts.decode(name, "ours")
    assert found["full"].kernels == full and (linear is None or found["linear"].kernels == linear)
    theirs = counts.traced(name, ("full", "full"), counts.generates_step).cost()
    assert theirs.kernels - counts.traced(name, ("full",), counts.generates_step).cost().kernels >= 40


def test_a_decode_steps_bytes(counts):
    """Against weights, prompts' keys and values once a group, own ones and logits once; and they repeat."""
    step, least = counts.decode("qwen2.5-vl-3b", "ours")["step"], counts.least("qwen2.5-vl-3b")
    assert abs(least - 9.55e9) < 1e7
    assert least < step.uncached <= 1.15 * least and step.bytes <= 1.5 * least
    counts.decode.cache_clear()
    assert counts.decode("qwen2.5-vl-3b", "ours")["step"] == step


def test_every_recipe_is_counted(counts):
    paths = [yaml.safe_load(path.read_text())["model"]["path"] for path in (ROOT / "configs").glob("*.yaml")]
    names = {path.lower() for path in paths if not path.startswith("builtin:")}
    assert {name.removesuffix("-instruct").removesuffix("-rl") for name in names} == set(counts.RECIPES)


def test_what_counts(counts):
    """Views and empty tensors are none, an expanded tensor counts once, one that is only written is not read, and one
    that the next kernel reads is cached."""
    counter = counts.Counter()
    x = torch.ones(8, 4)
    with counter:
        y = x[1:]
        z = y + y.new_empty(1).expand(4)
        w = z * 2
        w.fill_(1)
    names = [kernel.name for kernel in counter.kernels]
    assert names == ["add", "mul", "fill_"]
    assert [kernel.bytes for kernel in counter.kernels] == [4 * (28 + 1 + 28), 4 * (28 + 28), 4 * 28]
    cost = counter.cost()
    assert cost.values == (3, 4 * (57 + 56 + 28), 4 * (57 + 56 + 28) - 2 * 4 * 28)


def test_what_is_kept(counts):
    weight, x = torch.ones(4, 4, requires_grad=True), torch.ones(2, 4, requires_grad=True)
    kept = counts.Kept([weight])
    with torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda x: x):
        y = (x @ weight).exp()
        y * y
    assert kept.bytes == x.nbytes + y.nbytes
