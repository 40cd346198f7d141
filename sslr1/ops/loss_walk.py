"""The operation behind `grpo_loss`: what a loss type makes of each row, the walk over chunks of rows, the statistics.

torch.ops.sslr1.grpo_loss gives (loss, log-probs [N], entropies [N], statistics, gradient of hidden, gradient of
lm_head): the gradients are formed with the loss, and the backward pass only scales them. torch.ops.sslr1.token_logprobs
is the walk alone.
"""

from dataclasses import dataclass, replace

import torch

from sslr1.ops import backends
from sslr1.ops import chunks as chunked
from sslr1.ops import row_loss as rows
from sslr1.ops.chunks import Chunks, wide_dtype

STATS = ("policy_loss", "kl", "entropy", "clip_low", "clip_high", "ratio_mean", "ratio_min", "ratio_max", "prepass")


class Completions:
    """Which completion each of N rows belongs to: sequence int64 [N], non-decreasing, in [0, count)."""

    def __init__(self, sequence, count):
        self.sequence = sequence
        self.lengths = torch.zeros(count, dtype=torch.int64, device=sequence.device)
        self.lengths.index_add_(0, sequence, torch.ones_like(sequence))

    def mean(self, values):
        """Mean over each completion, at each of its rows. Not index_add, which sums floats in any order on a GPU."""
        sums = torch.segment_reduce(values, "sum", lengths=self.lengths, unsafe=True)
        return (sums / self.lengths)[self.sequence]

    def runs(self, chosen, height) -> list:
        """The rows `chosen`, in order, cut between completions: as many as fit `height`, or a single longer one."""
        cuts, start, end = [], 0, 0
        for n in self.sequence[chosen].unique_consecutive(return_counts=True)[1].tolist():
            if end > start and end + n - start > height:
                cuts.append(chosen[start:end])
                start = end
            end += n
        return [*cuts, chosen[start:end]] if end > start else cuts


@dataclass(kw_only=True)
class Objective:
    """What is minimised: the row kernel's coefficients of all rows, `grpo_loss`'s numbers, and of each row, [N], its
    policy term's weight, the log-prob `ref` (or None), and `scale`, what the loss type multiplies it by."""

    c: rows.Coefficients
    kl_coef: float
    entropy_coef: float
    weights: torch.Tensor
    ref: torch.Tensor | None
    scale: torch.Tensor
    one_ratio: bool  # of a completion (gspo), not one of each row


def _scale(loss_type, completions, token_count, sequence_count, max_tokens):
    """What a loss type multiplies each row by, [N]."""
    N = len(completions.sequence)
    if loss_type in ("dapo", "cispo"):
        return (1 / token_count).expand(N)
    if loss_type == "dr_grpo":
        return (1 / (sequence_count * max_tokens)).expand(N)
    return 1 / (sequence_count * completions.lengths[completions.sequence])


class Gradients:
    """d loss / d hidden and d loss / d lm_head, added up chunk by chunk; empty where they aren't wanted."""

    def __init__(self, chunks, hidden, lm_head, wants_hidden, wants_head):
        self.chunks, self.wants_hidden, self.wants_head = chunks, wants_hidden, wants_head
        wide = chunks.wide
        self.hidden = torch.zeros_like(hidden) if wants_hidden else hidden.new_empty(0)
        self.head = torch.zeros_like(lm_head, dtype=wide) if wants_head else hidden.new_empty(0, dtype=wide)

    def add(self, index, logits):
        """Those of rows `index`, whose logits have become their own gradient (or whose slopes the chunk holds)."""
        chunks = self.chunks
        slopes = logits if chunks.slopes is None else chunks.slopes
        if self.wants_hidden:
            self.hidden[index] = chunked.product(slopes, chunks.weight, chunks.wide)[: len(index)].to(self.hidden.dtype)
        if self.wants_head:
            chunked.add_product(self.head, slopes.T, chunks.states)


