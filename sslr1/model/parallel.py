"""The only file that knows FSDP2. One code path at every world size, one process included."""

from dataclasses import replace
from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils.checkpoint import checkpoint

from sslr1.distributed import World
from sslr1.errors import UserError
from sslr1.ops import transfer


def shard(policy, world: World, dtype: torch.dtype = torch.float32, replicate=1, recompute=0, compiled=False):
    """Shard a policy in place: each vision block and decoder layer, then the rest with the (possibly tied) embeddings.

    Parameters and reductions keep their dtype, compute runs in `dtype`, inputs are not cast (positions stay fp32).
    Gradients are summed over ranks, not averaged: losses are divided by global counts.
    replicate: copies of the model, each sharded over world.size / replicate neighbouring ranks (HSDP). recompute: every
    so-many-th block keeps only its input and runs again in the backward pass; 0 is none, 1 is all. compiled:
    torch.compile of every block but its attention. A policy with nothing to train gives its gathered embeddings and
    head up after each forward pass, as no backward will, and one with adapters those in no layer, which are small. What
    is frozen under adapters (`model.lora`) is left whole on every rank: the sampler reads it there. Raises UserError
    where `replicate` doesn't divide the ranks.
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
    under = {p for p in policy.parameters() if not p.requires_grad} if getattr(policy.model, "lora", None) else None
    options = {"mesh": mesh, "mp_policy": precision, "ignored_params": under}
    inner = policy.model.model
    for blocks in (inner.visual.blocks, inner.language_model.layers):
        for number, block in enumerate(blocks):
            if recompute and number % recompute == 0:  # inside of the module: its parameters are whole by then
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
            if hasattr(block, "linear_attn") and under is None:
                _shard_linear(block.linear_attn, mesh, precision)
            if compiled:  # dynamic, since the number of tokens is another in every micro-batch
                block.compile(dynamic=True)
            fully_shard(block, **options)
    trained = under is None and any(p.requires_grad for p in policy.parameters())
    fully_shard(policy, **options, reshard_after_forward=None if trained else True)
    for module in policy.modules():
        # One rank's mean is the sum, and dividing it would take a copy
        if isinstance(module, FSDPModule) and world.size > 1:
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no premultiplied sum
    return policy


def _shard_linear(layer, mesh, precision):
    """Of a gated delta net the matrices compute in the others' dtype; what is left is small, and whole in float32
    (`gated_delta_net.KEPT`; its forward casts the convolution and the bias)."""
    matrices = [part for part in layer.children() if isinstance(part, nn.Linear)]
    fully_shard(matrices, mesh=mesh, mp_policy=precision)
    fully_shard(layer, mesh=mesh, mp_policy=replace(precision, param_dtype=precision.reduce_dtype))


def materialize(policy, device) -> None:
    """Give parameters that are on the meta device memory on `device`, not yet filled; buffers move there."""
    buffers = {name: buffer for name, buffer in policy.named_buffers()}
    names = {}  # of those that share a parameter, which torch gives one each
    for name, parameter in policy.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    policy.to_empty(device=device)
    for first, *others in names.values():
        for name in others:
            owner, _, leaf = name.rpartition(".")
            policy.get_submodule(owner)._parameters[leaf] = policy.get_parameter(first)
    for name, buffer in buffers.items():
        owner, _, leaf = name.rpartition(".")
        policy.get_submodule(owner)._buffers[leaf] = transfer.upload(buffer, device, "weights")


@torch.no_grad()
def fill(parameter, rows) -> None:
    """Copy this rank's rows of a whole tensor, which `rows[a:b]` reads, into a (possibly sharded) parameter."""
    target = local(parameter)
    if target.numel():
        transfer.fill(target, part(parameter, rows), "weights")


def part(parameter, rows) -> torch.Tensor:
    """This rank's rows of a whole tensor, which `rows[a:b]` reads, for a (possibly sharded) parameter."""
    start = first_row(parameter)
    return rows[start : start + len(local(parameter))]


@torch.no_grad()
def exchange(parameters, others) -> None:
    """Let this rank's parts of parameters, by name, and others like them change places, between two passes."""
    for name, parameter in parameters.items():
        mine = local(parameter)
        before = mine.clone()
        mine.copy_(others[name])
        others[name].copy_(before)


def first_row(parameter) -> int:
    """Which row of the whole tensor this rank's part begins with."""
    if not isinstance(parameter, DTensor):
        return 0
    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return offset[0] if offset else 0


def last_micro_batch(policy, last: bool) -> None:
    """Every micro-batch's gradients are reduced within a copy of the model, or each rank would hold them whole until
    the last; between copies they are reduced after the last."""
    policy.set_requires_all_reduce(last)


def iter_full_params(policy):
    """(name in the Hugging Face model, whole tensor) of each parameter, one whole at a time. All ranks must call it."""
    for name, parameter in policy.model.named_parameters():
        yield name, whole(parameter.detach())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a (possibly sharded) tensor. All ranks must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_whole(tensor: torch.Tensor) -> bool:
    """Whether each rank's part of a tensor is all of it."""
    return not isinstance(tensor, DTensor) or tensor.device_mesh.size() == 1


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a (possibly sharded) tensor, sharing its storage."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def clip_gradients(policy, max_norm: float) -> torch.Tensor:
    """Scale gradients down to a global norm of at most `max_norm`; returns the norm before, 0-d, whole on every
    rank."""
    parameters = [p for p in policy.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    norm = whole(norm)
    if max_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
