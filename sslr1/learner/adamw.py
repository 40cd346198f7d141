"""AdamW with moments in bfloat16: 4 bytes a parameter for both instead of 8. Parameters stay float32.

A moment changes by a hundredth of itself or less a step, and bfloat16 has 8 bits: rounded to nearest, it would stand
still. So it is rounded up or down at random, in proportion, and right on average. The draws are keyed by (seed, step,
parameter, place of the shard): the same after a resume, and the same on every copy of a shard.
"""

import torch

from sslr1.model import parallel
from sslr1.ops import keys

MOMENTS = ("exp_avg", "exp_avg_sq")  # as torch's AdamW names them
SLICE = 1 << 24  # elements whose moments are float32 at a time


class AdamWBfloat16(torch.optim.Optimizer):
    """As torch.optim.AdamW (arXiv 1711.05101), with the state's names. seed: names the rounding's draws."""

    def __init__(self, parameters, lr, betas, eps, weight_decay, seed=0):
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.seed = seed

    @torch.no_grad()
    def step(self):
        number = 0
        for group in self.param_groups:
            for p in group["params"]:
                number += 1
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros(())
                    for name in MOMENTS:
                        state[name] = torch.zeros_like(p, dtype=torch.bfloat16)
                state["step"] += 1
                step = int(state["step"])
                key = keys.fold("moments", self.seed, step, number, parallel.first_row(p))
                generator = torch.Generator(p.device).manual_seed(key % 2**63)
                whole = (p, p.grad, state["exp_avg"], state["exp_avg_sq"])
                for slices in zip(*(parallel.local(x).view(-1).split(SLICE) for x in whole)):
                    _update(*slices, step, generator, group)


def _update(parameter, gradient, first, second, step, generator, group):
    (beta1, beta2), lr = group["betas"], group["lr"]
    m = first.float().lerp_(gradient, 1 - beta1)
    v = second.float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    first.copy_(round_at_random(m, generator))
    second.copy_(round_at_random(v, generator))
    scale = (v / (1 - beta2**step)).sqrt_().add_(group["eps"])
    parameter.mul_(1 - lr * group["weight_decay"]).addcdiv_(m, scale, value=-lr / (1 - beta1**step))


def round_at_random(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """float32 -> bfloat16, to either neighbour with a probability that makes the mean right. What is not finite
    stays."""
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    rounded = (x.view(torch.int32) + noise).bitwise_and_(-65536).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).bfloat16()
