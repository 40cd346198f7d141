// The attention turns a group's queries of a kv head into columns, so that the prompt's keys and values are read once for all of
// them, in products that stay in registers; a column is computed by itself, whatever stands beside it.
#include "vectorised.h"
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=fast")
#endif

#include "step.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "causal_conv.h"
#include "delta_rule.h"
#include "exponential.h"
#include "products.h"
#include "share.h"
#include "sigmoid.h"

namespace sslr1 {
namespace {

constexpr Index kColumns = 64;

template <class T = float>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

IN_EACH_CLONE float sum_of_squares(const float* x, Index n) {
  float sums[kLanes] = {};
  Index i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) sums[l] += x[i + l] * x[i + l];
  }
  for (; i < n; ++i) sums[0] += x[i] * x[i];
  float found = 0;
  for (int l = 0; l < kLanes; ++l) found += sums[l];
  return found;
}

IN_EACH_CLONE void norm(const float* x, const float* weight, float* out, Index n, float eps, bool zero_centred) {
  const float by = 1 / std::sqrt(sum_of_squares(x, n) / n + eps), plus = zero_centred ? 1.0f : 0.0f;
  for (Index i = 0; i < n; ++i) out[i] = x[i] * by * (plus + weight[i]);
}

VECTORISED void norm_row(const float* x, const float* weight, float* out, Index n, float eps, bool zero_centred) {
  norm(x, weight, out, n, eps, zero_centred);
}

VECTORISED void swiglu_row(const float* gate, float* out, Index n) {
  for (Index i = 0; i < n; ++i) out[i] = gate[i] * sigmoid(gate[i]) * gate[n + i];
}

// One head: from -> to, normed where there is a weight, turned.
VECTORISED void turn(const float* from, const float* weight, const float* cos, const float* sin, float* to, Index d, Index rotary,
                     float eps, bool zero_centred, float scale) {
  float room[512];
  if (weight) {
    norm(from, weight, room, d, eps, zero_centred);
    from = room;
  }
  const Index half = rotary / 2;
  for (Index i = 0; i < half; ++i) {
    to[i] = (from[i] * cos[i] - from[half + i] * sin[i]) * scale;
    to[half + i] = (from[half + i] * cos[half + i] + from[i] * sin[half + i]) * scale;
  }
  for (Index i = rotary; i < d; ++i) to[i] = from[i] * scale;
}

struct Group {  // what some rows of one place have of a kv head
  const float *prompt_k, *prompt_v;
  Index length, d, times, columns, wide;  // columns: rows times heads of a kv head; wide: filled up
  const float* own_k[kColumns];           // of each column
  const float* own_v[kColumns];
  Index own[kColumns];
  Index most;  // of own
};

// queries [d, wide], scores [length, wide], own_scores [most, wide], out [d, wide]
VECTORISED void attend(const Group& g, const float* queries, float* scores, float* own_scores, float* out) {
  const Index W = g.wide, L = g.length, d = g.d;
  product(L, W, d, g.prompt_k, d, 1, queries, W, scores, W, false);
  float top[kColumns], sum[kColumns] = {};
  for (Index c = 0; c < W; ++c) top[c] = -INFINITY;
  for (Index l = 0; l < L; ++l) {
    const float* row = scores + l * W;
    for (Index c = 0; c < W; ++c) top[c] = row[c] > top[c] || row[c] != row[c] ? row[c] : top[c];
  }
  for (Index c = 0; c < g.columns; ++c) {
    for (Index j = 0; j < g.own[c]; ++j) {
      const float* key = g.own_k[c] + j * d;
      float sums[kLanes] = {};
      Index i = 0;
      for (; i + kLanes <= d; i += kLanes) {
        for (int l = 0; l < kLanes; ++l) sums[l] += key[i + l] * queries[(i + l) * W + c];
      }
      for (; i < d; ++i) sums[0] += key[i] * queries[i * W + c];
      float found = 0;
      for (int l = 0; l < kLanes; ++l) found += sums[l];
      own_scores[c * g.most + j] = found;
      top[c] = found > top[c] || found != found ? found : top[c];
    }
  }
  for (Index l = 0; l < L; ++l) {
    float* row = scores + l * W;
    for (Index c = 0; c < W; ++c) {
      row[c] = decay(row[c] - top[c]);
      sum[c] += row[c];
    }
  }
  product(d, W, L, g.prompt_v, 1, d, scores, W, out, W, false);
  for (Index c = 0; c < g.columns; ++c) {
    for (Index j = 0; j < g.own[c]; ++j) {
      const float weight = decay(own_scores[c * g.most + j] - top[c]), *value = g.own_v[c] + j * d;
      sum[c] += weight;
      for (Index i = 0; i < d; ++i) out[i * W + c] += weight * value[i];
    }
  }
  for (Index i = 0; i < d; ++i) {
    for (Index c = 0; c < W; ++c) out[i * W + c] /= sum[c];
  }
}

