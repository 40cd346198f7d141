"""The short causal convolution before a recurrent layer, SiLU behind it: over packed groups, and one step of it for
decoding.

    y_t = sum over j of weight[:, 3 - j] x_(t - j), j = 0 … 3;    out_t = y_t sigmoid(y_t)

for each channel by itself, where a completion's rows before its first are its prompt's last, and there are zeros before
a prompt.
"""

import torch
import torch.nn.functional as F

from sslr1.ops import backends
from sslr1.ops.state_layout import CONTEXT, StateLayout


def causal_conv(x, weight, layout, *, backend="auto"):
    """The convolution and SiLU over a packed row of groups `[prompt | c1 … cG]`; differentiable in x and weight.

    x [T, channels]; weight [channels, 4] (a Conv1d's [channels, 1, 4] without its middle), the last column for the row
    itself; layout: a `StateLayout` of T tokens on their device, or what makes one. Returns [T, channels] of x's dtype.
    Sums are float32 (float64 for float64). Raises ValueError for another width and for a layout of another T.

    Cost: x read and out written once; backward x and the gradient read, dx written, and for CUDA tensors a gradient of
    y in float32 between. Nothing is kept but the inputs.

    backend: "reference" (gathers, float64 too), "cpp" (CPU), "triton" (CUDA), or "auto".
    """
    layout = layout if isinstance(layout, StateLayout) else StateLayout(layout).to(x.device)
    _check(x, weight)
    if layout.tokens != len(x):
        raise ValueError(f"groups cover {layout.tokens} tokens, x has {len(x)}")
    if backend == "auto" and x.is_meta:
        backend = "triton"  # of a plan, which asks what a GPU keeps
    else:
        backend = _choose("causal_conv", backend, x)
    if backend == "reference":
        return _reference(x, weight, layout.context)
    tables = layout.context, layout.followers, layout.follower_bounds
    return torch.ops.sslr1.causal_conv(x, weight, *tables, backend)


def _choose(operation, backend, x):
    unfit = "computes in float32, not in float64" if x.dtype == torch.float64 else None
    return backends.choose(operation, backend, x.device, ("triton", "cpp"), unfit)


def _check(x, weight):
    if weight.shape != (x.shape[1], CONTEXT + 1):
        raise ValueError(f"weight must be [{x.shape[1]}, {CONTEXT + 1}], got {list(weight.shape)}")


def _reference(x, weight, context):
    wide = torch.promote_types(x.dtype, torch.float32)
    whole, weight = x.to(wide), weight.to(wide)
    y = whole * weight[:, CONTEXT]
    for j, rows in enumerate(context, 1):
        before = whole.index_select(0, rows.clamp(min=0))
        y = y + before.masked_fill((rows < 0)[:, None], 0.0) * weight[:, CONTEXT - j]
    return F.silu(y).to(x.dtype)


@torch.no_grad()
def _op_forward(x, weight, context, followers, follower_bounds, backend):
    if backend == "triton":
        from sslr1.kernels import recurrent as kernel

        return kernel.causal_conv(x, weight, context)
    rows, turned, out = _rows(x), weight.float().t().contiguous(), torch.empty(x.shape)
    addresses = [y.data_ptr() for y in (rows, turned, context, out)]
    backends._C.causal_conv(*addresses, *x.shape, rows.stride(0), torch.get_num_threads())
    return out.to(x.dtype)


@torch.no_grad()
def _op_backward(grad, x, weight, context, followers, follower_bounds, backend):
    if backend == "triton":
        from sslr1.kernels import recurrent as kernel

        return kernel.causal_conv_backward(grad, x, weight, context, followers, follower_bounds)
    rows, turned, grad = _rows(x), weight.float().t().contiguous(), grad.float().contiguous()
    dx, dweight = torch.empty(x.shape), torch.empty_like(turned)
    addresses = [y.data_ptr() for y in (grad, rows, turned, context, dx, dweight)]
    backends._C.causal_conv_backward(*addresses, *x.shape, rows.stride(0), torch.get_num_threads())
    return dx.to(x.dtype), dweight.t().to(weight.dtype).contiguous()


