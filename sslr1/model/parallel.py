"""The only file that knows FSDP2. One code path at every world size, one process included."""

import ctypes
import os
import signal
import sys
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils.checkpoint import checkpoint

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

    torchrun hands restarted ranks the store of those before them, whose addresses still stand in it (seen in torch 2.13: whoever read
    one waited for good), so on one node each start gets names of its own. Nodes count restarts differently: there
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, in torchrun's environment, has a new store made each time."""
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


def shard(policy, world: World, dtype: torch.dtype = torch.float32, replicate=1, recompute=0, compiled=False):
    """Shard a policy in place: each vision block and decoder layer, then the rest with the (possibly tied) embeddings.

    Parameters and reductions keep their dtype, compute runs in `dtype`, inputs are not cast (positions stay fp32).
    Gradients are summed over ranks, not averaged: losses are divided by global counts.
    replicate: copies of the model, each sharded over world.size / replicate neighbouring ranks (HSDP). recompute: every so-many-th
    block keeps only its input and runs again in the backward pass; 0 is none, 1 is all. compiled: torch.compile of every block but its attention.
    A policy with nothing to train gives its gathered embeddings and head up behind each forward pass, as no backward will.
    Raises UserError where `replicate` doesn't divide the ranks.
    """
    if world.size % replicate:
        raise UserError(f"train.replicate is {replicate}, which does not divide the {world.size} ranks")
    if replicate > 1:
        shape, names = (replicate, world.size // replicate), ("replicate", "shard")
    else:
        shape, names = (world.size,), ("shard",)
    mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=names)
    precision = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.promote_types(dtype, torch.float32), cast_forward_inputs=False
    )
    inner = policy.model.model
    for blocks in (inner.visual.blocks, inner.language_model.layers):
        for number, block in enumerate(blocks):
            if recompute and number % recompute == 0:  # inside of the module: its parameters are whole by then
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
            if compiled:  # dynamic, since the number of tokens is another in every micro-batch
                block.compile(dynamic=True)
            fully_shard(block, mesh=mesh, mp_policy=precision)
    trained = any(p.requires_grad for p in policy.parameters())
    fully_shard(policy, mesh=mesh, mp_policy=precision, reshard_after_forward=None if trained else True)
    for module in policy.modules():
        # One rank's mean is the sum, and dividing it would take a copy
        if isinstance(module, FSDPModule) and world.size > 1:
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no premultiplied sum
    return policy


def materialize(policy, device) -> None:
    """Give parameters that are on the meta device memory on `device`, not yet filled; buffers move there."""
    buffers = {name: buffer for name, buffer in policy.named_buffers()}
    policy.to_empty(device=device)
    for name, buffer in buffers.items():
        owner, _, leaf = name.rpartition(".")
        policy.get_submodule(owner)._buffers[leaf] = buffer.to(device)


@torch.no_grad()
def fill(parameter, rows) -> None:
    """Copy this rank's rows of a whole tensor, which `rows[a:b]` reads, into a (possibly sharded) parameter."""
    target, start = local(parameter), first_row(parameter)
    if target.numel():
        target.copy_(rows[start : start + len(target)])


def first_row(parameter) -> int:
    """Which row of the whole tensor this rank's part begins with."""
    if not isinstance(parameter, DTensor):
        return 0
    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return offset[0] if offset else 0


def last_micro_batch(policy, last: bool) -> None:
    """Every micro-batch's gradients are reduced within a copy of the model, or each rank would hold them whole until the last;
    between copies they are reduced behind the last."""
    policy.set_requires_all_reduce(last)


def iter_full_params(policy):
    """(name in the Hugging Face model, whole tensor) of each parameter, one whole at a time. All ranks must call it."""
    for name, parameter in policy.model.named_parameters():
        yield name, whole(parameter.detach())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a (possibly sharded) tensor. All ranks must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a (possibly sharded) tensor, sharing its storage."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def clip_gradients(policy, max_norm: float) -> torch.Tensor:
    """Scale gradients down to a global norm of at most `max_norm`; returns the norm before, 0-d, whole on every rank."""
    parameters = [p for p in policy.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    norm = whole(norm)
    if max_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


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
    """Send and receive contiguous CPU tensors: lists of (rank, tag, tensor), a tag the same on both sides, received in place."""
    work = [dist.isend(_bytes(x), rank, tag=tag) for rank, tag, x in sends if x.numel()]
    work += [dist.irecv(_bytes(x), rank, tag=tag) for rank, tag, x in receives if x.numel()]
    for each in work:
        each.wait()


def _bytes(tensor):
    return tensor.view(-1).view(torch.uint8)  # of any dtype, which gloo need not know


def barrier() -> None:
    dist.barrier()
