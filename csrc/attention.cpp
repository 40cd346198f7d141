// Queries are columns, so that a key's scores lie side by side and neither keys nor values are copied or turned: 64 queries meet 64
// keys at a time, in products that stay in registers, and no score leaves the nearest caches. What a completion sees of its prompt
// and of itself is one softmax. Forward, a thread takes 64 queries of a head; backward a group and a key head, whose gradients are
// then its own. A sequence's result depends on its own rows and its prompt's alone, whatever threads there are.
#include "vectorised.h"
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=fast")
#endif

#include "attention.h"
#include "exponential.h"
#include "products.h"
#include "share.h"

#include <cmath>
#include <memory>

namespace sslr1 {
namespace {

constexpr Index kWide = 64;  // queries at a time, and keys

struct Span {
  Index row, tokens, prompt, prompt_tokens;  // prompt_tokens: 0 where it sees itself alone
};

struct Head {  // of q, k and v
  const float *q, *k, *v;
  Index q_token, k_token, v_token, d;
  float scale;
  bool causal;
};

struct Room {
  const Index d, wide_d;
  const std::unique_ptr<float[]> memory;  // as it comes: what fills rows up ends in numbers that nobody reads
  float *queries, *grads, *found, *scores, *dscores, *q_rows, *grad_rows;  // [d, 64] three times, [64, 64] twice, [64, wide_d] twice
  float top[kWide], sum[kWide], lse[kWide], along[kWide];

