"""Addresses for random numbers: everything random is drawn from a key, a 64-bit hash of what names the draw.

`fold` hashes Python integers and strings, `fold_tensor` does the same to int64 tensors on their device, bit for bit.
The mixer is the finaliser of splitmix64 (Steele, Lea and Flood 2014, variant 13 of Stafford's search).
"""

import hashlib
from functools import lru_cache

import numpy as np
import torch

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MUL1 = 0xBF58476D1CE4E5B9
_MUL2 = 0x94D049BB133111EB


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * _MUL1) & _MASK
    x = ((x ^ (x >> 27)) * _MUL2) & _MASK
    return x ^ (x >> 31)


@lru_cache(1024)
def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def fold(*parts: int | str) -> int:
    """Hash of the parts in order, an unsigned 64-bit integer. Strings are hashed by BLAKE2b first."""
    h = _GOLDEN
    for part in parts:
        if isinstance(part, str):
            part = _digest(part)
        h = _mix(((h + _GOLDEN) & _MASK) ^ _mix((int(part) + _GOLDEN) & _MASK))
    return h


def fold_digests(*parts: int | str, digests: np.ndarray) -> np.ndarray:
    """`fold(*parts, text)` for each of many texts by their digests, uint64, which are BLAKE2b's of 8 bytes, little end
    first: uint64."""
    return _mix_array(np.uint64((fold(*parts) + _GOLDEN) & _MASK) ^ _mix_array(digests + np.uint64(_GOLDEN)))


def _mix_array(x):
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_MUL1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_MUL2)
    return x ^ (x >> np.uint64(31))


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x


def _mix_tensor(x: torch.Tensor) -> torch.Tensor:
    def shifted(x, n):  # logical shift: int64's own keeps the sign
        return (x >> n) & ((1 << (64 - n)) - 1)

    x = (x ^ shifted(x, 30)) * _signed(_MUL1)
    x = (x ^ shifted(x, 27)) * _signed(_MUL2)
    return x ^ shifted(x, 31)


def fold_tensor(key: int | torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
    """Continue `fold`'s hash `key`, or each of a tensor of this function's hashes, with int64 tensors, broadcast
    against each other: int64, equal to `fold` bit for bit.

    `fold(a, b, c)` is `fold_tensor(fold(a), tensor(b), tensor(c))` (as a signed number).
    """
    h = key
    if not isinstance(key, torch.Tensor):
        h = torch.full((), _signed(key), dtype=torch.int64, device=parts[0].device)  # which copies nothing
    golden = _signed(_GOLDEN)
    for part in parts:
        h = _mix_tensor((h + golden) ^ _mix_tensor(part.to(torch.int64) + golden))
    return h


def uniform(key: torch.Tensor) -> torch.Tensor:
    """One float64 uniform in [0, 1) for each int64 key, from the top 53 bits of the key mixed once more."""
    bits = (_mix_tensor(key + _signed(_GOLDEN)) >> 11) & ((1 << 53) - 1)
    return bits.to(torch.float64) * 2.0**-53


class _Key(np.random.bit_generator.ISeedSequence):
    """A seed that is the key itself. Philox(key=...) is the same after asking the system for a seed in vain."""

    def __init__(self, key: int):
        self.key = key

    def generate_state(self, n_words, dtype=np.uint32):
        return np.array([self.key, *[0] * (n_words - 1)], dtype)


def generator(*parts: int | str) -> np.random.Generator:
    """A NumPy generator (Philox, counter-based) at the address that the parts name."""
    return np.random.Generator(np.random.Philox(_Key(fold(*parts))))
