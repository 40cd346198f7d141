"""The gated delta rule over packed groups, and one step of it for decoding: the recurrence of Qwen3.5's linear layers.

A head's state S [d_k, d_v] starts from zeros and takes in a token by

    S <- e^g S;    S <- S + k (beta (v - k^T S))^T;    out = S^T q

with g <= 0 and 0 <= beta <= 1 of that token, k of length 1 (Yang, Kautz, Hatamizadeh: "Gated Delta Networks", 2024,
eq. 10). A completion starts from its prompt's final state, the same tensor for all G of them; that state's gradient is
the sum of theirs.
"""

import inspect
import logging
from functools import cache

import torch

from sslr1.ops import backends, delta_chunks
from sslr1.ops.delta_chunks import EPSILON, Tables
from sslr1.ops.state_layout import Chunks, StateLayout

log = logging.getLogger(__name__)


def gated_delta_rule(q, k, v, g, beta, layout, *, scale=None, l2norm=True, return_states=False, backend="auto"):
    """The gated delta rule over a packed row of groups `[prompt | c1 … cG]`; differentiable in q, k, v, g and beta.

    q, k [T, H_k, d_k], v [T, H_v, d_v], g (the decay's logarithm) and beta [T, H_v]; H_v is a multiple of H_k, and key
    head i serves value heads i * H_v / H_k and on, as in transformers. layout: a `StateLayout` of T tokens on their
    device, or what makes one. scale: of q, d_k ** -0.5 unless given. l2norm: whether q and k are divided by their
    lengths here (transformers' and fla's `use_qk_l2norm_in_kernel`).

    Returns out [T, H_v, d_v] of v's dtype, or, with return_states, (out, states [groups, H_v, d_k, d_v]): where the
    prompts end, for decoding; float32 and without gradient. Everything is computed in float32 whatever comes in, and
    for float64 in float64 (states too). Gradients have their inputs' dtypes.

    backend: "reference" (token by token), "products" (batched matrix products, any device and dtype: `delta_chunks`),
    "cpp" (the same in the CPU's caches, float32), "fla" (flash-linear-attention's kernels on CUDA, bfloat16 or float16,
    which their products round their factors to), "triton" (ours, likewise, d_k to 128), or "auto": "cpp" on a CPU; on a
    GPU for half precision "fla" where it is installed, else "triton"; "products" for everything else. Cost: as
    `delta_chunks` says; "fla" keeps 128 bytes a token and head for its backward besides, and a state for each
    completion. Raises ValueError for shapes that don't fit, for a layout of another T and for a backend that can't run.
    """
    layout = layout if isinstance(layout, StateLayout) else StateLayout(layout).to(q.device)
    _check(q, k, v, g, beta)
    if layout.tokens != len(q):
        raise ValueError(f"groups cover {layout.tokens} tokens, q has {len(q)}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    backend = _choose(backend, q, v)
    if backend == "reference":
        out, states = _reference(q, k, v, g, beta, layout, scale, l2norm)
    elif backend == "fla":
        out, states = _through_fla(q, k, v, g, beta, layout, scale, l2norm)
    else:
        rest = *delta_chunks.tables(layout), scale, l2norm, backend
        out, states = torch.ops.sslr1.gated_delta_rule(q, k, v, g, beta, *rest)
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


HALF = torch.bfloat16, torch.float16
WIDEST = 128  # d_k that the Triton kernels are compiled and tested for


def _choose(backend, q, v) -> str:
    half = v.device.type == "cuda" and v.dtype in HALF
    if backend in ("auto", "fla"):
        chunk_rule, why = _fla() if half else (None, "takes bfloat16 and float16 on CUDA")
        if chunk_rule:
            return "fla"
        if backend == "fla":
            raise ValueError(f"gated_delta_rule: backend 'fla' {why}")
    if backend == "products":
        return backend
    unfit = None
    if v.dtype == torch.float64:
        unfit = "computes in float32: use backend 'products'"
    elif v.device.type == "cuda" and not half:
        unfit = f"takes bfloat16 and float16, got {v.dtype}: use backend 'products'"
    elif (backend == "triton" or half) and q.shape[-1] > WIDEST:
        unfit = f"takes d_k to {WIDEST}, got {q.shape[-1]}: use backend 'products'"
    chosen = backends.choose("gated_delta_rule", backend, v.device, ("triton", "cpp"), unfit)
    return "products" if (backend, chosen) == ("auto", "reference") else chosen


@torch.compiler.assume_constant_result
def _fla():
    """(fla's function or None, why). Looked for at the first call on a GPU, and logged."""
    return _find_fla()


@cache
def _find_fla():
    names = (
        "q k v g beta scale initial_state output_final_state use_qk_l2norm_in_kernel cu_seqlens cu_seqlens_cpu".split()
    )
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule as found
    except (ImportError, OSError, AttributeError) as error:  # not installed, or for another Triton
        found, why = None, f"needs flash-linear-attention 0.6: {error}"
    else:
        why = "flash-linear-attention"
        missing = [name for name in names if name not in inspect.signature(found).parameters]
        if missing:
            found, why = None, f"needs flash-linear-attention 0.6; this one takes no {', '.join(missing)}"
    log.info("the delta rule on the GPU: %s", why if found else f"batched products (fla {why})")
    return found, why


def _through_fla(q, k, v, g, beta, layout, scale, l2norm):
    """Two calls: prompts, and completions from their prompts' states, whose gradients autograd adds up."""
    chunk_rule, _ = _fla()

    def run(rows, bounds, host_bounds, initial):
        parts = [x.index_select(0, rows)[None] for x in (q, k, v, g, beta)]
        bounds = dict(cu_seqlens=bounds, cu_seqlens_cpu=host_bounds)
        states = dict(initial_state=initial, output_final_state=True)
        out, states = chunk_rule(*parts, scale=scale, use_qk_l2norm_in_kernel=l2norm, **states, **bounds)
        return out[0], states

    of_prompts, of_completions = layout.host_bounds
    out, states = run(layout.prompt_rows, layout.prompt_bounds, of_prompts, None)
    if not len(layout.completion_rows):
        return out, states
    start = states.index_select(0, layout.owners)
    more, _ = run(layout.completion_rows, layout.completion_bounds, of_completions, start)
    return torch.cat([out, more]).index_select(0, layout.places), states


def _op_forward(q, k, v, g, beta, *rest):
    *rest, backend = rest
    if backend == "products":
        return delta_chunks.forward(q, k, v, g, beta, *rest)
    if backend == "triton":
        from sslr1.kernels import delta_chunks as kernel

        return kernel.forward(q, k, v, g, beta, *_chunks(*rest))
    out, states = torch.empty(v.shape), torch.empty(len(rest[0]), v.shape[1], q.shape[2], v.shape[2])
    kept, arguments = _cpp_arguments(q, k, v, g, beta, states, *rest)
    backends._C.delta_rule(arguments, out.data_ptr(), torch.get_num_threads())
    return out.to(v.dtype), states


def _op_backward(grad, states, q, k, v, g, beta, *rest):
    *rest, backend = rest
    if backend == "products":
        return delta_chunks.backward(grad, states, q, k, v, g, beta, *rest)
    if backend == "triton":
        from sslr1.kernels import delta_back as kernel

        dq, dk, *found = kernel.backward(grad, states, q, k, v, g, beta, *_chunks(*rest))
        *_, scale, l2norm = rest
        dq, dk = delta_chunks.through_norm(dq, q, scale, l2norm), delta_chunks.through_norm(dk, k, 1.0, l2norm)
        return tuple(x.to(y.dtype) for x, y in zip((dq, dk, *found), (q, k, v, g, beta)))
    kept, arguments = _cpp_arguments(q, k, v, g, beta, states, *rest)
    grad = grad.float().contiguous()
    found = [torch.empty(x.shape) for x in (q, k, v, g, beta)]
    addresses = [x.data_ptr() for x in (grad, *found)]
    backends._C.delta_rule_backward(arguments, *addresses, torch.get_num_threads())
    return tuple(x.to(y.dtype) for x, y in zip(found, (q, k, v, g, beta)))


def _chunks(*rest):
    *tables, scale, l2norm = rest
    n = len(Chunks._fields)
    return Chunks(*tables[:n]), Chunks(*tables[n : 2 * n]), Tables(*tables).starts, scale, l2norm


def _cpp_arguments(q, k, v, g, beta, states, *rest):
    """(tensors that must outlive the call, its arguments)"""
    *tables, scale, l2norm = rest
    tables = Tables(*tables)
    rows = [x.float() for x in (q, k, v)]
    rows = [x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous() for x in rows]
    gates = [x.float().contiguous() for x in (g, beta)]
    firsts = tables.prompt_steps.cumsum(0) - tables.prompt_steps
    kept = *rows, *gates, tables.spans, firsts, states
    addresses = [x.data_ptr() for x in kept]
    sizes = len(tables.spans), q.shape[1], v.shape[1], q.shape[2], v.shape[2]
    strides = [x.stride(0) for x in rows]
    return kept, backends._C.DeltaRule(addresses[:5], strides, addresses[5:], sizes, scale, l2norm)


def _fake_forward(q, k, v, g, beta, prompt_rows, *rest):
    wide = torch.promote_types(v.dtype, torch.float32)
    return v.new_empty(v.shape), v.new_empty((prompt_rows.shape[0], v.shape[1], q.shape[2], v.shape[2]), dtype=wide)


def _fake_backward(grad, states, *inputs):
    return tuple(x.new_empty(x.shape) for x in inputs[:5])


_KEPT = 5 + len(Tables._fields)  # tensors among what comes in


def _setup(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], *inputs[:_KEPT])
    ctx.rest = inputs[_KEPT:]


