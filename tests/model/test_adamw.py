"""AdamW with bfloat16 moments: close to torch's, unbiased, the same again from a checkpoint."""

import torch

from sslr1 import model
from sslr1.learner.adamw import AdamWBfloat16, round_at_random
from sslr1.model import parallel
from sslr1.runs import checkpoint
from tests.learner.test_learner import OPTIONS, make_groups, make_learner, parameters

OPTIM = OPTIONS.optim.model_copy(update={"moments": "bfloat16"})


def test_rounding_is_right_on_average(seed):
    x = torch.cat([torch.randn(50), torch.tensor([1 + 2.0**-10, 3e-30, -0.0])])
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.stack([round_at_random(x, generator).double() for _ in range(20_000)])
    low, high = drawn.amin(0), drawn.amax(0)
    assert (low <= x).all() and (high >= x).all()
    width = (high - low).clamp(min=1e-300)
    assert (((drawn.mean(0) - x) / width).abs() < 5 * 0.5 / 20_000**0.5).all()
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan, 3.4028e38])
    out = round_at_random(odd, generator)
    assert out[0] == torch.inf and out[1] == -torch.inf and out[2].isnan() and out[3] > 3.3e38


def test_follows_torch(seed):
    """A thousand steps towards a target that moves: parameters stay close to those of float32 moments."""
    start, grads = torch.randn(40, 30), torch.randn(1000, 40, 30) * 0.3 + torch.randn(40, 30)
    found = []
    for kind in (torch.optim.AdamW, AdamWBfloat16):
        p = torch.nn.Parameter(start.clone())
        optimizer = kind([p], lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
        for g in grads:
            p.grad = g.clone()
            optimizer.step()
        found.append(p.detach() - start)
    assert (found[1] - found[0]).norm() < 0.01 * found[0].norm()


def test_resumed_is_unbroken(tmp_path, tiny, photographs, seed, one_process):
    learner, weights = make_learner(tiny, one_process, optim=OPTIM)
    recorded = make_groups(tiny, photographs, seed)
    learner.step(*recorded)
    state = learner.optimizer.state
    assert all(s["exp_avg"].dtype == s["exp_avg_sq"].dtype == torch.bfloat16 for s in state.values())
    options = dict(tokenizer=model.load_tokenizer(tiny), source=tiny, world=one_process)
    path = checkpoint.save(tmp_path, 1, learner=learner, sampler=weights.model, trainer={}, **options)
    learner.step(*recorded)
    other, _ = make_learner(tiny, one_process, optim=OPTIM)
    checkpoint.load(path, learner=other)
    other.step(*recorded)
    now, again = parameters(learner), parameters(other)
    assert all(torch.equal(now[name], again[name]) for name in now)
    for p, q in zip(learner.policy.parameters(), other.policy.parameters()):
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(
                *(parallel.local(x[name]) for x in (learner.optimizer.state[p], other.optimizer.state[q]))
            )
