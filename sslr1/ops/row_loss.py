"""One row of logits in, its log-prob, entropy and gradient out: the kernel under `grpo_loss` and `token_logprobs`.

With x = logits / temperature, lse = log sum e^x, p = e^(x - lse), for the row's token k:

    logp = x_k - lse          (never above 0)          H = -sum p (x - lse)
    d loss / d logits_j = (g ([j = k] - p_j) + bonus p_j (log p_j + H)) / temperature,

where g = d loss / d logp comes from the row's coefficients (all float32 [n] unless the logits are float64):

    ratio = e^(logp - old), or 1 where `old` is None
    clip:   g = -policy * advantage * ratio, or 0 where clamp(ratio, 1 - clip_low, 1 + clip_high) * advantage is less
            than ratio * advantage
    cispo:  g = -policy * advantage * min(ratio, 1 + clip_high)
    with `ref`: g += kl * (1 - e^(ref - logp)).

A row that holds NaN or +inf gets NaN everywhere. A logit of -inf has p = 0 and gradient 0.

Backends: "reference" (plain PyTorch, float64 too), "cpp" (csrc/row_loss.cpp), "triton" (kernels/triton/row_loss.py),
"cuda" (csrc/cuda/row_loss.cu).
"""

from dataclasses import KW_ONLY, dataclass, replace

import torch

from sslr1.ops import backends


@dataclass
class Coefficients:
    """What turns a row's log-prob into its gradient; tensors [n]. `old`, `ref`: log-probs, or None: on-policy, no
    KL."""

    advantage: torch.Tensor
    policy: torch.Tensor
    kl: torch.Tensor
    bonus: torch.Tensor
    _: KW_ONLY
    old: torch.Tensor | None = None
    ref: torch.Tensor | None = None
    clip_low: float = 0.2
    clip_high: float = 0.2
    cispo: bool = False

    def each(self, function):
        """The same with `function` of each tensor in its place."""
        tensors = {name: x for name, x in vars(self).items() if isinstance(x, torch.Tensor)}
        return replace(self, **{name: function(x) for name, x in tensors.items()})


def row_logprobs(logits, tokens, temperature, backend):
    """logits [n, V] float32 or float64, rows contiguous, tokens int64 [n] -> (logprobs, entropy) [n]. Logits stay."""
    if backend == "reference":
        return tuple(x.to(logits.dtype) for x in _statistics(logits, tokens, temperature)[:2])
    return _launch(backend, logits, logits, tokens, temperature)


def row_loss(logits, tokens, coefficients, temperature, backend, out=None):
    """The same, and writes d loss / d logits to `out` [n, V] (bfloat16, or the logits' dtype; None: over the
    logits)."""
    out = logits if out is None else out
    if backend == "reference":
        logprobs, entropy, all_logprobs = _statistics(logits, tokens, temperature)
        g = slope(logprobs, coefficients)
        _gradient(out, tokens, all_logprobs, entropy, g, coefficients.bonus, temperature)
        return logprobs.to(logits.dtype), entropy.to(logits.dtype)
    return _launch(backend, logits, out, tokens, temperature, coefficients)


def row_gradient(logits, tokens, logprobs, entropy, g, bonus, temperature, backend, out=None):
    """Write d loss / d logits, where log-probs, entropy and g = d loss / d logp [n] are known already. A token whose
    logit is -inf makes the row NaN."""
    out = logits if out is None else out
    if backend == "reference":
        all_logprobs = (logits.double() / temperature).log_softmax(-1)
        _gradient(out, tokens, all_logprobs, entropy, g, bonus, temperature)
    else:
        _launch(backend, logits, out, tokens, temperature, known=(logprobs, entropy), g=g, bonus=bonus)


def slope(logprobs, c):
    """d loss / d logp of each row, [n]."""
    ratio = torch.ones_like(logprobs) if c.old is None else (logprobs - c.old).exp()
    g, _ = policy_slope_and_term(logprobs, ratio, c)
    if c.ref is not None:
        g = g - c.kl * torch.expm1(c.ref - logprobs)
    return g


