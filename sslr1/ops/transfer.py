"""Copies from the host to the device: every one goes through here, and is counted by what it carries.

On a GPU they leave pinned memory and nobody waits for them. On a CPU nothing is copied and nothing counted.
"""

from collections import Counter
from threading import Lock

import torch

ALIGNED = 16  # bytes that each tensor of a common copy starts at a multiple of: Triton compiles one variant
sent = Counter()  # bytes so far, in this process, by purpose: images, plans, patches, ids, tables, rewards, …
_lock = Lock()  # the stream prepares the next step on a thread of its own


def total() -> int:
    """Bytes so far."""
    with _lock:
        return sum(sent.values())


def upload(x: torch.Tensor, device, purpose: str) -> torch.Tensor:
    """`x` on `device`: itself where it is there already."""
    device = torch.device(device)
    if x.device.type == device.type:
        return x
    _count(x.nbytes, purpose)
    return _pinned(x, device).to(device, non_blocking=True)


def upload_together(tensors, device, purpose: str) -> list:
    """Tensors on `device` by one copy, each starting at a multiple of ALIGNED bytes there; those that are there already
    as they are."""
    device, out = torch.device(device), list(tensors)
    here = [i for i, x in enumerate(out) if x.device.type != device.type]
    if not here:
        return out
    sizes = [-(-out[i].nbytes // ALIGNED) * ALIGNED for i in here]
    flat = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=device.type == "cuda")
    for i, piece in zip(here, flat.split(sizes)):
        piece[: out[i].nbytes].copy_(out[i].contiguous().view(-1).view(torch.uint8))
    _count(flat.nbytes, purpose)
    for i, piece in zip(here, flat.to(device, non_blocking=True).split(sizes)):
        out[i] = piece[: out[i].nbytes].view(out[i].dtype).view(out[i].shape)
    return out


def fill(target: torch.Tensor, x: torch.Tensor, purpose: str) -> None:
    """Copy `x` into `target`, wherever that lies, without another copy on its device: for weights."""
    if x.device.type != target.device.type:
        _count(x.nbytes, purpose)
    target.copy_(x)


def _count(size, purpose):
    with _lock:
        sent[purpose] += size


def _pinned(x, device):
    return x.contiguous().pin_memory() if device.type == "cuda" else x
