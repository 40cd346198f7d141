"""Attention of a packed row in two parts, merged: sequences to themselves, and groups of completions to their prompt.

One differentiable operation, torch.ops.sslr1.packed_attention, over whichever pair of functions `flash.PARTS` names, or
"cpp" (csrc/attention.cpp), which takes a completion's two sets of keys one after the other and has nothing to merge.
Both parts' forwards give a log-sum-exp; the union's is logaddexp of the two, and its output the mean of theirs,
weighted by exp(lse - union's lse). The backward hands the union's output and log-sum-exp to each part's, which is then
exact for its keys, and adds what they give. All completions of a group query the one prompt there is: its keys and
values are never copied G times, and its gradient comes out summed.

Cost, for one group of a prompt of P tokens and G completions of C, H heads of d, in key-query pairs (4 H d operations
each forward, 10 backward):

    this                  P^2/2 + G C^2/2 + G C P
    G separate sequences  G (P + C)^2/2
    one masked square     (P + G C)^2, and a mask of as many bytes

P = 1,500, C = 200, G = 16: 6.2, 23.1 and 22.1 million. Beside what the parts read and write, the completions' queries
and outputs are gathered once (2 G C H d numbers each way, the prompt's keys and values are H_kv/H of that and P/(G C)),
and merging passes over G C H d numbers in float32. The backward gathers as much again, with the gradient, and adds the
completions' dQ and the prompts' dK and dV into place.
"""

import torch

from sslr1.ops import backends
from sslr1.ops.flash import PARTS, Bounds

_TABLES = (
    "Tensor own, Tensor queries, Tensor keys, Tensor query_rows, Tensor key_rows, SymInt longest, "
    "SymInt longest_queries, SymInt longest_keys, bool causal, float scale, str backend"
)


def _bounds(own, queries, keys, longest, longest_queries, longest_keys, causal, scale):
    return (
        Bounds(own, own, longest, longest, causal, scale),
        Bounds(queries, keys, longest_queries, longest_keys, False, scale),
    )


def forward(q, k, v, own, queries, keys, query_rows, key_rows, *rest):
    """q [T, H, d], k and v [T, H_kv, d] -> out [T, H, d], lse [H, T], both contiguous. Tables: as a `Layout` has them;
    causal is the sequences' own part, the completions' part has no mask. Raises ValueError for shapes that don't fit,
    which libraries would read past the end of."""
    *longest_causal_scale, backend = rest
    _check_fit(q, k, v)
    if backend == "cpp":
        out, lse = _floats(q.shape), _floats(q.shape[1::-1])
        kept, arguments = _cpp_arguments(q, k, v, own, queries, keys, query_rows, key_rows, *longest_causal_scale[-2:])
        backends._C.attention(arguments, out.data_ptr(), lse.data_ptr(), torch.get_num_threads())
        return out.to(q.dtype), lse
    part = PARTS[backend]
    own, other = _bounds(own, queries, keys, *longest_causal_scale)
    out, lse = (x.contiguous() for x in part.forward(q, k, v, own))
    if len(query_rows):
        other_out, other_lse = part.forward(
            q.index_select(0, query_rows), k.index_select(0, key_rows), v.index_select(0, key_rows), other
        )
        own_lse = lse.index_select(1, query_rows)
        both = torch.logaddexp(own_lse, other_lse)
        merged = out.index_select(0, query_rows) * _weights(own_lse, both)  # float32: the weights are
        merged.addcmul_(other_out, _weights(other_lse, both))
        out.index_copy_(0, query_rows, merged.to(out.dtype))
        lse.index_copy_(1, query_rows, both)
    return out, lse


def _weights(lse, both):
    return (lse - both).exp().t().unsqueeze(-1)  # [n, H, 1]


def backward(grad, q, k, v, out, lse, own, queries, keys, query_rows, key_rows, *rest):
    """dq, dk and dv, contiguous, from the union's output and log-sum-exp."""
    *longest_causal_scale, backend = rest
    _check_fit(q, k, v)
    grad = grad.contiguous()
    if backend == "cpp":
        found = [_floats(x.shape) for x in (q, k, v)]
        kept, arguments = _cpp_arguments(q, k, v, own, queries, keys, query_rows, key_rows, *longest_causal_scale[-2:])
        given = *(x.float() for x in (grad, out)), lse, *found
        backends._C.attention_backward(arguments, *(x.data_ptr() for x in given), torch.get_num_threads())
        return tuple(x.to(y.dtype) for x, y in zip(found, (q, k, v)))
    part = PARTS[backend]
    own, other = _bounds(own, queries, keys, *longest_causal_scale)
    found = tuple(x.contiguous() for x in part.backward(grad, q, k, v, out, lse, own))
    if len(query_rows):
        grad, q, out = (x.index_select(0, query_rows) for x in (grad, q, out))
        k, v = (x.index_select(0, key_rows) for x in (k, v))
        more = part.backward(grad, q, k, v, out, lse.index_select(1, query_rows), other)
        for into, x, rows in zip(found, more, (query_rows, key_rows, key_rows)):
            into.index_copy_(0, rows, into.index_select(0, rows).add_(x))  # no row twice: no need for atomics
    return found


def _floats(shape):
    return torch.empty(shape, dtype=torch.float32, device="cpu")  # whatever is the default elsewhere


def _check_fit(q, k, v):
    (T, heads, d), heads_kv = q.shape, k.shape[1]
    if k.shape != (T, heads_kv, d) or v.shape != k.shape or not heads_kv or heads % heads_kv:
        raise ValueError(f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} don't fit together")


def _cpp_arguments(q, k, v, own, queries, keys, query_rows, key_rows, causal, scale):
    """(tensors that must outlive the call, its arguments). ValueError for boundaries past the end."""
    (T, heads, d), heads_kv = q.shape, k.shape[1]
    if own[0] != 0 or own[-1] != T or (own.diff() < 0).any():
        raise ValueError(f"boundaries must rise from 0 to {T} tokens, got {own.tolist()}")
    rows = [x.float() for x in (q, k, v)]
    rows = [x if x.stride(-1) == 1 else x.contiguous() for x in rows]
    kept = *rows, *(x.int().contiguous() for x in (own, queries, keys)), query_rows.contiguous(), key_rows.contiguous()
    strides = [stride for x in rows for stride in x.stride()[:2]]
    sizes = T, heads, heads_kv, d, len(own) - 1, len(queries) - 1
    return kept, backends._C.Attention([x.data_ptr() for x in kept], [*strides, *sizes], scale, causal)


def _fake_forward(q, *rest):
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=wide)


def _fake_backward(grad, q, k, v, *rest):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _setup(ctx, inputs, output):
    q, k, v, *tables = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, *tables[:5])
    ctx.rest = tables[5:]


def _backward(ctx, grad, _):
    nothing = [None] * (5 + len(ctx.rest))
    if grad is None:
        return None, None, None, *nothing
    return *torch.ops.sslr1.packed_attention_backward(grad, *ctx.saved_tensors, *ctx.rest), *nothing


backends.register(
    f"packed_attention(Tensor q, Tensor k, Tensor v, {_TABLES}) -> (Tensor, Tensor)",
    torch.no_grad()(forward),
    _fake_forward,
    _backward,
    _setup,
)
backends.register(
    f"packed_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_TABLES}) "
    "-> (Tensor, Tensor, Tensor)",
    torch.no_grad()(backward),
    _fake_backward,
)
