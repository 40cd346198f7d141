"""The gated delta rule's backward by chunks; `delta_chunks` says what both go by.

Launches: `scan` of `delta_chunks` once more, which now leaves the state before each chunk and U; `scan_back` from the
last chunk to the first with the state's gradient in registers, completions first; `gather_gates` and `gather_qk` add up
what each chunk gives g and beta, q and k. Cost: three times the forward's bytes, and 4 B d_k d_v for the states before
chunks and their gradients, written and read once.
"""

import torch
from sslr1.kernels.delta_chunks import PART, Row, decays_of, last_of, load_gate, load_rows, store_rows, tokens_of

import triton
import triton.language as tl

SCAN_BACK = dict(num_warps=8, num_stages=1)
GATHER_GATES = dict(num_warps=8, num_stages=1)
GATHER_QK = dict(num_warps=4, num_stages=1)


@triton.jit
def scan_back(
    grad,
    q,
    k,
    g,
    beta,
    rows,
    lasts,
    preceding,
    inverse,
    later,
    end,
    first,
    dr,
    dv,
    T,
    W,
    END: tl.constexpr,  # the last state has a gradient, end[last chunk]
    FIRST: tl.constexpr,  # leave that of the first state
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    D_K: tl.constexpr,
    D_V: tl.constexpr,
    C: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    DOT: tl.constexpr,
):
    """Grid as `scan`'s. later [chunks, HEADS, D_K, D_V]: the gradients of the states behind chunks."""
    head = tl.program_id(1)
    key_head = head // (HEADS // KEY_HEADS)
    place = tl.arange(0, C)
    i = tl.arange(0, KEYS)
    j = tl.program_id(2) * VALUES + tl.arange(0, VALUES)
    size = D_K * D_V
    tile = i[:, None] * D_V + j[None, :]
    inside = (i < D_K)[:, None] & (j < D_V)[None, :]
    square = place[:, None] * C + place[None, :]
    chunk = tl.load(lasts + tl.program_id(0))
    d = tl.zeros([KEYS, VALUES], tl.float32)
    if END:
        d = tl.load(end + (chunk * HEADS + head) * size + tile, mask=inside, other=0.0)
    while chunk >= 0:
        row, real = tokens_of(rows, chunk, T, W, C)
        keys = load_rows(k + (row * KEY_HEADS + key_head) * D_K, real, KEY_HEADS * D_K, i, D_K)
        queries = load_rows(q + (row * KEY_HEADS + key_head) * D_K, real, KEY_HEADS * D_K, i, D_K)
        total = tl.cumsum(load_gate(g + row * HEADS + head, real, HEADS), 0)  # behind the last token its own
        rate = load_gate(beta + row * HEADS + head, real, HEADS)
        decay = tl.exp(total)
        whole = last_of(total, place)
        at = later + (chunk * HEADS + head) * size + tile
        tl.store(at, d.to(later.dtype.element_ty), mask=inside)
        given = load_rows(grad + (row * HEADS + head) * D_V, real, HEADS * D_V, j, D_V).to(DOT)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * decays_of(total, place, False)
        du = tl.dot(tl.trans(scores.to(DOT)), given, input_precision="ieee")
        du += tl.exp(whole - total)[:, None] * tl.dot(keys, d.to(DOT), input_precision="ieee")
        factor = tl.trans(tl.load(inverse + (chunk * HEADS + head) * C * C + square))
        found = tl.dot(factor, du.to(DOT), input_precision="ieee")
        to = (row * HEADS + head) * D_V
        store_rows(dr + to, real, HEADS * D_V, j, D_V, found)
        dz = rate[:, None] * found
        store_rows(dv + to, real, HEADS * D_V, j, D_V, dz)
        d *= tl.exp(whole)
        d += tl.dot(tl.trans(queries), (decay[:, None] * given).to(DOT), input_precision="ieee")
        d -= tl.dot(tl.trans(keys), (decay[:, None] * dz).to(DOT), input_precision="ieee")
        before = tl.load(preceding + chunk)
        if FIRST:
            if before < 0:  # the chunks that begin a sequence are the first ones
                tl.store(first + (chunk * HEADS + head) * size + tile, d, mask=inside)
        chunk = before


