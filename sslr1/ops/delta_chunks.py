"""The gated delta rule by batched matrix products, 64 tokens at a time, with its backward by hand; any device.

Of a chunk of C tokens with queries Q, keys K and values V as rows, and G = cumsum(g), D_ij = e^(G_i - G_j) for i >= j,

    A = strictly lower part of beta (K K^T * D),    R = beta (V - e^G K S),    U = (I + A)^-1 R,
    out = e^G Q S + (Q K^T * D) U,    S <- e^(G_C) S + K^T (e^(G_C - G) U)

(Yang, Wang, Zhang, Shen, Kim: "Parallelizing Linear Transformers with the Delta Rule", 2024, section 3, with the decays
of "Gated Delta Networks"). What needs no state is computed for all chunks at once; what does, step by step for all
sequences at once: for the prompts, then for the completions, from their prompts' last states. Q lies above K in one
tensor, so that their products with a third are one.

Cost, of a head's chunk: 2 C (3 d_k d_v + 2 C d_k + 2 C d_v + C^2 / 3) operations forward; backward that again, and
about 2 C (6 d_k d_v + 4 C d_k + 4 C d_v) more. Between them nothing is kept beyond the inputs but the states behind the
prompts' chunks, 4 d_k d_v bytes a head: one for each 64 tokens, none for completions. The backward holds two states for
every chunk while it runs.
"""

from typing import NamedTuple

import torch

EPSILON = 1e-6  # under the root of the norm of q and k, as in transformers and fla


class Tables(NamedTuple):
    """What faster forms need of a `StateLayout`: both kinds of `Chunks`, and more."""

    prompt_rows: torch.Tensor
    prompt_steps: torch.Tensor
    prompt_following: torch.Tensor
    prompt_preceding: torch.Tensor
    prompt_lasts: torch.Tensor
    rows: torch.Tensor
    steps: torch.Tensor
    following: torch.Tensor
    preceding: torch.Tensor
    lasts: torch.Tensor
    starts: torch.Tensor
    spots: torch.Tensor
    spans: torch.Tensor


def tables(layout) -> Tables:
    return Tables(*layout.prompts, *layout.completions, layout.starts, layout.spots, layout.spans)


def forward(q, k, v, g, beta, *rest):
    """q, k, v, g, beta as `gated_delta_rule` has them, `Tables`, scale, l2norm -> out [T, H_v, d_v] of v's dtype, and
    the states behind the prompts' chunks [n, H_v, d_k, d_v]."""
    *tensors, scale, l2norm = rest
    t = Tables(*tensors)
    x = _Inputs(q, k, v, g, beta, scale, l2norm)
    found = _Found(t, x, v.shape[2])
    states = x.v.new_empty(len(t.prompt_rows), *x.state_shape)
    _Chunks(x, t.prompt_rows).scan(t.prompt_steps, x.zeros(t.prompt_steps), out=found.parts[0], after=states)
    if len(t.rows):
        _Chunks(x, t.rows).scan(t.steps, states.index_select(0, t.starts), out=found.parts[1])
    return found.tokens().to(v.dtype), states


def backward(grad, states, q, k, v, g, beta, *rest):
    """dq, dk, dv, dg and dbeta, of their inputs' shapes and dtypes, from out's gradient."""
    *tensors, scale, l2norm = rest
    t = Tables(*tensors)
    x = _Inputs(q, k, v, g, beta, scale, l2norm, grad)
    dqk, dv, dg, dbeta = found = [
        _Found(t, x, d, pair) for d, pair in ((q.shape[2], True), (v.shape[2], False), (1, False), (1, False))
    ]
    later = torch.zeros_like(states)  # the gradient of each state behind a chunk
    if len(t.rows):
        chunks = _Chunks(x, t.rows)
        before = chunks.scan(t.steps, states.index_select(0, t.starts))
        first = chunks.backward(t.steps, before, None, [f.parts[1] for f in found])
        later.index_add_(0, t.starts, first)
    before = states.index_select(0, t.prompt_preceding.clamp(min=0))
    before.masked_fill_((t.prompt_preceding < 0)[:, None, None, None], 0.0)
    chunks = _Chunks(x, t.prompt_rows)
    chunks.changes_from(before)
    chunks.backward(t.prompt_steps, before, later, [f.parts[0] for f in found])
    dq, dk = dqk.tokens()
    dq, dk = through_norm(dq, q, scale, l2norm), through_norm(dk, k, 1.0, l2norm)
    found = dq, dk, dv.tokens(), dg.tokens()[..., 0], dbeta.tokens()[..., 0]
    return tuple(d.to(y.dtype) for d, y in zip(found, (q, k, v, g, beta)))


