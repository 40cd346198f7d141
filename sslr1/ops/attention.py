"""Attention over packed tokens: shared-prefix (learner), variable-length (vision), decode (rollout).

All take and return tensors in transformers' layout, heads before tokens, and are differentiable except
`decode_attention`. The forms here are plain PyTorch and run anywhere; they are the reference for faster ones. The
decode step has one: kernels/triton/decode.py; it is also torch.ops.sslr1.decode_attention.
"""

from copy import copy
from itertools import groupby

import torch
import torch.nn.functional as F

from sslr1.ops import backends, flash, packed_attention, transfer  # noqa: F401 (registers the operation)

# What kernels/triton/decode.py is compiled and tested for; anything else takes the plain form.
KERNEL_DTYPES = (torch.bfloat16, torch.float32)
KERNEL_HEAD_SIZES = (64, 128, 256)


def _repeat_heads(x, times):
    """[B, H_kv, T, d] -> [B, H_kv * times, T, d], each head `times` times in a row."""
    return x if times == 1 else x.repeat_interleave(times, 1)


def group_mask(prompt_length: int, completion_lengths, device="cpu") -> torch.Tensor:
    """Who sees whom in `[prompt | c1 | … | cG]`: bool [T, T], row = query. Causal; completions don't see each other.
    Made on the device."""
    owner = torch.arange(len(completion_lengths) + 1)
    owner = owner.repeat_interleave(torch.tensor([prompt_length, *completion_lengths]))
    owner = transfer.upload(owner, device, "tables")
    causal = torch.ones(len(owner), len(owner), dtype=torch.bool, device=device).tril()
    return causal & ((owner[None, :] == 0) | (owner[None, :] == owner[:, None]))


class Layout:
    """Who sees whom in a packed row of groups, each `[prompt | c1 … cG]`: made once a micro-batch, handed to every
    layer as it is.

    groups: list of (prompt length, completion lengths). Its tensors are what variable-length attention asks for: int32
    boundaries of all prompts and completions (`own`), and, of the groups that have completions, boundaries and int64
    row numbers of all completions together (`queries`, `query_rows`) and of the prompts (`keys`, `key_rows`). Longest
    lengths are Python numbers, so that no layer waits for the device. Raises ValueError for a group without a prompt.
    """

    def __init__(self, groups):
        self.groups = [(int(prompt), tuple(int(c) for c in completions)) for prompt, completions in groups]
        own, query_rows, key_rows, row = [], [], [], 0
        for prompt, completions in self.groups:
            if prompt < 1:
                raise ValueError(f"a group's prompt has {prompt} tokens; it needs one at least")
            own += [prompt, *(c for c in completions if c)]
            answer = sum(completions)
            if answer:
                key_rows.append(torch.arange(row, row + prompt))
                query_rows.append(torch.arange(row + prompt, row + prompt + answer))
            row += prompt + answer
        self.tokens = row
        queries, keys = ([len(rows) for rows in spans] for spans in (query_rows, key_rows))
        self.longest, self.longest_queries, self.longest_keys = (_longest(x) for x in (own, queries, keys))
        self.own, self.queries, self.keys = (_boundaries(x) for x in (own, queries, keys))
        none = [torch.zeros(0, dtype=torch.int64)]
        self.query_rows, self.key_rows = (torch.cat(rows or none) for rows in (query_rows, key_rows))
        self._masks = {}

    def mask(self, group: int) -> torch.Tensor:
        """`group_mask` of one group, made for the first layer that asks and kept for the others."""
        if group not in self._masks:
            prompt, completions = self.groups[group]
            self._masks[group] = group_mask(prompt, completions, self.own.device)
        return self._masks[group]

    def to(self, device):
        """The same with its tensors on `device`."""
        moved = copy(self)
        moved._masks = {}
        tensors = {name: x for name, x in vars(self).items() if isinstance(x, torch.Tensor)}
        vars(moved).update(zip(tensors, transfer.upload_together(tensors.values(), device, "tables")))
        return moved


