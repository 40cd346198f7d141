"""The gated delta rule over packed groups, and one step of it for decoding: the recurrence of Qwen3.5's linear layers.

A head's state S [d_k, d_v] starts from zeros and takes in a token by

    S <- e^g S;    S <- S + k (beta (v - k^T S))^T;    out = S^T q

with g <= 0 and 0 <= beta <= 1 of that token, k of length 1 (Yang, Kautz, Hatamizadeh: "Gated Delta Networks", 2024,
eq. 10). A completion starts from its prompt's final state, the same tensor for all G of them; that state's gradient is
the sum of theirs.
"""

import torch

from sslr1.ops import delta_chunks
from sslr1.ops.delta_chunks import EPSILON
from sslr1.ops.state_layout import StateLayout


def gated_delta_rule(q, k, v, g, beta, layout, *, scale=None, l2norm=True, return_states=False, backend="auto"):
    """The gated delta rule over a packed row of groups `[prompt | c1 … cG]`; differentiable in q, k, v, g and beta.

    q, k [T, H_k, d_k], v [T, H_v, d_v], g (the decay's logarithm) and beta [T, H_v]; H_v is a multiple of H_k, and key
    head i serves value heads i * H_v / H_k and on, as in transformers. layout: a `StateLayout` of T tokens on their
    device, or what makes one. scale: of q, d_k ** -0.5 unless given. l2norm: whether q and k are divided by their
    lengths here (transformers' and fla's `use_qk_l2norm_in_kernel`).

    Returns out [T, H_v, d_v] of v's dtype, or, with return_states, (out, states [groups, H_v, d_k, d_v]): where the
    prompts end, for decoding; float32 and without gradient. Everything is computed in float32 whatever comes in, and
    for float64 in float64 (states too). Gradients have their inputs' dtypes.

    backend: "reference", token by token. Raises ValueError for shapes that don't fit and for a layout of another T.
    """
    layout = layout if isinstance(layout, StateLayout) else StateLayout(layout).to(q.device)
    _check(q, k, v, g, beta)
    if layout.tokens != len(q):
        raise ValueError(f"groups cover {layout.tokens} tokens, q has {len(q)}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if backend == "reference":
        out, states = _reference(q, k, v, g, beta, layout, scale, l2norm)
    else:
        out, states = torch.ops.sslr1.gated_delta_rule(q, k, v, g, beta, *delta_chunks.tables(layout), scale, l2norm)
        states = states.index_select(0, layout.ends) if return_states else states
    return (out, states.detach()) if return_states else out


def _check(q, k, v, g, beta):
    T, heads, d_v = v.shape
    if q.shape != k.shape or len(q) != T or heads % max(1, q.shape[1]):
        raise ValueError(
            f"q and k [{T}, H_k, d_k] with H_k that divides {heads}, the heads of v, are expected; got "
            f"{list(q.shape)} and {list(k.shape)}"
        )
    for name, x in (("g", g), ("beta", beta)):
        if x.shape != (T, heads):
            raise ValueError(f"{name} must be [{T}, {heads}], got {list(x.shape)}")


def _wide(*tensors):
    """In float32 at least."""
    return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]


def _normed(x):
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + EPSILON)


def _heads(x, heads):
    """[…, H_k, d] -> […, heads, d], each head several times in a row."""
    return x if x.shape[-2] == heads else x.repeat_interleave(heads // x.shape[-2], -2)


def _prepare(q, k, v, g, beta, scale, l2norm):
    wide = torch.promote_types(v.dtype, torch.float32)
    q, k, v, g, beta = (x.to(wide) for x in (q, k, v, g, beta))
    if l2norm:
        q, k = _normed(q), _normed(k)
    heads = v.shape[-2]
    return _heads(q * scale, heads), _heads(k, heads), v, g, beta


def _take(state, q, k, v, g, beta):
    """A token into each state […, d_k, d_v]: (new states, out […, d_v])."""
    state = state * g.exp()[..., None, None]
    change = beta[..., None] * (v - (k[..., None, :] @ state)[..., 0, :])
    state = state + k[..., None] * change[..., None, :]
    return state, (q[..., None, :] @ state)[..., 0, :]


def _reference(q, k, v, g, beta, layout, scale, l2norm):
    dtype = v.dtype
    q, k, v, g, beta = _prepare(q, k, v, g, beta, scale, l2norm)
    out, ends, row = [], [], 0

    def scan(state, length):
        nonlocal row
        for t in range(row, row + length):
            state, found = _take(state, q[t], k[t], v[t], g[t], beta[t])
            out.append(found)
        row += length
        return state

    for prompt, completions in layout.groups:
        end = scan(v.new_zeros(v.shape[1], k.shape[2], v.shape[2]), prompt)
        ends.append(end)
        for length in completions:
            scan(end, length)
    return torch.stack(out).to(dtype), torch.stack(ends)


def gated_delta_step(states, q, k, v, g, beta, samples, *, scale=None, l2norm=True, backend="auto"):
    """One token for each of R samples, whose states it moves on in place.

    states float32 [samples, H_v, d_k, d_v] (float64 for float64 tests), contiguous; samples int64 [R]: whose, none of
    them twice; q, k [R, H_k, d_k], v [R, H_v, d_v], g, beta [R, H_v], scale and l2norm as `gated_delta_rule` has them.
    Returns out [R, H_v, d_v] of v's dtype. No gradient. A row's result depends on nothing but that row and its state,
    nothing waits for the device, and nothing is kept: a captured graph may hold it. A state stays finite whatever
    tokens it takes (with l2norm and 0 <= beta <= 1), so that samples which are done may go on.

    Cost: R H_v d_k d_v 8 bytes, each state read and written once, and 8 operations for each of its numbers.
    """
    _check(q, k, v, g, beta)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.no_grad():
        return _reference_step(states, q, k, v, g, beta, samples, scale, l2norm)


def _reference_step(states, q, k, v, g, beta, samples, scale, l2norm):
    dtype = v.dtype
    state, out = _take(states.index_select(0, samples), *_prepare(q, k, v, g, beta, scale, l2norm))
    states.index_copy_(0, samples, state.to(states.dtype))
    return out.to(dtype)
