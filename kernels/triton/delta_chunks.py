"""The gated delta rule by chunks of up to 64 tokens, forward (backward: `delta_back`); `sslr1.ops.delta_chunks` has the
formulas and names, `sslr1.ops.state_layout` the tables.

Launches: `invert` finds (I + A)^-1 of every chunk; `scan` goes through the chunks of each sequence with a block of the
state's columns in registers, prompts first, then completions from their prompts' last states.

Cost of a chunk and value head, B bytes an element: B C (2 d_k + 2 d_v + C) read and written by `invert` and `scan`, q
and k once for each block of columns. Products take factors in `q`'s dtype on tensor cores and add up in float32; states
and decays are float32.
"""

import os

import torch

import triton
import triton.language as tl

WIDE = os.environ.get("TRITON_INTERPRET") == "1"  # the interpreter multiplies bfloat16 wrongly; float32 it can
EPSILON = 1e-6  # under the root of the norm of q and k
COLUMNS = 32  # of a state, in a program's registers
PART = 64  # of d_k, whose gradients a program gathers


@triton.jit
def load_rows(x, real, stride, column, width):
    """[C, D] of rows `stride` apart, 0 where there is none."""
    at = tl.arange(0, real.shape[0])[:, None] * stride + column[None, :]
    return tl.load(x + at, mask=real[:, None] & (column < width)[None, :], other=0.0)


@triton.jit
def store_rows(x, real, stride, column, width, value):
    at = tl.arange(0, real.shape[0])[:, None] * stride + column[None, :]
    tl.store(x + at, value.to(x.dtype.element_ty), mask=real[:, None] & (column < width)[None, :])


@triton.jit
def load_gate(x, real, heads):
    """[C], float32."""
    return tl.load(x + tl.arange(0, real.shape[0]) * heads, mask=real, other=0.0).to(tl.float32)


@triton.jit
def tokens_of(rows, chunk, T, W, C: tl.constexpr):
    """(the chunk's first row, which of C rows from there are its)"""
    place = tl.arange(0, C)
    return tl.load(rows + chunk * W), tl.load(rows + chunk * W + place, mask=place < W, other=T) < T


@triton.jit
def decays_of(total, place, STRICT: tl.constexpr):
    """e^(G_i - G_j) where i >= j (STRICT: i > j), else 0."""
    inside = place[:, None] > place[None, :] if STRICT else place[:, None] >= place[None, :]
    return tl.where(inside, tl.exp(tl.where(inside, total[:, None] - total[None, :], 0.0)), 0.0)


@triton.jit
def last_of(total, place):
    return tl.sum(tl.where(place == place.shape[0] - 1, total, 0.0), 0)


@triton.jit
def invert(
    k,
    g,
    beta,
    rows,
    inverse,
    T,
    W,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    D_K: tl.constexpr,
    C: tl.constexpr,
    KEYS: tl.constexpr,
    DOT: tl.constexpr,
):
    """Grid: chunks, value heads. inverse [chunks, HEADS, C, C]."""
    chunk = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    key_head = head // (HEADS // KEY_HEADS)
    place = tl.arange(0, C)
    row, real = tokens_of(rows, chunk, T, W, C)
    column = tl.arange(0, KEYS)
    keys = load_rows(k + (row * KEY_HEADS + key_head) * D_K, real, KEY_HEADS * D_K, column, D_K)
    total = tl.cumsum(load_gate(g + row * HEADS + head, real, HEADS), 0)  # behind the last token its own
    rate = load_gate(beta + row * HEADS + head, real, HEADS)
    found = -tl.dot(keys, tl.trans(keys), input_precision="ieee") * decays_of(total, place, True) * rate[:, None]
    for i in range(1, C):
        here = place == i
        one = tl.sum(tl.where(here[:, None], found, 0.0), 0)
        one += tl.sum(one[:, None] * found, 0)
        found = tl.where(here[:, None], one[None, :], found)
    found += tl.where(place[:, None] == place[None, :], 1.0, 0.0)
    at = (chunk * HEADS + head) * C * C + place[:, None] * C + place[None, :]
    tl.store(inverse + at, found.to(inverse.dtype.element_ty))