  explicit Room(Index d) : d(d), wide_d(up(d, kLanes)), memory(new float[kWide * (3 * d + 2 * kWide + 2 * wide_d) + kLanes]) {
    float* at = memory.get();
    while (reinterpret_cast<std::uintptr_t>(at) % 64) ++at;
    queries = at, grads = queries + kWide * d, found = grads + kWide * d, scores = found + kWide * d;
    dscores = scores + kWide * kWide, q_rows = dscores + kWide * kWide, grad_rows = q_rows + kWide * wide_d;
  }
};

IN_EACH_CLONE Floats decay(Floats x) {
  using Bits = std::uint32_t __attribute__((vector_size(4 * kLanes)));
  const Floats y = exponential<Floats, Bits>(x);
  return x > kLowest ? y : x <= kLowest ? Floats{} : x;  // NaN stays
}

// n rows become columns of `to` [d, 64], times scale; up to `wide` they are 0.
IN_EACH_CLONE void columns(const float* rows, Index apart, Index n, Index wide, Index d, float scale, float* to) {
  transpose(rows, n, d, apart, to, kWide);
  for (Index i = 0; i < d; ++i) {
    for (Index c = 0; c < n; ++c) to[i * kWide + c] *= scale;
    std::fill(to + i * kWide + n, to + i * kWide + wide, 0.0f);
  }
}

// Own keys at a time: fewer from where queries stop seeing all of them. Key j is then seen from column j + ahead on, so that columns
// before `ahead` see none.
IN_EACH_CLONE Index own_keys(const Head& x, const Span& s, Index key, Index first) {
  return std::min(x.causal && key >= first ? kLanes : kWide, s.tokens - key);
}

IN_EACH_CLONE void hide(float* scores, Index keys, Index ahead, Index from, Index wide) {
  for (Index j = std::max<Index>(0, 1 - ahead); j < keys; ++j) {
    for (Index c = from; c < std::min(wide, j + ahead); ++c) scores[j * kWide + c] = -INFINITY;
  }
}

IN_EACH_CLONE void meet(Room& r, const float* k, Index k_token, const float* v, Index v_token, Index keys, Index ahead, Index wide) {
  const Index from = std::max<Index>(ahead, 0);
  product(keys, wide - from, r.d, k, k_token, 1, r.queries + from, kWide, r.scores + from, kWide, false);
  hide(r.scores, keys, ahead, from, wide);
  for (Index c = from; c < wide; c += kLanes) {
    const Floats before = load(r.top + c);
    Floats top = before;
    for (Index j = 0; j < keys; ++j) {
      const Floats s = load(r.scores + j * kWide + c);
      top = s > top ? s : top;  // not NaN, of which the sum then is
    }
    const Floats by = decay(before - top);
    Floats sum = load(r.sum + c) * by;
    for (Index j = 0; j < keys; ++j) {
      const Floats p = decay(load(r.scores + j * kWide + c) - top);
      sum += p;
      store(r.scores + j * kWide + c, p);
    }
    store(r.top + c, top), store(r.sum + c, sum);
    for (Index i = 0; i < r.d; ++i) store(r.found + i * kWide + c, load(r.found + i * kWide + c) * by);
  }
  product(r.d, wide - from, keys, v, 1, v_token, r.scores + from, kWide, r.found + from, kWide, true);
}

// n queries of a sequence from its `first` on.
VECTORISED void forward(Room& r, const Head& x, const Span& s, Index first, Index n, float* out, Index out_token, float* lse) {
  const Index wide = up(n, kLanes), row = s.row + first;
  columns(x.q + row * x.q_token, x.q_token, n, wide, x.d, x.scale, r.queries);
  std::fill_n(r.found, kWide * x.d, 0.0f), std::fill_n(r.sum, kWide, 0.0f), std::fill_n(r.top, kWide, -INFINITY);
  for (Index i = 0; i < s.prompt_tokens; i += kWide) {
    const Index key = s.prompt + i;
    meet(r, x.k + key * x.k_token, x.k_token, x.v + key * x.v_token, x.v_token, std::min(kWide, s.prompt_tokens - i), -kWide, wide);
  }
  for (Index i = 0, keys; i < (x.causal ? first + n : s.tokens); i += keys) {
    const Index key = s.row + i;
    keys = own_keys(x, s, i, first);
    meet(r, x.k + key * x.k_token, x.k_token, x.v + key * x.v_token, x.v_token, keys, x.causal ? i - first : -kWide, wide);
  }
  for (Index i = 0; i < x.d; ++i) {
    for (Index c = 0; c < wide; ++c) r.found[i * kWide + c] /= r.sum[c];
  }
  transpose(r.found, x.d, n, kWide, out + row * out_token, out_token);
  for (Index c = 0; c < n; ++c) lse[row + c] = r.top[c] + std::log(r.sum[c]);
}

// dk and dv: these keys' rows, wide_d apart.
IN_EACH_CLONE void meet_again(Room& r, const float* k, Index k_token, const float* v, Index v_token, Index keys, Index ahead, Index n,
                              Index wide, float scale, float* dk, float* dv) {
  const Index from = std::max<Index>(ahead, 0);
  product(keys, wide - from, r.d, k, k_token, 1, r.queries + from, kWide, r.scores + from, kWide, false);
  product(keys, wide - from, r.d, v, v_token, 1, r.grads + from, kWide, r.dscores + from, kWide, false);
  hide(r.scores, keys, ahead, from, wide);
  for (Index j = 0; j < keys; ++j) {
    float *scores = r.scores + j * kWide, *dscores = r.dscores + j * kWide;
    for (Index c = from; c < wide; c += kLanes) {
      const Floats p = decay(load(scores + c) - load(r.lse + c));
      store(scores + c, p), store(dscores + c, p * (load(dscores + c) - load(r.along + c)) * scale);
    }
  }
  const Index D = r.wide_d;
  product(keys, D, n - from, r.scores + from, kWide, 1, r.grad_rows + from * D, D, dv, D, true);
  product(keys, D, n - from, r.dscores + from, kWide, 1, r.q_rows + from * D, D, dk, D, true);
  product(r.d, wide - from, keys, k, 1, k_token, r.dscores + from, kWide, r.found + from, kWide, true);
}

struct Gradients {
  const float *grad, *out, *lse;  // of a head, rows `token` apart
  float *dq, *dk, *dv;            // dq as they; dk, dv: rows of a group from its `row` on, wide_d apart
  Index token, row;
};

VECTORISED void backward(Room& r, const Head& x, const Gradients& y, const Span& s, Index first, Index n) {
  const Index wide = up(n, kLanes), row = s.row + first, d = x.d, D = r.wide_d;
  columns(x.q + row * x.q_token, x.q_token, n, wide, d, x.scale, r.queries);
  columns(y.grad + row * y.token, y.token, n, wide, d, 1, r.grads);
  std::fill_n(r.found, kWide * d, 0.0f), std::fill_n(r.along, kWide, 0.0f), std::fill_n(r.lse, kWide, INFINITY);
  for (Index c = 0; c < n; ++c) {
    const float *grad = y.grad + (row + c) * y.token, *out = y.out + (row + c) * y.token;
    std::memcpy(r.q_rows + c * D, x.q + (row + c) * x.q_token, 4 * d), std::memcpy(r.grad_rows + c * D, grad, 4 * d);
    for (Index i = 0; i < d; ++i) r.along[c] += grad[i] * out[i];
    r.lse[c] = y.lse[row + c];
  }
  for (Index i = 0; i < s.prompt_tokens; i += kWide) {
    const Index key = s.prompt + i, to = (key - y.row) * D;
    meet_again(r, x.k + key * x.k_token, x.k_token, x.v + key * x.v_token, x.v_token, std::min(kWide, s.prompt_tokens - i), -kWide, n,
               wide, x.scale, y.dk + to, y.dv + to);
  }
  for (Index i = 0, keys; i < (x.causal ? first + n : s.tokens); i += keys) {
    const Index key = s.row + i, to = (key - y.row) * D;
    keys = own_keys(x, s, i, first);
    meet_again(r, x.k + key * x.k_token, x.k_token, x.v + key * x.v_token, x.v_token, keys, x.causal ? i - first : -kWide, n, wide,
               x.scale, y.dk + to, y.dv + to);
  }
  transpose(r.found, d, n, kWide, y.dq + row * y.token, y.token);
}

template <class T = float>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Sequences in packed order, a group's completions behind its prompt.
std::vector<Span> spans(const Attention& a) {
  const auto *own = at<const int>(a.own), *queries = at<const int>(a.queries), *keys = at<const int>(a.keys);
  const Index *query_rows = at<const Index>(a.query_rows), *key_rows = at<const Index>(a.key_rows);
  std::vector<Span> found;
  Index g = 0;
  for (Index i = 0; i < a.sequences; ++i) {
    const Index row = own[i];
    while (g < a.groups && row > query_rows[queries[g + 1] - 1]) ++g;
    const bool inside = g < a.groups && row >= query_rows[queries[g]];
    found.push_back({row, own[i + 1] - row, inside ? key_rows[keys[g]] : row, inside ? keys[g + 1] - keys[g] : 0});
  }
  return found;
}

Head head_of(const Attention& a, Index head) {
  const Index head_kv = head / (a.heads / a.heads_kv);
  return {at(a.q) + head * a.q_head, at(a.k) + head_kv * a.k_head, at(a.v) + head_kv * a.v_head, a.q_token, a.k_token, a.v_token,
          a.d, static_cast<float>(a.scale), a.causal};
}

Index worth(const std::vector<Span>& spans, const Attention& a) {  // threads whose work outweighs their start
  Index pairs = 0;
  for (const Span& s : spans) pairs += s.tokens * (s.prompt_tokens + s.tokens);
  return pairs * a.heads * a.d / 4000000 + 1;
}

}  // namespace

void attention(const Attention& a, std::uintptr_t out, std::uintptr_t lse, int threads) {
  const std::vector<Span> sequences = spans(a);
  struct Task { Index sequence, first; };
  std::vector<Task> tasks;
  for (Index s = 0; s < a.sequences; ++s) {
    for (Index first = 0; first < sequences[s].tokens; first += kWide) tasks.push_back({s, first});
  }
  share(static_cast<Index>(tasks.size()) * a.heads, std::min<Index>(threads, worth(sequences, a)), [&](Index number) {
    const Task task = tasks[number / a.heads];
    const Index head = number % a.heads;
    const Span& s = sequences[task.sequence];
    Room room(a.d);
    forward(room, head_of(a, head), s, task.first, std::min(kWide, s.tokens - task.first), at(out) + head * a.d, a.heads * a.d,
            at(lse) + head * a.tokens);
  });
}

void attention_backward(const Attention& a, std::uintptr_t grad, std::uintptr_t out, std::uintptr_t lse, std::uintptr_t dq,
                        std::uintptr_t dk, std::uintptr_t dv, int threads) {
  const std::vector<Span> sequences = spans(a);
  std::vector<Index> begins;  // of groups, among the sequences, and the end
  for (Index s = 0; s < a.sequences; ++s) {
    if (!sequences[s].prompt_tokens) begins.push_back(s);
  }
  begins.push_back(a.sequences);
  const Index units = (static_cast<Index>(begins.size()) - 1) * a.heads_kv, times = a.heads / a.heads_kv;
  share(units, std::min<Index>(threads, worth(sequences, a)), [&](Index unit) {
    const Index begin = begins[unit / a.heads_kv], end = begins[unit / a.heads_kv + 1], head_kv = unit % a.heads_kv;
    const Index row = sequences[begin].row, rows = sequences[end - 1].row + sequences[end - 1].tokens - row;
    Room room(a.d);
    std::vector<float> keys(rows * room.wide_d), values(rows * room.wide_d);
    for (Index head = head_kv * times; head < (head_kv + 1) * times; ++head) {
      const Index to = head * a.d;
      const Gradients y{at(grad) + to, at(out) + to, at(lse) + head * a.tokens, at(dq) + to, keys.data(), values.data(),
                        a.heads * a.d, row};
      const Head x = head_of(a, head);
      for (Index s = begin; s < end; ++s) {
        for (Index first = 0; first < sequences[s].tokens; first += kWide) {
          backward(room, x, y, sequences[s], first, std::min(kWide, sequences[s].tokens - first));
        }
      }
    }
    for (Index i = 0; i < rows; ++i) {
      const Index to = ((row + i) * a.heads_kv + head_kv) * a.d;
      std::copy_n(keys.data() + i * room.wide_d, a.d, at(dk) + to), std::copy_n(values.data() + i * room.wide_d, a.d, at(dv) + to);
    }
  });
}

}  // namespace sslr1