@triton.jit
def gather_gates(
    grad,
    q,
    k,
    v,
    g,
    beta,
    rows,
    states,
    later,
    u,
    dr,
    products,
    dg,
    dbeta,
    T,
    W,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    D_K: tl.constexpr,
    D_V: tl.constexpr,
    V_STRIDE: tl.constexpr,
    C: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    DOT: tl.constexpr,
):
    """dg, dbeta, and products [chunks, heads, 2, C, C]: the gradients of Q K^T and K K^T. Grid: chunks, value heads."""
    chunk = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    key_head = head // (HEADS // KEY_HEADS)
    place = tl.arange(0, C)
    i = tl.arange(0, KEYS)
    row, real = tokens_of(rows, chunk, T, W, C)
    keys = load_rows(k + (row * KEY_HEADS + key_head) * D_K, real, KEY_HEADS * D_K, i, D_K)
    queries = load_rows(q + (row * KEY_HEADS + key_head) * D_K, real, KEY_HEADS * D_K, i, D_K)
    total = tl.cumsum(load_gate(g + row * HEADS + head, real, HEADS), 0)  # behind the last token its own
    rate = load_gate(beta + row * HEADS + head, real, HEADS)
    decay = tl.exp(total)
    whole = last_of(total, place)
    rest = tl.exp(whole - total)
    of_scores = tl.zeros([C, C], tl.float32)
    of_a = tl.zeros([C, C], tl.float32)
    of_beta = tl.zeros([C], tl.float32)
    of_total = tl.zeros([C], tl.float32)
    of_moved = tl.zeros([C], tl.float32)
    of_whole = tl.zeros([KEYS], tl.float32)
    for first in tl.range(0, D_V, VALUES):
        j = first + tl.arange(0, VALUES)
        tile = (chunk * HEADS + head) * D_K * D_V + i[:, None] * D_V + j[None, :]
        inside = (i < D_K)[:, None] & (j < D_V)[None, :]
        state = tl.load(states + tile, mask=inside, other=0.0)
        behind = tl.load(later + tile, mask=inside, other=0.0)
        given = load_rows(grad + (row * HEADS + head) * D_V, real, HEADS * D_V, j, D_V)
        values = load_rows(v + row * V_STRIDE + head * D_V, real, V_STRIDE, j, D_V).to(tl.float32)
        change = load_rows(u + (row * HEADS + head) * D_V, real, HEADS * D_V, j, D_V)
        back = load_rows(dr + (row * HEADS + head) * D_V, real, HEADS * D_V, j, D_V)
        of_scores += tl.dot(given.to(DOT), tl.trans(change), input_precision="ieee")
        of_a -= tl.dot(back, tl.trans(change), input_precision="ieee")
        known = decay[:, None] * tl.dot(keys, state, input_precision="ieee")
        of_beta += tl.sum(back.to(tl.float32) * (values - known), 1)
        of_total -= rate * tl.sum(back.to(tl.float32) * known, 1)
        known = decay[:, None] * tl.dot(queries, state, input_precision="ieee")
        of_total += tl.sum(given.to(tl.float32) * known, 1)
        moved = rest[:, None] * tl.dot(keys, behind, input_precision="ieee")
        of_moved += tl.sum(change.to(tl.float32) * moved, 1)
        of_whole += tl.sum(state.to(tl.float32) * behind.to(tl.float32), 1)
    to = products + (chunk * HEADS + head) * 2 * C * C + place[:, None] * C + place[None, :]
    of_scores *= decays_of(total, place, False)
    tl.store(to, of_scores.to(products.dtype.element_ty))
    of_scores *= tl.dot(queries, tl.trans(keys), input_precision="ieee")
    of_total += tl.sum(of_scores, 1) - tl.sum(of_scores, 0)
    of_a *= decays_of(total, place, True)
    tl.store(to + C * C, (of_a * rate[:, None]).to(products.dtype.element_ty))
    of_a *= tl.dot(keys, tl.trans(keys), input_precision="ieee")
    of_beta += tl.sum(of_a, 1)
    of_a *= rate[:, None]
    of_total += tl.sum(of_a, 1) - tl.sum(of_a, 0)
    at_end = tl.sum(of_moved, 0) + tl.exp(whole) * tl.sum(of_whole, 0)
    of_total += tl.where(place == C - 1, at_end, 0.0) - of_moved
    behind = tl.where(place[:, None] >= place[None, :], of_total[:, None], 0.0)
    to = row * HEADS + head + place * HEADS
    tl.store(dg + to, tl.sum(behind, 0), mask=real)
    tl.store(dbeta + to, of_beta, mask=real)


