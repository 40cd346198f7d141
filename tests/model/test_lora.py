"""Adapters: against PEFT's on transformers' own model, and against matrices merged by hand; what they may be put on."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText

from sslr1 import ops
from sslr1.config.settings import Lora
from sslr1.model import lora, parallel
from tests.learner.test_learner import make_groups, make_learner

BOTH = Lora(rank=4, alpha=6, rslora=True, vision="all-linear")


@pytest.mark.parametrize("shape, rank", [((2, 7, 33), 5), ((1, 16), 1), ((0, 8), 3), ((300, 64), 16)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_op_is_its_reference(seed, shape, rank, bias):
    x, weight, own = torch.randn(shape), torch.randn(20, shape[-1]), torch.randn(20) if bias else None
    lora_a, lora_b, weights = torch.randn(rank, shape[-1]), torch.randn(20, rank), torch.randn(*shape[:-1], 20)
    found = []
    for dtype, backend in ((torch.float64, "reference"), (torch.float64, "auto"), (torch.float32, "auto")):
        leaves = [t.to(dtype).requires_grad_() for t in (x, lora_a, lora_b)]
        fixed = [None if t is None else t.to(dtype) for t in (weight, own)]
        out = ops.lora_linear(leaves[0], *fixed, *leaves[1:], 0.7, backend=backend)
        found.append([out, *torch.autograd.grad((out * weights.to(dtype)).sum(), leaves)])
    for exact, same, near in zip(*found):
        assert exact.shape == same.shape == near.shape
        assert (same - exact).norm() <= 1e-13 * exact.norm() and (near - exact).norm() <= 1e-5 * exact.norm()
    assert torch.equal(ops.lora_linear(x, weight, own, lora_a, 0 * lora_b, 0.7), F.linear(x, weight, own))
    with pytest.raises(ValueError, match="are frozen"):
        ops.lora_linear(x, weight.requires_grad_(), own, lora_a, lora_b, 0.7)


def test_the_op_keeps_its_input_once_and_forms_no_gradient_of_the_matrix(seed):
    x, weight = torch.randn(50, 32, requires_grad=True), torch.randn(48, 32)
    parts = [(torch.randn(4, 32, requires_grad=True), torch.randn(48, 4, requires_grad=True)) for _ in range(3)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        outs = [ops.lora_linear(x, weight, None, a, b, 1.0) for a, b in parts]
    others = {t.data_ptr() for t in kept} - {t.data_ptr() for t in (weight, *(p for pair in parts for p in pair))}
    assert others - {x.data_ptr()} == {t.data_ptr() for t in kept if t.shape == (50, 4)}
    sizes = []

    class Products(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, arguments=(), options=None):
            out = op(*arguments, **(options or {}))
            if op.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
                sizes.append(tuple(out.shape))
            return out

    with Products():
        sum(outs).sum().backward()
    assert (48, 32) not in sizes and sizes.count((50, 32)) == 6


def test_the_op_compiles_whole(seed):
    x, weight, lora_a, lora_b = (torch.randn(s) for s in ((5, 8), (6, 8), (2, 8), (6, 2)))
    call = torch.compile(lambda *t: ops.lora_linear(*t, 0.5), backend="aot_eager", fullgraph=True)
    a, b = (t.clone().requires_grad_() for t in (lora_a, lora_b))
    call(x, weight, None, a, b).square().sum().backward()
    c, d = (t.clone().requires_grad_() for t in (lora_a, lora_b))
    ops.lora_linear(x, weight, None, c, d, 0.5, backend="reference").square().sum().backward()
    assert torch.allclose(a.grad, c.grad) and torch.allclose(b.grad, d.grad)


class ByHand(nn.Linear):
    """A linear with its adapter in its matrix."""

    def forward(self, x):
        return F.linear(x, self.weight + self.scale * self.lora_B @ self.lora_A, self.bias)


def by_hand(folder, found: lora.Lora, values):
    """transformers' own model in float64 with ByHand linears, and its adapters' parameters by our names."""
    network = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64).requires_grad_(False)
    parameters = {}
    for name in found.names:
        module = network.get_submodule(name)
        module.__class__, module.scale = ByHand, found.scale
        for part in ("lora_A", "lora_B"):
            setattr(module, part, nn.Parameter(values[f"{name}.{part}.weight"].clone()))
            parameters[f"{name}.{part}.weight"] = getattr(module, part)
    return network, parameters


def by_peft(folder, found: lora.Lora, values):
    import peft

    network = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64)
    asked = dict(r=found.rank, lora_alpha=found.alpha, use_rslora=found.rslora, target_modules=list(found.names))
    network = peft.get_peft_model(network, peft.LoraConfig(**asked), autocast_adapter_dtype=False)
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    parameters = {name.removeprefix(lora.PREFIX).replace(".default.", "."): p for name, p in trained.items()}
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(values[name])
    return network, parameters


def separate_loss(network, groups, rewards):
    """Each completion with its own copy of its prompt through transformers' own forward, one a call."""
    advantages, tokens = ops.advantages(rewards), sum(len(s.tokens) for g in groups for s in g.samples)
    for own, group in zip(advantages, groups):
        for advantage, sample in zip(own, group.samples):
            ids = torch.cat([group.prompt.input_ids, sample.tokens])[None]
            out = network(
                input_ids=ids,
                mm_token_type_ids=(ids == network.config.image_token_id).int(),
                use_cache=False,
                pixel_values=group.prompt.pixel_values.double(),
                image_grid_thw=group.prompt.image_grid_thw,
            ).logits[0, -len(sample.tokens) - 1 : -1]
            picked = out.log_softmax(-1).gather(-1, sample.tokens[:, None])[:, 0]
            yield -((picked - picked.detach()).exp() * advantage).sum() / tokens


def some_values(network):
    """Adapters that do something, halves of one size."""
    return {name: torch.randn(p.shape, dtype=torch.float64) * 0.1 for name, p in lora.adapters(network)}


def put(network, values):
    for name, parameter in lora.adapters(network):
        parallel.fill(parameter, values[name].to(parameter.dtype))


@pytest.mark.parametrize("theirs", [by_hand, pytest.param(by_peft, marks=pytest.mark.peer)])
@pytest.mark.parametrize("recompute", [0, 1])
def test_loss_and_gradients_are_theirs(any_tiny, photographs, seed, one_process, exact_norms, theirs, recompute):
    """In float64, packed in micro-batches that split groups, against separate sequences."""
    groups, rewards = make_groups(any_tiny, photographs, seed)
    rewards = rewards.double()
    tokens = max(len(g.prompt.input_ids) for g in groups) + 7
    learner, _ = make_learner(any_tiny, one_process, tokens, recompute=recompute, dtype=torch.float64, lora=BOTH)
    network, found = learner.policy.model, {}
    values = some_values(network)
    put(network, values)
    learner._update = lambda totals: found.update(loss=totals["loss"].item()) or {"grad_norm": 0.0}
    learner.step(groups, rewards)
    other, parameters = theirs(any_tiny, lora.lora_of(network), values)
    loss = 0.0
    for part in separate_loss(other, groups, rewards):
        part.backward()
        loss += part.item()
    assert abs(found["loss"] - loss) <= 1e-12
    mine = dict(lora.adapters(network))
    assert mine.keys() == parameters.keys() and any("visual.merger" in name for name in mine)
    for name, parameter in mine.items():
        expected = parameters[name].grad
        assert (parallel.local(parameter.grad) - expected).norm() <= 1e-12 * expected.norm(), name
    assert all(p.grad is None for name, p in network.named_parameters() if name not in mine)
