"""The GRPO loss from hidden states, without logits of all tokens: they exist for a chunk of rows at a time.

A chunk's logits are one matrix product; a row kernel (`sslr1.ops.row_loss`) finds log-probs and entropies and makes of the logits
their gradient; two more products turn that into the gradients of `hidden` and `lm_head`, which the backward pass only scales.
That is 6 N D V floating-point operations and memory of chunk * V. Rows that can't have a gradient (an advantage of 0, no KL,
no bonus) take the first product only.

Formulas: GRPO (arXiv 2402.03300), Dr. GRPO (2503.20783), DAPO (2503.14476), CISPO (2506.13585), GSPO (2507.18071).
"""

from dataclasses import dataclass

import torch

from sslr1.ops import chunks as chunked
from sslr1.ops import row_loss as rows
from sslr1.ops.chunks import Chunks, wide_dtype

LOSS_TYPES = ("dapo", "grpo", "dr_grpo", "cispo", "gspo")
ADVANTAGES = ("group", "mean", "batch")
STATS = ("policy_loss", "kl", "entropy", "clip_low", "clip_high", "ratio_mean", "ratio_min", "ratio_max", "prepass")


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
    exact = rewards.double()  # a reward near its group's mean would lose its digits
    centred = exact - exact.mean(1, keepdim=True)
    if kind == "group":
        spread = exact.std(1, keepdim=True) if exact.shape[1] > 1 else torch.zeros_like(centred)
        centred = centred / (spread + 1e-4)
    elif kind == "batch":
        if reward_std is None:
            reward_std = exact.std() if exact.numel() > 1 else exact.new_zeros(())
        centred = centred / (reward_std + 1e-4)
    flat = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    return centred.masked_fill(flat, 0).to(rewards.dtype)


@torch.no_grad()
def token_logprobs(hidden, lm_head, tokens, temperature=1.0, backend="auto", chunk=None):
    """Log-prob of each token and entropy (nats) of its distribution, temperature-scaled, no gradient.

    hidden [N, D], lm_head [V, D], tokens [N] int64 -> (logprobs [N], entropy [N]), float32 (float64 for float64 inputs).
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
    legal). old_logprobs [N]: of the policy that drew the tokens, None for on-policy (ratio exactly 1). ref_logprobs [N]:
    needed by kl_coef > 0. token_weights [N]: factor on each policy term, no gradient. advantages [P, G] overrides
    `advantage`. token_count, sequence_count: loss tokens and completions of the whole optimiser step over all ranks
    (default: this call's). max_tokens: needed by loss_type "dr_grpo". backend: of the row kernel, "reference", "cpp",
    "triton", "cuda", or "auto": the fastest that can run. chunk: rows whose logits exist at a time (default: 256 on a CPU, 4096
    on a GPU, 8192 from D = 3072; the power of two that holds N where that is less); the last chunk is filled up.

    Gradients lie within 1e-5 of their norm of float64's from float32 inputs. From bfloat16 each of their numbers is rounded once, by
    2^-8 at most, and on a GPU each logit's gradient before them: 1.7e-3 and 2.3e-3 of the norm in the root mean square.

    Returns GrpoLoss. Non-finite input gives a non-finite loss. Raises ValueError naming the argument that is wrong.
    """
    _check_rows(hidden, lm_head, tokens)
    N = tokens.shape[0]
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type {loss_type!r} is not one of {LOSS_TYPES}")
    if loss_type == "dr_grpo" and not max_tokens:
        raise ValueError("loss_type 'dr_grpo' divides by max_tokens: give max_tokens")
    if kl_coef and ref_logprobs is None:
        raise ValueError(f"kl_coef is {kl_coef}: give ref_logprobs")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
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
    if sequence.is_floating_point():
        raise ValueError(f"sequence must be integers, got {sequence.dtype}")
    if advantages is not None and advantages.shape != rewards.shape:
        raise ValueError(f"advantages must be {list(rewards.shape)} like rewards, got {list(advantages.shape)}")
    S = rewards.numel()
    wide = wide_dtype(hidden.dtype)
    with torch.no_grad():
        A = advantages if advantages is not None else _advantages(rewards, advantage, reward_std)
        flat = (rewards.amax(1) == rewards.amin(1)) if S else rewards.new_zeros(0)
        counts = [
            _at_least_one(own if given is None else given, wide, hidden.device)
            for given, own in ((token_count, N), (sequence_count, S))
        ]
    grads = torch.is_grad_enabled()
    loss, logprobs, entropy, numbers, _, _ = torch.ops.sslr1.grpo_loss(
        hidden,
        lm_head,
        tokens,
        sequence.to(torch.int64),
        A.detach().reshape(-1).to(wide),
        *(None if x is None else x.detach().to(wide) for x in (old_logprobs, ref_logprobs, token_weights)),
        *counts,
        temperature,
        loss_type,
        clip_low,
        clip_high,
        kl_coef,
        entropy_coef,
        max_tokens or 0,
        backend,
        chunk or 0,
        grads and hidden.requires_grad,
        grads and lm_head.requires_grad,
    )
    stats = dict(zip(STATS, numbers.detach().unbind()))
    stats["zero_variance"] = flat.to(wide).sum() * (rewards.shape[1] / counts[1])
    return GrpoLoss(loss, logprobs.detach(), entropy.detach(), stats)


