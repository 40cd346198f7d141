"""The GRPO loss from hidden states, without logits of all tokens: they exist for a chunk of rows at a time.

A chunk's logits are one matrix product; a row kernel (`sslr1.ops.row_loss`) finds log-probs and entropies and makes of
the logits their gradient; two more products turn that into the gradients of `hidden` and `lm_head`, which the backward
pass only scales. That is 6 N D V floating-point operations and memory of chunk * V. Rows that can't have a gradient (an
advantage of 0, no KL, no bonus) take the first product only.

Formulas: GRPO (arXiv 2402.03300), Dr. GRPO (2503.20783), DAPO (2503.14476), CISPO (2506.13585), GSPO (2507.18071).
"""

from dataclasses import dataclass

import torch

from sslr1.ops import transfer
from sslr1.ops.chunks import wide_dtype
from sslr1.ops.loss_walk import STATS

LOSS_TYPES = ("dapo", "grpo", "dr_grpo", "cispo", "gspo")
ADVANTAGES = ("group", "mean", "batch")


@dataclass(kw_only=True)
class GrpoLoss:
    """loss: 0-d, differentiable in hidden and lm_head. logprobs, entropy: [N], detached. stats: dict of 0-d tensors,
    each divided by the step's global counts, so that sums over micro-batches and ranks give the step's value
    (ratio_min and ratio_max combine by min and max)."""

    loss: torch.Tensor
    logprobs: torch.Tensor
    entropy: torch.Tensor
    stats: dict


def advantages(rewards, kind="group", reward_std=None):
    """Advantage of each completion from rewards [P, G]: [P, G] of the same dtype.

    group: (R - mean) / (std + 1e-4), std with G - 1. mean: R - mean. batch: (R - mean) / (reward_std + 1e-4), where
    reward_std is the step's (default: that of `rewards`). A group whose rewards are all equal gets exactly 0.
    """
    if kind not in ADVANTAGES:
        raise ValueError(f"advantage {kind!r} is not one of {ADVANTAGES}")
    if rewards.ndim != 2:
        raise ValueError(f"rewards must be [P, G], got shape {tuple(rewards.shape)}")
    if rewards.numel() == 0:
        return rewards.clone()
    exact = rewards.double()  # a reward near its group's mean would lose its digits
    centred = exact - exact.mean(1, keepdim=True)
    if kind == "group":
        spread = exact.std(1, keepdim=True) if exact.shape[1] > 1 else torch.zeros_like(centred)
        centred = centred / (spread + 1e-4)
    elif kind == "batch":
        if reward_std is None:
            reward_std = exact.std() if exact.numel() > 1 else exact.new_zeros(())
        centred = centred / (reward_std + 1e-4)
    return centred.masked_fill(_flat(rewards), 0).to(rewards.dtype)


@torch.no_grad()
def token_logprobs(hidden, lm_head, tokens, temperature=1.0, backend="auto", chunk=None):
    """Log-prob of each token and entropy (nats) of its distribution, temperature-scaled, no gradient.

    hidden [N, D], lm_head [V, D], tokens [N] int64 -> (logprobs [N], entropy [N]), float32 (float64 for float64).
    backend, chunk: as in `grpo_loss`.
    """
    _check_rows(hidden, lm_head, tokens)
    return torch.ops.sslr1.token_logprobs(hidden, lm_head, tokens, temperature, backend, chunk or 0)


