"""The sampler's weights: the learner's, in its compute dtype."""

import torch
from torch import nn

from sslr1.model import decode_layers, lora, parallel
from sslr1.model.gated_delta_net import dtypes_of
from sslr1.ops import transfer


class SamplerWeights:
    """A plain model for the engine that follows a sharded policy.

    What a rank holds whole in the compute dtype is the learner's own storage, and `refresh` has nothing to do for it:
    all parameters of one rank that computes in their dtype, and on any rank what is frozen under adapters. The others
    are a replica, filled parameter by parameter from the shards, those that one product of a decode step computes one
    behind the other.
    Make it with the policy before sharding (it takes the structure from there), then `attach` it to the sharded one.
    """

    def __init__(self, model, dtype):
        with torch.device("meta"):
            self.model = type(model)(model.config)
            lora.follow(self.model, model)
        self.model.generation_config = model.generation_config
        self.dtype = dtype
        for name, buffer in model.named_buffers():  # rotary tables: small, not part of the state
            owner, _, leaf = name.rpartition(".")
            self.model.get_submodule(owner)._buffers[leaf] = buffer.detach().clone()
        self.model.eval().requires_grad_(False)
        self.shared, self.copied = False, []

    def attach(self, policy, world):
        for name, buffer in self.model.named_buffers():
            owner, _, leaf = name.rpartition(".")
            self.model.get_submodule(owner)._buffers[leaf] = transfer.upload(buffer, world.device, "weights")
        parameters, dtypes = dict(policy.model.named_parameters()), dtypes_of(policy.model, self.dtype)
        whole = {name for name, p in parameters.items() if p.dtype == dtypes[name] and parallel.is_whole(p)}
        self.copied = [name for name in parameters if name not in whole]
        self.shared = not self.copied
        own = decode_layers.joined(self.model, self.copied, dtypes, world.device)
        for name, parameter in parameters.items():
            if name in whole:
                tensor = parallel.local(parameter.detach())
            else:
                tensor = own.get(name)
            if tensor is None:
                tensor = torch.empty(parameter.shape, dtype=dtypes[name], device=world.device)
            owner, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
        self.model.tie_weights()
        self.refresh(policy)
        return self

    @torch.no_grad()
    def refresh(self, policy):
        """Copy the policy's parameters after an optimiser step. All ranks must call it."""
        mine, theirs = dict(self.model.named_parameters()), dict(policy.model.named_parameters())
        for name in self.copied:
            mine[name].copy_(parallel.whole(theirs[name].detach()))
