"""Norms, SwiGLU and the rotary embedding as transformers' modules compute them, which keep their inputs alone for the
backward pass; what the first two return is marked for `again`.

Sums of squares and gradients are float32 (float64 for float64), and results are rounded where transformers rounds.
backend: "reference" (torch, any dtype and device), "cpp" (float32 on a CPU), "triton" (bfloat16, float16 and float32 on
CUDA), or "auto".
"""

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sslr1.ops import again, backends


def rms_norm(x, weight, eps, plus_one=False, *, backend="auto"):
    """x / sqrt(mean x^2 + eps) * weight over the last dimension (arXiv 1910.07467), x [..., n], weight [n].

    plus_one: times 1 + weight, and rounded once, behind it (Qwen3.5), not before and behind it."""
    wide = f"takes rows to {WIDEST}, got {len(weight)}" if x.is_cuda and len(weight) > WIDEST else None
    make, backward = {
        "reference": (_rms_norm, _rms_norm_backward),
        "cpp": (_rms_norm_cpp, _rms_norm_backward_cpp),
        "triton": (_rms_norm_triton, _rms_norm_backward_triton),
    }[_choose("rms_norm", backend, x, weight, unfit=wide)]
    return _run(make, backward, (x, weight), eps, plus_one)


def gated_rms_norm(x, gate, weight, eps):
    """rms_norm(x) * silu(gate), the gate in float32: x, gate [..., n], weight [n]."""
    return _run(_gated, _gated_backward, (x, gate, weight), eps)


def layer_norm(x, weight, bias, eps):
    """torch's, which keeps its input alone as it is."""
    make = _bound(_layer_norm, eps)
    return again.mark(make(x, weight, bias), make, x, weight, bias)


def swiglu(gate, up, *, backend="auto"):
    """silu(gate) * up (arXiv 2002.05202), both [..., n]."""
    make, backward = {
        "reference": (_swiglu, _swiglu_backward),
        "cpp": (_swiglu_cpp, _swiglu_backward_cpp),
        "triton": (_swiglu_triton, _swiglu_backward_triton),
    }[_choose("swiglu", backend, gate, up)]
    return _run(make, backward, (gate, up))


def activated(function, x):
    """function(x) of a function that keeps its input alone as it is."""
    return again.mark(function(x), function, x)


def rotated(qkv, cos, sin):
    """Queries, keys and values of qkv [T, 3, H, d], each [T, H, d], the first two rotated by cos and sin [T, d] (arXiv
    2104.09864, halves as in transformers, in float32). Kept are cos and sin, which all layers share."""
    return _Rotated.apply(qkv, cos, sin)


WIDEST = 4096  # of a norm's row, that the Triton kernels are compiled and tested for
PLAIN = torch.Tensor, torch.nn.Parameter  # that have an address


def _choose(operation, backend, *tensors, unfit=None):
    half = () if tensors[0].device.type == "cpu" else (torch.bfloat16, torch.float16)
    dtypes = [x.dtype for x in tensors]
    if dtypes[0] not in (torch.float32, *half) or len({*dtypes}) > 1 or any(type(x) not in PLAIN for x in tensors):
        unfit = f"takes plain tensors, of one dtype that is float32 (on a GPU also half), got {dtypes}"
    return backends.choose(operation, backend, tensors[0].device, ("triton", "cpp"), unfit)


def _run(make, backward, inputs, *options):
    make, backward = _bound(make, *options), _bound(backward, *options)
    return again.mark(_Cheap.apply(make, backward, *inputs), make, *inputs)


def _bound(function, *options):
    return lambda *tensors: function(*tensors, *options)


class _Cheap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, make, backward, *inputs):
        ctx.save_for_backward(*inputs)
        ctx.backward = backward
        return make(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        inputs = ctx.saved_tensors
        found = ctx.backward(grad, *inputs)
        return None, None, *(x.to(y.dtype) for x, y in zip(found, inputs))


def _wide(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _root(x, eps):
    """1 / sqrt(mean x^2 + eps)"""
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True).add_(eps))


def _rms_norm(x, weight, eps, plus_one):
    wide = _wide(x)
    normed = wide * _root(wide, eps)
    if plus_one:
        return normed.mul_(1 + _wide(weight)).to(x.dtype)
    return normed.to(x.dtype) * weight


