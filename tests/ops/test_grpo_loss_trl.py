"""Our loss and its gradients against TRL's own `GRPOTrainer._compute_loss` on the same tensors, for types of both."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from sslr1 import ops

pytestmark = pytest.mark.peer


def trl_loss(logits, tokens, mask, advantages, old, ref, *, loss_type, low, high, kl, bonus, level, max_tokens):
    """What TRL's trainer computes once its model has given it logits [S, T, V]."""
    from trl import GRPOTrainer
    from trl.trainer.utils import selective_log_softmax_and_entropy

    logprobs, entropy = selective_log_softmax_and_entropy(logits, tokens)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logprobs, entropy, None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        beta=kl,
        epsilon_low=low,
        epsilon_high=high,
        loss_type=loss_type,
        use_vllm=False,
        max_completion_length=max_tokens,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=bool(bonus),
        use_adaptive_entropy=False,
        entropy_coef=bonus,
        model=torch.nn.Module().train(),
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        accelerator=SimpleNamespace(
            num_processes=1, sync_gradients=True, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    inputs = {
        "prompt_ids": tokens[:, :1],
        "prompt_mask": torch.ones_like(tokens[:, :1]),
        "completion_ids": tokens,
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
        "num_items_in_batch": mask.sum(),
    }
    return GRPOTrainer._compute_loss(trainer, None, inputs)


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize(
    "ours, theirs", [("dapo",) * 2, ("grpo",) * 2, ("dr_grpo",) * 2, ("cispo",) * 2, ("gspo", "grpo")]
)
def test_equal_to_trl(seed, ours, theirs, off_policy):
    P, G, T, D, V = 3, 4, 9, 16, 211
    S = P * G
    lengths = torch.randint(1, T + 1, (S,))  # TRL divides by the length: none is empty
    mask = (torch.arange(T) < lengths[:, None]).long()
    hidden = torch.randn(S, T, D, dtype=torch.float64, requires_grad=True)
    head = (3 * torch.randn(V, D, dtype=torch.float64) / D**0.5).requires_grad_()
    tokens, rewards = torch.randint(0, V, (S, T)), torch.rand(P, G)
    now = (hidden @ head.T).log_softmax(-1).gather(-1, tokens[..., None])[..., 0].detach()
    old = now + 0.3 * torch.randn(S, T, dtype=torch.float64) if off_policy else None
    ref = now + 0.3 * torch.randn(S, T, dtype=torch.float64)
    A = ops.advantages(rewards.double())
    bonus = 0.02 if ours in ("dapo", "cispo") else 0.0  # TRL's bonus is a mean over tokens, whatever the type
    shared = dict(max_tokens=T)
    expected = trl_loss(
        hidden @ head.T,
        tokens,
        mask,
        A.reshape(-1),
        old,
        ref,
        loss_type=theirs,
        low=0.1,
        high=1.25 if ours == "cispo" else 0.25,  # TRL clamps cispo's ratio at epsilon_high, we at 1 + clip_high
        kl=0.05,
        bonus=bonus,
        level="sequence" if ours == "gspo" else "token",
        **shared,
    )
    keep = mask.bool()
    out = ops.grpo_loss(
        hidden[keep],
        head,
        tokens[keep],
        torch.arange(S)[:, None].expand(S, T)[keep],
        rewards.double(),
        old_logprobs=None if old is None else old[keep],
        ref_logprobs=ref[keep],
        loss_type=ours,
        clip_low=0.1,
        clip_high=0.25,
        kl_coef=0.05,
        entropy_coef=bonus,
        **shared,
    )
    assert torch.allclose(out.loss, expected, rtol=1e-9)
    for a, b in zip(*(torch.autograd.grad(loss, (hidden, head)) for loss in (out.loss, expected))):
        assert (a - b).norm() <= 1e-9 * b.norm()
