// A thread takes a group and a key head, and of it one value head after the other: all that belongs to a chunk of 64 tokens stays
// in its nearest caches, and nothing but results leaves them. Cost in operations: as delta_chunks.py says, without what its
// triangles leave out. A sequence's result depends on its own rows and its prompt's alone, whatever threads there are.
#include "vectorised.h"
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=fast")
#endif

#include "delta_rule.h"
#include "exponential.h"
#include "normed.h"
#include "products.h"
#include "share.h"

#include <cmath>
#include <memory>

namespace sslr1 {
namespace {

constexpr Index kChunk = 64;

struct Sizes {
  Index d_k, d_v, wide_k, wide_v;  // wide: filled up with zeros
  Sizes(Index d_k, Index d_v) : d_k(d_k), d_v(d_v), wide_k(up(d_k, kLanes)), wide_v(up(d_v, kLanes)) {}
};

// A thread's chunk: matrices of kChunk rows, or two of these one above the other, queries above keys.
struct Chunk : Sizes {
  Index n = 0, rows = 0;  // tokens, and filled up
  std::vector<float> memory;
  float *qk, *k_turned, *v, *z, *u, *products, *decays, *scores, *solved, *with_state, *state, *total, *decayed, *rest, *beta;
  float *grad, *du, *both, *outer, *turned, *dqk, *later, *scratch, *dtotal, *dbeta;
  float whole = 1;  // e^G of the last token

