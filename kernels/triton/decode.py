"""One decode step's attention, G samples sharing their prompt's keys and values; `sslr1.ops.attention` says what it is.

Up to three launches. `prompt_part`: a program takes all G * H / H_kv queries of a group and a kv head as one matrix
tile against a piece of the prompt, and leaves the piece's output and log-sum-exp. `own_part`: a program takes one
sample's H / H_kv queries of a kv head against that sample's own keys, or a piece of them, and where these are not cut
joins the prompt's pieces and writes the result; where they are, `join` does.

Cost: a prompt's keys and values read once a step (once for each tile, where a group has more than 128 queries of a kv
head, or 64 in float32), a sample's own read once, q read once for each part and the output written: with B bytes an
element

    B d (2 H_kv (sum of prompt lengths + sum of own lengths) + 3 P G H) bytes,

and 4 (d + 1) bytes written and read for each query and piece, which stay in L2. 512 samples, G=16, H=16, H_kv=2, d=128,
bf16, prompts of 1,000 tokens, own 200: 33 + 105 + 6 = 144 MB, and 8 MB written and read again for two pieces a prompt.

How prompts are cut follows from shapes alone, so that a captured graph serves every step and a row's arithmetic depends
on its own keys and on these shapes, never on other rows' lengths or values; `batch_invariant` takes pieces of one size
instead, so that it depends on the group's own shape only. Nothing beyond a length is read. Exponentials are in base 2;
scores, sums, maxima and what pieces leave are float32, and products of float32 are float32's own, not TF32's.
"""

import functools
import math
import os

import torch

import triton
import triton.language as tl

PROCESSORS = 132  # programs that a wave holds: an H100's multiprocessors
WIDE = os.environ.get("TRITON_INTERPRET") == "1"  # the interpreter multiplies bfloat16 wrongly; float32 it can
# Keys of a prompt that a program takes where the cut must not depend on the batch: whole blocks of any layout
PIECE = 256


def layout(dtype, rows, d=128):
    """For `rows` queries of heads of d: rows of a tile, keys of a block, options. No tensor core multiplies float32
    exactly; without them its tiles must be smaller to stay in registers, as they must for wide heads."""
    rows = max(16, triton.next_power_of_2(rows))
    if d > 128:
        if dtype == torch.float32:
            return 16, 16, {"num_warps": 8, "num_stages": 2}
        return min(rows, 64), 32, {"num_warps": 8 if rows > 32 else 4, "num_stages": 3}
    if dtype == torch.float32:
        return min(rows, 64), 16, {"num_warps": 8 if rows > 16 else 4, "num_stages": 3}
    return min(rows, 128), 64, {"num_warps": 8 if rows > 64 else 4, "num_stages": 3}


@triton.jit
def attend(q, keys, values, start, end, key_stride, value_stride, scale, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """q [ROWS, D] against keys [start, end): maximum of scaled scores m [ROWS], sum s [ROWS] of 2^(score - m), and
    2^(score - m) @ values [ROWS, D]."""
    ROWS: tl.constexpr = q.shape[0]
    D: tl.constexpr = q.shape[1]
    lane = tl.arange(0, BLOCK)
    column = tl.arange(0, D)
    key_at = lane[:, None] * key_stride + column[None, :]
    value_at = lane[:, None] * value_stride + column[None, :]
    m = tl.full([ROWS], float("-inf"), tl.float32)
    s = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, D], tl.float32)
    if WIDE:
        q = q.to(tl.float32)
    for first in tl.range(start, end, BLOCK):
        here = tl.cast(first, tl.int64)
        real = first + lane < end
        k = tl.load(keys + here * key_stride + key_at, mask=real[:, None], other=0.0)
        v = tl.load(values + here * value_stride + value_at, mask=real[:, None], other=0.0)
        if WIDE:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        x = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        x = tl.where(real[None, :], x, float("-inf"))
        top = tl.maximum(m, tl.max(x, 1))
        shift = tl.exp2(m - top)
        p = tl.exp2(x - top[:, None])
        s = s * shift + tl.sum(p, 1)
        out = tl.dot(p.to(v.dtype), v, out * shift[:, None], input_precision="ieee")
        m = top
    return m, s, out


@triton.jit
def add_parts(m, s, out, parts, lses, count, column, real):
    """Running m, s and out [ROWS, D] of rows joined with `count` parts each; parts, lses: pointers [ROWS]."""
    D: tl.constexpr = out.shape[1]
    for part in tl.range(0, count):
        lse = tl.load(lses + part, mask=real, other=0.0)
        more = tl.load(parts[:, None] + part * D + column[None, :], mask=real[:, None], other=0.0)
        top = tl.maximum(m, lse)
        shift = tl.exp2(m - top)
        weight = tl.exp2(lse - top)
        s = s * shift + weight
        out = out * shift[:, None] + more * weight[:, None]
        m = top
    return m, s, out


