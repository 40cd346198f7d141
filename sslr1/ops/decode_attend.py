"""Attention of a decode step from its product to what the output's product takes: q and k normed, turned (rotary), k
and v written to the samples' own buffers, G samples a prompt against prompt and own keys, and a gate on the result.

Cost: `decode_attention`'s and, on a GPU, two launches that read and write a step's rows: one that splits, norms, turns
and writes, and, where there is a gate or not all samples of the places are computed, one behind.
"""

import torch
import torch.nn.functional as F

from sslr1.ops import attention, backends
from sslr1.ops.decode_rows import choose, rms_norm

WIDEST = 512  # head that C++ has room for


def step_attention(
    qkv,
    cos,
    sin,
    q_norm,
    k_norm,
    prompt_k,
    prompt_v,
    prompt_lengths,
    own_k,
    own_v,
    own_lengths,
    samples,
    written,
    scale,
    *,
    heads,
    gated=False,
    eps=1e-6,
    zero_centred=False,
    batch_invariant=False,
    backend="auto",
):
    """One token for each of n samples in P places of G, whose keys and values it writes.

    qkv [R, W], R >= n, contiguous: heads * d queries (each head's followed by its gate where gated), H_kv * d keys, as
    many values. cos, sin [R, rotary] turn the first `rotary` of each head (first half against second). q_norm, k_norm
    [d] or None: RMS norms' weights, eps and zero_centred as `step_norm` has them. prompt_k, prompt_v [P, H_kv, L, d];
    prompt_lengths int32 [P]; own_k, own_v [P, G, H_kv, C, d], written to, contiguous; own_lengths int32 [P, G]: keys of
    each sample with this step's, 0 for those that are done; samples int64 [n]: p * G + s, ascending; written int64 [n]:
    where in the own buffers the new key goes, which is behind the others.

    Returns [R, heads * d], zeros in rows after n. Otherwise as `decode_attention`; "cpp" takes float32.
    """
    width, d = qkv.shape[1], prompt_k.shape[-1]
    if width != ((2 if gated else 1) * heads + 2 * prompt_k.shape[1]) * d or not qkv.is_contiguous():
        raise ValueError(
            f"qkv is {list(qkv.shape)}, not {heads} heads of {d} with {prompt_k.shape[1]} keys, contiguous"
        )
    if not (own_k.is_contiguous() and own_v.is_contiguous()):
        raise ValueError("own_k and own_v must be contiguous: they are written to")
    tensors = qkv, cos, sin, q_norm, k_norm, prompt_k, prompt_v, prompt_lengths, own_k, own_v, own_lengths
    numbers = scale, heads, gated, eps, zero_centred, batch_invariant
    return torch.ops.sslr1.step_attention(*tensors, samples, written, *numbers, backend)