  explicit Chunk(const Sizes& s) : Sizes(s) {
    const Index C = kChunk, K = wide_k, V = wide_v, D = std::max(K, V);
    struct Part { float** where; Index size; };
    const Part parts[] = {{&qk, 2 * C * K}, {&k_turned, K * C}, {&v, C * V}, {&z, C * V}, {&u, C * V}, {&products, 2 * C * C},
                          {&decays, C * C}, {&scores, C * C}, {&solved, C * C}, {&with_state, 2 * C * V}, {&state, K * V},
                          {&total, C}, {&decayed, C}, {&rest, C}, {&beta, C}, {&grad, 2 * C * V}, {&du, C * V},
                          {&both, 2 * C * V}, {&outer, 2 * C * C}, {&turned, D * std::max(D, C)}, {&dqk, 2 * C * K},
                          {&later, K * V}, {&scratch, C * D}, {&dtotal, C}, {&dbeta, C}};
    Index size = 0;
    for (const Part& part : parts) size += up(part.size, kLanes);
    memory.resize(size + kLanes);
    float* at = memory.data();
    while (reinterpret_cast<std::uintptr_t>(at) % 64) ++at;
    for (const Part& part : parts) *part.where = at, at += up(part.size, kLanes);
  }
};

struct Inputs : Sizes {
  const float *q, *k, *v, *g, *beta;
  Index q_stride, k_stride, v_stride, key_heads, heads;
  float scale;
  bool l2norm;
};

// All of a chunk that needs no state.
IN_EACH_CLONE void begin(Chunk& c, const Inputs& x, Index head, Index row, Index n) {
  const Index K = c.wide_k, V = c.wide_v, C = kChunk, key_head = head / (x.heads / x.key_heads);
  c.n = n, c.rows = up(n, kLanes);
  float total = 0;
  for (Index i = 0; i < c.rows; ++i) {
    float *q = c.qk + i * K, *k = c.qk + (c.rows + i) * K, *v = c.v + i * V;
    std::memset(q, 0, 4 * K), std::memset(k, 0, 4 * K), std::memset(v, 0, 4 * V);
    c.beta[i] = 0;
    if (i < n) {
      const Index t = row + i;
      const float *from_q = x.q + t * x.q_stride + key_head * x.d_k, *from_k = x.k + t * x.k_stride + key_head * x.d_k;
      const float by_q = x.scale * (x.l2norm ? inverse_length(from_q, x.d_k) : 1);
      const float by_k = x.l2norm ? inverse_length(from_k, x.d_k) : 1;
      for (Index j = 0; j < x.d_k; ++j) q[j] = from_q[j] * by_q, k[j] = from_k[j] * by_k;
      std::memcpy(v, x.v + t * x.v_stride + head * x.d_v, 4 * x.d_v);
      c.beta[i] = x.beta[t * x.heads + head];
      total += x.g[t * x.heads + head];
    }
    c.total[i] = total;
  }
  for (Index i = 0; i < c.rows; ++i) c.decayed[i] = decay(c.total[i]), c.rest[i] = decay(total - c.total[i]);
  c.whole = decay(total);
  const float* keys = c.qk + c.rows * K;
  transpose(keys, c.rows, K, K, c.k_turned, C);
  product(2 * c.rows, c.rows, K, c.qk, K, 1, c.k_turned, C, c.products, C, false);
  for (Index i = 0; i < c.rows; ++i) {
    float *decays = c.decays + i * C, *scores = c.scores + i * C, *solved = c.solved + i * C;
    const float *qk = c.products + i * C, *kk = c.products + (c.rows + i) * C, at = c.total[i], beta = c.beta[i];
    const Index to = up(i + 1, kLanes);  // whole vectors; what is above the diagonal is made 0
    for (Index j = 0; j < to; ++j) {
      const float d = std::min(at - c.total[j], 0.0f);
      decays[j] = j > i ? 0.0f : decay(at != at ? at : d);
      scores[j] = qk[j] * decays[j];
      solved[j] = j < i ? -beta * kk[j] * decays[j] : 0.0f;
    }
    for (Index j = to; j < c.rows; ++j) decays[j] = scores[j] = solved[j] = 0;
  }
}

// z = v - e^G k S, u = (1 + A)^-1 beta z. fresh: the state is 0.
IN_EACH_CLONE void changes(Chunk& c, const float* state, bool fresh) {
  const Index K = c.wide_k, V = c.wide_v, C = kChunk;
  if (fresh) {
    std::memset(c.with_state, 0, 8 * c.rows * V);
  } else {
    product(2 * c.rows, V, K, c.qk, K, 1, state, V, c.with_state, V, false);
  }
  for (Index i = 0; i < c.rows; ++i) {
    const float* k_state = c.with_state + (c.rows + i) * V;
    for (Index j = 0; j < V; ++j) {
      const float z = c.v[i * V + j] - c.decayed[i] * k_state[j];
      c.z[i * V + j] = z, c.u[i * V + j] = c.beta[i] * z;
    }
  }
  for (Index i = 0; i < c.rows; i += 4) {
    if (i) product(4, V, i, c.solved + i * C, C, 1, c.u, V, c.u + i * V, V, true);
    for (Index r = i + 1; r < i + 4; ++r) {
      for (Index s = i; s < r; ++s) {
        const float factor = c.solved[r * C + s];
        for (Index j = 0; j < V; ++j) c.u[r * V + j] += factor * c.u[s * V + j];
      }
    }
  }
}

// S <- e^(G_C) S + K^T (e^(G_C - G) U)
IN_EACH_CLONE void move_on(Chunk& c, float* state) {
  const Index K = c.wide_k, V = c.wide_v;
  for (Index i = 0; i < c.rows; ++i) {
    for (Index j = 0; j < V; ++j) c.scratch[i * V + j] = c.rest[i] * c.u[i * V + j];
  }
  for (Index i = 0; i < K * V; ++i) state[i] *= c.whole;
  product(K, V, c.rows, c.qk + c.rows * K, 1, K, c.scratch, V, state, V, true);
}

IN_EACH_CLONE void take_state(const Sizes& s, const float* from, float* to) {  // into rows filled up
  std::memset(to, 0, 4 * s.wide_k * s.wide_v);
  for (Index i = 0; i < s.d_k; ++i) std::memcpy(to + i * s.wide_v, from + i * s.d_v, 4 * s.d_v);
}

IN_EACH_CLONE void leave_state(const Sizes& s, const float* from, float* to) {
  for (Index i = 0; i < s.d_k; ++i) std::memcpy(to + i * s.d_v, from + i * s.wide_v, 4 * s.d_v);
}

VECTORISED void forward_chunk(Chunk& c, const Inputs& x, Index head, Index row, Index n, bool fresh, float* state, float* out) {
  const Index V = c.wide_v, C = kChunk;
  begin(c, x, head, row, n);
  changes(c, state, fresh);
  for (Index i = 0; i < c.rows; ++i) {
    for (Index j = 0; j < V; ++j) c.with_state[i * V + j] *= c.decayed[i];
  }
  product(c.rows, V, c.rows, c.scores, C, 1, c.u, V, c.with_state, V, true, kLower);
  for (Index i = 0; i < n; ++i) std::memcpy(out + ((row + i) * x.heads + head) * x.d_v, c.with_state + i * V, 4 * x.d_v);
  move_on(c, state);
}

// The state alone.
VECTORISED void state_chunk(Chunk& c, const Inputs& x, Index head, Index row, Index n, float* state) {
  begin(c, x, head, row, n);
  changes(c, state, false);
  move_on(c, state);
}

struct Gradients {
  const float* grad;
  float *dq, *dk, *dv, *dg, *dbeta;
};

// c.later: the gradient of the state behind the chunk, replaced by that of the one before, `state`; last: it is 0 as yet.
VECTORISED void backward_chunk(Chunk& c, const Inputs& x, const Gradients& y, Index head, Index row, Index n, bool fresh, bool last,
                               const float* state) {
  const Index K = c.wide_k, V = c.wide_v, C = kChunk;
  begin(c, x, head, row, n);
  changes(c, state, fresh);
  const Index R = c.rows;
  const float* keys = c.qk + R * K;
  for (Index i = 0; i < R; ++i) {
    float* grad = c.grad + i * V;
    std::memset(grad, 0, 4 * V);
    if (i < n) std::memcpy(grad, y.grad + ((row + i) * x.heads + head) * x.d_v, 4 * x.d_v);
  }
  if (!last) {
    product(R, V, K, keys, K, 1, c.later, V, c.du, V, false);
    for (Index i = 0; i < R; ++i) {
      for (Index j = 0; j < V; ++j) c.du[i * V + j] *= c.rest[i];
    }
  }
  product(R, V, R, c.scores, 1, C, c.grad, V, c.du, V, !last, kUpper);
  for (Index i = R - 4; i >= 0; i -= 4) {  // du becomes dR
    const Index below = i + 4;
    if (below < R) product(4, V, R - below, c.solved + below * C + i, 1, C, c.du + below * V, V, c.du + i * V, V, true);
    for (Index r = i + 2; r >= i; --r) {
      for (Index s = r + 1; s < below; ++s) {
        const float factor = c.solved[s * C + r];
        for (Index j = 0; j < V; ++j) c.du[r * V + j] += factor * c.du[s * V + j];
      }
    }
  }
  for (Index i = 0; i < R; ++i) {
    const float *dr = c.du + i * V, *grad = c.grad + i * V;
    float *through_q = c.both + i * V, *through_k = c.both + (R + i) * V, *minus = c.grad + (R + i) * V, *dv = c.scratch + i * V;
    for (Index j = 0; j < V; ++j) {
      dv[j] = c.beta[i] * dr[j];
      through_q[j] = c.decayed[i] * grad[j], through_k[j] = -c.decayed[i] * dv[j], minus[j] = -dr[j];
    }
    c.dbeta[i] = dot(dr, c.z + i * V, V);
    c.dtotal[i] = fresh ? 0 : dot(through_q, c.with_state + i * V, V) + dot(through_k, c.with_state + (R + i) * V, V);
    if (i < n) std::memcpy(y.dv + ((row + i) * x.heads + head) * x.d_v, dv, 4 * x.d_v);
  }
  transpose(c.u, R, V, V, c.turned, C);
  product(2 * R, R, V, c.grad, V, 1, c.turned, C, c.outer, C, false);
  float columns[kChunk] = {};
  for (Index i = 0; i < R; ++i) {
    float *of_q = c.outer + i * C, *of_k = c.outer + (R + i) * C;
    const float *decays = c.decays + i * C, *qk = c.products + i * C, *kk = c.products + (R + i) * C;
    Floats dbeta{}, dtotal{};
    for (Index j = 0; j < R; j += kLanes) {
      const Floats d = load(decays + j), a = load(of_q + j) * d;
      Floats b = load(of_k + j) * d;
      if (j <= i && i < j + kLanes) b[i - j] = 0;
      const Floats in_k = b * load(kk + j), sum = a * load(qk + j) + c.beta[i] * in_k;
      dbeta += in_k, dtotal += sum;
      store(of_q + j, a), store(of_k + j, b * c.beta[i]), store(columns + j, load(columns + j) + sum);
    }
    for (int l = 0; l < kLanes; ++l) c.dbeta[i] += dbeta[l], c.dtotal[i] += dtotal[l];
  }
  for (Index i = 0; i < R; ++i) c.dtotal[i] -= columns[i];
  product(R, K, R, c.outer, C, 1, keys, K, c.dqk, K, false, kLower);
  product(R, K, R, c.outer + R * C, C, 1, keys, K, c.dqk + R * K, K, false, kLower);
  float* dk = c.dqk + R * K;
  product(R, K, R, c.outer, 1, C, c.qk, K, dk, K, true, kUpper);
  product(R, K, R, c.outer + R * C, 1, C, keys, K, dk, K, true, kUpper);
  if (!fresh) {
    transpose(state, K, V, V, c.turned, K);
    product(2 * R, K, V, c.both, V, 1, c.turned, K, c.dqk, K, true);
  }
  if (!last) {
    transpose(c.later, K, V, V, c.turned, K);
    product(R, K, V, c.u, V, 1, c.turned, K, c.scratch, K, false);
    float moved = fresh ? 0 : c.whole * dot(state, c.later, K * V);
    for (Index i = 0; i < R; ++i) {
      for (Index j = 0; j < K; ++j) c.scratch[i * K + j] *= c.rest[i], dk[i * K + j] += c.scratch[i * K + j];
      const float one = dot(c.scratch + i * K, keys + i * K, K);
      moved += one, c.dtotal[i] -= one;
    }
    c.dtotal[n - 1] += moved;
    for (Index i = 0; i < K * V; ++i) c.later[i] *= c.whole;
  }
  product(K, V, 2 * R, c.qk, 1, K, c.both, V, c.later, V, !last);
  const Index key_head = head / (x.heads / x.key_heads);
  float dg = 0;
  for (Index i = R; i-- > 0;) {
    dg += c.dtotal[i];
    if (i >= n) continue;
    const Index t = row + i;
    y.dg[t * x.heads + head] = dg, y.dbeta[t * x.heads + head] = c.dbeta[i];
    float *to_q = y.dq + (t * x.key_heads + key_head) * x.d_k, *to_k = y.dk + (t * x.key_heads + key_head) * x.d_k;
    for (Index j = 0; j < x.d_k; ++j) to_q[j] += c.dqk[i * K + j], to_k[j] += dk[i * K + j];
  }
}

// Gradients of normed and scaled rows to those of what came in.
VECTORISED void through_norm(const float* x, float* dx, Index d, float scale, bool l2norm) {
  float by = scale, along = 0;
  if (l2norm) {
    const float inverse = inverse_length(x, d);
    for (Index j = 0; j < d; ++j) along += x[j] * dx[j];
    along *= inverse * inverse, by *= inverse;
  }
  for (Index j = 0; j < d; ++j) dx[j] = by * (dx[j] - along * x[j]);
}

struct Span {
  Index row, tokens, prompt, place;
};

struct Groups {
  const Span* spans;
  const Index* firsts;
  std::vector<Index> begins;  // the prompts' numbers among the spans, and the end
  Index widest = 0;           // chunks of the longest completion

