"""What stands between the products of a decode step, row by row: RMS norms and SwiGLU. No gradients.

step_norm: x / sqrt(mean(x^2) + eps), times weight (Qwen2.5-VL, Qwen3-VL: rounded to x's dtype before the weight) or
1 + weight (`zero_centred`, Qwen3.5: rounded behind it). step_swiglu: silu(gate) up. Sums are float32 (float64 for
float64). A row depends on nothing but itself.

Cost with B bytes a number, one launch each: step_norm 2 B rows width, step_swiglu 3 B rows width.
"""

import torch
import torch.nn.functional as F

from sslr1.ops import backends


def step_norm(x, weight, eps, *, zero_centred=False, backend="auto"):
    """x [R, D], contiguous, weight [D] -> [R, D] of x's dtype.

    backend: "reference" (float64 too), "cpp" (float32 on the CPU), "triton" (CUDA), or "auto". Raises ValueError for
    shapes that don't fit.
    """
    if x.ndim != 2 or not x.is_contiguous() or weight.shape != x.shape[1:]:
        raise ValueError(f"x must be [R, D], contiguous, and weight [D], got {list(x.shape)} and {list(weight.shape)}")
    if backend == "auto" and at_hand(x):
        return _norm_cpp(x, weight, eps, zero_centred)
    return torch.ops.sslr1.step_norm(x, weight, eps, zero_centred, backend)


def step_swiglu(gate_up, *, backend="auto"):
    """gate_up [R, 2 I], gates first, contiguous -> [R, I]. backend: as for `step_norm`."""
    if gate_up.ndim != 2 or gate_up.shape[1] % 2 or not gate_up.is_contiguous():
        raise ValueError(f"gate_up must be [R, 2 I], contiguous, got {list(gate_up.shape)}")
    if backend == "auto" and at_hand(gate_up):
        return _swiglu_cpp(gate_up)
    return torch.ops.sslr1.step_swiglu(gate_up, backend)


def at_hand(x) -> bool:
    """Whether C++ takes it as it is: on a CPU torch's dispatcher would cost several times what a row does."""
    return type(x) is torch.Tensor and x.device.type == "cpu" and x.dtype == torch.float32 and backends._C is not None


def choose(operation, backend, x) -> str:
    """float32 is C++'s on a CPU, and Triton takes all but float64."""
    unfit = "computes in float32, not in float64" if x.dtype == torch.float64 else None
    if x.device.type == "cpu" and x.dtype != torch.float32:
        unfit = unfit or (f"takes float32 on a CPU, got {x.dtype}" if backend in ("auto", "cpp") else None)
    return backends.choose(operation, backend, x.device, ("triton", "cpp"), unfit)


def rms_norm(x, weight, eps, zero_centred):
    """As transformers' modules have it."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if zero_centred:
        return (normed * (1.0 + weight.to(wide.dtype))).to(x.dtype)
    return weight.to(x.dtype) * normed.to(x.dtype)


@torch.no_grad()
def _op_step_norm(x, weight, eps, zero_centred, backend):
    backend = choose("step_norm", backend, x)
    if backend == "reference":
        return rms_norm(x, weight, eps, zero_centred)
    if backend == "triton":
        from sslr1.kernels import step as kernel

        return kernel.norm_rows(x, weight, eps, zero_centred)
    return _norm_cpp(x, weight, eps, zero_centred)


def _norm_cpp(x, weight, eps, zero_centred):
    out, weight = torch.empty_like(x), weight.float().contiguous()
    backends._C.step_norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), *x.shape, eps, zero_centred)
    return out


@torch.no_grad()
def _op_step_swiglu(gate_up, backend):
    backend = choose("step_swiglu", backend, gate_up)
    if backend == "reference":
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up
    if backend == "triton":
        from sslr1.kernels import step as kernel

        return kernel.swiglu(gate_up)
    return _swiglu_cpp(gate_up)


def _swiglu_cpp(gate_up):
    R, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(R, width)
    backends._C.step_swiglu(gate_up.data_ptr(), out.data_ptr(), R, width)
    return out


backends.register(
    "step_norm(Tensor x, Tensor weight, float eps, bool zero_centred, str backend) -> Tensor",
    _op_step_norm,
    lambda x, *rest: torch.empty_like(x),
)
backends.register(
    "step_swiglu(Tensor gate_up, str backend) -> Tensor",
    _op_step_swiglu,
    lambda x, backend: x.new_empty(x.shape[0], x.shape[1] // 2),
)
