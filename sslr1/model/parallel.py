"""The only file that knows FSDP2. One code path at every world size, one process included."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor


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
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        place = torch.device("cuda", torch.cuda.current_device())
    else:
        place = torch.device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        store = None if "RANK" in os.environ else dist.HashStore()
        dist.init_process_group(backend, rank=rank, world_size=size, store=store)
    return World(rank, size, place)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def shard(policy, world: World, dtype: torch.dtype = torch.float32):
    """Shard a policy in place: each vision block and decoder layer, then the rest with the (possibly tied) embeddings.

    Parameters and reductions keep their dtype, compute runs in `dtype`, inputs are not cast (positions stay fp32).
    Gradients are summed over ranks, not averaged: losses are divided by global counts.
    """
    mesh = init_device_mesh(world.device.type, (world.size,))
    precision = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.promote_types(dtype, torch.float32), cast_forward_inputs=False
    )
    inner = policy.model.model
    for block in [*inner.visual.blocks, *inner.language_model.layers]:
        fully_shard(block, mesh=mesh, mp_policy=precision)
    fully_shard(policy, mesh=mesh, mp_policy=precision)
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no premultiplied sum
    return policy


def last_micro_batch(policy, last: bool) -> None:
    """Reduce gradients only behind the last micro-batch of a step."""
    policy.set_requires_gradient_sync(last)


def iter_full_params(policy):
    """(name in the Hugging Face model, whole tensor) of each parameter, one whole at a time. All ranks must call it."""
    for name, parameter in policy.model.named_parameters():
        tensor = parameter.detach()
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a (possibly sharded) tensor, sharing its storage."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def clip_gradients(policy, max_norm: float) -> torch.Tensor:
    """Scale gradients down to a global norm of at most `max_norm`; returns the norm before, 0-d, whole on every rank."""
    parameters = [p for p in policy.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if max_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def all_reduce(tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
    """Sum, min or max of a tensor over ranks, in place."""
    dist.all_reduce(tensor, {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}[op])
    return tensor


def barrier() -> None:
    dist.barrier()
