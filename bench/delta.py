"""The gated delta rule, forward and backward, over a group whose completions start from the one state that their prompt
leaves, against transformers' chunked form on as many separate sequences."""

from dataclasses import dataclass
from functools import partial

import torch
from row import Row, Sides, device_of

from sslr1 import ops


@dataclass(frozen=True)
class Shape:
    key_heads: int
    heads: int
    d: int
    prompt: int
    G: int
    own: int
    dtype: torch.dtype


SHAPES = {
    "cpu": Shape(4, 8, 64, 400, 16, 32, torch.float32),
    "cuda": Shape(16, 32, 128, 1500, 16, 200, torch.bfloat16),
    "dry": Shape(1, 2, 16, 70, 3, 9, torch.bfloat16),
}
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def rows(mode):
    s = SHAPES[mode]
    what = (
        f"gated delta rule, forward and backward: {s.key_heads} key and {s.heads} value heads of {s.d}, a prompt of "
        f"{s.prompt:,} tokens, G = {s.G}, {s.own} own, {str(s.dtype).removeprefix('torch.')}"
    )
    against = f"transformers' chunked form on {s.G} separate sequences"
    return [Row(what=what, against=against, make=partial(sides, s, device_of(mode)))]


def draw(shape, device):
    """q, k, v, g, beta of the packed row, and out's gradient."""
    T, options = shape.prompt + shape.G * shape.own, dict(device=device, dtype=shape.dtype)
    q, k = torch.randn(2, T, shape.key_heads, shape.d, **options)
    v, grad = torch.randn(2, T, shape.heads, shape.d, **options)
    g, beta = -torch.rand(T, shape.heads, device=device), torch.rand(T, shape.heads, **options)
    return [x.requires_grad_() for x in (q, k, v, g, beta)], grad


def repeated(inputs, shape):
    """The same as separate sequences [G, prompt + own, heads, …], heads repeated as their modules do."""
    prompt, times = shape.prompt, shape.heads // shape.key_heads
    for i, x in enumerate(inputs):
        x = x.detach()
        own = x[prompt:].unflatten(0, (shape.G, shape.own))
        whole = torch.cat([x[:prompt].expand(shape.G, *x[:prompt].shape), own], 1)
        yield (whole.repeat_interleave(times, 2) if i < 2 else whole).requires_grad_()


def sides(shape, device):
    from transformers.models.qwen3_5 import modeling_qwen3_5

    rule = modeling_qwen3_5.torch_chunk_gated_delta_rule
    rule = getattr(rule, "__wrapped__", rule)  # with fla installed the name itself is fla's
    inputs, grad = draw(shape, device)
    layout = ops.StateLayout([(shape.prompt, (shape.own,) * shape.G)]).to(device)
    sequences = list(repeated(inputs, shape))
    other = torch.zeros(*sequences[2].shape, device=device, dtype=shape.dtype)  # a prompt's outputs count once
    other[0, : shape.prompt], other[:, shape.prompt :] = (
        grad[: shape.prompt],
        grad[shape.prompt :].unflatten(0, (shape.G, shape.own)),
    )

    def ours():
        out = ops.gated_delta_rule(*inputs, layout)
        return out.detach(), *torch.autograd.grad(out, inputs, grad)

    def peer():
        out, _ = rule(*sequences, use_qk_l2norm_in_kernel=True)
        return out.detach(), *torch.autograd.grad(out, sequences, other)

    def check(mine, theirs):
        for i, (a, b) in enumerate(zip(mine, theirs or ())):
            b = b.float()
            prompt = b[0, : shape.prompt] if i == 0 else b[:, : shape.prompt].sum(0)
            b = torch.cat([prompt, b[:, shape.prompt :].flatten(0, 1)])
            if i in (1, 2):
                b = b.unflatten(1, (shape.key_heads, -1)).sum(2)
            assert (a.float() - b).norm() <= BOUNDS[shape.dtype] * b.norm()

    return Sides(ours=ours, peer=peer, check=check)
