"""Drawing tokens from logits by inverse CDF, one keyed uniform a row, with the log-prob of what was drawn.

The log-prob is the learner's own quantity: log softmax(logits / temperature)[token] over the whole vocabulary.
Suppression, top-k and top-p restrict the draw only.
"""

import torch

from sslr1.ops.keys import uniform


def sample(logits, key, *, temperature=1.0, top_p=1.0, top_k=0, suppress=None, backend="auto"):
    """Draw one token a row.

    logits [B, V] floating, key [B] int64 (a hash of what names the draw), suppress: 1-D int64 tensor of ids that are
    never drawn, or None. top_k 0 and top_p 1 are off; top-k keeps exactly k tokens (ties: lower ids first), top-p the
    smallest set whose probability reaches p, computed after suppression and top-k. temperature 0 takes the largest
    logit that is allowed, and its log-prob is that at temperature 1.

    Returns (tokens [B] int64, logprobs [B] float32). A row depends on nothing but itself and its key. A row that holds
    NaN, or no drawable token, gets log-prob NaN: callers look at it when they next look at the device at all.
    """
    if logits.ndim != 2:
        raise ValueError(f"logits must be [B, V], got shape {tuple(logits.shape)}")
    if key.shape != logits.shape[:1] or key.dtype != torch.int64:
        raise ValueError(f"key must be int64 [{logits.shape[0]}], got {key.dtype} {tuple(key.shape)}")
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
        raise ValueError(f"need temperature >= 0, 0 < top_p <= 1, top_k >= 0; got {temperature}, {top_p}, {top_k}")
    if backend not in ("auto", "reference"):
        raise ValueError(f"sample has no backend {backend!r}; it has 'reference'")
    return _sample_reference(logits, key, temperature, top_p, top_k, suppress)


def _sample_reference(logits, key, temperature, top_p, top_k, suppress):
    scaled = logits.float() / (temperature or 1.0)
    logprobs = scaled.log_softmax(-1)
    allowed = scaled if suppress is None else scaled.index_fill(-1, suppress, float("-inf"))
    bad = scaled.isnan().any(-1) | (allowed.amax(-1) == float("-inf"))
    if temperature == 0:
        tokens = allowed.argmax(-1)
    else:
        if top_k:
            order = allowed.argsort(dim=-1, descending=True, stable=True)
            allowed = allowed.scatter(-1, order[:, top_k:], float("-inf"))
        p = allowed.double().softmax(-1)
        if top_p < 1:
            ranked, order = p.sort(dim=-1, descending=True, stable=True)
            beyond = ranked.cumsum(-1) - ranked >= top_p
            p = p.scatter(-1, order, ranked.masked_fill(beyond, 0))
        cdf = p.cumsum(-1)
        # strictly-greater search: a token of probability 0 has an empty interval and can't be drawn
        target = uniform(key)[:, None] * cdf[:, -1:]
        tokens = torch.searchsorted(cdf, target, right=True)[:, 0]
        last = logits.shape[1] - 1 - (p > 0).flip(-1).int().argmax(-1)  # rounding may push the target to the end
        tokens = torch.minimum(tokens, last)
    picked = logprobs.gather(-1, tokens[:, None])[:, 0]
    return tokens, picked.masked_fill(bad, float("nan"))