VECTORISED void gated(const float* gate, float* out, Index d) {
  for (Index i = 0; i < d; ++i) out[i] *= sigmoid(gate[i]);
}

VECTORISED void gated_norm(const float* x, const float* weight, const float* z, float* out, Index n, float eps) {
  const float by = 1 / std::sqrt(sum_of_squares(x, n) / n + eps);
  for (Index i = 0; i < n; ++i) out[i] = x[i] * by * weight[i] * (z[i] * sigmoid(z[i]));
}

}  // namespace

void step_norm(std::uintptr_t x, std::uintptr_t weight, std::uintptr_t out, std::int64_t rows, std::int64_t width, double eps,
               bool zero_centred) {
  for (Index row = 0; row < rows; ++row) {
    norm_row(at(x) + row * width, at(weight), at(out) + row * width, width, static_cast<float>(eps), zero_centred);
  }
}

void step_swiglu(std::uintptr_t gate_up, std::uintptr_t out, std::int64_t rows, std::int64_t width) {
  for (Index row = 0; row < rows; ++row) swiglu_row(at(gate_up) + row * 2 * width, at(out) + row * width, width);
}

void step_attention(const StepAttention& a, int threads) {
  const Index *samples = at<Index>(a.samples), *written = at<Index>(a.written);
  const int* lengths = at<int>(a.prompt_lengths);
  const Index d = a.d, each = a.gated ? 2 * d : d, times = a.heads / a.heads_kv, wide = a.heads * d;
  std::vector<float> queries(a.rows * wide);
  for (Index row = 0; row < a.rows; ++row) {
    const float *from = at(a.qkv) + row * a.stride, *cos = at(a.cos) + row * a.rotary, *sin = at(a.sin) + row * a.rotary;
    for (Index h = 0; h < a.heads; ++h) {
      turn(from + h * each, at(a.q_norm), cos, sin, queries.data() + row * wide + h * d, d, a.rotary, static_cast<float>(a.eps),
           a.zero_centred, static_cast<float>(a.scale));
    }
    const float *key = from + a.heads * each, *value = key + a.heads_kv * d;
    for (Index h = 0; h < a.heads_kv; ++h) {
      const Index to = ((samples[row] * a.heads_kv + h) * a.room + written[row]) * d;
      turn(key + h * d, at(a.k_norm), cos, sin, at(a.own_k) + to, d, a.rotary, static_cast<float>(a.eps), a.zero_centred, 1);
      std::copy_n(value + h * d, d, at(a.own_v) + to);
    }
  }
  struct Task { Index first, end; };  // rows of one place
  std::vector<Task> tasks;
  const Index at_once = std::max<Index>(1, kColumns / times);
  for (Index row = 0; row < a.rows; ++row) {
    const bool joins = !tasks.empty() && row - tasks.back().first < at_once &&
                       samples[row] / a.group_size == samples[tasks.back().first] / a.group_size;
    if (joins) {
      tasks.back().end = row + 1;
    } else {
      tasks.push_back({row, row + 1});
    }
  }
  Index work = 0;
  for (Index row = 0; row < a.rows; ++row) work += (lengths[samples[row] / a.group_size] + written[row]) * wide;
  // For some milliseconds after each product torch's own threads wait at full speed: less work than that is done sooner alone
  share(static_cast<Index>(tasks.size()) * a.heads_kv, std::min<Index>(threads, work / 20000000 + 1), [&](Index number) {
    const Task task = tasks[number / a.heads_kv];
    const Index head = number % a.heads_kv, place = samples[task.first] / a.group_size, start = (place * a.heads_kv + head) * a.longest * d;
    Group g{at(a.prompt_k) + start, at(a.prompt_v) + start, lengths[place], d, times, (task.end - task.first) * times, 0, {}, {}, {}, 0};
    g.wide = up(g.columns, kLanes);
    std::vector<float> columns(2 * d * g.wide);
    float *turned = columns.data(), *found = turned + d * g.wide;
    for (Index c = 0; c < g.columns; ++c) {
      const Index row = task.first + c / times, from = (samples[row] * a.heads_kv + head) * a.room * d;
      g.own_k[c] = at(a.own_k) + from, g.own_v[c] = at(a.own_v) + from, g.own[c] = written[row] + 1;
      g.most = std::max(g.most, g.own[c]);
      const float* query = queries.data() + row * wide + (head * times + c % times) * d;
      for (Index i = 0; i < d; ++i) turned[i * g.wide + c] = query[i];
    }
    std::vector<float> scores(g.length * g.wide + g.columns * g.most);
    attend(g, turned, scores.data(), scores.data() + g.length * g.wide, found);
    for (Index c = 0; c < g.columns; ++c) {
      const Index row = task.first + c / times, h = head * times + c % times;
      float* to = at(a.out) + row * wide + h * d;
      for (Index i = 0; i < d; ++i) to[i] = found[i * g.wide + c];
      if (a.gated) gated(at(a.qkv) + row * a.stride + h * each + d, to, d);
    }
  });
}

