"""Ranks, and what they say to each other."""

import ctypes
import os
import signal
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist

from sslr1.errors import UserError

PR_SET_PDEATHSIG = 1  # of Linux's prctl


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0


def start(device: str = "auto") -> World:
    """Join the processes that torchrun started, or stand alone. NCCL on GPUs, gloo on CPUs."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        # torchrun that is killed outright would leave its ranks running: they get a SIGTERM then
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        place = torch.device("cuda", torch.cuda.current_device())
    else:
        place = torch.device(device)
    # Where float32 is asked for, the patch embedding, a convolution, takes it too
    torch.backends.cudnn.allow_tf32 = False
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, rank=rank, world_size=size, store=_store(size))
    return World(rank, size, place)


def _store(size):
    """Where the ranks find each other's addresses; None leaves it to the environment.

    torchrun hands restarted ranks the store of those before them, whose addresses still stand in it (seen in torch
    2.13: whoever read one waited for good), so on one node each start gets names of its own. Nodes count restarts
    differently: there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, in torchrun's environment, has a new store made each
    time."""
    env = os.environ
    if "RANK" not in env:
        return dist.HashStore()
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or env.get("GROUP_WORLD_SIZE") != "1":
        return None
    store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), size, is_master=False)
    return dist.PrefixStore(f"start-{env['TORCHELASTIC_RESTART_COUNT']}", store)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce(tensor: torch.Tensor, op: str = "sum", group=None) -> torch.Tensor:
    """Sum, min or max of a tensor over ranks, in place. group: all ranks by another way, see `another_group`."""
    ops = {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}
    dist.all_reduce(tensor, ops[op], group=group)
    return tensor


def another_group():
    """All ranks once more, for CPU tensors, on connections of their own: for another thread's collectives."""
    return dist.new_group(backend="gloo")


def all_gather_rows(tensor: torch.Tensor) -> list:
    """Each rank's CPU tensor [n, K], where n may differ from rank to rank, and K is 0 where n is."""
    shapes = torch.stack(_all_gather(torch.tensor(tensor.shape)))
    padded = tensor.new_zeros(shapes.amax(0).tolist())
    padded[: tensor.shape[0], : tensor.shape[1]] = tensor
    return [part[:n] for part, n in zip(_all_gather(padded), shapes[:, 0].tolist())]


def _all_gather(tensor):
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return parts


def swap(sends, receives) -> None:
    """Send and receive contiguous CPU tensors: lists of (rank, tag, tensor), a tag the same on both sides, received in
    place."""
    work = [dist.isend(_bytes(x), rank, tag=tag) for rank, tag, x in sends if x.numel()]
    work += [dist.irecv(_bytes(x), rank, tag=tag) for rank, tag, x in receives if x.numel()]
    for each in work:
        each.wait()


def _bytes(tensor):
    return tensor.view(-1).view(torch.uint8)  # of any dtype, which gloo need not know


def barrier() -> None:
    dist.barrier()


def agree(problem, world) -> None:
    """Raise on all ranks if rank 0 has a problem: its own words there, a bare UserError elsewhere."""
    flag = torch.full((), int(problem is not None), device=world.device)
    if int(all_reduce(flag, "max")):
        raise UserError(str(problem) if problem is not None else "")
