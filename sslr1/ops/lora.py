"""A linear layer with a low-rank adapter (LoRA, arXiv 2106.09685): y = x Wᵀ + b + s (x Aᵀ) Bᵀ, of which A and B are
trained and W isn't.

Cost for T tokens, matrices of I x O and rank R: forward 2 T (I O + R I + R O) operations, backward twice the adapter's
and once W's, since W's own gradient is not formed: 2/3 of a trained linear's in all. Kept for the backward pass are x
(or what it is made of: `again`), which neighbours that read the same x share, and x Aᵀ [T, R], small beside it, which
spares one of the thin products.
The adapter's part is added into y in place, in the product's own sum: there is no second y, and no copy of x.
"""

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sslr1.ops import again


def lora_linear(x, weight, bias, lora_a, lora_b, scale, backend="auto"):
    """x [..., I], weight [O, I], bias [O] or None, lora_a [R, I], lora_b [O, R] -> [..., O], all of one dtype.

    Differentiable in x, lora_a and lora_b. backend: "auto", or "reference" for the formula by autograd alone. Raises
    ValueError for a weight or bias that wants a gradient.
    """
    if backend not in ("auto", "reference"):
        raise ValueError(f"backend {backend!r} is not one of auto, reference")
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("the matrix and bias under an adapter are frozen: requires_grad_(False)")
    if backend == "reference":
        return F.linear(x, weight, bias) + scale * F.linear(F.linear(x, lora_a), lora_b)
    return _Lora.apply(x, weight, bias, lora_a, lora_b, scale)


class _Lora(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, lora_a, lora_b, scale):
        thin = F.linear(x, lora_a)
        out = F.linear(x, weight, bias)
        out.view(-1, out.shape[-1]).addmm_(thin.view(-1, thin.shape[-1]), lora_b.t(), alpha=scale)
        tensors, ctx.again = again.to_keep(x)
        ctx.save_for_backward(thin, weight, lora_a, lora_b, *tensors)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        thin, weight, lora_a, lora_b, *tensors = ctx.saved_tensors
        x = ctx.again(tensors)
        flat = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[3]:
            grad_thin = (flat @ lora_b).mul_(ctx.scale)
        if ctx.needs_input_grad[0]:
            grad_x = (flat @ weight).addmm_(grad_thin, lora_a).view(x.shape)
        if ctx.needs_input_grad[3]:
            grad_a = grad_thin.t() @ x.reshape(-1, x.shape[-1])
        if ctx.needs_input_grad[4]:
            grad_b = (flat.t() @ thin.view(-1, thin.shape[-1])).mul_(ctx.scale)
        return grad_x, None, None, grad_a, grad_b, None
