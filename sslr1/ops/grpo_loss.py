"""The GRPO loss from hidden states: reference in plain PyTorch, any floating dtype, float64 included.

Formulas: GRPO (arXiv 2402.03300), Dr. GRPO (2503.20783), DAPO (2503.14476), CISPO (2506.13585), GSPO (2507.18071).
"""

from dataclasses import dataclass

import torch

LOSS_TYPES = ("dapo", "grpo", "dr_grpo", "cispo", "gspo")
ADVANTAGES = ("group", "mean", "batch")


@dataclass
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
    centred = rewards - rewards.mean(1, keepdim=True)
    if kind == "group":
        spread = rewards.std(1, keepdim=True) if rewards.shape[1] > 1 else torch.zeros_like(centred)
        centred = centred / (spread + 1e-4)
    elif kind == "batch":
        if reward_std is None:
            reward_std = rewards.std() if rewards.numel() > 1 else rewards.new_zeros(())
        centred = centred / (reward_std + 1e-4)
    flat = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    return centred.masked_fill(flat, 0)


def _logprobs_entropy(hidden, lm_head, tokens, temperature):
    wide = torch.promote_types(
        hidden.dtype, torch.float32
    )  # rounded logits would put per cents of error into the ratio
    hidden, lm_head = hidden.to(wide), lm_head.to(wide)
    logprobs_V = (hidden @ lm_head.T / temperature).log_softmax(-1)
    entropy = -(logprobs_V.exp() * logprobs_V).sum(-1)
    return logprobs_V.gather(-1, tokens[:, None])[:, 0], entropy


@torch.no_grad()
def token_logprobs(hidden, lm_head, tokens, temperature=1.0, backend="auto", chunk=4096):
    """Log-prob of each token and entropy (nats) of its distribution, temperature-scaled, no gradient.

    hidden [N, D], lm_head [V, D], tokens [N] int64 -> (logprobs [N], entropy [N]). Logits exist for `chunk` rows at a time,
    in float32 (float64 for float64 inputs). backend: "reference" (and "auto"), or "triton" or "cuda", whose row kernels read
    a chunk's logits once.
    """
    if backend not in ("auto", "reference", "triton", "cuda"):
        raise ValueError(f"token_logprobs has no backend {backend!r}; it has 'reference', 'triton' and 'cuda'")
    _check_rows(hidden, lm_head, tokens)
    if backend in ("auto", "reference"):
        parts = [
            _logprobs_entropy(h, lm_head, t, temperature) for h, t in zip(hidden.split(chunk), tokens.split(chunk))
        ]
    else:
        row_kernel = _triton_rows if backend == "triton" else _cuda_rows
        parts = [
            row_kernel(float_logits(h, lm_head), t, temperature)
            for h, t in zip(hidden.split(chunk), tokens.split(chunk))
        ]
    logprobs, entropy = zip(*parts)
    return torch.cat(logprobs), torch.cat(entropy)