@triton.jit
def prompt_part(
    q,
    keys,
    values,
    lengths,
    parts,
    lses,
    G,
    heads_kv,
    tiles,
    piece,
    part_count,
    scale,
    q_prompt_stride,
    q_sample_stride,
    q_head_stride,
    key_prompt_stride,
    key_head_stride,
    key_stride,
    value_prompt_stride,
    value_head_stride,
    value_stride,
    TIMES: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Grid: prompts x kv heads x tiles of rows (fastest: they read the same keys), pieces of `piece` keys."""
    tile = tl.program_id(0) % tiles
    head_kv = tl.program_id(0) // tiles % heads_kv
    prompt = (tl.program_id(0) // tiles // heads_kv).to(tl.int64)
    number = tl.program_id(1)
    start = number * piece
    end = tl.minimum(tl.load(lengths + prompt).to(tl.int32), start + piece)
    if start >= end:
        return
    row = tile * ROWS + tl.arange(0, ROWS)
    real = row < G * TIMES
    sample = row // TIMES
    head = head_kv * TIMES + row % TIMES
    column = tl.arange(0, D)
    q += prompt * q_prompt_stride
    q_at = sample.to(tl.int64) * q_sample_stride + head * q_head_stride
    queries = tl.load(q + q_at[:, None] + column[None, :], mask=real[:, None], other=0.0)
    keys += prompt * key_prompt_stride + head_kv.to(tl.int64) * key_head_stride
    values += prompt * value_prompt_stride + head_kv.to(tl.int64) * value_head_stride
    m, s, out = attend(queries, keys, values, start, end, key_stride, value_stride, scale, WIDE, BLOCK)
    to = ((prompt * G + sample) * heads_kv * TIMES + head) * part_count + number
    tl.store(parts + to[:, None] * D + column[None, :], out / s[:, None], mask=real[:, None])
    tl.store(lses + to, m + tl.log2(s), mask=real)


@triton.jit
def own_part(
    q,
    keys,
    values,
    lengths,
    prompt_lengths,
    parts,
    lses,
    result,
    G,
    heads_kv,
    prompt_piece,
    prompt_parts,
    piece,
    part_count,
    scale,
    q_prompt_stride,
    q_sample_stride,
    q_head_stride,
    key_prompt_stride,
    key_sample_stride,
    key_head_stride,
    key_stride,
    value_prompt_stride,
    value_sample_stride,
    value_head_stride,
    value_stride,
    length_prompt_stride,
    length_sample_stride,
    TIMES: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    JOIN: tl.constexpr,  # one piece only: join the prompt's pieces to it and write `result`
):
    """Grid: samples, kv heads, pieces of `piece` keys."""
    place = tl.program_id(0).to(tl.int64)
    prompt = place // G
    sample = place % G
    head_kv = tl.program_id(1)
    number = tl.program_id(2)
    start = number * piece
    length = tl.load(lengths + prompt * length_prompt_stride + sample * length_sample_stride).to(tl.int32)
    end = tl.minimum(length, start + piece)
    if not JOIN:
        if start >= end:
            return
    row = tl.arange(0, ROWS)
    real = row < TIMES
    head = head_kv * TIMES + row
    column = tl.arange(0, D)
    q += prompt * q_prompt_stride + sample * q_sample_stride
    queries = tl.load(q + head[:, None] * q_head_stride + column[None, :], mask=real[:, None], other=0.0)
    keys += prompt * key_prompt_stride + sample * key_sample_stride + head_kv.to(tl.int64) * key_head_stride
    values += prompt * value_prompt_stride + sample * value_sample_stride + head_kv.to(tl.int64) * value_head_stride
    m, s, out = attend(queries, keys, values, start, end, key_stride, value_stride, scale, WIDE, BLOCK)
    at = place * heads_kv * TIMES + head
    if JOIN:
        count = tl.cdiv(tl.load(prompt_lengths + prompt).to(tl.int32), prompt_piece)
        to = at * part_count
        m, s, out = add_parts(m, s, out, parts + to * D, lses + to, count, column, real)
        out = (out / s[:, None]).to(result.dtype.element_ty)
        tl.store(result + at[:, None] * D + column[None, :], out, mask=real[:, None])
    else:
        to = at * part_count + prompt_parts + number
        tl.store(parts + to[:, None] * D + column[None, :], out / s[:, None], mask=real[:, None])
        tl.store(lses + to, m + tl.log2(s), mask=real)


@triton.jit
def join(
    prompt_lengths,
    lengths,
    parts,
    lses,
    result,
    G,
    heads,
    prompt_piece,
    prompt_parts,
    piece,
    part_count,
    length_prompt_stride,
    length_sample_stride,
    ROWS: tl.constexpr,
    D: tl.constexpr,
):
    """The pieces of the prompt and of the samples' own keys, to `result`. Grid: samples, tiles of heads."""
    place = tl.program_id(0).to(tl.int64)
    prompt = place // G
    head = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    real = head < heads
    column = tl.arange(0, D)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    s = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, D], tl.float32)
    at = place * heads + head
    to = at * part_count
    count = tl.cdiv(tl.load(prompt_lengths + prompt).to(tl.int32), prompt_piece)
    m, s, out = add_parts(m, s, out, parts + to * D, lses + to, count, column, real)
    length = tl.load(lengths + prompt * length_prompt_stride + place % G * length_sample_stride).to(tl.int32)
    to += prompt_parts
    m, s, out = add_parts(m, s, out, parts + to * D, lses + to, tl.cdiv(length, piece), column, real)
    out = (out / s[:, None]).to(result.dtype.element_ty)
    tl.store(result + at[:, None] * D + column[None, :], out, mask=real[:, None])


