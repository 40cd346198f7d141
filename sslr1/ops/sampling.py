"""Drawing tokens from logits by a two-level inverse CDF, one keyed uniform a row, with the log-prob of what was drawn.

With x = logits / temperature and m the largest x that may be drawn, e^(x - m) is summed over blocks of tokens; the
row's uniform times the total picks a block by the blocks' cumulative sums, and what remains picks a token inside that
block. A token whose e^(x - m) is 0 is never drawn: where rounding pushes the target past the end, the last token of
positive mass is.

The log-prob is the learner's own quantity: log softmax(logits / temperature)[token] over the whole vocabulary.
Suppression, top-k and top-p restrict the draw only.

Everything about a row depends on that row and its key alone, bit for bit. Sums here are therefore elementwise additions
in an order that the length fixes; torch's own sums and scans pick theirs by the number of rows too, on a GPU at least.

`sample` is also torch.ops.sslr1.sample. Backends: this file's reference, csrc/draw.cpp and kernels/triton/sample.py.
"""

import torch
import torch.nn.functional as F

from sslr1.ops import backends, transfer
from sslr1.ops.keys import uniform

BLOCK = 1024  # tokens whose sum is one entry of the upper level
CHUNK = 1 << 19  # logits worked on at a time: on a CPU what is made of them in between stays in the cache
CUDA_CHUNK = 1 << 24  # there it only bounds the memory


def sample(logits, key, *, temperature=1.0, top_p=1.0, top_k=0, suppress=None, repeats=1, backend="auto"):
    """Draw one token a row, or `repeats` of them, each with a key of its own and as if it had a row of its own.

    logits [B, V] floating, key [B * repeats] int64 (a hash of what names the draw; a row's stand together), suppress:
    1-D int64 tensor of ids that are never drawn, or None. top_k 0 and top_p 1 are off; top-k keeps exactly k tokens
    (ties: lower ids first), top-p the smallest set whose probability reaches p, computed after suppression and top-k.
    temperature 0 takes the largest logit that is allowed, and its log-prob is that at temperature 1.

    backend: "reference" (plain PyTorch; float64 logits are computed in float64, others in float32), "cpp" (CPU
    tensors, float32 without top-k and top-p), "triton" (CUDA tensors, or CPU ones in Triton's interpreter; not for
    float64), or "auto": the fastest that can run.

    Returns (tokens int64, logprobs float32), as many as keys. A row depends on nothing but itself and its key. A row
    that holds NaN or +inf, or no drawable token, gets log-prob NaN and some id below V: callers look at it when they
    next look at the device at all. Raises ValueError for arguments that don't fit; ids in `suppress` are checked where
    they lie on the CPU.
    """
    if logits.ndim != 2 or not logits.shape[1]:
        raise ValueError(f"logits must be [B, V] with V >= 1, got shape {tuple(logits.shape)}")
    if not logits.is_floating_point():
        raise ValueError(f"logits must be floating, got {logits.dtype}")
    if repeats < 1 or key.shape != (len(logits) * repeats,) or key.dtype != torch.int64:
        raise ValueError(f"key must be int64 [{len(logits) * repeats}], got {key.dtype} {tuple(key.shape)}")
    if not temperature >= 0 or not 0 < top_p <= 1 or top_k < 0:
        raise ValueError(f"need temperature >= 0, 0 < top_p <= 1, top_k >= 0; got {temperature}, {top_p}, {top_k}")
    if suppress is not None:
        if suppress.ndim != 1 or suppress.dtype != torch.int64:
            raise ValueError(f"suppress must be 1-D int64, got {suppress.dtype} {tuple(suppress.shape)}")
        if not suppress.numel():
            suppress = None
        elif suppress.device.type == "cpu" and not 0 <= suppress.min() <= suppress.max() < logits.shape[1]:
            lowest, highest = suppress.min().item(), suppress.max().item()
            raise ValueError(
                f"suppress holds ids from {lowest} to {highest}, the logits have {logits.shape[1]} columns"
            )
    return torch.ops.sslr1.sample(
        logits,
        key,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        suppress=suppress,
        backend=backend,
        repeats=repeats,
    )


