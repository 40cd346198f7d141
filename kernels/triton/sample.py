"""One token and its log-prob a row of logits, by a two-level inverse CDF; `sslr1.ops.sampling` says what is drawn.

Three launches. `draw_uniforms` makes a uniform of each key. `statistics`, one program for each block of a row, leaves
each block's maximum and sum of exponentials, once for the vocabulary and once for what may be drawn. `pick`, one
program a row, chooses a block by the blocks' cumulative sums and reads that block again to choose the token in it.

Cost: every logit read once and one exponential each; besides 1 byte a logit of `suppressed`, which stays in cache, 16
bytes written and read a block, and one block a row read again. For 1,024 rows of 151,936 logits: 0.62 GB in float32,
0.31 GB in bfloat16. With top-k or top-p (`allowed` is a tensor of its own) twice the reads and the exponentials.

Sums in a block are float32, in the order that the block's layout fixes; what is cumulated is float64.
"""

import torch
from sslr1.kernels.keys import uniform

import triton
import triton.language as tl

BLOCK = 4096
KEYS = 256  # a program of `draw_uniforms`
# Fused, x - max would differ from the x whose max was taken, and log-probs could exceed 0.
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}


@triton.jit
def draw_uniforms(keys, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, uniform(tl.load(keys + at, mask=at < n, other=0)), mask=at < n)


@triton.jit
def exponential(x, top):
    return tl.where(x == float("-inf"), 0.0, tl.exp(x - top))  # NaN stays: it marks the row


@triton.jit
def load(logits, suppressed, at, vocabulary, inverse_temperature, SUPPRESSED: tl.constexpr):
    """x [BLOCK] float32, -inf beyond the vocabulary, and the same with -inf where `suppressed`."""
    x = tl.load(logits + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32) * inverse_temperature
    drawable = x
    if SUPPRESSED:
        drawable = tl.where(tl.load(suppressed + at, mask=at < vocabulary, other=1) != 0, float("-inf"), x)
    return x, drawable


