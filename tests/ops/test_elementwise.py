"""Norms, SwiGLU and the vision tower's rotary embedding against their formulas by autograd and transformers' modules;
and what the products that read them keep."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen3_5

from sslr1 import ops
from sslr1.ops import again, backends
from sslr1.ops.lora import lora_linear
from tests.interpreter import interpret
from tests.ops.test_delta_rule import assert_compiles

F64 = torch.float64
BACKENDS = ["reference", pytest.param("cpp", marks=pytest.mark.skipif(backends._C is None, reason="not built"))]


def normed(x, weight, eps=1e-6):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def turned(qkv, cos, sin):
    q, k, v = qkv.unbind(1)
    return *qwen2_5.apply_rotary_pos_emb_vision(q, k, cos, sin), v


# (ours, formula, shapes)
CASES = {
    "norm": (lambda x, w, b: ops.rms_norm(x, w, 1e-6, backend=b), normed, [(3, 5, 33), (33,)]),
    "norm, centred": (
        lambda x, w, b: ops.rms_norm(x, w, 1e-6, plus_one=True, backend=b),
        lambda x, w: normed(x, 1 + w),
        [(70, 48), (48,)],
    ),
    "gated norm": (
        lambda x, g, w, b: ops.gated_rms_norm(x, g, w, 1e-6),
        lambda x, g, w: normed(x, w) * F.silu(g),
        [(4, 3, 16), (4, 3, 16), (16,)],
    ),
    "swiglu": (lambda g, u, b: ops.swiglu(g, u, backend=b), lambda g, u: F.silu(g) * u, [(2, 7, 19)] * 2),
    "layer norm": (
        lambda x, w, c, b: ops.layer_norm(x, w, c, 1e-6),
        lambda x, w, c: F.layer_norm(x, w.shape, w, c, 1e-6),
        [(9, 20), (20,), (20,)],
    ),
    "rotary": (
        lambda qkv, cos, sin, b: torch.cat(ops.rotated(qkv, cos.detach(), sin.detach())),
        lambda qkv, cos, sin: torch.cat(turned(qkv, cos.detach(), sin.detach())),
        [(6, 3, 2, 8), (6, 8), (6, 8)],
    ),
}


def both(name, dtype, backend):
    """((result, gradients) of ours, the same of the formula) of inputs that are views with gaps and a gradient whose
    rows are not in order."""
    mine, formula, shapes = CASES[name]
    drawn = [2 * torch.randn(*shape, 2, dtype=dtype).select(-1, 0) for shape in shapes]
    found = []
    for run in (lambda *x: mine(*x, backend), formula):
        inputs = [x.clone().requires_grad_() if x.dim() == 1 else x.requires_grad_() for x in drawn]
        for x in inputs:
            x.grad = None
        out = run(*inputs)
        torch.manual_seed(0)
        (out.transpose(0, 1) * torch.randn(out.transpose(0, 1).shape, dtype=dtype)).sum().backward()
        found.append((out.detach(), [x.grad for x in inputs if x.grad is not None]))
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_formula_by_autograd(name, seed, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # transformers' rotary keeps float64
    (out, gradients), (wanted, theirs) = both(name, F64, "reference")
    torch.testing.assert_close(out, wanted, rtol=1e-13, atol=1e-13)
    assert len(gradients) == len(theirs)
    for a, b in zip(gradients, theirs):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["norm", "norm, centred", "swiglu"])
def test_float32_on_a_cpu(name, backend, seed):
    check_float32(name, backend)


INTERPRETED = """
from tests.ops import test_elementwise as test
for name in ("norm", "norm, centred", "swiglu"):
    test.check_float32(name, "triton")
