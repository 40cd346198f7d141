"""float32 products on a CPU: by the faster library only where its digits are float32's, and as before elsewhere."""

import subprocess
import sys

import pytest
import torch

from sslr1 import model, ops
from sslr1.ops import products
from sslr1.rollout import Engine, wave
from tests.learner.test_learner import make_groups, make_learner

CPU = torch.device("cpu")


@pytest.fixture
def faster(monkeypatch):
    monkeypatch.setattr(products, "_onednn_is_faster", lambda: True)


def test_products_keep_their_digits(seed):
    """On every machine: where oneDNN would round, it isn't taken."""
    x, w = torch.randn(70, 576, requires_grad=True), torch.randn(300, 576, requires_grad=True)
    with ops.fast_products(CPU):
        y = x @ w.T
        y.square().sum().backward()
    wide = [p.detach().double().requires_grad_() for p in (x, w)]
    exact = wide[0] @ wide[1].T
    exact.square().sum().backward()
    for got, expected in ((y, exact), *((p.grad, q.grad) for p, q in zip((x, w), wide))):
        assert (got - expected).norm() <= 1e-6 * expected.norm()


def test_the_setting_is_put_back(faster):
    with ops.fast_products(CPU):
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == "highest"
    with pytest.raises(ZeroDivisionError), ops.fast_products(CPU):
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("given", [(torch.device("cuda"),), (CPU, 256)])
def test_nothing_is_set_elsewhere(faster, given):
    with ops.fast_products(*given):
        assert torch.get_float32_matmul_precision() == "highest"


SET = {
    "old way": ("torch.set_float32_matmul_precision('high')", "torch.get_float32_matmul_precision() == 'high'"),
    "new way": (
        "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
        "torch.backends.mkldnn.matmul.fp32_precision == 'bf16'",
    ),
}


@pytest.mark.parametrize("own, kept", SET.values(), ids=SET)
def test_what_somebody_has_set_stays(own, kept):
    script = f"""
import torch
from sslr1 import model, ops
from sslr1.ops import products
from sslr1.rollout import Engine, wave
from tests.learner.test_learner import make_groups, make_learner
products._onednn_is_faster = lambda: True
{own}
with ops.fast_products(torch.device("cpu")):
    assert {kept}
assert {kept}
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_library_that_rounds_is_not_taken(monkeypatch):
    monkeypatch.setattr(products, "EXACT", 1e-9)  # float32 rounds, too
    assert not products._onednn_is_exact() and torch.get_float32_matmul_precision() == "highest"


def test_learner_and_prefill_take_it(faster, monkeypatch, tiny, photographs, seed, one_process):
    seen, run = [], wave.run

    def note(*_):
        seen.append(torch.get_float32_matmul_precision())

    learner, weights = make_learner(tiny, one_process)
    learner.policy.register_forward_pre_hook(note)
    groups, rewards = make_groups(tiny, photographs, seed)
    learner.step(groups, rewards)
    assert set(seen) == {"medium"}
    seen.clear()
    monkeypatch.setattr(wave, "run", lambda *given: note() or run(*given))
    Engine(weights.model, model.load_tokenizer(tiny), max_tokens=2).generate([groups[0].prompt], group_size=2)
    assert seen == ["medium"] and torch.get_float32_matmul_precision() == "highest"