_advantages = advantages  # grpo_loss has an argument of that name


def _at_least_one(count, dtype, device):
    """A count as a 0-d tensor; a number is written there by the device, which a copy from the host would have to wait for."""
    if isinstance(count, torch.Tensor):
        return count.to(device, dtype).clamp(min=1)
    return torch.full((), max(1, count), dtype=dtype, device=device)


def _check_rows(hidden, lm_head, tokens):
    if hidden.ndim != 2 or lm_head.ndim != 2 or hidden.shape[1] != lm_head.shape[1]:
        raise ValueError(
            f"hidden must be [N, D] and lm_head [V, D], got {list(hidden.shape)} and {list(lm_head.shape)}"
        )
    if hidden.dtype != lm_head.dtype or not hidden.is_floating_point():
        raise ValueError(f"hidden and lm_head must have one floating dtype, got {hidden.dtype} and {lm_head.dtype}")
    if tokens.shape != hidden.shape[:1] or tokens.dtype != torch.int64:
        raise ValueError(f"tokens must be int64 [{hidden.shape[0]}], got {tokens.dtype} {list(tokens.shape)}")


def _check_values(tokens, V, sequence=None, S=0):
    if tokens.is_cuda or not len(tokens):  # on a GPU these checks would stall the stream
        return
    if int(tokens.min()) < 0 or int(tokens.max()) >= V:
        raise ValueError(f"tokens must lie in [0, {V})")
    if sequence is not None:
        if int(sequence[0]) < 0 or int(sequence[-1]) >= S or bool((sequence.diff() < 0).any()):
            raise ValueError(f"sequence must be non-decreasing and in [0, {S})")


# ---- the operation


@torch.no_grad()
def _token_logprobs(hidden, lm_head, tokens, temperature, backend, chunk):
    _check_values(tokens, len(lm_head))
    chunks = Chunks(hidden, lm_head, tokens, temperature, backend, chunk)
    chunks.statistics(torch.arange(len(tokens), device=tokens.device))
    return chunks.logprobs, chunks.entropy


