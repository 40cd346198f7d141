"""Variable-length attention as two plain functions: forward gives the log-sum-exp too, backward takes an output and a
log-sum-exp that need not be its own forward's.

That is what attention over a union of key sets needs: with the union's output O and log-sum-exp, each set's backward by
itself computes P = exp(S - lse) and dS = P * (dO V^T - rowsum(dO * O)), its exact share of the whole (as in ring
attention). Autograd through a library's own function could not do it: there the log-sum-exp has no gradient.

The same two functions come from flash-attn, from torch's own flash kernels, and from torch's CPU kernels, which serve
the CPU and float64 tests of everything that is built on them. flash-attn is imported at the first use, if at all.
"""

import inspect
import logging
from collections import defaultdict
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch

log = logging.getLogger(__name__)

aten = torch.ops.aten


class Part(NamedTuple):
    """forward(q, k, v, bounds) -> out, lse; backward(dout, q, k, v, out, lse, bounds) -> dq, dk, dv.

    q, out, dout, dq [Tq, H, d]; k, v, dk, dv [Tk, H_kv, d], H a multiple of H_kv; lse [H, Tq], float32 (float64 for
    float64), contiguous. Every sequence has a query and a key.
    """

    forward: callable
    backward: callable


class Bounds(NamedTuple):
    """Which queries meet which keys. queries, keys int32 [n + 1]: where each of n sequences starts, and the end;
    longest_queries, longest_keys: of the sequences, known to the host; causal: query i sees keys to i, as many of
    each."""

    queries: torch.Tensor
    keys: torch.Tensor
    longest_queries: int
    longest_keys: int
    causal: bool
    scale: float


@torch.compiler.assume_constant_result
def library() -> str:
    """What computes variable-length attention on this process's GPU: "flash_attn", "torch" or "none". Decided at the
    first call, and logged."""
    return _library()


@cache
def _library():
    found, why = _find_library()
    log.info("attention on the GPU: %s (%s)", found, why)
    return found


def _find_library():
    if torch.version.hip or not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        return "none", "flash kernels need an NVIDIA GPU of compute capability 8.0 or more; masks are used"
    try:
        import flash_attn
        from flash_attn import flash_attn_interface as interface

        if _takes(interface._flash_attn_varlen_forward, FORWARD) and _takes(
            interface._flash_attn_varlen_backward, BACKWARD
        ):
            return "flash_attn", f"flash-attn {flash_attn.__version__}"
        why = f"flash-attn {flash_attn.__version__} takes other arguments than 2.7 and 2.8"
    except (ImportError, OSError, AttributeError) as error:  # not installed, or built for another torch
        why = f"no flash-attn: {error}"
    if not torch.backends.cuda.is_flash_attention_available():
        return "none", f"{why}; torch was built without flash kernels; masks are used"
    if not (
        _orders(aten._flash_attention_forward, TORCH_FORWARD)
        and _orders(aten._flash_attention_backward, TORCH_BACKWARD)
    ):
        return "none", f"{why}; torch {torch.__version__}'s kernels take other arguments than 2.13's; masks are used"
    return "torch", f"torch {torch.__version__}; {why}"


def supports(q) -> bool:
    """Whether flash kernels take tensors of this kind."""
    return q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


# flash-attn: what is handed over, all of it by name. 2.7.0 and 2.8.0 have these and more, which have defaults.
_BOUNDS = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p softmax_scale causal"
FORWARD = f"q k v {_BOUNDS}".split()
_NEUTRAL = dict(window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None)
BACKWARD = [*f"dout q k v out softmax_lse dq dk dv {_BOUNDS} deterministic".split(), *_NEUTRAL]


def _takes(function, names):
    parameters = inspect.signature(getattr(function, "_init_fn", function)).parameters  # _init_fn: torch's custom ops
    return all(name in parameters for name in names)


def _named(bounds):
    return dict(
        cu_seqlens_q=bounds.queries,
        cu_seqlens_k=bounds.keys,
        max_seqlen_q=bounds.longest_queries,
        max_seqlen_k=bounds.longest_keys,
        dropout_p=0.0,
        softmax_scale=bounds.scale,
        causal=bounds.causal,
    )


def _flash_attn_forward(q, k, v, bounds):
    from flash_attn import flash_attn_interface as interface

    return interface._flash_attn_varlen_forward(q=q, k=k, v=v, **_named(bounds))[:2]


def _flash_attn_backward(dout, q, k, v, out, lse, bounds):
    from flash_attn import flash_attn_interface as interface

    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    options = dict(**_named(bounds), **_NEUTRAL, deterministic=torch.are_deterministic_algorithms_enabled())
    tensors = dict(dout=dout, q=q, k=k, v=v, out=out, softmax_lse=lse, dq=dq, dk=dk, dv=dv)
    interface._flash_attn_varlen_backward(**tensors, **options)
    return dq, dk, dv