def rotate(x, cos, sin):
    """x [R, H, d], cos and sin [R, rotary]."""
    rotary = cos.shape[-1]
    turned, rest = x[..., :rotary], x[..., rotary:]
    half = torch.cat((-turned[..., rotary // 2 :], turned[..., : rotary // 2]), -1)
    turned = turned * cos[:, None] + half * sin[:, None]
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


@torch.no_grad()
def _op_step_attention(
    qkv,
    cos,
    sin,
    q_norm,
    k_norm,
    prompt_k,
    prompt_v,
    prompt_lengths,
    own_k,
    own_v,
    own_lengths,
    samples,
    written,
    scale,
    heads,
    gated,
    eps,
    zero_centred,
    batch_invariant,
    backend,
):
    P, G, heads_kv, C, d = own_k.shape
    backend = _choose(backend, qkv, d)
    rows, n = len(qkv), len(samples)
    if backend == "cpp":
        norms = [None if w is None else w.float().contiguous() for w in (q_norm, k_norm)]
        tensors = qkv, cos.float().contiguous(), sin.float().contiguous(), *norms
        tensors += prompt_k.contiguous(), prompt_v.contiguous(), prompt_lengths.int().contiguous()
        return _in_cpp((*tensors, own_k, own_v, samples, written), heads, (scale, eps, zero_centred, gated))
    dense = n == P * G
    if backend == "triton":
        from sslr1.kernels import step as kernel

        norms = q_norm, k_norm, eps, zero_centred
        q = kernel.prepare(qkv, cos, sin, norms, own_k, own_v, samples, written, heads, gated)
    else:
        norms = q_norm, k_norm, eps, zero_centred
        q, gate = _prepare(qkv[:n], cos[:n], sin[:n], norms, own_k, own_v, samples, written, heads)
        q = q if dense else q.new_zeros(P * G, heads, d).index_copy_(0, samples, q)
    given = q.view(P, G, heads, d), prompt_k, prompt_v, prompt_lengths, own_k, own_v, own_lengths
    inner = backend if attention.fits(qkv.dtype, d) else "reference"
    out = attention._op_decode_attention(*given, scale=scale, backend=inner, batch_invariant=batch_invariant)
    out = out.view(P * G, heads, d)
    if backend == "triton":
        if dense and not gated and rows == n:
            return out.view(rows, heads * d)
        return kernel.finish(out, qkv, samples, gated)
    out = out if dense else out.index_select(0, samples)
    if gated:
        out = out * gate.sigmoid()
    return F.pad(out.reshape(n, heads * d), (0, 0, 0, rows - n))


def _in_cpp(tensors, heads, settings):
    qkv, cos, prompt_k, own_k, samples = (tensors[i] for i in (0, 1, 5, 8, 10))
    (_, G, heads_kv, C, d), n = own_k.shape, len(samples)
    out = qkv.new_empty(len(qkv), heads * d)
    out[n:] = 0
    addresses = [0 if x is None else x.data_ptr() for x in (*tensors, out)]
    numbers = n, qkv.shape[1], heads, heads_kv, d, cos.shape[1], prompt_k.shape[2], G, C
    backends._C.step_attention(addresses, numbers, *settings, torch.get_num_threads())
    return out


def _prepare(qkv, cos, sin, norms, own_k, own_v, samples, written, heads):
    """(queries [n, heads, d], gates of as many numbers or of none), keys and values written to their places."""
    heads_kv, C, d = own_k.shape[2:]
    q_norm, k_norm, eps, zero_centred = norms
    q, k, v = qkv.split((qkv.shape[1] - 2 * heads_kv * d, heads_kv * d, heads_kv * d), -1)
    q, k, v = q.unflatten(-1, (heads, -1)), k.unflatten(-1, (heads_kv, d)), v.unflatten(-1, (heads_kv, d))
    q, gate = q[..., :d], q[..., d:]
    if q_norm is not None:
        q, k = rms_norm(q, q_norm, eps, zero_centred), rms_norm(k, k_norm, eps, zero_centred)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    into = (samples[:, None] * heads_kv + torch.arange(heads_kv, device=qkv.device)) * C + written[:, None]
    for buffer, new in ((own_k, k), (own_v, v)):
        buffer.view(-1, d).index_copy_(0, into.view(-1), new.reshape(-1, d))
    return q, gate


def _choose(backend, qkv, d):
    fits = (d <= WIDEST and not d % 4) if qkv.device.type == "cpu" else not d & (d - 1)
    if backend == "auto" and not fits:
        return "reference"
    return choose("step_attention", backend, qkv)


backends.register(
    "step_attention(Tensor qkv, Tensor cos, Tensor sin, Tensor? q_norm, Tensor? k_norm, Tensor prompt_k, "
    "Tensor prompt_v, Tensor prompt_lengths, Tensor(a!) own_k, Tensor(b!) own_v, Tensor own_lengths, Tensor samples, "
    "Tensor written, float scale, int heads, bool gated, float eps, bool zero_centred, bool batch_invariant, "
    "str backend) -> Tensor",
    _op_step_attention,
    lambda qkv, *rest: qkv.new_empty(len(qkv), rest[13] * rest[4].shape[-1]),
)