  explicit Groups(const DeltaRule& a)
      : spans(reinterpret_cast<const Span*>(a.spans)), firsts(reinterpret_cast<const Index*>(a.firsts)) {
    for (Index i = 0; i < a.sequences; ++i) {
      if (spans[i].prompt) begins.push_back(i);
      else widest = std::max(widest, up(spans[i].tokens, kChunk) / kChunk);
    }
    begins.push_back(a.sequences);
  }
  Index count() const { return static_cast<Index>(begins.size()) - 1; }
};

Inputs inputs_of(const DeltaRule& a) {
  const auto in = [](std::uintptr_t address) { return reinterpret_cast<const float*>(address); };
  return {Sizes(a.d_k, a.d_v), in(a.q), in(a.k), in(a.v), in(a.g), in(a.beta), a.q_stride, a.k_stride, a.v_stride,
          a.key_heads, a.heads, static_cast<float>(a.scale), a.l2norm};
}

}  // namespace

void delta_rule(const DeltaRule& a, std::uintptr_t out_address, int threads) {
  const Inputs x = inputs_of(a);
  const Groups groups(a);
  float *out = reinterpret_cast<float*>(out_address), *states = reinterpret_cast<float*>(a.states);
  const Index size = a.d_k * a.d_v;
  share(groups.count() * a.heads, threads, [&](Index unit) {
    const Index group = unit / a.heads, head = unit % a.heads;
    Chunk c(x);
    std::vector<float> end(c.wide_k * c.wide_v);
    for (Index s = groups.begins[group]; s < groups.begins[group + 1]; ++s) {
      const Span& span = groups.spans[s];
      if (!span.prompt) std::copy(end.begin(), end.end(), c.state);
      for (Index i = 0; i < span.tokens; i += kChunk) {
        const bool fresh = span.prompt && !i;
        if (fresh) std::memset(c.state, 0, 4 * end.size());
        forward_chunk(c, x, head, span.row + i, std::min(kChunk, span.tokens - i), fresh, c.state, out);
        if (span.prompt) leave_state(x, c.state, states + ((groups.firsts[i / kChunk] + span.place) * a.heads + head) * size);
      }
      if (span.prompt) std::copy_n(c.state, end.size(), end.begin());
    }
  });
}

void delta_rule_backward(const DeltaRule& a, std::uintptr_t grad, std::uintptr_t dq, std::uintptr_t dk, std::uintptr_t dv,
                         std::uintptr_t dg, std::uintptr_t dbeta, int threads) {
  const Inputs x = inputs_of(a);
  const Groups groups(a);
  const auto to = [](std::uintptr_t address) { return reinterpret_cast<float*>(address); };
  const Gradients y{to(grad), to(dq), to(dk), to(dv), to(dg), to(dbeta)};
  const float* states = to(a.states);
  const Index size = a.d_k * a.d_v, times = a.heads / a.key_heads;
  share(groups.count() * a.key_heads, threads, [&](Index unit) {
    const Index group = unit / a.key_heads, key_head = unit % a.key_heads, first = groups.begins[group];
    const Index end = groups.begins[group + 1];
    Chunk c(x);
    const Index wide = c.wide_k * c.wide_v;
    std::vector<float> start(wide), dstart(wide), before(groups.widest * wide);
    const auto each_row = [&](auto work) {
      for (Index s = first; s < end; ++s) {
        for (Index t = groups.spans[s].row; t < groups.spans[s].row + groups.spans[s].tokens; ++t) work(t);
      }
    };
    each_row([&](Index t) {
      const Index at = (t * a.key_heads + key_head) * a.d_k;
      std::fill_n(y.dq + at, a.d_k, 0.0f), std::fill_n(y.dk + at, a.d_k, 0.0f);
    });
    const Span& prompt = groups.spans[first];
    const Index chunks = up(prompt.tokens, kChunk) / kChunk;
    for (Index head = key_head * times; head < (key_head + 1) * times; ++head) {
      const auto behind = [&](Index i, float* state) {
        take_state(x, states + ((groups.firsts[i] + prompt.place) * a.heads + head) * size, state);
      };
      behind(chunks - 1, start.data());
      std::fill(dstart.begin(), dstart.end(), 0.0f);
      for (Index s = first + 1; s < end; ++s) {
        const Span& span = groups.spans[s];
        const Index count = up(span.tokens, kChunk) / kChunk;
        for (Index i = 0; i < count; ++i) {
          float* state = before.data() + i * wide;
          std::copy_n(i ? state - wide : start.data(), wide, state);
          if (i) state_chunk(c, x, head, span.row + (i - 1) * kChunk, kChunk, state);
        }
        for (Index i = count; i-- > 0;) {
          const Index n = std::min(kChunk, span.tokens - i * kChunk);
          backward_chunk(c, x, y, head, span.row + i * kChunk, n, false, i + 1 == count, before.data() + i * wide);
        }
        if (count) {
          for (Index i = 0; i < wide; ++i) dstart[i] += c.later[i];
        }
      }
      std::copy_n(dstart.data(), wide, c.later);
      for (Index i = chunks; i-- > 0;) {
        if (i) behind(i - 1, c.state);
        const Index n = std::min(kChunk, prompt.tokens - i * kChunk);
        backward_chunk(c, x, y, head, prompt.row + i * kChunk, n, !i, false, c.state);
      }
    }
    each_row([&](Index t) {
      const Index at = (t * a.key_heads + key_head) * a.d_k;
      through_norm(x.q + t * x.q_stride + key_head * a.d_k, y.dq + at, a.d_k, x.scale, a.l2norm);
      through_norm(x.k + t * x.k_stride + key_head * a.d_k, y.dk + at, a.d_k, 1, a.l2norm);
    });
  });
}

}  // namespace sslr1