# torch's own flash kernels, in the order in which `torch.nn.attention.varlen` hands over what they take. (That module
# itself has changed its signature between versions, and its backward takes only its own forward's output.)
TORCH_FORWARD = "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask".split()
TORCH_BACKWARD = ["grad_out", *TORCH_FORWARD[:3], "out", "logsumexp", *TORCH_FORWARD[3:-1]]  # and two of dropout's


def _orders(operation, names):
    return [a.name for a in operation.default._schema.arguments][: len(names)] == names


def _torch_forward(q, k, v, bounds):
    *tables, causal, scale = bounds
    return aten._flash_attention_forward(q, k, v, *tables, 0.0, causal, False, scale=scale)[:2]


def _torch_backward(dout, q, k, v, out, lse, bounds):
    *tables, causal, scale = bounds
    dropouts = torch.empty(2, dtype=torch.uint64, device=q.device), q.new_empty(0)
    return aten._flash_attention_backward(dout, q, k, v, out, lse, *tables, 0.0, causal, *dropouts, scale=scale)


# The CPU: torch's flash kernels for dense batches. Causal sequences of about one length share a call, filled up to a
# width that depends on their own length only, so that a sequence's result does not depend on its neighbours; what is
# beyond a causal sequence's end is seen by nothing in it.


def _batches(bounds):
    """(query rows [B, L], key rows [B, L'], bool [B, L] which of them are there, the rest being row 0)."""
    queries, keys = bounds.queries.tolist(), bounds.keys.tolist()
    batches = defaultdict(list)
    for number, (start, end) in enumerate(pairwise(queries)):
        step = 8 if end - start <= 64 else 64
        width = -(-(end - start) // step) * step if bounds.causal else -1 - number
        batches[width].append((start, end, keys[number], keys[number + 1]))
    for width, batch in batches.items():
        start, end, first_key, last_key = batch[0]
        if width < 0:
            inside = torch.ones(1, end - start, dtype=torch.bool)
            yield torch.arange(start, end)[None], torch.arange(first_key, last_key)[None], inside
            continue
        spans = torch.tensor(batch)
        place = torch.arange(width)
        inside = place < (spans[:, 1] - spans[:, 0])[:, None]
        queries_at, keys_at = ((spans[:, i, None] + place) * inside for i in (0, 2))
        yield queries_at, keys_at, inside


def _gather(x, rows, times=1):
    """[T, H, d] -> [B, H * times, L, d]"""
    x = x.index_select(0, rows.view(-1)).view(*rows.shape, *x.shape[1:]).transpose(1, 2)
    return x if times == 1 else x.repeat_interleave(times, 1)


def _cpu_forward(q, k, v, bounds):
    times, wide = q.shape[1] // k.shape[1], torch.promote_types(q.dtype, torch.float32)
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=wide)
    for query_rows, key_rows, inside in _batches(bounds):
        qkv = _gather(q, query_rows), _gather(k, key_rows, times), _gather(v, key_rows, times)
        found = aten._scaled_dot_product_flash_attention_for_cpu(*qkv, 0.0, bounds.causal, scale=bounds.scale)
        rows = query_rows[inside]
        for into, x in zip((out, lse), found):
            into.index_copy_(0, rows, x.transpose(1, 2)[inside])
    return out, lse.t().contiguous()


def _cpu_backward(dout, q, k, v, out, lse, bounds):
    times = q.shape[1] // k.shape[1]
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    lse = lse.t()[..., None]
    for query_rows, key_rows, inside in _batches(bounds):
        beyond = ~inside[:, None, :, None]
        given = _gather(dout, query_rows).masked_fill(beyond, 0.0)
        qkv = _gather(q, query_rows), _gather(k, key_rows, times), _gather(v, key_rows, times)
        lse_here = _gather(lse, query_rows).masked_fill(beyond, float("inf"))[..., 0]  # P = 0
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            given, *qkv, _gather(out, query_rows), lse_here, 0.0, bounds.causal, scale=bounds.scale
        )
        for into, x, rows, heads in zip((dq, dk, dv), grads, (query_rows, key_rows, key_rows), (1, times, times)):
            x = x.unflatten(1, (-1, heads)).sum(2) if heads > 1 else x
            here = inside if bounds.causal else torch.ones_like(rows, dtype=torch.bool)
            into.index_copy_(0, rows[here], x.transpose(1, 2)[here])
    return dq, dk, dv


PARTS = {
    "flash_attn": Part(_flash_attn_forward, _flash_attn_backward),
    "torch": Part(_torch_forward, _torch_backward),
    "cpu": Part(_cpu_forward, _cpu_backward),
}
