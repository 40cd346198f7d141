"""RMSNorm and SwiGLU, forward and backward, as `sslr1.ops.elementwise` has them.

Cost in bytes, with B an element and N numbers: the norm 2 B N, its backward 3 B N and 8 bytes a number of the weight
for each program, which goes through its rows in order, so that results repeat bit by bit; SwiGLU 3 B N and 5 B N.
"""

import torch

import triton
import triton.language as tl

PROGRAMS = 512  # of a norm's backward pass: about four for each multiprocessor
PIECE = 1024  # numbers of SwiGLU that a program takes


@triton.jit
def norm(x, weight, out, n, eps, PLUS_ONE: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: rows."""
    at = tl.program_id(0).to(tl.int64) * n
    i = tl.arange(0, BLOCK)
    real = i < n
    row = tl.load(x + at + i, mask=real, other=0.0).to(tl.float32)
    scale = tl.load(weight + i, mask=real, other=0.0).to(tl.float32)
    row *= 1 / tl.sqrt(tl.sum(row * row, 0) / n + eps)
    if PLUS_ONE:
        found = row * (1 + scale)
    else:  # rounded twice, as there
        found = row.to(out.dtype.element_ty).to(tl.float32) * scale
    tl.store(out + at + i, found.to(out.dtype.element_ty), mask=real)


@triton.jit
def norm_backward(grad, x, weight, dx, sums, rows, n, eps, PLUS_ONE: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: programs, each with a row of `sums` float32 [programs, n], the weight's gradient from its rows."""
    first = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    real = i < n
    total = tl.zeros([BLOCK], tl.float32)
    at = first.to(tl.int64) * n
    step = tl.num_programs(0).to(tl.int64) * n
    for _ in range(first, rows, tl.num_programs(0)):
        row = tl.load(x + at + i, mask=real, other=0.0).to(tl.float32)
        slope = tl.load(grad + at + i, mask=real, other=0.0).to(tl.float32)
        root = 1 / tl.sqrt(tl.sum(row * row, 0) / n + eps)
        row *= root
        total += slope * row
        scale = tl.load(weight + i, mask=real, other=0.0).to(tl.float32)  # again, or registers run out
        if PLUS_ONE:
            scale += 1
        slope *= scale
        found = (slope - row * (tl.sum(slope * row, 0) / n)) * root
        tl.store(dx + at + i, found.to(dx.dtype.element_ty), mask=real)
        at += step
    tl.store(sums + first.to(tl.int64) * n + i, total, mask=real)


@triton.jit
def sigmoid(y):
    e = tl.exp(-tl.abs(y))
    return tl.where(y < 0, e, 1.0) / (1 + e)


@triton.jit
def gated(gate, up, out, count, BLOCK: tl.constexpr):
    """Grid: pieces."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = i < count
    g = tl.load(gate + i, mask=real, other=0.0).to(tl.float32)
    u = tl.load(up + i, mask=real, other=0.0).to(tl.float32)
    silu = (g * sigmoid(g)).to(out.dtype.element_ty).to(tl.float32)  # rounded, as there
    tl.store(out + i, (silu * u).to(out.dtype.element_ty), mask=real)


@triton.jit
def gated_backward(grad, gate, up, dgate, dup, count, BLOCK: tl.constexpr):
    """Grid: pieces."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = i < count
    slope = tl.load(grad + i, mask=real, other=0.0).to(tl.float32)
    g = tl.load(gate + i, mask=real, other=0.0).to(tl.float32)
    u = tl.load(up + i, mask=real, other=0.0).to(tl.float32)
    s = sigmoid(g)
    tl.store(dup + i, (slope * g * s).to(dup.dtype.element_ty), mask=real)
    tl.store(dgate + i, (slope * u * s * (1 + g * (1 - s))).to(dgate.dtype.element_ty), mask=real)


def rms_norm(x, weight, eps, plus_one):
    x, n = x.contiguous(), len(weight)
    out = torch.empty_like(x)
    if x.numel():
        norm[(x.numel() // n,)](x, weight, out, n, eps, plus_one, **sizes(n))
    return out


def rms_norm_backward(grad, x, weight, eps, plus_one):
    grad, x, n = grad.contiguous(), x.contiguous(), len(weight)
    rows = x.numel() // n
    dx, sums = torch.empty_like(x), x.new_zeros(min(rows, PROGRAMS), n, dtype=torch.float32)
    if rows:
        norm_backward[(len(sums),)](grad, x, weight, dx, sums, rows, n, eps, plus_one, **sizes(n))
    return dx, sums.sum(0)


def sizes(n) -> dict:
    """A row of n numbers in one block, 8 of them in a thread; beyond 4,096 the backward pass spills."""
    block = triton.next_power_of_2(n)
    return dict(BLOCK=block, num_warps=max(1, block // 256))


def swiglu(gate, up):
    gate, up = gate.contiguous(), up.contiguous()
    out, count = torch.empty_like(gate), gate.numel()
    if count:
        gated[(triton.cdiv(count, PIECE),)](gate, up, out, count, PIECE)
    return out


def swiglu_backward(grad, gate, up):
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    out, count = (torch.empty_like(gate), torch.empty_like(gate)), gate.numel()
    if count:
        gated_backward[(triton.cdiv(count, PIECE),)](grad, gate, up, *out, count, PIECE)
    return out