def _op_sample(logits, key, *, temperature, top_p, top_k, suppress, backend, repeats=1):
    unfit = "samples in float32, the logits are float64: use 'reference'" if logits.dtype == torch.float64 else None
    B, V = logits.shape
    if temperature == 0:
        top_k, top_p = 0, 1.0
    top_k = top_k if top_k < V else 0
    if logits.device.type == "cpu" and backend in ("auto", "cpp"):
        wanted = logits.dtype == torch.float32 and top_k == 0 and top_p == 1
        unfit = unfit if wanted else "takes float32 without top-k and top-p: use 'reference'"
    backend = backends.choose("sample", backend, logits.device, ("triton", "cpp"), unfit)
    if suppress is not None:
        suppress = transfer.upload(suppress, logits.device, "tables")
    restricted = top_k > 0 or top_p < 1
    if backend == "cpp":
        return _cpp(logits, uniform(key), suppress, temperature, repeats)
    height = max(1, (CUDA_CHUNK if logits.device.type == "cuda" else CHUNK) // V)
    chunks = [slice(i, i + height) for i in range(0, B, height)]
    if backend == "triton":
        from sslr1.kernels import sample as kernel

        if restricted:
            allowed = torch.empty_like(logits, memory_format=torch.contiguous_format)
            for rows in chunks:
                allowed[rows] = _restrict(logits[rows], temperature, top_p, top_k, suppress)
            return kernel.sample(logits, allowed, None, key, temperature, repeats)
        mask = None if suppress is None else logits.new_zeros(V, dtype=torch.uint8).index_fill_(0, suppress, 1)
        return kernel.sample(logits, logits, mask, key, temperature, repeats)
    u = uniform(key)
    tokens = torch.empty_like(key)
    logprobs = torch.empty_like(key, dtype=torch.float32)
    aside = None if suppress is None else suppress.sort().values
    for rows in chunks:
        allowed = _restrict(logits[rows], temperature, top_p, top_k, suppress) if restricted else None
        for i in range(repeats):
            mine = slice(rows.start * repeats + i, rows.stop * repeats, repeats)
            tokens[mine], logprobs[mine] = _reference(logits[rows], allowed, aside, u[mine, None], temperature)
    return tokens, logprobs


def _cpp(logits, u, suppress, temperature, repeats):
    B, V = logits.shape
    tokens, logprobs = torch.empty_like(u, dtype=torch.int64), torch.empty_like(u, dtype=torch.float32)
    aside = None if suppress is None else torch.zeros(V, dtype=torch.uint8).index_fill_(0, suppress, 1)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    if repeats > 1:  # a row at a time, which lies 0 apart from itself
        parts = [(logits[i], *(x[i * repeats : (i + 1) * repeats] for x in (u, tokens, logprobs))) for i in range(B)]
        calls = [((row, u, aside, t, p), repeats, 0) for row, u, t, p in parts]
    else:
        calls = [((logits, u, aside, tokens, logprobs), B, logits.stride(0))]
    for tensors, count, stride in calls:
        addresses = [0 if x is None else x.data_ptr() for x in tensors]
        backends._C.draw(*addresses, count, V, stride, temperature, torch.get_num_threads())
    return tokens, logprobs


def _fake_sample(logits, key, **options):
    return torch.empty_like(key), torch.empty_like(key, dtype=torch.float32)


backends.register(
    "sample(Tensor logits, Tensor key, *, float temperature, float top_p, int top_k, Tensor? suppress, str backend, "
    "int repeats=1) -> (Tensor, Tensor)",
    _op_sample,
    _fake_sample,
)


def _reference(logits, allowed, aside, u, temperature):
    """Tokens and log-probs [b] of logits [b, V] for uniforms [b, 1]. What may be drawn is `allowed` [b, V], the logits
    with -inf elsewhere, or where that is None all ids but the sorted ones in `aside` (or None).

    The vocabulary's sum is that of the draw plus that of what was left out, so one exponential a logit does for both.
    """
    x = _scaled(logits, temperature)
    if allowed is not None:
        out = x.masked_fill(allowed > -torch.inf, -torch.inf)
        x = _scaled(allowed, temperature)
    elif aside is not None:
        again = F.pad(aside[1:] == aside[:-1], (1, 0))
        out = x[:, aside].masked_fill(again, -torch.inf)  # each id once
        x = x.index_fill(1, aside, -torch.inf)
    else:
        out = None
    top = x.amax(-1, keepdim=True)
    tokens, total = _invert((x - top).exp_(), u)
    if temperature == 0:
        tokens = x.argmax(-1, keepdim=True)
    whole = top
    if out is not None:
        whole = torch.maximum(top, out.amax(-1, keepdim=True))
        total = total * (top - whole).double().exp() + _sum((out - whole).exp_().double())
    logprobs = (x.gather(-1, tokens) - whole).double() - total.log()
    fine = top.isfinite() & whole.isfinite()  # maxima of a row that holds NaN are NaN
    return tokens[:, 0], logprobs.masked_fill(~fine, torch.nan)[:, 0].float()


def _scaled(logits, temperature):
    x = logits if logits.dtype == torch.float64 else logits.float()
    return x if temperature in (0, 1) else x / temperature


def _restrict(logits, temperature, top_p, top_k, suppress):
    """The logits [b, V], -inf for what suppression, top-k and top-p exclude."""
    if suppress is not None:
        logits = logits.index_fill(-1, suppress, -torch.inf)
    ranked = logits.topk(top_k).values if top_k else logits.sort(descending=True).values
    last = ranked.shape[1] - 1
    if top_p < 1:
        p = ((ranked.double() - ranked[:, :1].double()) / temperature).exp_()
        last = _invert(p, top_p, reach=True)[0]
    else:
        last = ranked.new_full((len(ranked), 1), last, dtype=torch.int64)
    least = ranked.gather(-1, last)
    above, level = logits > least, logits == least
    room = last + 1 - above.sum(-1, keepdim=True)
    keep = above | (level & (level.cumsum(-1, dtype=torch.int32) <= room))  # lower ids first
    return logits.masked_fill(~keep, -torch.inf)


def _invert(weights, fraction, reach=False):
    """First column of each row of `weights` [b, n] whose cumulative sum exceeds (`reach`: reaches) `fraction` of the
    row's total, and that total, float64: both [b, 1]. A column of weight 0 is never the answer, unless all are."""
    b, n = weights.shape
    block = min(BLOCK, 1 << (n - 1).bit_length())
    if n % block:
        weights = F.pad(weights, (0, -n % block))
    weights = weights.reshape(b, -1, block)
    sums = _sum(weights.double())[..., 0]
    cdf = F.pad(_cumsum(sums), (1, 0))
    target = fraction * cdf[:, -1:]
    chosen = _first(cdf[:, 1:], sums, target, reach)
    inside = weights.gather(1, chosen[..., None].expand(-1, -1, block))[:, 0].double()
    lane = _first(_cumsum(inside), inside, target - cdf.gather(1, chosen), reach)
    return (chosen * block + lane).clamp_(max=n - 1), cdf[:, -1:]


def _first(cdf, weights, target, reach):
    solid = weights > 0
    hit = solid & (cdf >= target if reach else cdf > target)
    last = weights.shape[1] - 1 - solid.flip(-1).byte().argmax(-1, keepdim=True)
    return torch.where(hit.any(-1, keepdim=True), hit.byte().argmax(-1, keepdim=True), last)


def _sum(x):
    """Sum over the last dimension, kept, by halves."""
    while (n := x.shape[-1]) > 1:
        halves = x[..., : n // 2] + x[..., n // 2 : n // 2 * 2]
        x = torch.cat([halves, x[..., -1:]], -1) if n % 2 else halves
    return x


def _cumsum(x):
    """Cumulative sum over the last dimension, by doubling."""
    step = 1
    while step < x.shape[-1]:
        x = torch.cat([x[..., :step], x[..., step:] + x[..., :-step]], -1)
        step *= 2
    return x