def _walk(chunks, active, c, gradients):
    """Log-probs, entropies and gradients of the rows `active`, one look at each chunk's logits."""
    for index, picked, logits in chunks.over(active):
        filled = c.each(lambda x: chunks.fill(x, index))
        found = rows.row_loss(logits, picked, filled, chunks.temperature, chunks.backend, chunks.slopes)
        chunks.note(index, found)
        gradients.add(index, logits)


def _walk_completions(chunks, active, c, gradients, completions) -> int:
    """The same where a row's ratio needs all log-probs of its completion before any of its gradients (gspo,
    off-policy): chunks are cut between completions. Returns how many rows took a pass for their log-probs first, their
    completion being longer than a chunk."""
    longer = 0
    for part in completions.runs(active, chunks.height):
        fits = len(part) <= chunks.height
        if not fits:
            longer += len(part)
            chunks.statistics(part)
        for index, picked, logits in chunks.over(part):
            if fits:
                chunks.note(index, rows.row_logprobs(logits, picked, chunks.temperature, chunks.backend))
            # in float64, or differences would round ratios by 1e-5; of other completions it may be anything yet
            shift = completions.mean(chunks.logprobs.double() - c.old)
            own, now = c.each(lambda x: x[index]), chunks.logprobs[index].double()
            own.old = now - shift[index]
            g = torch.zeros(chunks.height, dtype=chunks.wide, device=index.device)
            g[: len(index)] = rows.slope(now, own)
            known = [chunks.fill(x, index) for x in (chunks.logprobs, chunks.entropy)]
            bonus = chunks.fill(c.bonus, index)
            rows.row_gradient(logits, picked, *known, g, bonus, chunks.temperature, chunks.backend, chunks.slopes)
            gradients.add(index, logits)
    return longer


def _totals(o, logprobs, entropy, completions, token_count, longer):
    """(loss, STATS as one vector) from all rows' log-probs and entropies. Of N numbers each, so float64 costs nothing
    and cancellation does no harm."""
    c = o.c
    logprobs, entropy, A, scale, weights = (x.double() for x in (logprobs, entropy, c.advantage, o.scale, o.weights))
    log_ratio = logprobs - (logprobs if c.old is None else c.old)
    ratio = (completions.mean(log_ratio) if o.one_ratio else log_ratio).exp()
    low, high = (ratio < 1 - c.clip_low) & (A < 0), (ratio > 1 + c.clip_high) & (A > 0)
    if c.cispo:  # clamps every ratio above its bound; the others only where the gradient would grow it
        low, high = torch.zeros_like(low), ratio > 1 + c.clip_high
    nothing = torch.zeros_like(logprobs)
    _, terms = rows.policy_slope_and_term(logprobs, ratio, replace(c, advantage=A, policy=weights))
    kl = nothing if o.ref is None else torch.expm1(o.ref - logprobs) - (o.ref - logprobs)
    policy_loss = (terms * scale).sum()
    loss = policy_loss + o.kl_coef * (kl * scale).sum() - o.entropy_coef * (entropy * scale).sum()
    extremes = (ratio.min(), ratio.max()) if len(ratio) else (ratio.new_ones(()),) * 2
    means = (x.double().sum() / token_count for x in (kl, entropy, low, high, ratio))
    return loss, torch.stack([policy_loss, *means, *extremes, longer / token_count])