"""


def test_triton_in_the_interpreter(seed):
    interpret(INTERPRETED, seed)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_triton_compiles_for_hopper_without_spills(tmp_path, dtype):
    """At a head's width, the 3B's and the widest."""
    from sslr1.kernels import elementwise as module

    types = dict.fromkeys("x weight out grad dx gate up dgate dup".split(), f"*{dtype}")
    types |= {"sums": "*fp32", "eps": "fp32"}
    kernels = [("gated", dict(BLOCK=module.PIECE), {}, {}), ("gated_backward", dict(BLOCK=module.PIECE), {}, {})]
    for n in (128, 2048, ops.elementwise.WIDEST):
        sizes = module.sizes(n)
        options = {"num_warps": sizes.pop("num_warps")}
        for plus_one in (False, True):
            kernels += [(name, sizes | {"PLUS_ONE": plus_one}, options, {}) for name in ("norm", "norm_backward")]
    assert len(list(assert_compiles([module], kernels, types, tmp_path))) == 14


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n", [128, 2048, 3584])
def test_triton_on_the_gpu(dtype, n, seed):
    """Against float64, and no further off than torch's operations."""
    x, w, grad, gate = (torch.randn(*s, device="cuda", dtype=dtype) for s in ((999, n), (n,), (999, n), (999, n)))
    for run, given in (
        (lambda b, x, w: ops.rms_norm(x, w, 1e-6, backend=b), (x, w)),
        (lambda b, x, w: ops.rms_norm(x, w, 1e-6, plus_one=True, backend=b), (x, w)),
        (lambda b, gate, up: ops.swiglu(gate, up, backend=b), (gate, x)),
    ):
        found = {}
        for backend, wide in (("triton", False), ("reference", False), ("exact", True)):
            inputs = [(y.double() if wide else y.clone()).requires_grad_() for y in given]
            out = run("reference" if wide else backend, *inputs)
            out.backward(grad.to(out.dtype))
            found[backend] = [out.detach().double(), *(y.grad.double() for y in inputs)]
        for mine, plain, exact in zip(*found.values()):
            assert (mine - exact).norm() <= 1.1 * (plain - exact).norm() + 1e-6 * exact.norm()


def check_float32(name, backend):
    (out, gradients), (wanted, theirs) = both(name, torch.float32, backend)
    torch.testing.assert_close(out, wanted, rtol=3e-6, atol=3e-6)
    for a, b in zip(gradients, theirs):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


def modules(dtype):
    """(transformers' module, ours) of each kind."""
    centred, gated = qwen3_5.Qwen3_5RMSNorm(64), qwen3_5.Qwen3_5RMSNormGated(64)
    plain = qwen2_5.Qwen2_5_VLRMSNorm(64)
    for module in (centred, gated, plain):
        module.weight.data.normal_()
    centred, plain = centred.to(dtype), plain.to(dtype)  # the gated one's weight stays in float32
    return {
        "norm": (plain, lambda x, gate: ops.rms_norm(x, plain.weight, 1e-6, backend="reference")),
        "centred": (centred, lambda x, gate: ops.rms_norm(x, centred.weight, 1e-6, plus_one=True, backend="reference")),
        "gated": (gated, lambda x, gate: ops.gated_rms_norm(x, gate, gated.weight, 1e-6)),
        "swiglu": (lambda x, gate: F.silu(gate) * x, lambda x, gate: ops.swiglu(gate, x, backend="reference")),
    }