@triton.jit
def gather_qk(
    grad,
    q,
    k,
    g,
    beta,
    rows,
    states,
    later,
    u,
    dr,
    products,
    dq,
    dk,
    T,
    W,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    D_K: tl.constexpr,
    D_V: tl.constexpr,
    C: tl.constexpr,
    PART: tl.constexpr,
    VALUES: tl.constexpr,
    DOT: tl.constexpr,
):
    """dq, dk [T, heads, d_k] float32: of q and k as products take them. Grid: chunks, value heads, PARTs of d_k."""
    chunk = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    key_head = head // (HEADS // KEY_HEADS)
    place = tl.arange(0, C)
    i = tl.program_id(2) * PART + tl.arange(0, PART)
    row, real = tokens_of(rows, chunk, T, W, C)
    total = tl.cumsum(load_gate(g + row * HEADS + head, real, HEADS), 0)  # behind the last token its own
    rate = load_gate(beta + row * HEADS + head, real, HEADS)
    decay = tl.exp(total)
    rest = tl.exp(last_of(total, place) - total)
    of_q = tl.zeros([C, PART], tl.float32)
    of_k = tl.zeros([C, PART], tl.float32)
    for first in tl.range(0, D_V, VALUES):
        j = first + tl.arange(0, VALUES)
        tile = (chunk * HEADS + head) * D_K * D_V + i[:, None] * D_V + j[None, :]
        inside = (i < D_K)[:, None] & (j < D_V)[None, :]
        state = tl.load(states + tile, mask=inside, other=0.0)
        behind = tl.load(later + tile, mask=inside, other=0.0)
        given = load_rows(grad + (row * HEADS + head) * D_V, real, HEADS * D_V, j, D_V).to(tl.float32)
        change = load_rows(u + (row * HEADS + head) * D_V, real, HEADS * D_V, j, D_V).to(tl.float32)
        back = load_rows(dr + (row * HEADS + head) * D_V, real, HEADS * D_V, j, D_V).to(tl.float32)
        of_q += tl.dot((decay[:, None] * given).to(DOT), tl.trans(state), input_precision="ieee")
        of_k -= tl.dot(((decay * rate)[:, None] * back).to(DOT), tl.trans(state), input_precision="ieee")
        of_k += tl.dot((rest[:, None] * change).to(DOT), tl.trans(behind), input_precision="ieee")
    keys = load_rows(k + (row * KEY_HEADS + key_head) * D_K, real, KEY_HEADS * D_K, i, D_K)
    queries = load_rows(q + (row * KEY_HEADS + key_head) * D_K, real, KEY_HEADS * D_K, i, D_K)
    at = products + (chunk * HEADS + head) * 2 * C * C + place[:, None] * C + place[None, :]
    of_product = tl.load(at)
    of_q += tl.dot(of_product, keys, input_precision="ieee")
    of_k += tl.dot(tl.trans(of_product), queries, input_precision="ieee")
    of_product = tl.load(at + C * C)
    of_k += tl.dot(of_product, keys, input_precision="ieee")
    of_k += tl.dot(tl.trans(of_product), keys, input_precision="ieee")
    to = (row * HEADS + head) * D_K
    store_rows(dq + to, real, HEADS * D_K, i, D_K, of_q)
    store_rows(dk + to, real, HEADS * D_K, i, D_K, of_k)


def backward(grad, states, q, k, v, g, beta, prompts, completions, starts, scale, l2norm):
    """dq, dk [T, heads, d_k] float32, of q and k normed and q scaled, for each value head; dv of v's dtype; dg, dbeta
    float32."""
    x = Row(q, k, v, g, beta, scale, l2norm)
    grad = grad.contiguous()
    dq, dk = x.empty(2, x.tokens, x.heads, x.d_k)
    dv, dr, u = (x.empty(*v.shape, dtype=dtype) for dtype in (v.dtype, x.dot, x.dot))
    dg, dbeta = x.empty(2, x.tokens, x.heads)
    end = torch.zeros_like(states)
    for chunks, start in ((completions, states), (prompts, None)):
        rows, of_completions = chunks.rows, start is not None
        if not len(rows):
            continue
        count = int(chunks.steps[0])
        before, later = x.empty(2, len(rows), *states.shape[1:], dtype=x.dot)
        inverse = x.invert(rows)
        x.scan(chunks, count, inverse, start, starts, before, u, True)
        first = x.empty(count, *states.shape[1:]) if of_completions else end
        gates = x.g, x.beta, rows
        tensors = grad, x.q, x.k, *gates, chunks.lasts, chunks.preceding, inverse, later, end, first, dr, dv
        grid = count, x.heads, x.blocks
        x.launch(scan_back, grid, tensors, rows, SCAN_BACK, END=not of_completions, FIRST=of_completions)
        products = x.empty(*inverse.shape[:2], 2, *inverse.shape[2:], dtype=x.dot)
        tensors = grad, x.q, x.k, x.v, *gates, before, later, u, dr, products, dg, dbeta
        x.launch(gather_gates, (len(rows), x.heads), tensors, rows, GATHER_GATES)
        tensors = grad, x.q, x.k, *gates, before, later, u, dr, products, dq, dk
        grid = len(rows), x.heads, triton.cdiv(x.d_k, PART)
        x.launch(gather_qk, grid, tensors, rows, GATHER_QK)
        if of_completions:
            end.index_add_(0, starts, first)
    return dq, dk, dv, dg, dbeta