@functools.cache
def pieces(length, block, programs, processors):
    """How to cut `length` keys, blocks whole, where `programs` programs would take them whole: (keys a piece, pieces).

    The cut whose waves of `processors` programs take the least time, a piece counted as its blocks and two more for
    what it leaves and finds.
    """
    blocks = triton.cdiv(length, block)

    def time(size):
        return triton.cdiv(programs * triton.cdiv(blocks, size), processors) * (size + 2)

    best = min((triton.cdiv(blocks, count) for count in range(1, blocks + 1)), key=time, default=1)
    return best * block, triton.cdiv(blocks, best)


def decode_attention(q, prompt_k, prompt_v, prompt_lengths, own_k, own_v, own_lengths, scale, batch_invariant=False):
    """q [P, G, H, d]; prompt_k, prompt_v [P, H_kv, L, d]; prompt_lengths int32 or int64 [P]; own_k, own_v [P, G, H_kv,
    C, d]; own_lengths int32 or int64 that expands to [P, G]. All of one dtype, float32 or bfloat16, d a power of two.
    Returns [P, G, H, d]."""
    P, G, H, d = q.shape
    heads_kv, L = prompt_k.shape[1:3]
    C, times = own_k.shape[3], H // heads_kv
    result = torch.empty(P, G, H, d, dtype=q.dtype, device=q.device)
    if not result.numel():
        return result
    q, prompt_k, prompt_v, own_k, own_v = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (q, prompt_k, prompt_v, own_k, own_v)
    )
    prompt_lengths, own_lengths = prompt_lengths.contiguous(), own_lengths.expand(P, G)
    rows, block, options = layout(q.dtype, G * times, d)
    _, own_block, own_options = layout(q.dtype, times, d)
    tiles = triton.cdiv(G * times, rows)
    prompt_piece, prompt_parts = pieces(L, block, P * heads_kv * tiles, PROCESSORS)
    piece, own_parts = pieces(C, own_block, P * G * heads_kv, PROCESSORS)
    if batch_invariant:
        prompt_piece, prompt_parts, piece, own_parts = PIECE, triton.cdiv(L, PIECE), C, 1
    whole = own_parts <= 1  # then the own keys' program joins
    part_count = prompt_parts + (0 if whole else own_parts)
    parts = torch.empty(P, G, H, part_count, d, dtype=torch.float32, device=q.device)
    lses = torch.empty(P, G, H, part_count, dtype=torch.float32, device=q.device)
    scale *= math.log2(math.e)
    shared = dict(TIMES=times, D=d, WIDE=WIDE)
    if prompt_parts:
        tensors = q, prompt_k, prompt_v, prompt_lengths, parts, lses
        numbers = G, heads_kv, tiles, prompt_piece, part_count, scale
        strides = *q.stride()[:3], *prompt_k.stride()[:3], *prompt_v.stride()[:3]
        grid = P * heads_kv * tiles, prompt_parts
        prompt_part[grid](*tensors, *numbers, *strides, ROWS=rows, BLOCK=block, **shared, **options)
    tensors = q, own_k, own_v, own_lengths, prompt_lengths, parts, lses, result
    numbers = G, heads_kv, prompt_piece, prompt_parts, piece, part_count, scale
    strides = *q.stride()[:3], *own_k.stride()[:4], *own_v.stride()[:4], *own_lengths.stride()
    constants = dict(ROWS=max(16, triton.next_power_of_2(times)), BLOCK=own_block, JOIN=whole)
    own_part[(P * G, heads_kv, max(1, own_parts))](*tensors, *numbers, *strides, **constants, **shared, **own_options)
    if not whole:
        tensors = prompt_lengths, own_lengths, parts, lses, result
        numbers = G, H, prompt_piece, prompt_parts, piece, part_count
        join[(P * G, triton.cdiv(H, 16))](*tensors, *numbers, *own_lengths.stride(), ROWS=16, D=d)
    return result
