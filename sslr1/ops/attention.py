"""Attention over packed tokens, as tensor operations: shared-prefix (learner), variable-length (vision), decode (rollout).

All take and return tensors in transformers' layout, heads before tokens, and are differentiable except `decode_attention`.
The forms here are plain PyTorch and run anywhere; they are the reference for faster ones.
"""

from itertools import groupby

import torch
import torch.nn.functional as F


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


def decode_attention(q, prompt_k, prompt_v, prompt_mask, own_k, own_v, scale):
    """One decode step of G samples a prompt that share the prompt's keys and values.

    q [P, G, H, d]; prompt_k, prompt_v [P, H_kv, L, d], read once for all G samples; prompt_mask bool [P, L], True where a
    key is real; own_k, own_v [P, G, H_kv, t, d], the samples' own, this step's included. Returns [P, G, H, d].
    """
    P, G, H, d = q.shape
    heads_kv, L = prompt_k.shape[1:3]
    times = H // heads_kv
    q_kv = q.view(P, G, heads_kv, times, d)
    q_prompt = q_kv.permute(0, 2, 1, 3, 4).reshape(P, heads_kv, G * times, d)
    to_prompt = (q_prompt @ prompt_k.transpose(-1, -2)).view(P, heads_kv, G, times, L).permute(0, 2, 1, 3, 4)
    to_prompt = to_prompt.masked_fill(~prompt_mask[:, None, None, None, :], float("-inf"))
    to_own = q_kv @ own_k.transpose(-1, -2)  # [P, G, H_kv, times, t]
    scores = torch.cat([to_prompt, to_own], -1) * scale
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    w_prompt, w_own = weights.split([L, to_own.shape[-1]], -1)
    w_prompt = w_prompt.permute(0, 2, 1, 3, 4).reshape(P, heads_kv, G * times, L)
    out = (w_prompt @ prompt_v).view(P, heads_kv, G, times, d).permute(0, 2, 1, 3, 4) + w_own @ own_v
    return out.reshape(P, G, H, d)