def policy_slope_and_term(logprobs, ratio, c):
    """(slope, term), [n] each: the policy term of each row, weighted by c.policy, and its slope by the row's
    log-prob."""
    if c.cispo:
        g = -c.policy * c.advantage * ratio.clamp(max=1 + c.clip_high)
        return g, g * logprobs
    free, clipped = ratio * c.advantage, ratio.clamp(1 - c.clip_low, 1 + c.clip_high) * c.advantage
    slope = torch.where(free > clipped, 0.0, -c.policy * free)  # NaN is not greater
    return slope, -c.policy * torch.minimum(free, clipped)


def _statistics(logits, tokens, temperature):
    # in float32, 1 - p of a likely token would be rounding, and of a ratio e^(logp - old) 1e-5 would be
    all_logprobs = (logits.double() / temperature).log_softmax(-1)
    entropy = -torch.where(all_logprobs > -torch.inf, all_logprobs.exp() * all_logprobs, 0.0).sum(-1)
    broken = all_logprobs.isnan().any(-1)
    nan = all_logprobs.new_full((), torch.nan)
    logprobs = all_logprobs.gather(-1, tokens[:, None])[:, 0]
    return torch.where(broken, nan, logprobs), torch.where(broken, nan, entropy), all_logprobs


def _gradient(out, tokens, all_logprobs, entropy, g, bonus, temperature):
    p = all_logprobs.exp()
    surprise = torch.where(all_logprobs > -torch.inf, all_logprobs + entropy[:, None], 0.0)
    gradient = p * (bonus[:, None] * surprise - g[:, None])
    gradient.scatter_add_(1, tokens[:, None], g[:, None].to(p.dtype))
    out.copy_(gradient / temperature)


def choose_backend(backend, dtype, device) -> str:
    """What `backend` means for logits of `dtype` on `device`: "auto" is the fastest that can run. Or raises
    ValueError."""
    unfit = None if dtype == torch.float32 else f"computes in float32, not in {dtype}"
    return backends.choose("the row loss", backend, device, ("cuda", "triton", "cpp"), unfit)


def _launch(backend, logits, out, tokens, temperature, c=None, known=None, g=None, bonus=None):
    """A kernel on every row: statistics; with coefficients `c` the gradient too; from `known` ones the gradient
    alone."""
    n, V = logits.shape
    logprobs, entropy = known or torch.empty(2, n, dtype=torch.float32, device=logits.device)
    columns, clip = (None, None, None, bonus, None, None, g), (0.0, 0.0, False)
    if c:
        columns, clip = (c.advantage, c.policy, c.kl, c.bonus, c.old, c.ref, None), (c.clip_low, c.clip_high, c.cispo)
    for x in (logprobs, entropy, *columns):
        assert x is None or (x.dtype == torch.float32 and x.is_contiguous() and x.shape == (n,))
    assert logits.dtype == torch.float32 and logits.stride(1) == out.stride(1) == 1 and tokens.is_contiguous()
    if backend == "triton":
        from sslr1.kernels import row_loss as kernel

        measure, write = known is None, bool(c or known)
        kernel.launch(logits, out, tokens, logprobs, entropy, columns, clip, temperature, measure, write)
        return logprobs, entropy
    addresses = [0 if x is None else x.data_ptr() for x in (logits, tokens, logprobs, entropy, *columns)]
    arguments = (1 if c else 2 if known else 0, *addresses, n, V, logits.stride(0), 1 / temperature, *clip)
    if backend == "cuda":
        stream = torch.cuda.current_stream(logits.device).cuda_stream
        backends._C.row_loss_cuda(*arguments, out.data_ptr(), out.stride(0), out.dtype == torch.bfloat16, stream)
    else:
        assert out is logits
        backends._C.row_loss(*arguments, torch.get_num_threads())
    return logprobs, entropy
