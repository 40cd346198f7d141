"""CPU memory that is used again: what CUDA's caching allocator does for a GPU. Pages fresh from the system are zeroed
one by one as they are touched, which takes longer than rendering into them."""

import math

import torch

from sslr1.ops import backends

SMALL = 1 << 16  # bytes under which the system's allocator does the same


def empty(*shape, dtype, device="cpu") -> torch.Tensor:
    """torch.empty; on the CPU, memory of tensors of about this size that are no longer referenced is handed out again.
    Up to 128 MiB are kept for that."""
    size = math.prod(shape) * dtype.itemsize
    if backends._C is None or torch.device(device).type != "cpu" or size < SMALL:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.frombuffer(backends._C.Block(size), dtype=dtype).view(shape)