@pytest.mark.parametrize("name", ["norm", "centred", "gated", "swiglu"])
def test_rounded_as_transformers_does_and_gradients_no_worse(name, seed):
    """bfloat16: the same bits forward; gradients no further from float64's than transformers' are."""
    theirs, ours = modules(torch.bfloat16)[name]
    x, gate, grad = (torch.randn(500, 64).bfloat16() for _ in range(3))
    taken = (x, gate) if name in ("gated", "swiglu") else (x,)
    found = []
    for run in (ours, theirs):
        inputs = [y.clone().requires_grad_() for y in taken]
        out = run(*inputs, *[None] * (run is ours and len(inputs) == 1))
        out.backward(grad)
        found.append((out.detach(), [y.grad.double() for y in inputs]))
    assert torch.equal(found[0][0], found[1][0])
    wide = [y.double().requires_grad_() for y in taken]
    weight = getattr(theirs, "weight", torch.ones(64)).detach().double()
    formula = {
        "norm": lambda x: normed(x, weight),
        "centred": lambda x: normed(x, 1 + weight),
        "gated": lambda x, gate: normed(x, weight) * F.silu(gate),
        "swiglu": lambda x, gate: F.silu(gate) * x,
    }[name]
    formula(*wide).backward(grad.double())
    for mine, other, exact in zip(found[0][1], found[1][1], (y.grad for y in wide)):
        assert (mine - exact).norm() <= 1.02 * (other - exact).norm()


def test_products_keep_what_it_was_made_of(seed, monkeypatch):
    """Three products read a norm, one of them with an adapter: what each keeps is the norm's inputs, and it is made
    again once. Gradients are those of autograd."""
    x, weight = torch.randn(7, 16, dtype=F64, requires_grad=True), torch.randn(16, dtype=F64, requires_grad=True)
    matrices = [torch.randn(5, 16, dtype=F64, requires_grad=True) for _ in range(2)]
    bias = torch.randn(5, dtype=F64, requires_grad=True)
    base, a, b = (
        torch.randn(5, 16, dtype=F64),
        *(torch.randn(*s, dtype=F64, requires_grad=True) for s in ((2, 16), (5, 2))),
    )
    leaves, made, saved = [x, weight, *matrices, bias, a, b], [], []
    inner = ops.elementwise._rms_norm
    monkeypatch.setattr(ops.elementwise, "_rms_norm", lambda *given: made.append(1) or inner(*given))

    def note(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = ops.rms_norm(x, weight, 1e-6)
        own = y.untyped_storage().data_ptr()
        read = y[None]  # a view of it, as layers hand one on
        out = again.linear(read, matrices[0], bias) + again.linear(y, matrices[1])
        out = out + lora_linear(read, base, None, a, b, 0.5)
        del y, read
    assert own not in {tensor.untyped_storage().data_ptr() for tensor in saved}
    assert len(made) == 1
    grad = torch.randn_like(out)
    for _ in range(2):  # twice through one graph, each time made once
        made.clear()
        gradients = torch.autograd.grad(out, leaves, grad, retain_graph=True)
        assert len(made) == 1
    y = normed(x, weight)
    plain = F.linear(y, matrices[0], bias) + F.linear(y, matrices[1]) + F.linear(y, base) + 0.5 * y @ a.T @ b.T
    for mine, wanted in zip(gradients, torch.autograd.grad(plain[None], leaves, grad)):
        torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-12)


def test_what_has_been_written_to_is_kept_itself(seed):
    x, weight, matrix = (torch.randn(*s, dtype=F64, requires_grad=True) for s in ((4, 8), (8,), (3, 8)))
    y = ops.rms_norm(x, weight, 1e-6)
    assert again.recipe_of(y) is not None and again.recipe_of(y[1:]) is None and again.recipe_of(y.t()) is None
    y = y.mul_(2)
    assert again.recipe_of(y) is None
    (grad,) = torch.autograd.grad(again.linear(y, matrix).sum(), matrix)
    torch.testing.assert_close(grad, (2 * normed(x, weight)).sum(0).expand(3, 8))
    with torch.no_grad():
        assert again.is_plain()


def test_frozen_matrices_keep_nothing_of_their_input(seed):
    x, weight = torch.randn(4, 8, requires_grad=True), nn.Parameter(torch.randn(8))
    frozen = torch.randn(3, 8)
    y = ops.rms_norm(x, weight, 1e-6)
    assert again.recipe_of(y).readers.count == 0
    again.linear(y, frozen).sum().backward()
    assert again.recipe_of(y).readers.count == 0 and x.grad is not None
