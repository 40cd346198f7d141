"""What a recurrent layer needs around its chunks: one step of the gated delta rule over states in place, and the causal
convolution with SiLU, over packed groups and one row at a time. `sslr1.ops.delta_rule` and `sslr1.ops.short_conv` say
what they are.

Cost in bytes, with B an element: `step` 8 d_k d_v for each row and value head, every state read and written once, q and
k once more for each 32 of d_v. `conv` B T channels 2, what neighbours share comes from the nearest cache; its backward
B T channels 3 and 4 T channels 2, the gradient of y between its two launches. Everything adds up in an order that
follows from a row's own sequence, or, of the weight's gradient, from shapes alone: results repeat, bit by bit.
"""

import torch

import triton
import triton.language as tl

EPSILON = tl.constexpr(1e-6)  # under the root of the norm of q and k


@triton.jit
def step(
    states,
    q,
    k,
    v,
    g,
    beta,
    samples,
    out,
    heads,
    times,
    d_k,
    d_v,
    scale,
    q_stride,
    k_stride,
    v_stride,
    NORM: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
):
    """Grid: rows, value heads, blocks of VALUES columns of the state."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    i = tl.arange(0, KEYS)
    j = tl.program_id(2) * VALUES + tl.arange(0, VALUES)
    keys = head // times * d_k + i
    queries = tl.load(q + row * q_stride + keys, mask=i < d_k, other=0.0).to(tl.float32)
    keys = tl.load(k + row * k_stride + keys, mask=i < d_k, other=0.0).to(tl.float32)
    if NORM:
        queries *= 1 / tl.sqrt(tl.sum(queries * queries, 0) + EPSILON)
        keys *= 1 / tl.sqrt(tl.sum(keys * keys, 0) + EPSILON)
    values = tl.load(v + row * v_stride + head * d_v + j, mask=j < d_v, other=0.0).to(tl.float32)
    decay = tl.exp(tl.load(g + row * heads + head).to(tl.float32))
    rate = tl.load(beta + row * heads + head).to(tl.float32)
    at = states + (tl.load(samples + row) * heads + head) * d_k * d_v + i[:, None] * d_v + j[None, :]
    real = (i < d_k)[:, None] & (j < d_v)[None, :]
    state = tl.load(at, mask=real, other=0.0) * decay
    change = rate * (values - tl.sum(keys[:, None] * state, 0))
    state += keys[:, None] * change[None, :]
    tl.store(at, state, mask=real)
    found = tl.sum((queries * scale)[:, None] * state, 0)
    tl.store(out + (row * heads + head) * d_v + j, found.to(out.dtype.element_ty), mask=j < d_v)


def delta_step(states, q, k, v, g, beta, samples, scale, l2norm):
    """As `sslr1.ops.gated_delta_step` has them."""
    R, heads, d_v = v.shape
    d_k = q.shape[2]
    out = torch.empty(R, heads, d_v, dtype=v.dtype, device=v.device)
    if not out.numel():
        return out
    q, k, v = (x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous() for x in (q, k, v))
    block = step_block(d_v)
    step[(R, heads, triton.cdiv(d_v, block))](
        states,
        q,
        k,
        v,
        g.contiguous(),
        beta.contiguous(),
        samples.contiguous(),
        out,
        heads,
        heads // q.shape[1],
        d_k,
        d_v,
        scale,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        NORM=l2norm,
        KEYS=triton.next_power_of_2(d_k),
        VALUES=block,
        num_warps=4,
    )
    return out


def step_block(d_v):
    """Columns of a state that a program takes: 128 x 32 of float32 are 32 registers a thread."""
    return min(32, triton.next_power_of_2(d_v))


@triton.jit
def before(x, context, rows, row, far, channel, real, x_stride):
    """x `far` rows before `row`, [BLOCK], 0 where there is none."""
    at = tl.load(context + (far - 1) * rows + row)
    return tl.load(x + at * x_stride + channel, mask=real & (at >= 0), other=0.0).to(tl.float32)


@triton.jit
def window(x, weight, context, rows, row, channel, real, x_stride):
    """(y, x of the row and of the three before), [BLOCK] each."""
    x0 = tl.load(x + row * x_stride + channel, mask=real, other=0.0).to(tl.float32)
    x1 = before(x, context, rows, row, 1, channel, real, x_stride)
    x2 = before(x, context, rows, row, 2, channel, real, x_stride)
    x3 = before(x, context, rows, row, 3, channel, real, x_stride)
    w0 = tl.load(weight + channel * 4 + 3, mask=real, other=0.0).to(tl.float32)
    w1 = tl.load(weight + channel * 4 + 2, mask=real, other=0.0).to(tl.float32)
    w2 = tl.load(weight + channel * 4 + 1, mask=real, other=0.0).to(tl.float32)
    w3 = tl.load(weight + channel * 4, mask=real, other=0.0).to(tl.float32)
    return x0 * w0 + x1 * w1 + x2 * w2 + x3 * w3, x0, x1, x2, x3


@triton.jit
def sigmoid(y):
    e = tl.exp(-tl.abs(y))
    return tl.where(y < 0, e, 1.0) / (1 + e)


@triton.jit
def conv(x, weight, context, out, rows, channels, x_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: ROWS rows each, blocks of channels."""
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = channel < channels
    first = tl.program_id(0).to(tl.int64) * ROWS
    for row in tl.range(first, tl.minimum(first + ROWS, rows)):
        y, _, _, _, _ = window(x, weight, context, rows, row, channel, real, x_stride)
        tl.store(out + row * channels + channel, (y * sigmoid(y)).to(out.dtype.element_ty), mask=real)