@torch.no_grad()
def _grpo_loss(
    hidden,
    lm_head,
    tokens,
    sequence,
    advantage,
    old,
    ref,
    weights,
    token_count,
    sequence_count,
    temperature,
    loss_type,
    clip_low,
    clip_high,
    kl_coef,
    entropy_coef,
    max_tokens,
    backend,
    chunk,
    wants_hidden,
    wants_head,
):
    N, S = len(tokens), len(advantage)
    _check_values(tokens, len(lm_head), sequence, S)
    chunks = Chunks(hidden, lm_head, tokens, temperature, backend, chunk)
    wide = chunks.wide
    weights = torch.ones(N, dtype=wide, device=hidden.device) if weights is None else weights
    lengths = torch.zeros(S, dtype=torch.int64, device=hidden.device).index_add_(0, sequence, torch.ones_like(sequence))

    def mean(values):
        """Mean over each completion, at each of its tokens. Not index_add, which sums floats in any order on a GPU."""
        sums = torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True)
        return (sums / lengths)[sequence]

    A = advantage[sequence]
    if loss_type in ("dapo", "cispo"):
        scale = (1 / token_count).expand(N)
    elif loss_type == "dr_grpo":
        scale = (1 / (sequence_count * max_tokens)).expand(N)
    else:
        scale = 1 / (sequence_count * lengths[sequence])
    columns = {
        "advantage": A,
        # the one ratio of a completion moves with each of its tokens, for all of them
        "policy": scale * (mean(weights) if loss_type == "gspo" else weights),
        "kl": scale * kl_coef,
        "bonus": scale * entropy_coef,
        "old": old,
        "ref": ref if kl_coef else None,
    }
    clip = {"clip_low": clip_low, "clip_high": clip_high, "cispo": loss_type == "cispo"}
    grad_hidden = torch.zeros_like(hidden) if wants_hidden else hidden.new_empty(0)
    grad_head = torch.zeros_like(lm_head, dtype=wide) if wants_head else hidden.new_empty(0, dtype=wide)

    def gradients(index, logits):
        slopes = logits if chunks.slopes is None else chunks.slopes
        if wants_hidden:
            grad_hidden[index] = chunked.product(slopes, chunks.weight, wide)[: len(index)].to(hidden.dtype)
        if wants_head:
            chunked.add_product(grad_head, slopes.T, chunks.states)

    numbers = torch.arange(N, device=hidden.device)
    moves = torch.full((N,), wants_hidden or wants_head, device=hidden.device)
    if not (kl_coef or entropy_coef):
        moves &= A * columns["policy"] != 0
    active, idle, longer = numbers[moves], numbers[~moves], 0
    if loss_type == "gspo" and old is not None:
        # The ratio needs all log-probs of a completion before any of its gradients: chunks are cut between completions
        for part in _whole_completions(sequence[active], chunks.height):
            part = active[part]
            fits = len(part) <= chunks.height
            if not fits:  # a pass for its log-probs first
                longer += len(part)
                chunks.statistics(part)
            for index, picked, logits in chunks.over(part):
                if fits:
                    chunks.note(index, rows.row_logprobs(logits, picked, temperature, chunks.backend))
                # in float64, or differences would round ratios by 1e-5; of other completions it may be anything yet
                shift = mean(chunks.logprobs.double() - old)
                own = {name: None if x is None else x[index] for name, x in columns.items()}
                now = chunks.logprobs[index].double()
                own["old"] = now - shift[index]
                g = torch.zeros(chunks.height, dtype=wide, device=hidden.device)
                g[: len(index)] = rows.slope(now, rows.Coefficients(**own, **clip))
                known = [chunks.fill(x, index) for x in (chunks.logprobs, chunks.entropy)]
                bonus = chunks.fill(columns["bonus"], index)
                rows.row_gradient(logits, picked, *known, g, bonus, temperature, chunks.backend, chunks.slopes)
                gradients(index, logits)
    else:
        for index, picked, logits in chunks.over(active):
            filled = rows.Coefficients(**{name: chunks.fill(x, index) for name, x in columns.items()}, **clip)
            chunks.note(index, rows.row_loss(logits, picked, filled, temperature, chunks.backend, chunks.slopes))
            gradients(index, logits)
    chunks.statistics(idle)

    # of N numbers each, so float64 costs nothing and cancellation does no harm
    logprobs, entropy, A, scale, weights = (x.double() for x in (chunks.logprobs, chunks.entropy, A, scale, weights))
    log_ratio = logprobs - (logprobs if old is None else old)
    ratio = (mean(log_ratio) if loss_type == "gspo" else log_ratio).exp()
    low, high = (ratio < 1 - clip_low) & (A < 0), (ratio > 1 + clip_high) & (A > 0)
    if loss_type == "cispo":  # clamps every ratio above its bound; the others only where the gradient would grow it
        low, high = torch.zeros_like(low), ratio > 1 + clip_high
        terms = -weights * ratio.clamp(max=1 + clip_high) * A * logprobs
    else:
        terms = -weights * torch.minimum(ratio * A, ratio.clamp(1 - clip_low, 1 + clip_high) * A)
    kl = torch.zeros_like(logprobs) if ref is None else torch.expm1(ref - logprobs) - (ref - logprobs)
    policy_loss = (terms * scale).sum()
    loss = policy_loss + kl_coef * (kl * scale).sum() - entropy_coef * (entropy * scale).sum()
    extremes = (ratio.min(), ratio.max()) if N else (ratio.new_ones(()),) * 2
    means = (x.double().sum() / token_count for x in (kl, entropy, low, high, ratio))
    stats = torch.stack([policy_loss, *means, *extremes, longer / token_count])
    return loss.to(wide), chunks.logprobs, chunks.entropy, stats.to(wide), grad_hidden, grad_head.to(lm_head.dtype)


