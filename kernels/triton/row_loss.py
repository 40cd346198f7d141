"""One row of logits in, its log-prob, its entropy and its gradient out; the formulas are in `sslr1.ops.row_loss`.

Cost: 4 bytes read an element for statistics, two exponentials an element; the gradient reads again (what L2 still holds
of the row, from its end backwards), one more exponential, and writes 4, or 2. One program a row, and so large that a
multiprocessor takes one at a time: L2 then holds much of the rows in flight. Each lane keeps a running maximum m of its
logits, s = sum e^d and w = sum d e^d with d = (x - m) / temperature; merged,

    lse = m / temperature + log s,  entropy = log s - w / s.

The token's own logit joins last: 1 - p and log p of a token that is nearly certain would be lost to rounding.
"""

import numpy as np

import triton
import triton.language as tl

BLOCK = 8192
STAGES = tl.constexpr(3)  # loads run two blocks ahead of the arithmetic


@triton.jit
def exponent(x, top, inverse_temperature):
    """(x - top) / temperature; for -inf, top or not, a number whose exponential is 0. NaN stays."""
    return tl.where(x == float("-inf"), -200.0, (x - top) * inverse_temperature)


@triton.jit
def log1p(x):
    """For x >= 0, as precise as the logarithm (Kahan)."""
    u = 1 + x
    return tl.where(u == 1, x, tl.log(u) * x / tl.where(u == 1, 1.0, u - 1))


@triton.jit
def expm1(x):
    """For x <= 0, likewise."""
    u = tl.exp(x)
    log_u = tl.where((u == 1) | (u == 0), 1.0, tl.log(u))
    return tl.where(u == 1, x, tl.where(u == 0, -1.0, (u - 1) * x / log_u))


@triton.jit
def kernel(
    logits,
    out,
    tokens,
    logprobs,
    entropy,
    advantage,
    policy,
    kl,
    bonus,
    old,
    ref,
    g,
    vocabulary,
    stride,
    out_stride,
    inverse_temperature,
    inverse_rest,  # what float32 leaves of it
    clip_low,
    clip_high,
    MEASURE: tl.constexpr,  # write logprobs and entropy; else read them, and g
    WRITE: tl.constexpr,  # write the gradient to `out`
    CISPO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    out += row * out_stride
    token = tl.load(tokens + row)
    picked = tl.load(logits + token)
    token = token.to(tl.int32)
    exact_inverse = tl.full([], 1.0, tl.float64) * inverse_temperature + inverse_rest
    if MEASURE:
        m = tl.full([BLOCK], float("-inf"), tl.float32)
        s = tl.zeros([BLOCK], tl.float32)
        w = tl.zeros([BLOCK], tl.float32)
        for start in tl.range(0, vocabulary, BLOCK, num_stages=STAGES):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(logits + at, mask=at < vocabulary, other=float("-inf"))
            x = tl.where(at == token, float("-inf"), x)
            top = tl.maximum(m, x)
            shift = exponent(m, top, inverse_temperature)
            d = exponent(x, top, inverse_temperature)
            scale = tl.exp(shift)
            e = tl.exp(d)
            w = (w + shift * s) * scale + d * e
            s = s * scale + e
            m = top
        base = tl.maximum(tl.max(m, 0), picked)
        shift = exponent(m, base, inverse_temperature)
        scale = tl.exp(shift)
        d = exponent(picked, base, inverse_temperature)
        e = tl.exp(d)
        others = tl.sum(s * scale, 0)
        w = tl.sum((w + shift * s) * scale, 0) + d * e
        s = others + e
        # s is NaN after NaN or +inf, 0 where all are -inf
        inverse_s = tl.where(s > 0, 1 / s, float("nan"))
        log_s = tl.where(picked == base, log1p(others), tl.log(s))
        # In float64: of a logit of 90, roundings to float32 would be 1e-5 of the ratio
        exact = (picked.to(tl.float64) - base) * exact_inverse - log_s
        exact = tl.where(exact > 0, 0.0, exact)  # a minimum could lose NaN
        exact = tl.where(s > 0, exact, float("nan"))
        logprob = exact.to(tl.float32)
        H = log_s - w * inverse_s
        tl.store(logprobs + row, logprob)
        tl.store(entropy + row, H)
    if WRITE:
        # p = scale e^t and log p + H = t + surprise, with t = (x - base) / temperature + offset
        if MEASURE:
            offset = 0.0
            scale = inverse_s
            surprise = H - log_s
            ratio = 1.0
            if old is not None:
                ratio = tl.exp((exact - tl.load(old + row)).to(tl.float32))
            A = tl.load(advantage + row)
            capped = tl.where(ratio > 1 + clip_high, 1 + clip_high, ratio)
            if CISPO:
                slope = -tl.load(policy + row) * A * capped
            else:
                free = ratio * A
                clipped = tl.where(capped < 1 - clip_low, 1 - clip_low, capped) * A
                slope = tl.where(free > clipped, 0.0, -tl.load(policy + row) * free)  # NaN is not greater
            if ref is not None:
                slope += tl.load(kl + row) * (1 - tl.exp((tl.load(ref + row) - exact).to(tl.float32)))
        else:
            # From the logit whose log-prob is 0, near all that matter: differences to a far one would be rounded
            logprob = tl.load(logprobs + row)
            zero = picked.to(tl.float64) - logprob / exact_inverse
            base = zero.to(tl.float32)
            offset = ((base.to(tl.float64) - zero) * exact_inverse).to(tl.float32)
            scale = 1.0
            surprise = tl.load(entropy + row)
            slope = tl.load(g + row)
        slope *= inverse_temperature
        own = slope * expm1(logprob)  # -g (1 - p)
        weight = tl.load(bonus + row) * inverse_temperature
        tl.debug_barrier()  # all threads have the token's logit before one overwrites it
        last = (vocabulary - 1) // BLOCK * BLOCK
        for back in tl.range(0, vocabulary, BLOCK, num_stages=STAGES):
            at = last - back + tl.arange(0, BLOCK)
            x = tl.load(logits + at, mask=at < vocabulary, other=0.0, eviction_policy="evict_first")
            t = (x - base) * inverse_temperature + offset
            finite = tl.where(t == float("-inf"), 0.0, t + surprise)  # times p = 0
            p = tl.exp(t) * scale
            gradient = weight * (p * finite) - tl.where(at == token, own, slope * p)
            to = out + at
            tl.store(to, gradient.to(out.dtype.element_ty), mask=at < vocabulary, eviction_policy="evict_first")


def launch(logits, out, tokens, logprobs, entropy, columns, clip, temperature, measure, write):
    """Run the kernel on every row of logits, float32 [n, V] with contiguous rows.

    out [n, V]: float32 or bfloat16, the logits themselves or apart from them; tokens int64 [n]; columns: advantage,
    policy, kl, bonus, old, ref and g, each float32 [n] or None; clip: clip_low, clip_high, cispo. measure: write
    logprobs and entropy, float32 [n], instead of reading them and g; write: write d loss / d logits to `out`.
    """
    n, V = logits.shape
    if n == 0:
        return
    inverse = float(np.float32(1.0 / temperature))
    clip_low, clip_high, cispo = clip
    block = min(BLOCK, triton.next_power_of_2(V))
    numbers = V, logits.stride(0), out.stride(0), inverse, 1.0 / temperature - inverse, clip_low, clip_high
    options = dict(MEASURE=measure, WRITE=write, CISPO=cispo, BLOCK=block, num_warps=max(1, min(32, block // 256)))
    kernel[(n,)](logits, out, tokens, logprobs, entropy, *columns, *numbers, **options)