@triton.jit
def conv_dy(grad, x, weight, context, dy, parts, rows, channels, x_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The gradient of y [rows, channels], and of the weight, each program's part [4, channels]. Grid as `conv`'s."""
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = channel < channels
    first = tl.program_id(0).to(tl.int64) * ROWS
    s0 = tl.zeros([BLOCK], tl.float32)
    s1 = tl.zeros([BLOCK], tl.float32)
    s2 = tl.zeros([BLOCK], tl.float32)
    s3 = tl.zeros([BLOCK], tl.float32)
    for row in tl.range(first, tl.minimum(first + ROWS, rows)):
        y, x0, x1, x2, x3 = window(x, weight, context, rows, row, channel, real, x_stride)
        s = sigmoid(y)
        d = tl.load(grad + row * channels + channel, mask=real, other=0.0).to(tl.float32) * s * (1 + y * (1 - s))
        tl.store(dy + row * channels + channel, d, mask=real)
        s0 += d * x0
        s1 += d * x1
        s2 += d * x2
        s3 += d * x3
    parts += tl.program_id(0).to(tl.int64) * 4 * channels + channel
    tl.store(parts, s3, mask=real)
    tl.store(parts + channels, s2, mask=real)
    tl.store(parts + 2 * channels, s1, mask=real)
    tl.store(parts + 3 * channels, s0, mask=real)


@triton.jit
def conv_dx(dy, weight, followers, bounds, dx, count, channels, BLOCK: tl.constexpr):
    """Grid: rows, blocks of channels. A prompt's last rows have followers in every completion."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = channel < channels
    w0 = tl.load(weight + channel * 4 + 3, mask=real, other=0.0).to(tl.float32)
    found = w0 * tl.load(dy + row * channels + channel, mask=real, other=0.0)
    for i in tl.range(tl.load(bounds + row), tl.load(bounds + row + 1)):
        follower = tl.load(followers + i)
        far = tl.load(followers + count + i)
        w = tl.load(weight + channel * 4 + 3 - far, mask=real, other=0.0).to(tl.float32)
        found += w * tl.load(dy + follower * channels + channel, mask=real, other=0.0)
    tl.store(dx + row * channels + channel, found.to(dx.dtype.element_ty), mask=real)


BLOCK = 256  # channels of a program
ROWS = 32


def _rows(x):
    return x if x.stride(1) == 1 else x.contiguous()


def causal_conv(x, weight, context):
    """x [T, channels], weight [channels, 4], context as a `StateLayout` has it -> [T, channels]."""
    T, channels = x.shape
    out = torch.empty(T, channels, dtype=x.dtype, device=x.device)
    x = _rows(x)
    grid = triton.cdiv(T, ROWS), triton.cdiv(channels, BLOCK)
    conv[grid](x, weight.contiguous(), context, out, T, channels, x.stride(0), ROWS=ROWS, BLOCK=BLOCK)
    return out


def causal_conv_backward(grad, x, weight, context, followers, follower_bounds):
    """(dx, dweight) of their inputs' dtypes."""
    T, channels = x.shape
    x, weight, grad = _rows(x), weight.contiguous(), grad.contiguous()
    dy = torch.empty(T, channels, dtype=torch.float32, device=x.device)
    dx = torch.empty(T, channels, dtype=x.dtype, device=x.device)
    blocks, across = triton.cdiv(T, ROWS), triton.cdiv(channels, BLOCK)
    parts = torch.empty(blocks, 4, channels, dtype=torch.float32, device=x.device)
    sizes = dict(ROWS=ROWS, BLOCK=BLOCK)
    conv_dy[(blocks, across)](grad, x, weight, context, dy, parts, T, channels, x.stride(0), **sizes)
    count = followers.shape[1]
    conv_dx[(T, across)](dy, weight, followers, follower_bounds, dx, count, channels, BLOCK=BLOCK)
    return dx, parts.sum(0).t().to(weight.dtype).contiguous()


@triton.jit
def conv_step(tails, x, weight, samples, out, channels, x_stride, BLOCK: tl.constexpr):
    """Grid: rows, blocks of channels."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = channel < channels
    tails += (tl.load(samples + row) * channels + channel) * 3
    new = tl.load(x + row * x_stride + channel, mask=real, other=0.0)
    x3 = tl.load(tails, mask=real, other=0.0)
    x2 = tl.load(tails + 1, mask=real, other=0.0)
    x1 = tl.load(tails + 2, mask=real, other=0.0)
    tl.store(tails, x2, mask=real)
    tl.store(tails + 1, x1, mask=real)
    tl.store(tails + 2, new, mask=real)
    y = new.to(tl.float32) * tl.load(weight + channel * 4 + 3, mask=real, other=0.0).to(tl.float32)
    y += x1.to(tl.float32) * tl.load(weight + channel * 4 + 2, mask=real, other=0.0).to(tl.float32)
    y += x2.to(tl.float32) * tl.load(weight + channel * 4 + 1, mask=real, other=0.0).to(tl.float32)
    y += x3.to(tl.float32) * tl.load(weight + channel * 4, mask=real, other=0.0).to(tl.float32)
    tl.store(out + row * channels + channel, (y * sigmoid(y)).to(out.dtype.element_ty), mask=real)


def causal_conv_step(tails, x, weight, samples):
    """As `sslr1.ops.causal_conv_step` has them."""
    R, channels = x.shape
    out = torch.empty(R, channels, dtype=x.dtype, device=x.device)
    x = _rows(x)
    grid = R, triton.cdiv(channels, BLOCK)
    if R:
        conv_step[grid](tails, x, weight.contiguous(), samples.contiguous(), out, channels, x.stride(0), BLOCK=BLOCK)
    return out