def _whole_completions(sequence, height) -> list:
    """Slices of [N] rows that end between completions: as many as `height` rows hold, or a single longer one."""
    slices, start, end = [], 0, 0
    for n in sequence.unique_consecutive(return_counts=True)[1].tolist():
        if end > start and end + n - start > height:
            slices.append(slice(start, end))
            start = end
        end += n
    return [*slices, slice(start, end)] if end > start else slices


_library = torch.library.Library("sslr1", "FRAGMENT")
_ROWS = "Tensor hidden, Tensor lm_head, Tensor tokens"
_library.define(f"token_logprobs({_ROWS}, float temperature, str backend, int chunk) -> (Tensor, Tensor)")
_library.define(
    f"grpo_loss({_ROWS}, Tensor sequence, Tensor advantage, Tensor? old, Tensor? ref, Tensor? weights, Tensor token_count, "
    "Tensor sequence_count, float temperature, str loss_type, float clip_low, float clip_high, float kl_coef, "
    "float entropy_coef, int max_tokens, str backend, int chunk, bool wants_hidden, bool wants_head) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.impl("token_logprobs", _token_logprobs, "CompositeExplicitAutograd")
_library.impl("grpo_loss", _grpo_loss, "CompositeExplicitAutograd")


@torch.library.register_fake("sslr1::token_logprobs")
def _(hidden, lm_head, tokens, temperature, backend, chunk):
    return tuple(hidden.new_empty(len(tokens), dtype=wide_dtype(hidden.dtype)) for _ in range(2))


@torch.library.register_fake("sslr1::grpo_loss")
def _(hidden, lm_head, tokens, *rest):
    wide, (wants_hidden, wants_head) = wide_dtype(hidden.dtype), rest[-2:]
    each = [hidden.new_empty(shape, dtype=wide) for shape in ((), (len(tokens),), (len(tokens),), (len(STATS),))]
    return (
        *each,
        torch.empty_like(hidden) if wants_hidden else hidden.new_empty(0),
        torch.empty_like(lm_head) if wants_head else hidden.new_empty(0, dtype=lm_head.dtype),
    )


def _setup(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros of the size of `output`, for nothing
    ctx.gradients = output[-2:]  # not saved tensors: those stay until the graph goes, and a parameter would get a copy


def _backward(ctx, grad_loss, *_):
    if torch.is_grad_enabled():
        raise RuntimeError("grpo_loss has no second derivative: its gradients are formed in the forward pass")
    if ctx.gradients is None:
        raise RuntimeError(
            "grpo_loss hands its gradients out once, to spare a copy of them: call it again for a second backward"
        )
    gradients, ctx.gradients = ctx.gradients, None
    if all(type(g) is torch.Tensor for g in gradients):
        scaled = [g.mul_(grad_loss) if g.ndim == 2 else None for g in gradients]
    else:  # in a graph that is being traced, outputs can't change
        scaled = [g * grad_loss if g.ndim == 2 else None for g in gradients]
    return *scaled, *[None] * 19


torch.library.register_autograd("sslr1::grpo_loss", _backward, setup_context=_setup)