void step_delta(const StepDelta& a, int threads) {
  const Index keys = a.key_heads * a.d_k, values = a.heads * a.d_v, channels = 2 * keys + values;
  const Index *samples = at<Index>(a.samples), worth = a.count * a.heads * a.d_k * a.d_v / 8000000;
  share(a.count, std::min<Index>(threads, worth + 1), [&](Index row) {
    const float *from = at(a.rows) + row * a.stride, *z = from + channels, *b = z + values, *decays = b + a.heads;
    std::vector<float> room(channels + values + 2 * a.heads);
    float *mixed = room.data(), *found = mixed + channels, *g = found + values, *beta = g + a.heads;
    const auto address = [](const void* x) { return reinterpret_cast<std::uintptr_t>(x); };
    causal_conv_step(a.tails, address(from), a.weight, address(samples + row), address(mixed), 1, channels);
    for (Index h = 0; h < a.heads; ++h) {
      const float x = decays[h] + at(a.dt_bias)[h];
      g[h] = -std::exp(at(a.A_log)[h]) * (x > 20 ? x : std::log1p(std::exp(x)));
      beta[h] = 1 / (1 + std::exp(-b[h]));
    }
    delta_step(a.states, address(mixed), address(mixed + keys), address(mixed + 2 * keys), address(g), address(beta),
               address(samples + row), address(found), 1, a.key_heads, a.heads, a.d_k, a.d_v, 1 / std::sqrt(double(a.d_k)), true, 1);
    for (Index h = 0; h < a.heads; ++h) {
      gated_norm(found + h * a.d_v, at(a.norm), z + h * a.d_v, at(a.out) + row * values + h * a.d_v, a.d_v,
                 static_cast<float>(a.eps));
    }
  });
}

}  // namespace sslr1