@triton.jit
def statistics(
    logits,
    allowed,
    suppressed,
    blocks,
    vocabulary,
    stride,
    allowed_stride,
    inverse_temperature,
    SUPPRESSED: tl.constexpr,
    RESTRICTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """blocks float32 [B, 4, n]: maximum and sum of e^(x - maximum), of the vocabulary, then of what may be drawn."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    n = tl.num_programs(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    x, drawable = load(logits + row * stride, suppressed, at, vocabulary, inverse_temperature, SUPPRESSED)
    top = tl.max(x, 0)
    e = exponential(x, top)
    s = tl.sum(e, 0)
    drawable_top = top
    drawable_s = s
    if RESTRICTED:
        x, drawable = load(allowed + row * allowed_stride, suppressed, at, vocabulary, inverse_temperature, SUPPRESSED)
        drawable_top = tl.max(drawable, 0)
        drawable_s = tl.sum(exponential(drawable, drawable_top), 0)
    elif SUPPRESSED:
        drawable_top = tl.max(drawable, 0)
        if drawable_top == top:
            drawable_s = tl.sum(tl.where(drawable == float("-inf"), 0.0, e), 0)
        else:  # a suppressed logit is the block's largest: beside it the others might underflow
            drawable_s = tl.sum(exponential(drawable, drawable_top), 0)
    blocks += row * 4 * n + block
    tl.store(blocks, top)
    tl.store(blocks + n, s)
    tl.store(blocks + 2 * n, drawable_top)
    tl.store(blocks + 3 * n, drawable_s)


@triton.jit
def first(cdf, weights, target, lane, N: tl.constexpr):
    """First lane whose cdf exceeds target, never one of weight 0; the last of positive weight if rounding left none."""
    found = tl.min(tl.where((cdf > target) & (weights > 0), lane, N), 0)
    last = tl.max(tl.where(weights > 0, lane, 0), 0)
    return tl.where(found < N, found, last)


@triton.jit
def pick(
    logits,
    allowed,
    suppressed,
    blocks,
    uniforms,
    tokens,
    logprobs,
    vocabulary,
    stride,
    allowed_stride,
    inverse_temperature,
    n,
    repeats,
    SUPPRESSED: tl.constexpr,
    GREEDY: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: draws, `repeats` of each row."""
    row = tl.program_id(0).to(tl.int64)
    logits += row // repeats * stride
    allowed += row // repeats * allowed_stride
    blocks += row // repeats * 4 * n
    lane = tl.arange(0, BLOCKS)
    tops = tl.load(blocks + lane, mask=lane < n, other=float("-inf"))
    whole = tl.max(tops, 0)
    total = tl.sum(exponential(tops, whole) * tl.load(blocks + n + lane, mask=lane < n, other=0.0), 0)
    tops = tl.load(blocks + 2 * n + lane, mask=lane < n, other=float("-inf"))
    top = tl.max(tops, 0)
    target = 0.0
    if GREEDY:
        block = tl.min(tl.where(tops == top, lane, BLOCKS), 0)
    else:
        sums = tl.load(blocks + 3 * n + lane, mask=lane < n, other=0.0)
        weights = exponential(tops, top).to(tl.float64) * sums.to(tl.float64)
        target = tl.load(uniforms + row) * tl.sum(weights, 0)
        block = first(tl.cumsum(weights, 0), weights, target, lane, BLOCKS)
        # what is left, as a share of the block: sums of the same block by different roads differ in their last bits
        target = (target - tl.sum(tl.where(lane < block, weights, 0.0), 0)) / tl.sum(
            tl.where(lane == block, weights, 0.0), 0
        )
    block = tl.minimum(block, n - 1)  # a row of NaN has none
    lane = tl.arange(0, BLOCK)
    at = block * BLOCK + lane
    x, x = load(allowed, suppressed, at, vocabulary, inverse_temperature, SUPPRESSED)
    if GREEDY:
        token = tl.min(tl.where(x == top, lane, BLOCK), 0)
    else:
        weights = exponential(x, top).to(tl.float64)
        token = first(tl.cumsum(weights, 0), weights, target * tl.sum(weights, 0), lane, BLOCK)
    token = tl.minimum(block * BLOCK + token, vocabulary - 1)
    x = tl.load(logits + token).to(tl.float32) * inverse_temperature
    fine = (top > float("-inf")) & (whole < float("inf"))
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(logprobs + row, tl.where(fine, x - whole - tl.log(total), float("nan")))


def aligned(logits):
    """The logits, or a copy, with rows that start at multiples of 16 elements and bytes: on alignment depends how wide
    the compiler's loads are, and on that the order of sums, which must not depend on where a row lies."""
    if logits.stride(1) == 1 and logits.stride(0) % 16 == 0 and logits.data_ptr() % 16 == 0:
        return logits
    B, V = logits.shape
    return logits.new_empty(B, triton.cdiv(V, 16) * 16)[:, :V].copy_(logits)


def uniforms_of(keys):
    """float64, as `sslr1.ops.uniform`."""
    out, n = torch.empty(keys.shape, dtype=torch.float64, device=keys.device), len(keys)
    if n:
        draw_uniforms[(triton.cdiv(n, KEYS),)](keys.contiguous(), out, n, BLOCK=KEYS, num_warps=2)
    return out


def sample(logits, allowed, suppressed, keys, temperature, repeats=1):
    """logits [B, V] floating but not float64; allowed: the same tensor, or one like it with -inf where nothing may be
    drawn; suppressed: uint8 [V], 1 for ids never drawn, or None; keys int64 [B * repeats], a row's together;
    temperature 0 is greedy.

    Returns tokens int64, logprobs float32, as many as keys.
    """
    B, V = logits.shape
    restricted = allowed is not logits
    logits = aligned(logits)
    allowed = aligned(allowed) if restricted else logits
    tokens = torch.empty(B * repeats, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(B * repeats, dtype=torch.float32, device=logits.device)
    if not B:
        return tokens, logprobs
    block = min(BLOCK, triton.next_power_of_2(V))
    n = triton.cdiv(V, block)
    blocks = logits.new_empty(B, 4, n, dtype=torch.float32)
    inverse_temperature = 1.0 / (temperature or 1.0)
    masked = suppressed is not None
    mask = suppressed if masked else tokens  # a pointer that isn't read
    numbers = V, logits.stride(0), allowed.stride(0), inverse_temperature
    options = dict(SUPPRESSED=masked, BLOCK=block, **OPTIONS)
    statistics[(B, n)](logits, allowed, mask, blocks, *numbers, RESTRICTED=restricted, **options)
    options |= dict(GREEDY=temperature == 0, BLOCKS=triton.next_power_of_2(n))
    given = logits, allowed, mask, blocks, uniforms_of(keys), tokens, logprobs, *numbers, n, repeats
    pick[(B * repeats,)](*given, **options)
    return tokens, logprobs