def _boundaries(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def _longest(lengths):
    # Never 1: flash kernels take a batch of single queries for a decode step and reshape it as one.
    return max(2, *lengths) if lengths else 2


def shared_prefix_attention(q, k, v, layout, scale, *, backend="auto"):
    """Attention of packed groups `[prompt | c1 … cG]`: prompts causal, completions see their prompt and themselves.

    q [1, H, T, d], k and v [1, H_kv, T, d] with positions already applied; layout: a `Layout` of T tokens on q's
    device, or what makes one. Returns [1, T, H, d], differentiable in q, k and v.

    backend: "reference" (SDPA with a mask a group: (P + sum C)^2 of work and of mask), "cpp" (on a CPU, in float32,
    without mask or parts), "flash" (parts, merged: see `packed_attention`) with the GPU library that `flash.library`
    chose, a name in `flash.PARTS`, which pins the library ("cpu" takes CPU tensors), or "auto": the fastest that can
    run. Raises ValueError for one that can't, and for shapes and a layout that don't fit together.
    """
    layout = layout if isinstance(layout, Layout) else Layout(layout).to(q.device)
    if layout.tokens != q.shape[2]:
        raise ValueError(f"groups cover {layout.tokens} tokens, q has {q.shape[2]}")
    _one_row(q, k, v)
    chosen = _choose_parts(backend, q)
    if chosen == "reference":
        return _masked(q, k, v, layout, scale)
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    tables = layout.own, layout.queries, layout.keys, layout.query_rows, layout.key_rows
    longest = layout.longest, layout.longest_queries, layout.longest_keys
    return torch.ops.sslr1.packed_attention(q, k, v, *tables, *longest, True, scale, chosen)[0][None]


def _one_row(q, k, v):
    if not len(q) == len(k) == len(v) == 1:
        raise ValueError(f"sequences lie one after the other in a single row, got {len(q)}, {len(k)} and {len(v)} rows")


def _choose_parts(backend, q) -> str:
    """A name in `flash.PARTS`, "cpp" or "reference"."""
    if backend == "cpp" or (backend == "auto" and q.device.type == "cpu"):
        unfit = "takes float32 and shorter numbers, got float64" if q.dtype == torch.float64 else None
        return backends.choose("attention", backend, q.device, ("cpp",), unfit)
    if backend in ("auto", "flash"):
        found = flash.library() if flash.supports(q) else "none"
        if found != "none":
            return found
        if backend == "flash":
            raise ValueError(
                f"backend 'flash' takes float16 and bfloat16 on CUDA, head sizes that are multiples of 8 up to 256, "
                f"and needs flash kernels ({flash.library()} found); q is {q.dtype} {q.shape[-1]} on {q.device}"
            )
        return "reference"
    if backend not in ("reference", *flash.PARTS):
        known = ["reference", "cpp", "flash", *flash.PARTS]
        raise ValueError(f"attention has no backend {backend!r}; it has {', '.join(map(repr, known))}")
    return backend


@torch.compiler.disable
def _masked(q, k, v, layout, scale):
    times = q.shape[1] // k.shape[1]
    sizes = [prompt + sum(completions) for prompt, completions in layout.groups]
    out = []
    parts = zip(q.split(sizes, 2), _repeat_heads(k, times).split(sizes, 2), _repeat_heads(v, times).split(sizes, 2))
    for group, (q_g, k_g, v_g) in enumerate(parts):
        if any(layout.groups[group][1]):
            o = F.scaled_dot_product_attention(q_g, k_g, v_g, attn_mask=layout.mask(group), scale=scale)
        else:
            o = F.scaled_dot_product_attention(q_g, k_g, v_g, is_causal=True, scale=scale)
        out.append(o)
    return torch.cat(out, 2).transpose(1, 2)


def varlen_attention(q, k, v, boundaries, longest, scale, *, backend="auto"):
    """Full (not causal) attention inside each of several sequences that lie one after the other.

    q, k, v [1, H, T, d]; boundaries int32 [n + 1]: where each sequence starts, and T; longest: of the sequences, which
    spares flash kernels a look at the device. Returns [1, T, H, d], differentiable in q, k and v.

    backend: as `shared_prefix_attention`'s; "reference" is SDPA, where neighbours of equal length share one call, and
    "auto" on a CPU for what "cpp" doesn't take. Raises ValueError as it does.
    """
    _one_row(q, k, v)
    chosen = _choose_parts(backend, q)
    if chosen != "reference":
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        nothing, no_rows = boundaries[:1], boundaries[:0].long()
        tables = boundaries, nothing, nothing, no_rows, no_rows
        return torch.ops.sslr1.packed_attention(q, k, v, *tables, max(2, longest), 2, 2, False, scale, chosen)[0][None]
    return _in_runs(q, k, v, boundaries, scale)


@torch.compiler.disable
def _in_runs(q, k, v, boundaries, scale):
    heads, d = q.shape[1], q.shape[3]
    runs = [(length, len(list(same))) for length, same in groupby(boundaries.diff().tolist())]
    sizes = [length * count for length, count in runs]
    out = []
    for (length, count), *qkv in zip(runs, q.split(sizes, 2), k.split(sizes, 2), v.split(sizes, 2)):
        qkv = [x.reshape(heads, count, length, d).transpose(0, 1) for x in qkv]
        o = F.scaled_dot_product_attention(*qkv, scale=scale)  # [count, H, length, d]
        out.append(o.transpose(1, 2).reshape(1, count * length, heads, d))
    return torch.cat(out, 1)


def decode_attention(
    q, prompt_k, prompt_v, prompt_lengths, own_k, own_v, own_lengths, scale, *, batch_invariant=False, backend="auto"
) -> torch.Tensor:
    """One decode step of G samples a prompt that share the prompt's keys and values; softmax over both parts together.

    q [P, G, H, d]; prompt_k, prompt_v [P, H_kv, L, d], read once for all G samples; prompt_lengths int32 or int64 [P],
    0 to L; own_k, own_v [P, G, H_kv, C, d], buffers with room for C keys of the samples' own; own_lengths int32 or
    int64, [1] or whatever else expands to [P, G]: how many of them are there, this step's included, 0 to C. The rest
    are of one floating dtype. What lies beyond a length has no influence, but the plain form, which multiplies it by 0,
    needs it finite.

    batch_invariant: a group's result follows, bit for bit, from its own G, lengths and values, whatever P, L and C are
    and whatever the other groups hold. Otherwise these decide how work is cut up, and results agree to rounding only.
    Its cost: the plain form runs prompt by prompt; the kernel cuts prompts into pieces of one size and samples' own
    keys not at all, so that few long ones no longer fill a GPU.

    backend: "reference" (plain PyTorch), "triton" (CUDA tensors, or CPU ones in Triton's interpreter; bfloat16 and
    float32, head sizes 64 and 128), or "auto": the fastest that can run. On CUDA neither waits for the device, and one
    captured graph serves every length.

    Returns [P, G, H, d], without gradient; rows without a single key are NaN. Raises ValueError for arguments that
    don't fit; lengths are checked where they lie on the CPU.
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
    tensors = q, prompt_k, prompt_v, prompt_lengths, own_k, own_v, own_lengths
    options = dict(scale=scale, backend=backend, batch_invariant=batch_invariant)
    return torch.ops.sslr1.decode_attention(*tensors, **options)


def fits(dtype, head_size) -> bool:
    """Whether the kernel takes them."""
    return dtype in KERNEL_DTYPES and head_size in KERNEL_HEAD_SIZES


def _choose_backend(backend, q) -> str:
    unfit = None
    if not fits(q.dtype, q.shape[-1]):
        unfit = (
            f"takes bfloat16 and float32 and head sizes {KERNEL_HEAD_SIZES}, got {q.dtype} and {q.shape[-1]}: "
            "use backend 'reference'"
        )
    return backends.choose("decode_attention", backend, q.device, ("triton",), unfit)


@torch.no_grad()
def _op_decode_attention(*tensors, scale, backend, batch_invariant=False):
    q, prompt_k, _, prompt_lengths, own_k, _, own_lengths = tensors
    backend = _choose_backend(backend, q)
    prompt_range = _extent("prompt_lengths", prompt_lengths, prompt_k.shape[2])
    own_range = _extent("own_lengths", own_lengths, own_k.shape[3])
    if backend == "triton":
        from sslr1.kernels import decode as kernel

        return kernel.decode_attention(*tensors, scale, batch_invariant)
    if batch_invariant:
        return _one_by_one(*tensors, scale)
    return _reference(*tensors, scale, prompt_range, own_range)


def _fake_decode_attention(q, *tensors, **options):
    return q.new_empty(q.shape)


backends.register(
    "decode_attention(Tensor q, Tensor prompt_k, Tensor prompt_v, Tensor prompt_lengths, Tensor own_k, Tensor own_v, "
    "Tensor own_lengths, *, float scale, str backend, bool batch_invariant=False) -> Tensor",
    _op_decode_attention,
    _fake_decode_attention,
)


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
    """The ranges bound what is there: nothing after the longest is read, nothing before the shortest is masked."""
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
        beyond = torch.arange(least, L, device=q.device) >= prompt_lengths[:, None]
        to_prompt[..., least:].masked_fill_(beyond[:, None, None], float("-inf"))
    to_prompt = to_prompt.view(P, heads_kv, G, times, L).transpose(1, 2)
    to_own = q_kv @ own_k.transpose(-1, -2)  # [P, G, H_kv, times, C]
    if own_least < C:
        beyond = torch.arange(own_least, C, device=q.device) >= own_lengths.expand(P, G)[..., None]
        to_own[..., own_least:].masked_fill_(beyond[:, :, None, None], float("-inf"))
    scores = torch.cat([to_prompt, to_own], -1)
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    w_prompt, w_own = weights.split([L, C], -1)
    w_prompt = w_prompt.transpose(1, 2).reshape(P, heads_kv, G * times, L)
    out = w_own @ own_v
    out += (w_prompt @ prompt_v).view(P, heads_kv, G, times, d).transpose(1, 2)
    return out.reshape(P, G, H, d)


def _one_by_one(q, prompt_k, prompt_v, prompt_lengths, own_k, own_v, own_lengths, scale):
    """The same, every matrix product of a group in shapes that follow from the group alone. Waits for the device."""
    P, G, H, d = q.shape
    out = q.new_empty(q.shape)
    own_lengths = own_lengths.expand(P, G)
    for p, (length, own) in enumerate(zip(prompt_lengths.tolist(), own_lengths.tolist())):
        one = slice(p, p + 1)
        tensors = (x[one] for x in (q, prompt_k, prompt_v, prompt_lengths, own_k, own_v, own_lengths))
        out[one] = _reference(*tensors, scale, (length, length), (min(own, default=0), max(own, default=0)))
    return out