def _rows(x):
    x = x.float()
    return x if x.stride(1) == 1 else x.contiguous()


def _setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5])
    ctx.backend = inputs[5]


def _backward(ctx, grad):
    if grad is None:
        return (None,) * 6
    return *torch.ops.sslr1.causal_conv_backward(grad, *ctx.saved_tensors, ctx.backend), *[None] * 4


_ARGUMENTS = "Tensor x, Tensor weight, Tensor context, Tensor followers, Tensor follower_bounds, str backend"
backends.register(
    f"causal_conv({_ARGUMENTS}) -> Tensor", _op_forward, lambda x, *rest: x.new_empty(x.shape), _backward, _setup
)
backends.register(
    f"causal_conv_backward(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor)",
    _op_backward,
    lambda grad, x, weight, *rest: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
)


def prompt_tails(x, layout):
    """The last three rows of every prompt, [groups, channels, 3], the last row last, zeros before a shorter one: what
    `causal_conv_step` goes on from."""
    rows = layout.tails
    tails = x.detach().index_select(0, rows.clamp(min=0).view(-1)).view(*rows.shape, -1)
    return tails.masked_fill((rows < 0)[..., None], 0.0).transpose(1, 2).contiguous()


def causal_conv_step(tails, x, weight, samples, *, backend="auto"):
    """One row for each of R samples, whose tails it moves on in place.

    tails [samples, channels, 3], contiguous, of x's dtype: the rows before, as `prompt_tails` has them; samples int64
    [R]: whose, none of them twice; x [R, channels]; weight [channels, 4]. Returns [R, channels] of x's dtype. No
    gradient; nothing waits for the device, and a row depends on its own tail alone.
    """
    _check(x, weight)
    if tails.shape[1:] != (x.shape[1], CONTEXT) or tails.dtype != x.dtype or not tails.is_contiguous():
        raise ValueError(
            f"tails must be {x.dtype} [samples, {x.shape[1]}, {CONTEXT}], contiguous, got {tails.dtype} "
            f"{list(tails.shape)}"
        )
    if samples.shape != (len(x),) or samples.dtype != torch.int64:
        raise ValueError(f"samples must be int64 [{len(x)}], got {samples.dtype} {list(samples.shape)}")
    return torch.ops.sslr1.causal_conv_step(tails, x, weight, samples, backend)


@torch.no_grad()
def _op_step(tails, x, weight, samples, backend):
    if backend == "auto" and x.device.type == "cpu" and x.dtype != torch.float32:
        backend = "reference"
    backend = _choose("causal_conv_step", backend, x)
    if backend == "reference":
        wide = torch.promote_types(x.dtype, torch.float32)
        window = torch.cat([tails.index_select(0, samples), x[..., None]], -1)
        tails.index_copy_(0, samples, window[..., 1:])
        return F.silu((window.to(wide) * weight.to(wide)).sum(-1)).to(x.dtype)
    if backend == "triton":
        from sslr1.kernels import recurrent as kernel

        return kernel.causal_conv_step(tails, x, weight, samples)
    if x.dtype != torch.float32:
        raise ValueError(f"causal_conv_step: backend 'cpp' takes float32, got {x.dtype}")
    out = torch.empty(x.shape)
    tensors = tails, x.contiguous(), weight.float().contiguous(), samples.contiguous(), out
    backends._C.causal_conv_step(*(y.data_ptr() for y in tensors), *x.shape)
    return out


backends.register(
    "causal_conv_step(Tensor(a!) tails, Tensor x, Tensor weight, Tensor samples, str backend) -> Tensor",
    _op_step,
    lambda tails, x, *rest: x.new_empty(x.shape),
)