def _backward(ctx, grad, _):
    nothing = [None] * (len(Tables._fields) + len(ctx.rest))
    if grad is None:
        return *[None] * 5, *nothing
    return *torch.ops.sslr1.gated_delta_rule_backward(grad, *ctx.saved_tensors, *ctx.rest), *nothing


_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, "
    + "".join(f"Tensor {name}, " for name in Tables._fields)
    + "float scale, bool l2norm, str backend"
)
backends.register(
    f"gated_delta_rule({_ARGUMENTS}) -> (Tensor, Tensor)",
    torch.no_grad()(_op_forward),
    _fake_forward,
    _backward,
    _setup,
)
backends.register(
    f"gated_delta_rule_backward(Tensor grad, Tensor states, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    torch.no_grad()(_op_backward),
    _fake_backward,
)


def gated_delta_step(states, q, k, v, g, beta, samples, *, scale=None, l2norm=True, backend="auto"):
    """One token for each of R samples, whose states it moves on in place.

    states float32 [samples, H_v, d_k, d_v] (float64 for float64 tests), contiguous; samples int64 [R]: whose, none of
    them twice; q, k [R, H_k, d_k], v [R, H_v, d_v], g, beta [R, H_v], scale and l2norm as `gated_delta_rule` has them.
    Returns out [R, H_v, d_v] of v's dtype. No gradient. A row's result depends on nothing but that row and its state,
    nothing waits for the device, and nothing is kept: a captured graph may hold it. A state stays finite whatever
    tokens it takes (with l2norm and 0 <= beta <= 1), so that samples which are done may go on.

    Cost: R H_v d_k d_v 8 bytes, each state read and written once, and 8 operations for each of its numbers.

    backend: "reference", "cpp" (float32 states on the CPU), "triton" (float32 states on CUDA; one launch), or "auto".
    """
    _check(q, k, v, g, beta)
    R, heads, d_v = v.shape
    if states.shape[1:] != (heads, q.shape[2], d_v) or not states.is_contiguous():
        raise ValueError(
            f"states must be [samples, {heads}, {q.shape[2]}, {d_v}], contiguous, got {list(states.shape)}"
        )
    if samples.shape != (R,) or samples.dtype != torch.int64:
        raise ValueError(f"samples must be int64 [{R}], got {samples.dtype} {list(samples.shape)}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.ops.sslr1.gated_delta_step(states, q, k, v, g, beta, samples, scale, l2norm, backend)


@torch.no_grad()
def _op_step(states, q, k, v, g, beta, samples, scale, l2norm, backend):
    unfit = None if states.dtype == torch.float32 else f"takes float32 states, got {states.dtype}"
    backend = backends.choose("gated_delta_step", backend, states.device, ("triton", "cpp"), unfit)
    if backend == "reference":
        prepared = _prepare(q, k, v, g, beta, scale, l2norm)
        state, out = _take(states.index_select(0, samples), *(x.to(states.dtype) for x in prepared))
        states.index_copy_(0, samples, state)
        return out.to(v.dtype)
    if backend == "triton":
        from sslr1.kernels import recurrent as kernel

        return kernel.delta_step(states, q, k, v, g, beta, samples, scale, l2norm)
    out = torch.empty(v.shape)
    inputs = [states, *(x.float().contiguous() for x in (q, k, v, g, beta)), samples.contiguous(), out]
    sizes = len(v), q.shape[1], *states.shape[1:]
    backends._C.delta_step(*(x.data_ptr() for x in inputs), *sizes, scale, l2norm, torch.get_num_threads())
    return out.to(v.dtype)


backends.register(
    "gated_delta_step(Tensor(a!) states, Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor samples, "
    "float scale, bool l2norm, str backend) -> Tensor",
    _op_step,
    lambda states, q, k, v, *rest: v.new_empty(v.shape),
)
