"""What stands between the products of a decode step; `sslr1.ops.decode_rows`, `decode_attend`, `decode_delta` and
`decode_samples` say what it computes.

Cost in bytes, with B an element and R rows of width D: `norm_rows` 2 B R D, `swiglu` 3 B R I, `prepare` and `finish`
2 B a number of what they read, `delta` each state read and written once as `recurrent.step`, `gated_norm` 3 B R H d. A
program's row, or head, follows from itself alone, whatever stands beside it. Sums are float32; what transformers rounds
to the row's dtype in between is rounded here, too.
"""

import torch
from sslr1.kernels.keys import fold
from sslr1.kernels.recurrent import EPSILON, sigmoid, step_block

import triton
import triton.language as tl


@triton.jit
def norm(x, w, eps, n, ZERO_CENTRED: tl.constexpr, to: tl.constexpr):
    """x, w float32, x 0 beyond n: as `decode_rows.rms_norm`, float32 again."""
    y = x / tl.sqrt(tl.sum(x * x, 0) / n + eps)
    if ZERO_CENTRED:
        return (y * (1.0 + w)).to(to).to(tl.float32)
    return (y.to(to).to(tl.float32) * w).to(to).to(tl.float32)


@triton.jit
def norms(x, weight, out, width, eps, ZERO_CENTRED: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    real = lane < width
    to: tl.constexpr = x.dtype.element_ty
    whole = tl.load(x + row * width + lane, mask=real, other=0.0).to(tl.float32)
    w = tl.load(weight + lane, mask=real, other=0.0).to(tl.float32)
    tl.store(out + row * width + lane, norm(whole, w, eps, width, ZERO_CENTRED, to).to(to), mask=real)


@triton.jit
def swiglu_rows(gate_up, out, width, BLOCK: tl.constexpr):
    """Grid: rows, blocks."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = lane < width
    to: tl.constexpr = out.dtype.element_ty
    gate = tl.load(gate_up + row * 2 * width + lane, mask=real, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + lane, mask=real, other=0.0).to(tl.float32)
    tl.store(out + row * width + lane, ((gate * sigmoid(gate)).to(to).to(tl.float32) * up).to(to), mask=real)


@triton.jit
def split_turn(
    qkv,
    cos,
    sin,
    q_norm,
    k_norm,
    q,
    own_k,
    own_v,
    samples,
    written,
    heads,
    heads_kv,
    room,
    rotary,
    stride,
    eps,
    D: tl.constexpr,
    EACH: tl.constexpr,  # numbers of a query head, its gate's among them
    NORM: tl.constexpr,
    ZERO_CENTRED: tl.constexpr,
    TO: tl.constexpr,
):
    """Grid: samples, heads and twice the kv heads: queries to q [places * G, heads, D], keys and values to where they
    stay."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    lane = tl.arange(0, D)
    sample = tl.load(samples + row)
    query = head < heads
    value = head >= heads + heads_kv
    start = tl.where(query, head * EACH, heads * EACH + (head - heads) * D)
    x = tl.load(qkv + row * stride + start + lane)
    head_kv = tl.where(value, head - heads - heads_kv, head - heads)
    at = ((sample * heads_kv + head_kv) * room + tl.load(written + row)) * D + lane
    if value:
        tl.store(own_v + at, x)
    else:
        half = rotary // 2
        turned = lane < rotary
        other = tl.where(lane < half, lane + half, tl.where(turned, lane - half, lane))
        sign = tl.where(lane < half, -1.0, 1.0)
        wide = x.to(tl.float32)
        across = tl.load(qkv + row * stride + start + other).to(tl.float32)
        if NORM:
            w = tl.where(query, 1.0, 0.0)
            mine = w * tl.load(q_norm + lane).to(tl.float32) + (1 - w) * tl.load(k_norm + lane).to(tl.float32)
            theirs = w * tl.load(q_norm + other).to(tl.float32) + (1 - w) * tl.load(k_norm + other).to(tl.float32)
            by = 1 / tl.sqrt(tl.sum(wide * wide, 0) / D + eps)
            if ZERO_CENTRED:
                wide = (wide * by * (1.0 + mine)).to(TO).to(tl.float32)
                across = (across * by * (1.0 + theirs)).to(TO).to(tl.float32)
            else:
                wide = ((wide * by).to(TO).to(tl.float32) * mine).to(TO).to(tl.float32)
                across = ((across * by).to(TO).to(tl.float32) * theirs).to(TO).to(tl.float32)
        c = tl.load(cos + row * rotary + lane, mask=turned, other=1.0).to(tl.float32)
        s = tl.load(sin + row * rotary + lane, mask=turned, other=0.0).to(tl.float32)
        found = (wide * c).to(TO).to(tl.float32) + (sign * across * s).to(TO).to(tl.float32)
        if query:
            tl.store(q + (sample * heads + head) * D + lane, found.to(TO))
        else:
            tl.store(own_k + at, found.to(TO))


@triton.jit
def gather_gate(found, qkv, samples, out, heads, stride, n, D: tl.constexpr, GATED: tl.constexpr):
    """Grid: rows, heads. found [places * G, heads, D] -> out [rows, heads, D], zeros from row n."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    lane = tl.arange(0, D)
    real = row < n
    to: tl.constexpr = out.dtype.element_ty
    sample = tl.load(samples + row, mask=real, other=0)
    x = tl.load(found + (sample * heads + head) * D + lane, mask=(lane < D) & real, other=0.0).to(tl.float32)
    if GATED:
        gate = tl.load(qkv + row * stride + (2 * head + 1) * D + lane, mask=(lane < D) & real, other=0.0)
        x *= sigmoid(gate.to(tl.float32)).to(to).to(tl.float32)
    tl.store(out + (row * heads + head) * D + lane, x.to(to))


@triton.jit
def delta(
    states,
    q,
    k,
    v,
    a,
    b,
    A_log,
    dt_bias,
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
    gate_stride,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
):
    """`recurrent.step` with the decays before it. Grid: rows, value heads, blocks of VALUES columns of the state."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    i = tl.arange(0, KEYS)
    j = tl.program_id(2) * VALUES + tl.arange(0, VALUES)
    keys = head // times * d_k + i
    queries = tl.load(q + row * q_stride + keys, mask=i < d_k, other=0.0).to(tl.float32)
    keys = tl.load(k + row * k_stride + keys, mask=i < d_k, other=0.0).to(tl.float32)
    queries *= 1 / tl.sqrt(tl.sum(queries * queries, 0) + EPSILON)
    keys *= 1 / tl.sqrt(tl.sum(keys * keys, 0) + EPSILON)
    values = tl.load(v + row * v_stride + head * d_v + j, mask=j < d_v, other=0.0).to(tl.float32)
    x = tl.load(a + row * gate_stride + head).to(tl.float32) + tl.load(dt_bias + head).to(tl.float32)
    x = tl.where(x > 20, x, tl.log(1 + tl.exp(tl.minimum(x, 20.0))))
    decay = tl.exp(-tl.exp(tl.load(A_log + head).to(tl.float32)) * x)
    rate = sigmoid(tl.load(b + row * gate_stride + head).to(tl.float32)).to(b.dtype.element_ty).to(tl.float32)
    at = states + (tl.load(samples + row) * heads + head) * d_k * d_v + i[:, None] * d_v + j[None, :]
    real = (i < d_k)[:, None] & (j < d_v)[None, :]
    state = tl.load(at, mask=real, other=0.0) * decay
    change = rate * (values - tl.sum(keys[:, None] * state, 0))
    state += keys[:, None] * change[None, :]
    tl.store(at, state, mask=real)
    result = tl.sum(queries[:, None] * state, 0) * scale
    tl.store(out + (row * heads + head) * d_v + j, result.to(out.dtype.element_ty), mask=j < d_v)


@triton.jit
def gate_norm(found, z, weight, out, heads, d, stride, n, eps, BLOCK: tl.constexpr):
    """Grid: rows, heads. found [n, heads, d], z `stride` apart -> out [rows, heads, d], zeros from row n."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    real = (lane < d) & (row < n)
    to: tl.constexpr = out.dtype.element_ty
    x = tl.load(found + (row * heads + head) * d + lane, mask=real, other=0.0).to(tl.float32)
    gate = tl.load(z + row * stride + head * d + lane, mask=real, other=0.0).to(tl.float32)
    x = (x / tl.sqrt(tl.sum(x * x, 0) / d + eps)).to(to).to(tl.float32)
    x *= tl.load(weight + lane, mask=lane < d, other=0.0).to(tl.float32) * (gate * sigmoid(gate))
    tl.store(out + (row * heads + head) * d + lane, x.to(to), mask=lane < d)


def norm_rows(x, weight, eps, zero_centred):
    """As `sslr1.ops.step_norm` has them."""
    R, D = x.shape
    out = torch.empty_like(x)
    block = triton.next_power_of_2(D)
    if R:
        norms[(R,)](x, weight, out, D, eps, ZERO_CENTRED=zero_centred, BLOCK=block, num_warps=8 if block > 2048 else 4)
    return out


def swiglu(gate_up):
    """As `sslr1.ops.step_swiglu` has them."""
    R, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(R, width)
    block = min(2048, triton.next_power_of_2(width))
    if R:
        swiglu_rows[(R, triton.cdiv(width, block))](gate_up, out, width, BLOCK=block)
    return out


DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def prepare(qkv, cos, sin, norms, own_k, own_v, samples, written, heads, gated):
    """Queries [P * G, heads, d] of the samples, whose keys and values are written. Those of others stay undefined."""
    P, G, heads_kv, room, d = own_k.shape
    q_norm, k_norm, eps, zero_centred = norms
    q = qkv.new_empty(P * G, heads, d)
    weights = (qkv, qkv) if q_norm is None else (q_norm, k_norm)
    given = qkv, cos.contiguous(), sin.contiguous(), *weights, q, own_k, own_v, samples, written
    numbers = heads, heads_kv, room, cos.shape[1], qkv.shape[1], eps
    options = dict(D=d, EACH=2 * d if gated else d, NORM=q_norm is not None, ZERO_CENTRED=zero_centred)
    if len(samples):
        split_turn[(len(samples), heads + 2 * heads_kv)](*given, *numbers, **options, TO=DTYPES[qkv.dtype], num_warps=1)
    return q


def finish(found, qkv, samples, gated):
    """found [P * G, heads, d] of the samples, gated -> [rows of qkv, heads * d]."""
    _, heads, d = found.shape
    rows, n = len(qkv), len(samples)
    out = qkv.new_empty(rows, heads * d)
    given = found, qkv, samples, out, heads, qkv.shape[1], n
    if rows:
        gather_gate[(rows, heads)](*given, D=d, GATED=gated, num_warps=1)
    return out


def delta_step(states, q, k, v, a, b, A_log, dt_bias, samples):
    """As `sslr1.ops.step_delta` has them, q, k and v convolved."""
    R, heads, d_v = v.shape
    d_k = q.shape[2]
    out = torch.empty(R, heads, d_v, dtype=v.dtype, device=v.device)
    block = step_block(d_v)
    given = states, q, k, v, a, b, A_log, dt_bias, samples, out
    numbers = heads, heads // q.shape[1], d_k, d_v, d_k**-0.5, q.stride(0), k.stride(0), v.stride(0), a.stride(0)
    if R:
        grid = R, heads, triton.cdiv(d_v, block)
        delta[grid](*given, *numbers, KEYS=triton.next_power_of_2(d_k), VALUES=block, num_warps=4)
    return out


def gated_norm(found, z, weight, eps, rows):
    """found [n, heads, d], z [n, heads * d] -> [rows, heads * d]."""
    n, heads, d = found.shape
    out = found.new_empty(rows, heads * d)
    given = found, z, weight, out, heads, d, z.stride(0), n, eps
    if rows:
        gate_norm[(rows, heads)](*given, BLOCK=triton.next_power_of_2(d), num_warps=1)
    return out


ROWS = 256  # samples a program


@triton.jit
def begin_rows(
    samples,
    tokens,
    counts,
    live,
    addresses,
    first_position,
    own_lengths,
    token,
    position,
    written,
    key,
    n,
    every,
    width,
    BLOCK: tl.constexpr,
):
    """Grid: blocks of samples. The first `every` of them get their lengths, the first n rows what they are given."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = at < every
    count = tl.load(counts + at, mask=real, other=0)
    going = tl.load(live + at, mask=real, other=0) != 0
    tl.store(own_lengths + at, tl.where(going, count, 0).to(tl.int32), mask=real)
    real = at < n
    sample = tl.load(samples + at, mask=real, other=0)
    count = tl.load(counts + sample, mask=real, other=0)
    tl.store(token + at, tl.load(tokens + sample * width + tl.maximum(count - 1, 0), mask=real, other=0), mask=real)
    tl.store(position + at, tl.load(first_position + sample, mask=real, other=0) + count - 1, mask=real)
    tl.store(written + at, count - 1, mask=real)
    tl.store(key + at, fold(tl.load(addresses + sample, mask=real, other=0), count), mask=real)


@triton.jit
def end_rows(
    samples,
    drawn,
    drawn_logprobs,
    stop,
    most,
    tokens,
    logprobs,
    counts,
    live,
    n,
    width,
    stops,
    BLOCK: tl.constexpr,
):
    """Grid: blocks of rows."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = at < n
    sample = tl.load(samples + at, mask=real, other=0)
    count = tl.load(counts + sample, mask=real, other=0)
    going = real & (tl.load(live + sample, mask=real, other=0) != 0)
    token = tl.load(drawn + at, mask=real, other=0)
    place = sample * width + count
    tl.store(tokens + place, token, mask=going)
    tl.store(logprobs + place, tl.load(drawn_logprobs + at, mask=real, other=0.0), mask=going)
    count += going.to(tl.int64)
    tl.store(counts + sample, count, mask=real)
    on = going & (count < tl.load(most))
    for i in range(stops):
        on = on & (token != tl.load(stop + i))
    tl.store(live + sample, on.to(tl.uint8), mask=real)


def begin(samples, tokens, counts, live, addresses, first_position, own_lengths):
    """As `sslr1.ops.step_begin` has them."""
    n, every = len(samples), len(counts)
    found = tuple(torch.empty_like(samples) for _ in range(4))
    known = samples, tokens, counts, live.view(torch.uint8), addresses, first_position, own_lengths
    grid = (triton.cdiv(max(n, every), ROWS),)
    begin_rows[grid](*known, *found, n, every, tokens.shape[1], BLOCK=ROWS, num_warps=2)
    return found


def end(samples, drawn, drawn_logprobs, stop, most, tokens, logprobs, counts, live):
    """As `sslr1.ops.step_end` has them."""
    n = len(samples)
    known = samples, drawn, drawn_logprobs, stop, most, tokens, logprobs, counts, live.view(torch.uint8)
    if n:
        grid = (triton.cdiv(n, ROWS),)
        end_rows[grid](*known, n, tokens.shape[1], len(stop), BLOCK=ROWS, num_warps=2)