def float_logits(hidden, lm_head):
    """Logits [N, V] in float32 (float64 for float64) from states and head, not rounded to it on the way. No gradient on a GPU."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if hidden.is_cuda and hidden.dtype != wide:
        return torch.mm(hidden, lm_head.T, out_dtype=wide)
    return hidden.to(wide) @ lm_head.to(wide).T


def _triton_rows(logits, tokens, temperature):
    from sslr1.kernels.row_logprobs import row_logprobs

    return row_logprobs(logits, tokens, temperature)


def _cuda_rows(logits, tokens, temperature):
    from sslr1 import _C

    if not _C.has_cuda or not logits.is_cuda:
        raise ValueError("backend 'cuda' needs CUDA tensors and an extension that was built where nvcc is")
    N, V = logits.shape
    logprobs, entropy = torch.empty(2, N, dtype=torch.float32, device=logits.device)
    _C.row_logprobs(
        logits.data_ptr(),
        tokens.data_ptr(),
        logprobs.data_ptr(),
        entropy.data_ptr(),
        N,
        V,
        logits.stride(0),
        1.0 / temperature,
        torch.cuda.current_stream(logits.device).cuda_stream,
    )
    return logprobs, entropy


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
):
    """GRPO loss of N completion tokens.

    hidden [N, D]: the states that predict `tokens`; lm_head [V, D]; tokens [N] int64; sequence [N] integers in [0, S),
    non-decreasing, completion s = puzzle s // G, sample s % G of rewards [P, G] float32 (a completion without tokens is
    legal). old_logprobs [N]: of the policy that drew the tokens, None for on-policy (ratio exactly 1). ref_logprobs [N]:
    needed by kl_coef > 0. token_weights [N]: factor on each policy term, no gradient. advantages [P, G] overrides
    `advantage`. token_count, sequence_count: loss tokens and completions of the whole optimiser step over all ranks
    (default: this call's). max_tokens: needed by loss_type "dr_grpo".

    Returns GrpoLoss. Non-finite input gives a non-finite loss. Raises ValueError naming the argument that is wrong.
    """
    _check_backend(backend)
    _check_rows(hidden, lm_head, tokens)
    N = tokens.shape[0]
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type {loss_type!r} is not one of {LOSS_TYPES}")
    if loss_type == "dr_grpo" and not max_tokens:
        raise ValueError("loss_type 'dr_grpo' divides by max_tokens: give max_tokens")
    if kl_coef and ref_logprobs is None:
        raise ValueError(f"kl_coef is {kl_coef}: give ref_logprobs")
    if rewards.ndim != 2:
        raise ValueError(f"rewards must be [P, G], got shape {tuple(rewards.shape)}")
    for name, x in (
        ("sequence", sequence),
        ("old_logprobs", old_logprobs),
        ("ref_logprobs", ref_logprobs),
        ("token_weights", token_weights),
    ):
        if x is not None and x.shape != (N,):
            raise ValueError(f"{name} must be [{N}], got shape {tuple(x.shape)}")
    if advantages is not None and advantages.shape != rewards.shape:
        raise ValueError(f"advantages must be {list(rewards.shape)} like rewards, got {list(advantages.shape)}")
    S = rewards.numel()
    sequence = sequence.to(torch.int64)
    if N and not sequence.is_cuda:  # on a GPU this check would stall the stream
        if int(sequence[0]) < 0 or int(sequence[-1]) >= S or bool((sequence.diff() < 0).any()):
            raise ValueError(f"sequence must be non-decreasing and in [0, {S})")
        if int(tokens.min()) < 0 or int(tokens.max()) >= lm_head.shape[0]:
            raise ValueError(f"tokens must lie in [0, {lm_head.shape[0]})")

    logprobs, entropy = _logprobs_entropy(hidden, lm_head, tokens, temperature)
    work = logprobs.dtype
    with torch.no_grad():
        A_PG = advantages if advantages is not None else _advantages(rewards, advantage, reward_std)
        A = A_PG.reshape(-1).to(work).index_select(0, sequence)
        length_S = torch.zeros(S, dtype=work, device=hidden.device).index_add_(0, sequence, torch.ones_like(logprobs))
        length = length_S.index_select(0, sequence)
        T = N if token_count is None else token_count
        S_all = S if sequence_count is None else sequence_count
        per_token = 1.0 / _at_least_one(T, logprobs)
        per_sequence = 1.0 / _at_least_one(S_all, logprobs)
        if loss_type in ("dapo", "cispo"):
            scale = per_token.expand(N)
        elif loss_type == "dr_grpo":
            scale = (per_sequence / max_tokens).expand(N)
        else:
            scale = per_sequence / length
        weight = torch.ones_like(logprobs) if token_weights is None else token_weights.detach().to(work)

    log_ratio = logprobs - (logprobs if old_logprobs is None else old_logprobs.to(work)).detach()
    if loss_type == "gspo":
        mean_S = torch.zeros(S, dtype=work, device=hidden.device).index_add(0, sequence, log_ratio / length)
        log_ratio = mean_S.index_select(0, sequence)
    ratio = log_ratio.exp()
    if loss_type == "cispo":
        term = -weight * ratio.detach().clamp(max=1 + clip_high) * A * logprobs
    else:
        term = -weight * torch.minimum(ratio * A, ratio.clamp(1 - clip_low, 1 + clip_high) * A)
    policy = (term * scale).sum()
    loss = policy
    kl = torch.zeros_like(logprobs)
    if ref_logprobs is not None:
        r = ref_logprobs.detach().to(work) - logprobs
        kl = r.exp() - r - 1
        loss = loss + kl_coef * (kl * scale).sum()
    if entropy_coef:
        loss = loss - entropy_coef * (entropy * scale).sum()

    with torch.no_grad():
        flat = (rewards.amax(1) == rewards.amin(1)) if rewards.numel() else rewards.new_zeros(0)
        rho = ratio.detach()
        # what the clip stops: cispo clamps every ratio above its bound, the others only where the gradient would grow it
        low = (rho < 1 - clip_low) & (A < 0) if loss_type != "cispo" else torch.zeros_like(rho, dtype=torch.bool)
        high = (rho > 1 + clip_high) & ((A > 0) | (loss_type == "cispo"))
        one = torch.ones((), dtype=work, device=hidden.device)
        stats = {
            "policy_loss": policy.detach(),
            "kl": (kl.detach() * per_token).sum(),
            "entropy": (entropy.detach() * per_token).sum(),
            "clip_low": (low.to(work) * per_token).sum(),
            "clip_high": (high.to(work) * per_token).sum(),
            "ratio_mean": (rho * per_token).sum(),
            "ratio_min": rho.min() if N else one,
            "ratio_max": rho.max() if N else one,
            "zero_variance": flat.to(work).sum() * rewards.shape[1] * per_sequence,
        }
    return GrpoLoss(loss, logprobs.detach(), entropy.detach(), stats)


_advantages = advantages  # grpo_loss has an argument of that name


def _at_least_one(count, like):
    return torch.as_tensor(count, device=like.device).to(like.dtype).clamp(min=1)


def _check_backend(backend):
    if backend not in ("auto", "reference"):
        raise ValueError(f"grpo_loss has no backend {backend!r}; it has 'reference'")


def _check_rows(hidden, lm_head, tokens):
    if hidden.ndim != 2 or lm_head.ndim != 2 or hidden.shape[1] != lm_head.shape[1]:
        raise ValueError(
            f"hidden must be [N, D] and lm_head [V, D], got {list(hidden.shape)} and {list(lm_head.shape)}"
        )
    if tokens.shape != hidden.shape[:1] or tokens.dtype != torch.int64:
        raise ValueError(f"tokens must be int64 [{hidden.shape[0]}], got {tokens.dtype} {list(tokens.shape)}")