class _Inputs:
    """The row's tensors as the products take them: in float32 at least, q and k normed, q scaled, and a row of zeros
    behind the last, which slots without a token get."""

    def __init__(self, q, k, v, g, beta, scale, l2norm, grad=None):
        T, self.heads, d_v = v.shape
        wide = torch.promote_types(v.dtype, torch.float32)
        self.qk = v.new_empty(2, T + 1, *q.shape[1:], dtype=wide)
        self.qk[:, T] = 0
        self.qk[0, :T], self.qk[1, :T] = q, k
        if l2norm:
            self.qk *= self.qk.square().sum(-1, keepdim=True).add_(EPSILON).rsqrt_()
        self.qk[0] *= scale
        self.v, self.g, self.beta, self.grad = (
            None if y is None else torch.nn.functional.pad(y.to(wide), (0, 0) * (y.ndim - 1) + (0, 1))
            for y in (v, g, beta, grad)
        )
        self.state_shape = self.heads, q.shape[2], d_v

    def zeros(self, steps):
        return self.v.new_zeros(int(steps[0]), *self.state_shape)

    def gather(self, x, rows):
        """x [T + 1, H, …] -> [n, H, C, …]"""
        heads = torch.arange(self.heads, device=rows.device)
        at = rows[:, None] * self.heads + heads[:, None]
        return x.flatten(0, 1).index_select(0, at.view(-1)).view(*at.shape, *x.shape[2:])

    def gather_qk(self, rows):
        """[n, H, 2 C, d_k], keys below queries; a key head's for each of its value heads."""
        _, T, heads, d = self.qk.shape
        head = torch.arange(self.heads, device=rows.device) // (self.heads // heads)
        both = torch.arange(2, device=rows.device) * (T * heads)
        at = (rows[:, None] * heads + head[:, None])[:, :, None] + both[:, None]
        return self.qk.view(-1, d).index_select(0, at.view(-1)).view(*at.shape[:2], -1, d)


def through_norm(d, x, scale, l2norm):
    """The gradient of x [T, H_k, d_k] from that of what the products took of it, for each value head [T, H_v, d_k]."""
    d = d * scale
    if d.shape[1] != x.shape[1]:
        d = d.unflatten(1, (x.shape[1], -1)).sum(2)
    if not l2norm:
        return d
    x = x.to(d.dtype)
    inverse = (x * x).sum(-1, keepdim=True).add_(EPSILON).rsqrt_()
    x = x * inverse
    return (d - x * (d * x).sum(-1, keepdim=True)) * inverse


class _Found:
    """What is found for each slot: parts [n, H, C, d] of prompts and completions, to be filled. pair: C is twice as
    large, for queries above keys."""

    def __init__(self, t, x, d, pair=False):
        self.heads, self.spots, self.pair, self.d = x.heads, t.spots, pair, d
        shapes = [(len(rows), x.heads, rows.shape[1] << pair, d) for rows in (t.prompt_rows, t.rows)]
        sizes = [a * b * c for a, b, c, _ in shapes]
        self.flat = x.v.new_empty(sum(sizes), d)
        self.parts = [part.view(shape) for part, shape in zip(self.flat.split(sizes), shapes)]

    def tokens(self):
        """[T, H, d], or two of them."""
        first, place, width = self.spots[..., None]
        at = first * self.heads + width * torch.arange(self.heads, device=first.device)
        if self.pair:
            return self._take(2 * at + place), self._take(2 * at + place + width)
        return self._take(at + place)

    def _take(self, at):
        return self.flat.index_select(0, at.view(-1)).view(*at.shape, self.d)