@triton.jit
def scan(
    q,
    k,
    v,
    g,
    beta,
    rows,
    following,
    inverse,
    start,
    starts,
    states,
    out,
    T,
    W,
    START: tl.constexpr,  # from start[starts[sequence]], not from zeros
    BEFORE: tl.constexpr,  # leave states before each chunk and U in `out`, not out; else states behind each where KEEP
    KEEP: tl.constexpr,
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
    """Grid: sequences, value heads, blocks of columns."""
    chunk = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    key_head = head // (HEADS // KEY_HEADS)
    place = tl.arange(0, C)
    i = tl.arange(0, KEYS)
    j = tl.program_id(2) * VALUES + tl.arange(0, VALUES)
    size = D_K * D_V
    tile = i[:, None] * D_V + j[None, :]
    inside = (i < D_K)[:, None] & (j < D_V)[None, :]
    state = tl.zeros([KEYS, VALUES], tl.float32)
    if START:
        state = tl.load(start + (tl.load(starts + chunk) * HEADS + head) * size + tile, mask=inside, other=0.0)
    square = place[:, None] * C + place[None, :]
    while chunk >= 0:
        row, real = tokens_of(rows, chunk, T, W, C)
        keys = load_rows(k + (row * KEY_HEADS + key_head) * D_K, real, KEY_HEADS * D_K, i, D_K)
        total = tl.cumsum(load_gate(g + row * HEADS + head, real, HEADS), 0)  # behind the last token its own
        rate = load_gate(beta + row * HEADS + head, real, HEADS)
        decay = tl.exp(total)
        whole = last_of(total, place)
        if BEFORE:
            at = states + (chunk * HEADS + head) * size + tile
            tl.store(at, state.to(states.dtype.element_ty), mask=inside)
        factor = state.to(DOT)
        known = tl.dot(keys, factor, input_precision="ieee")
        values = load_rows(v + row * V_STRIDE + head * D_V, real, V_STRIDE, j, D_V).to(tl.float32)
        r = (rate[:, None] * (values - decay[:, None] * known)).to(DOT)
        u = tl.dot(tl.load(inverse + (chunk * HEADS + head) * C * C + square), r, input_precision="ieee")
        to = out + (row * HEADS + head) * D_V
        if BEFORE:
            store_rows(to, real, HEADS * D_V, j, D_V, u)
        else:
            queries = load_rows(q + (row * KEY_HEADS + key_head) * D_K, real, KEY_HEADS * D_K, i, D_K)
            scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * decays_of(total, place, False)
            found = decay[:, None] * tl.dot(queries, factor, input_precision="ieee")
            found += tl.dot(scores.to(DOT), u.to(DOT), input_precision="ieee")
            store_rows(to, real, HEADS * D_V, j, D_V, found)
        rest = tl.exp(whole - total)
        state = state * tl.exp(whole) + tl.dot(tl.trans(keys), (rest[:, None] * u).to(DOT), input_precision="ieee")
        if KEEP:
            tl.store(states + (chunk * HEADS + head) * size + tile, state, mask=inside)
        chunk = tl.load(following + chunk)


def height(rows):
    """Rows of the chunks' tiles: of 32 they would leave the tensor cores' fast path, and registers would spill."""
    return 16 if rows.shape[1] <= 16 else 64


class Row:
    """A packed row's tensors as products take them, q and k normed, and what every launch takes of them."""

    def __init__(self, q, k, v, g, beta, scale, l2norm):
        self.dot = torch.float32 if WIDE else v.dtype
        self.q, self.k = ((_normed(x.float()) if l2norm else x.float()) for x in (q, k))
        self.q, self.k = (self.q * scale).to(self.dot).contiguous(), self.k.to(self.dot).contiguous()
        self.v = v if v.stride()[1:] == (v.shape[2], 1) else v.contiguous()
        self.g, self.beta = g.contiguous(), beta.contiguous()
        self.tokens, self.heads, self.d_v = v.shape
        self.key_heads, self.d_k = q.shape[1:]
        self.blocks = triton.cdiv(self.d_v, COLUMNS)

    def empty(self, *shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=self.v.device)

    def launch(self, kernel, grid, tensors, rows, options, **constants):
        """Of the sizes a kernel is compiled with those that it names: offsets are numbers then, not registers."""
        C, keys = (max(16, triton.next_power_of_2(n)) for n in (rows.shape[1], self.d_k))
        constants |= dict(
            C=C, KEYS=keys, VALUES=COLUMNS, PART=min(PART, keys), DOT=_DOT[self.dot], V_STRIDE=self.v.stride(0)
        )
        constants |= dict(HEADS=self.heads, KEY_HEADS=self.key_heads, D_K=self.d_k, D_V=self.d_v)
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
        kernel[grid](*tensors, self.tokens, rows.shape[1], **constants, **options)

    def invert(self, rows):
        C = height(rows)
        inverse = self.empty(len(rows), self.heads, C, C, dtype=self.dot)
        tensors = self.k, self.g, self.beta, rows, inverse
        self.launch(invert, (len(rows), self.heads), tensors, rows, INVERT)
        return inverse

    def scan(self, chunks, count, inverse, start, starts, states, out, before):
        tensors = self.q, self.k, self.v, self.g, self.beta, chunks.rows, chunks.following, inverse
        tensors += (out, chunks.rows) if start is None else (start, starts)
        tensors += (out if states is None else states, out)
        flags = dict(START=start is not None, BEFORE=before, KEEP=states is not None and not before)
        self.launch(scan, (count, self.heads, self.blocks), tensors, chunks.rows, SCAN, **flags)


def _normed(x):
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + EPSILON)


_DOT = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
INVERT = dict(num_warps=4, num_stages=1)
SCAN = dict(num_warps=8, num_stages=1)


def forward(q, k, v, g, beta, prompts, completions, starts, scale, l2norm):
    """prompts, completions: `Chunks`; starts as a `StateLayout` has them. Returns out of v's dtype, and the states
    behind the prompts' chunks, float32."""
    x = Row(q, k, v, g, beta, scale, l2norm)
    out = x.empty(*v.shape, dtype=v.dtype)
    states = x.empty(len(prompts.rows), x.heads, x.d_k, x.d_v)
    x.scan(prompts, int(prompts.steps[0]), x.invert(prompts.rows), None, None, states, out, False)
    if len(completions.rows):
        inverse = x.invert(completions.rows)
        x.scan(completions, int(completions.steps[0]), inverse, states, starts, None, out, False)
    return out, states
