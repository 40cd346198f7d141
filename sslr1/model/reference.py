"""The reference of a KL penalty: a copy of the policy that stays as it was."""

import torch

from sslr1.model import parallel
from sslr1.model.gated_delta_net import cast
from sslr1.model.load import load_weights, skeleton
from sslr1.model.shared_prefix import Policy


def load_reference(path, world, dtype=torch.float32, replicate=1, compiled=False) -> Policy:
    """The model folder's policy, frozen and sharded as the trained one is, in its compute dtype: in bfloat16 half of
    what the trained weights take, no gradients, no moments. All ranks must call it. Errors: `check_folder`'s and
    `load_weights`'.
    """
    network = skeleton(path).requires_grad_(False)
    cast(network, dtype)
    policy = parallel.shard(Policy(network), world, dtype, replicate, compiled=compiled)
    parallel.materialize(policy, world.device)
    load_weights(policy.model, path)
    return policy
