"""The hash of `sslr1.ops.keys` inside a kernel, bit for bit: keys are int64 in memory, uint64 here."""

import triton
import triton.language as tl

GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
MUL1 = tl.constexpr(0xBF58476D1CE4E5B9)
MUL2 = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def mix(x):
    x = (x ^ (x >> 30)) * MUL1
    x = (x ^ (x >> 27)) * MUL2
    return x ^ (x >> 31)


@triton.jit
def fold(key, part):
    """`fold_tensor(key, part)` of int64 tensors."""
    h = key.to(tl.uint64, bitcast=True) + GOLDEN
    return mix(h ^ mix(part.to(tl.uint64, bitcast=True) + GOLDEN)).to(tl.int64, bitcast=True)


@triton.jit
def uniform(key):
    """float64 in [0, 1)."""
    bits = mix(key.to(tl.uint64, bitcast=True) + GOLDEN) >> 11
    return bits.to(tl.int64, bitcast=True).to(tl.float64) * (2.0**-53)