def grpo_loss(
    hidden,
    lm_head,
    tokens,
    sequence,
    rewards,
    *,
    old_logprobs=None,
    ref_logprobs=None,
    token_weights=None,
    advantages=None,
    temperature=1.0,
    loss_type="dapo",
    advantage="group",
    clip_low=0.2,
    clip_high=0.2,
    kl_coef=0.0,
    entropy_coef=0.0,
    max_tokens=None,
    token_count=None,
    sequence_count=None,
    reward_std=None,
    backend="auto",
    chunk=None,
):
    """GRPO loss of N completion tokens.

    hidden [N, D]: the states that predict `tokens`; lm_head [V, D]; tokens [N] int64; sequence [N] integers in [0, S),
    non-decreasing, completion s = puzzle s // G, sample s % G of rewards [P, G] float32 (a completion without tokens is
    legal). old_logprobs [N]: of the policy that drew the tokens, None for on-policy (ratio exactly 1). ref_logprobs
    [N]: needed by kl_coef > 0. token_weights [N]: factor on each policy term, no gradient. advantages [P, G] overrides
    `advantage`. token_count, sequence_count: loss tokens and completions of the whole optimiser step over all ranks
    (default: this call's). max_tokens: needed by loss_type "dr_grpo". backend: of the row kernel, "reference", "cpp",
    "triton", "cuda", or "auto": the fastest that can run. chunk: rows whose logits exist at a time (default: 256 on a
    CPU, 4096 on a GPU, 8192 from D = 3072; or the power of two that holds N); the last chunk is filled up.

    Gradients lie within 1e-5 of their norm of float64's from float32 inputs. From bfloat16 each of their numbers is
    rounded once, by 2^-8 at most, and on a GPU each logit's gradient before them: 1.7e-3 and 2.3e-3 of the norm in the
    root mean square.

    Returns GrpoLoss. Non-finite input gives a non-finite loss. Raises ValueError naming the argument that is wrong.
    """
    rows_of = dict(old_logprobs=old_logprobs, ref_logprobs=ref_logprobs, token_weights=token_weights)
    _check(hidden, lm_head, tokens, sequence, rewards, rows_of, advantages, temperature, loss_type, max_tokens, kl_coef)
    wide = wide_dtype(hidden.dtype)
    with torch.no_grad():
        A = _advantages(rewards, advantage, reward_std) if advantages is None else advantages
        columns = [None if x is None else x.detach().to(wide) for x in (A.reshape(-1), *rows_of.values())]
        counts = [
            _at_least_one(own if given is None else given, wide, hidden.device)
            for given, own in ((token_count, len(tokens)), (sequence_count, rewards.numel()))
        ]
    numbers = temperature, loss_type, clip_low, clip_high, kl_coef, entropy_coef, max_tokens or 0, backend, chunk or 0
    wants = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, lm_head)]
    given = (*columns, *counts, *numbers, *wants)
    loss, *found, _, _ = torch.ops.sslr1.grpo_loss(hidden, lm_head, tokens, sequence.to(torch.int64), *given)
    logprobs, entropy, stats = (x.detach() for x in found)
    stats = dict(zip(STATS, stats.unbind()))
    stats["zero_variance"] = _flat(rewards).to(wide).sum() * (rewards.shape[1] / counts[1])
    return GrpoLoss(loss=loss, logprobs=logprobs, entropy=entropy, stats=stats)


_advantages = advantages  # grpo_loss has an argument of that name


def _flat(rewards):
    """Which groups' rewards are all equal, [P, 1]."""
    return rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True) if rewards.numel() else rewards.new_zeros(0)


def _at_least_one(count, dtype, device):
    """A count as a 0-d tensor; a number is written there by the device, which would have to wait for a copy."""
    if isinstance(count, torch.Tensor):
        return transfer.upload(count, device, "counts").to(dtype).clamp(min=1)
    return torch.full((), max(1, count), dtype=dtype, device=device)


def _check(
    hidden, lm_head, tokens, sequence, rewards, rows_of, advantages, temperature, loss_type, max_tokens, kl_coef
):
    _check_rows(hidden, lm_head, tokens)
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type {loss_type!r} is not one of {LOSS_TYPES}")
    if loss_type == "dr_grpo" and not max_tokens:
        raise ValueError("loss_type 'dr_grpo' divides by max_tokens: give max_tokens")
    if kl_coef and rows_of["ref_logprobs"] is None:
        raise ValueError(f"kl_coef is {kl_coef}: give ref_logprobs")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if rewards.ndim != 2:
        raise ValueError(f"rewards must be [P, G], got shape {tuple(rewards.shape)}")
    for name, x in (("sequence", sequence), *rows_of.items()):
        if x is not None and x.shape != tokens.shape:
            raise ValueError(f"{name} must be {list(tokens.shape)}, got shape {tuple(x.shape)}")
    if sequence.is_floating_point():
        raise ValueError(f"sequence must be integers, got {sequence.dtype}")
    if advantages is not None and advantages.shape != rewards.shape:
        raise ValueError(f"advantages must be {list(rewards.shape)} like rewards, got {list(advantages.shape)}")


def _check_rows(hidden, lm_head, tokens):
    if hidden.ndim != 2 or lm_head.ndim != 2 or hidden.shape[1] != lm_head.shape[1]:
        raise ValueError(
            f"hidden must be [N, D] and lm_head [V, D], got {list(hidden.shape)} and {list(lm_head.shape)}"
        )
    if hidden.dtype != lm_head.dtype or not hidden.is_floating_point():
        raise ValueError(f"hidden and lm_head must have one floating dtype, got {hidden.dtype} and {lm_head.dtype}")
    if tokens.shape != hidden.shape[:1] or tokens.dtype != torch.int64:
        raise ValueError(f"tokens must be int64 [{hidden.shape[0]}], got {tokens.dtype} {list(tokens.shape)}")