class _Chunks:
    """Chunks [n, H, …], as far as no state is needed; then `u`, `qk_states` and gradients step by step."""

    def __init__(self, x, rows):
        C = rows.shape[1]
        self.x, self.rows, self.C = x, rows, C
        self.qk, self.v, self.beta = x.gather_qk(rows), x.gather(x.v, rows), x.gather(x.beta, rows)
        self.k = self.qk[:, :, C:]
        total = x.gather(x.g, rows).cumsum(-1)  # G
        self.decay, self.whole = total.exp(), total[..., -1, None, None].exp()
        self.rest = (total[..., -1:] - total).exp()[..., None]
        self.decays = total[..., :, None] - total[..., None, :]
        above = torch.ones(C, C, dtype=torch.bool, device=rows.device).triu_(1)
        self.decays = self.decays.masked_fill_(above, -torch.inf).exp_()  # D
        self.products = self.qk @ self.k.transpose(-1, -2)
        self.scores = self.products[:, :, :C] * self.decays
        A = self.products[:, :, C:] * self.decays * self.beta[..., None]
        eye = torch.eye(C, dtype=A.dtype, device=A.device).expand_as(A)
        self.inverse = torch.linalg.solve_triangular(A, eye, upper=False, unitriangular=True)
        self.factors = torch.cat([self.decay, -self.decay], -1)[..., None]  # e^G of queries, -e^G of keys
        self.beta, self.decay = self.beta[..., None], self.decay[..., None]

    def _steps(self, steps):
        counts = steps.tolist()
        ends = [sum(counts[: i + 1]) for i in range(len(counts))]
        return [(slice(end - m, end), m) for end, m in zip(ends, counts)]

    def scan(self, steps, state, out=None, after=None):
        """Step by step from `state` [sequences, H, d_k, d_v]. out [n, H, C, d_v], after [n, H, d_k, d_v]: filled where
        given. Without out: states before each chunk, and what the backward needs is kept."""
        C = self.C
        steps = self._steps(steps)
        kept, befores = [], []
        for i, (c, m) in enumerate(steps):
            state = state[:m]
            with_state = self.qk[c] @ state
            u = self.inverse[c] @ (
                self.beta[c] * torch.addcmul(self.v[c], with_state[:, :, C:], self.factors[c][:, :, C:])
            )
            if out is not None:
                torch.baddbmm(
                    (with_state[:, :, :C] * self.decay[c]).flatten(0, 1),
                    self.scores[c].flatten(0, 1),
                    u.flatten(0, 1),
                    out=out[c].flatten(0, 1),
                )
            else:
                kept.append((with_state, u)), befores.append(state)
            if after is not None or i + 1 < len(steps):
                following = state * self.whole[c] if after is None else torch.mul(state, self.whole[c], out=after[c])
                following.flatten(0, 1).baddbmm_(
                    self.k[c].flatten(0, 1).transpose(1, 2), (self.rest[c] * u).flatten(0, 1)
                )
                state = following
        if out is None:
            self.with_states, self.u = (torch.cat(x) if len(x) > 1 else x[0] for x in zip(*kept))
            return torch.cat(befores) if len(befores) > 1 else befores[0]

    def changes_from(self, before):
        """What the backward needs, where states before each chunk are known."""
        self.with_states = self.qk @ before
        C = self.C
        self.u = self.inverse @ (self.beta * torch.addcmul(self.v, self.with_states[:, :, C:], self.factors[:, :, C:]))

    def backward(self, steps, before, later, found):
        """Fills `found` (dqk, dv, dg, dbeta); later [n, H, d_k, d_v]: the gradients of the states behind the chunks but
        for what comes through the next chunk, which is added; None where there are none. Returns that of the states
        before the first chunks."""
        C, x = self.C, self.x
        dqk, dv, dg, dbeta = found
        grad = x.gather(x.grad, self.rows)
        steps = self._steps(steps)
        alone = later is None and len(steps) == 1
        if later is None and not alone:
            later = torch.zeros_like(before)
        du = self.scores.transpose(-1, -2) @ grad
        both = self.qk.new_empty(*self.qk.shape[:3], grad.shape[-1])  # of e^G Q S and of -e^G K S … through S
        torch.mul(grad, self.decay, out=both[:, :, :C])
        dr = torch.empty_like(du)
        previous, m_previous = None, 0
        for c, m in reversed(steps):
            if previous is not None:
                later[c][:m_previous] += previous
            d = du[c]
            if not alone:
                d += self.rest[c] * (self.k[c] @ later[c])
            torch.matmul(self.inverse[c].transpose(-1, -2), d, out=dr[c])
            dz = torch.mul(dr[c], self.beta[c], out=dv[c])
            torch.mul(dz, self.factors[c][:, :, C:], out=both[c][:, :, C:])
            previous, m_previous = self.qk[c].transpose(-1, -2) @ both[c], m
            if not alone:
                previous.addcmul_(later[c], self.whole[c])
        # The rest needs no order
        r = torch.addcmul(self.v, self.with_states[:, :, C:], self.factors[:, :, C:])
        torch.sum(dr * r, -1, keepdim=True, out=dbeta)
        dtotal = (both * self.with_states).sum(-1)
        dtotal = dtotal[:, :, :C] + dtotal[:, :, C:]
        dproducts = torch.cat([grad, -dr], 2) @ self.u.transpose(-1, -2)
        dproducts.unflatten(2, (2, C)).mul_(self.decays[:, :, None])
        dproducts[:, :, C:].tril_(-1)
        through = dproducts * self.products
        dbeta += through[:, :, C:].sum(-1, keepdim=True)
        through[:, :, C:] *= self.beta
        dproducts[:, :, C:] *= self.beta
        dtotal += through[:, :, :C].sum(-1) + through[:, :, C:].sum(-1) - through.sum(2)
        torch.matmul(both, before.transpose(-1, -2), out=dqk)
        dqk.flatten(0, 1).baddbmm_(dproducts.flatten(0, 1), self.k.flatten(0, 1))
        dk = dqk[:, :, C:]
        dk += dproducts.transpose(-1, -2) @ self.qk
        if not alone:
            dk_state = self.rest * (self.u @ later.transpose(-1, -2))
            dk += dk_state
            moved = (dk_state * self.k).sum(-1)
            dtotal -= moved
            dtotal[..., -1] += moved.sum(-1) + self.whole[..., 0, 0] * (before * later).sum((-1, -2))
        dg.copy_(dtotal.flip(-1).cumsum(-1).flip(-1)[..., None])
        return previous