@torch.no_grad()
def _grpo_loss(hidden, lm_head, tokens, sequence, advantage, old, ref, weights, *numbers):
    token_count, sequence_count, temperature, loss_type, clip_low, clip_high, kl_coef, entropy_coef, *rest = numbers
    max_tokens, backend, chunk, wants_hidden, wants_head = rest
    _check_values(tokens, len(lm_head), sequence, len(advantage))
    chunks = Chunks(hidden, lm_head, tokens, temperature, backend, chunk)
    completions, device = Completions(sequence, len(advantage)), hidden.device
    scale = _scale(loss_type, completions, token_count, sequence_count, max_tokens)
    weights = torch.ones(len(tokens), dtype=chunks.wide, device=device) if weights is None else weights
    # gspo: the one ratio of a completion moves with each of its tokens, for all of them
    c = rows.Coefficients(
        advantage=advantage[sequence],
        policy=scale * (completions.mean(weights) if loss_type == "gspo" else weights),
        kl=scale * kl_coef,
        bonus=scale * entropy_coef,
        old=old,
        ref=ref if kl_coef else None,
        clip_low=clip_low,
        clip_high=clip_high,
        cispo=loss_type == "cispo",
    )
    objective = Objective(
        c=c,
        kl_coef=kl_coef,
        entropy_coef=entropy_coef,
        weights=weights,
        ref=ref,
        scale=scale,
        one_ratio=loss_type == "gspo",
    )
    gradients = Gradients(chunks, hidden, lm_head, wants_hidden, wants_head)
    numbers, longer = torch.arange(len(tokens), device=device), 0
    moves = torch.full((len(tokens),), wants_hidden or wants_head, device=device)
    if not (kl_coef or entropy_coef):
        moves &= c.advantage * c.policy != 0
    if loss_type == "gspo" and old is not None:
        longer = _walk_completions(chunks, numbers[moves], c, gradients, completions)
    else:
        _walk(chunks, numbers[moves], c, gradients)
    chunks.statistics(numbers[~moves])
    loss, stats = _totals(objective, chunks.logprobs, chunks.entropy, completions, token_count, longer)
    grad_head = gradients.head.to(lm_head.dtype)
    return loss.to(chunks.wide), chunks.logprobs, chunks.entropy, stats.to(chunks.wide), gradients.hidden, grad_head


@torch.no_grad()
def _token_logprobs(hidden, lm_head, tokens, temperature, backend, chunk):
    _check_values(tokens, len(lm_head))
    chunks = Chunks(hidden, lm_head, tokens, temperature, backend, chunk)
    chunks.statistics(torch.arange(len(tokens), device=tokens.device))
    return chunks.logprobs, chunks.entropy


def _check_values(tokens, V, sequence=None, S=0):
    if tokens.is_cuda or not len(tokens):  # on a GPU these checks would stall the stream
        return
    if int(tokens.min()) < 0 or int(tokens.max()) >= V:
        raise ValueError(f"tokens must lie in [0, {V})")
    if sequence is not None:
        if int(sequence[0]) < 0 or int(sequence[-1]) >= S or bool((sequence.diff() < 0).any()):
            raise ValueError(f"sequence must be non-decreasing and in [0, {S})")


def _fake_token_logprobs(hidden, lm_head, tokens, temperature, backend, chunk):
    return tuple(hidden.new_empty(len(tokens), dtype=wide_dtype(hidden.dtype)) for _ in range(2))


def _fake_grpo_loss(hidden, lm_head, tokens, *rest):
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
    ctx.others = [None] * (len(inputs) - 2)


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
    return *scaled, *ctx.others


_ROWS = "Tensor hidden, Tensor lm_head, Tensor tokens"
backends.register(
    f"token_logprobs({_ROWS}, float temperature, str backend, int chunk) -> (Tensor, Tensor)",
    _token_logprobs,
    _fake_token_logprobs,
)
backends.register(
    f"grpo_loss({_ROWS}, Tensor sequence, Tensor advantage, Tensor? old, Tensor? ref, Tensor? weights, "
    "Tensor token_count, Tensor sequence_count, float temperature, str loss_type, float clip_low, float clip_high, "
    "float kl_coef, float entropy_coef, int max_tokens, str backend, int chunk, bool wants_hidden, bool wants_head) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _grpo_loss,
    _fake_grpo_loss,
    _backward,
    _setup,
)
