"""Attention over packed tokens, as tensor operations: shared-prefix (learner), variable-length (vision), decode (rollout).

All take and return tensors in transformers' layout, heads before tokens, and are differentiable except `decode_attention`.
The forms here are plain PyTorch and run anywhere; they are the reference for faster ones. The decode step has one:
kernels/triton/decode.py; it is also torch.ops.sslr1.decode_attention.
"""

import os
from itertools import groupby

import torch
import torch.nn.functional as F

# What kernels/triton/decode.py is compiled and tested for; anything else takes the plain form.
KERNEL_DTYPES = (torch.bfloat16, torch.float32)
KERNEL_HEAD_SIZES = (64, 128)


def _repeat_heads(x, times):
    """[B, H_kv, T, d] -> [B, H_kv * times, T, d], each head `times` times in a row."""
    return x if times == 1 else x.repeat_interleave(times, 1)


def group_mask(prompt_length: int, completion_lengths, device=None) -> torch.Tensor:
    """Who sees whom in `[prompt | c1 | … | cG]`: bool [T, T], row = query. Causal, and completions don't see each other."""
    owner = torch.repeat_interleave(
        torch.arange(len(completion_lengths) + 1, device=device),
        torch.tensor([prompt_length, *completion_lengths], device=device),
    )
    causal = torch.ones(len(owner), len(owner), dtype=torch.bool, device=device).tril()
    return causal & ((owner[None, :] == 0) | (owner[None, :] == owner[:, None]))


def shared_prefix_attention(q, k, v, groups, scale):
    """Attention of packed groups, each `[prompt | c1 … cG]`: prompts causal, completions see their prompt and themselves.

    q [1, H, T, d], k and v [1, H_kv, T, d] with positions already applied; groups: list of (prompt_length,
    completion_lengths), in packing order, adding up to T (completions may be none). Returns [1, T, H, d].
    One call a group: work is (P + sum C)^2 a group, nothing is copied per completion.
    """
    times = q.shape[1] // k.shape[1]
    sizes = [prompt + sum(completions) for prompt, completions in groups]
    if sum(sizes) != q.shape[2]:
        raise ValueError(f"groups cover {sum(sizes)} tokens, q has {q.shape[2]}")
    out = []
    parts = zip(q.split(sizes, 2), _repeat_heads(k, times).split(sizes, 2), _repeat_heads(v, times).split(sizes, 2))
    for (prompt, completions), (q_g, k_g, v_g) in zip(groups, parts):
        if completions:
            mask = group_mask(prompt, completions, q.device)
            out.append(F.scaled_dot_product_attention(q_g, k_g, v_g, attn_mask=mask, scale=scale))
        else:
            out.append(F.scaled_dot_product_attention(q_g, k_g, v_g, is_causal=True, scale=scale))
    return torch.cat(out, 2).transpose(1, 2)


def varlen_attention(q, k, v, lengths, scale):
    """Full (not causal) attention inside each of several sequences that lie one behind the other.

    q, k, v [1, H, T, d]; lengths: list of ints adding up to T. Returns [1, T, H, d]. Neighbours of equal length share
    one call.
    """
    heads, d = q.shape[1], q.shape[3]
    runs = [(length, len(list(same))) for length, same in groupby(lengths)]
    sizes = [length * count for length, count in runs]
    out = []
    for (length, count), *qkv in zip(runs, q.split(sizes, 2), k.split(sizes, 2), v.split(sizes, 2)):
        qkv = [x.reshape(heads, count, length, d).transpose(0, 1) for x in qkv]
        o = F.scaled_dot_product_attention(*qkv, scale=scale)  # [count, H, length, d]
        out.append(o.transpose(1, 2).reshape(1, count * length, heads, d))
    return torch.cat(out, 1)


def decode_attention(
    q, prompt_k, prompt_v, prompt_lengths, own_k, own_v, own_lengths, scale, *, backend="auto"
) -> torch.Tensor:
    """One decode step of G samples a prompt that share the prompt's keys and values; softmax over both parts together.

    q [P, G, H, d]; prompt_k, prompt_v [P, H_kv, L, d], read once for all G samples; prompt_lengths int32 or int64 [P], 0 to L;
    own_k, own_v [P, G, H_kv, C, d], buffers with room for C keys of the samples' own; own_lengths int32 or int64, [1] or
    whatever else expands to [P, G]: how many of them are there, this step's included, 0 to C. The rest are of one floating dtype.
    What lies behind a length has no influence, but the plain form, which multiplies it by 0, needs it finite.

    backend: "reference" (plain PyTorch), "triton" (CUDA tensors, or CPU ones in Triton's interpreter; bfloat16 and float32,
    head sizes 64 and 128), or "auto": the fastest that can run. On CUDA neither waits for the device, and one captured graph
    serves every length.

    Returns [P, G, H, d], without gradient; rows without a single key are NaN. Raises ValueError for arguments that don't fit;
    lengths are checked where they lie on the CPU.
    """
    P, G, H, d = q.shape
    heads_kv, L, C = *prompt_k.shape[1:3], own_k.shape[3]
    for name, x, shape in (
        ("prompt_k", prompt_k, (P, heads_kv, L, d)),
        ("prompt_v", prompt_v, (P, heads_kv, L, d)),
        ("own_k", own_k, (P, G, heads_kv, C, d)),
        ("own_v", own_v, (P, G, heads_kv, C, d)),
    ):
        if x.shape != shape or x.dtype != q.dtype:
            raise ValueError(f"{name} must be {q.dtype} {list(shape)}, got {x.dtype} {list(x.shape)}")
    if H % heads_kv:
        raise ValueError(f"{H} query heads can't share {heads_kv} key heads evenly")
    if prompt_lengths.shape != (P,):
        raise ValueError(f"prompt_lengths must be [{P}], got {list(prompt_lengths.shape)}")
    for name, lengths in (("prompt_lengths", prompt_lengths), ("own_lengths", own_lengths)):
        if lengths.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} must be int32 or int64, got {lengths.dtype}")
    return torch.ops.sslr1.decode_attention(
        q, prompt_k, prompt_v, prompt_lengths, own_k, own_v, own_lengths, scale=scale, backend=backend
    )