def _rms_norm_backward(grad, x, weight, eps, plus_one):
    return _through_norm(_wide(grad), _wide(x), _wide(weight) + plus_one, eps)


def _through_norm(grad, x, weight, eps):
    """Gradients of x and weight from that of weight * x / sqrt(mean x^2 + eps), all in float32."""
    root = _root(x, eps)
    normed = x * root
    grad_weight = (grad * normed).sum(tuple(range(x.dim() - 1)))
    grad = grad * weight
    along = (grad * normed).mean(-1, keepdim=True)
    return grad.addcmul_(normed, along, value=-1).mul_(root), grad_weight


def _gated(x, gate, weight, eps):
    return (_rms_norm(x, weight, eps, False) * F.silu(_wide(gate))).to(x.dtype)


def _gated_backward(grad, x, gate, weight, eps):
    grad, wide_gate = _wide(grad), _wide(gate)
    grad_gate = torch.ops.aten.silu_backward(grad * _rms_norm(x, weight, eps, False), wide_gate)
    grad_x, grad_weight = _through_norm(grad * F.silu(wide_gate), _wide(x), _wide(weight), eps)
    return grad_x, grad_gate, grad_weight


def _layer_norm(x, weight, bias, eps):
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def _swiglu(gate, up):
    return F.silu(gate).mul_(up)


def _swiglu_backward(grad, gate, up):
    return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def _addresses(*tensors):
    return [x.data_ptr() for x in tensors]


def _rms_norm_cpp(x, weight, eps, plus_one):
    x, n, threads = x.contiguous(), len(weight), torch.get_num_threads()
    out = torch.empty_like(x)
    backends._C.rms_norm(*_addresses(x, weight, out), x.numel() // n, n, eps, plus_one, threads)
    return out


def _rms_norm_backward_cpp(grad, x, weight, eps, plus_one):
    grad, x, n, threads = grad.contiguous(), x.contiguous(), len(weight), torch.get_num_threads()
    out = torch.empty_like(x), torch.empty_like(weight)
    backends._C.rms_norm_backward(*_addresses(grad, x, weight, *out), x.numel() // n, n, eps, plus_one, threads)
    return out


def _swiglu_cpp(gate, up):
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    backends._C.swiglu(*_addresses(gate, up, out), gate.numel(), torch.get_num_threads())
    return out


def _swiglu_backward_cpp(grad, gate, up):
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate), torch.empty_like(gate)
    backends._C.swiglu_backward(*_addresses(grad, gate, up, *out), gate.numel(), torch.get_num_threads())
    return out


def _rms_norm_triton(x, weight, eps, plus_one):
    from sslr1.kernels import elementwise as kernel

    return kernel.rms_norm(x, weight, eps, plus_one)


def _rms_norm_backward_triton(grad, x, weight, eps, plus_one):
    from sslr1.kernels import elementwise as kernel

    return kernel.rms_norm_backward(grad, x, weight, eps, plus_one)


def _swiglu_triton(gate, up):
    from sslr1.kernels import elementwise as kernel

    return kernel.swiglu(gate, up)


def _swiglu_backward_triton(grad, gate, up):
    from sslr1.kernels import elementwise as kernel

    return kernel.swiglu_backward(grad, gate, up)


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, cos, sin):
        ctx.save_for_backward(cos, sin)
        cos, sin = (_like(qkv, x) for x in (cos, sin))
        q, k = (_turn(qkv[:, i], cos, sin) for i in range(2))
        return q, k, qkv[:, 2].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        cos, sin = (_like(grads[0], x) for x in ctx.saved_tensors)
        T, H, d = grads[0].shape
        out = grads[0].new_empty(T, 3, H, d)
        for i, grad in enumerate(grads):
            out[:, i] = grad if i == 2 else _turn(grad, cos, -sin.roll(d // 2, -1))
        return out, None, None


def _like(x, table):
    """A table [T, d] as what x [T, ..., H, d] computes with takes it."""
    return table.to(torch.promote_types(x.dtype, torch.float32))[:, None]


def _turn(x, cos, sin):
    """x * cos + (-x2 | x1) * sin, rounded once."""
    wide, half = _wide(x), x.shape[-1] // 2
    out = wide * cos
    out[..., :half].addcmul_(wide[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(wide[..., :half], sin[..., half:])
    return out.to(x.dtype)