def _choose_backend(backend, q) -> str:
    supported = q.dtype in KERNEL_DTYPES and q.shape[-1] in KERNEL_HEAD_SIZES
    if backend == "auto":
        return "triton" if q.device.type == "cuda" and supported else "reference"
    if backend == "triton":
        if q.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(f"backend 'triton' takes CUDA tensors, q is on {q.device}")
        if not supported:
            raise ValueError(
                f"backend 'triton' takes bfloat16 and float32 and head sizes {KERNEL_HEAD_SIZES}, got {q.dtype} and "
                f"{q.shape[-1]}: use backend 'reference'"
            )
    elif backend != "reference":
        raise ValueError(f"decode_attention has no backend {backend!r}; it has 'reference' and 'triton'")
    return backend


@torch.no_grad()
def _op_decode_attention(q, prompt_k, prompt_v, prompt_lengths, own_k, own_v, own_lengths, *, scale, backend):
    backend = _choose_backend(backend, q)
    prompt_range = _extent("prompt_lengths", prompt_lengths, prompt_k.shape[2])
    own_range = _extent("own_lengths", own_lengths, own_k.shape[3])
    tensors = q, prompt_k, prompt_v, prompt_lengths, own_k, own_v, own_lengths
    if backend == "triton":
        from sslr1.kernels import decode as kernel

        return kernel.decode_attention(*tensors, scale)
    return _reference(*tensors, scale, prompt_range, own_range)


_library = torch.library.Library("sslr1", "FRAGMENT")
_library.define(
    "decode_attention(Tensor q, Tensor prompt_k, Tensor prompt_v, Tensor prompt_lengths, Tensor own_k, Tensor own_v, "
    "Tensor own_lengths, *, float scale, str backend) -> Tensor"
)
_library.impl("decode_attention", _op_decode_attention, "CompositeExplicitAutograd")


@torch.library.register_fake("sslr1::decode_attention")
def _(q, *tensors, scale, backend):
    return q.new_empty(q.shape)


def _extent(name, lengths, room):
    """Fewest and most of `lengths`, read where they lie on the CPU; elsewhere reading would wait for the device."""
    if lengths.device.type != "cpu":
        return 0, room
    known = lengths.flatten().tolist() or [0]
    least, most = min(known), max(known)
    if least < 0 or most > room:
        raise ValueError(f"{name} are {least} to {most}, there is room for 0 to {room}")
    return least, most


def _reference(q, prompt_k, prompt_v, prompt_lengths, own_k, own_v, own_lengths, scale, prompt_range, own_range):
    """The ranges bound what is there: nothing behind the longest is looked at, nothing before the shortest is masked."""
    P, G, H, d = q.shape
    if not q.numel():
        return q.new_empty(q.shape)
    heads_kv, times = prompt_k.shape[1], H // prompt_k.shape[1]
    (least, L), (own_least, C) = prompt_range, own_range
    prompt_k, prompt_v, own_k, own_v = prompt_k[:, :, :L], prompt_v[:, :, :L], own_k[..., :C, :], own_v[..., :C, :]
    q_kv = (q * scale).view(P, G, heads_kv, times, d)
    q_prompt = q_kv.transpose(1, 2).reshape(P, heads_kv, G * times, d)
    to_prompt = q_prompt @ prompt_k.transpose(-1, -2)
    if least < L:
        behind = torch.arange(least, L, device=q.device) >= prompt_lengths[:, None]
        to_prompt[..., least:].masked_fill_(behind[:, None, None], float("-inf"))
    to_prompt = to_prompt.view(P, heads_kv, G, times, L).transpose(1, 2)
    to_own = q_kv @ own_k.transpose(-1, -2)  # [P, G, H_kv, times, C]
    if own_least < C:
        behind = torch.arange(own_least, C, device=q.device) >= own_lengths.expand(P, G)[..., None]
        to_own[..., own_least:].masked_fill_(behind[:, :, None, None], float("-inf"))
    scores = torch.cat([to_prompt, to_own], -1)
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    w_prompt, w_own = weights.split([L, C], -1)
    w_prompt = w_prompt.transpose(1, 2).reshape(P, heads_kv, G * times, L)
    out = w_own @ own_v
    out += (w_prompt @ prompt_v).view(P, heads_kv, G, times, d).transpose(1, 2)
    return out.reshape(P, G, H, d)
