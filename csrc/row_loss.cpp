// A row is read from memory once and written once: its three passes (maximum, sums, gradient) find it in L2. One exponential an
// element, a second one where the entropy has a gradient. Sums are taken in lanes of fixed width, blocks of them in double, so a
// row's result is the same on every machine with the same exponential, whatever the other rows hold.
#include "vectorised.h"

#include "row_loss.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <future>
#include <limits>
#include <vector>

namespace sslr1 {
namespace {

using Index = std::int64_t;
constexpr int kLanes = 16;
constexpr Index kBlock = 4096;  // elements whose sums stay in float
constexpr float kLowest = -87.0f;  // below it e^x counts as 0

// e^x for x <= 0: Cephes' polynomial on [-ln 2 / 2, ln 2 / 2], error under 2 units in the last place. Of NaN it makes anything.
IN_EACH_CLONE float exponential(float x) {
  const float scaled = x * 1.44269504088896341f, magic = 12582912.0f;  // adding it rounds to a whole number
  const float whole = (scaled + magic) - magic;
  float r = x - whole * 0.693359375f;
  r = r - whole * -2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  const float bits = scaled + magic;
  std::int32_t exponent;
  std::memcpy(&exponent, &bits, 4);
  exponent <<= 23;  // the magic number's own low bits are 0
  std::int32_t result;
  std::memcpy(&result, &y, 4);
  result += exponent;
  std::memcpy(&y, &result, 4);
  return x < kLowest ? 0.0f : y;
}

VECTORISED float maximum(const float* x, Index n) {
  float lanes[kLanes];
  std::fill_n(lanes, kLanes, -std::numeric_limits<float>::infinity());
  Index i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) lanes[l] = x[i + l] > lanes[l] ? x[i + l] : lanes[l];
  }
  for (; i < n; ++i) lanes[0] = x[i] > lanes[0] ? x[i] : lanes[0];
  return *std::max_element(lanes, lanes + kLanes);
}

// How a row adds up: `peaks` elements equal the maximum m and count 1 each, the others' e^(x - m) is `rest`. Kept apart, since a
// token that is nearly certain has a gradient of 1 - p = rest / (1 + rest), which 1 + rest in float would round away.
struct Sums {
  double peaks = 0, rest = 0, weighted = 0;  // weighted: sum of (x - m) e^(x - m)
  double beyond_one() const { return peaks - 1 + rest; }
};

// Adds n <= kBlock elements; e^(x - m) is written over them where `keep`.
template <bool keep>
IN_EACH_CLONE void sum_block(float* x, Index n, float factor, float m, Sums& sums) {
  float peaks[kLanes] = {}, rest[kLanes] = {}, weighted[kLanes] = {};
  const auto at = [&](Index i, int l) {
    float d = x[i] * factor - m;
    const float e = exponential(d);
    peaks[l] += d < 0 ? 0.0f : 1.0f;
    rest[l] += d < 0 ? e : 0.0f;
    d = d < kLowest ? kLowest : d;  // -inf times 0
    weighted[l] += d * e;
    if (keep) x[i] = e;
  };
  Index i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) at(i + l, l);
  }
  for (; i < n; ++i) at(i, 0);
  for (int l = 0; l < kLanes; ++l) sums.peaks += peaks[l], sums.rest += rest[l], sums.weighted += weighted[l];
}

VECTORISED void sum_and_keep(float* x, Index n, float factor, float m, Sums& sums) {
  sum_block<true>(x, n, factor, m, sums);
}

VECTORISED void sum_only(float* x, Index n, float factor, float m, Sums& sums) {
  sum_block<false>(x, n, factor, m, sums);
}

VECTORISED void scale(float* x, Index n, float by) {
  for (Index i = 0; i < n; ++i) x[i] *= by;
}

// x -> factor * p * (bonus * (log p + entropy) - g), where log p = x * factor - near + logprob: `near` is a logit times factor
// whose log-prob that is
VECTORISED void gradient(float* x, Index n, float factor, float near, float logprob, float entropy, float g, float bonus) {
  for (Index i = 0; i < n; ++i) {
    float d = (x[i] * factor - near) + logprob;
    const float p = exponential(d > 0 ? 0 : d);
    d = d < kLowest ? kLowest : d;
    x[i] = factor * p * (bonus * (d + entropy) - g);
  }
}

struct Arguments {
  int mode;
  float* logits;
  const Index* tokens;
  float *logprobs, *entropy;
  const float *advantage, *policy, *kl, *bonus, *old, *ref, *g;
  Index vocabulary, stride;
  float factor, clip_low, clip_high;
  bool cispo;
};

// d loss / d logp, as `slope` of the reference has it.
float slope(const Arguments& a, Index row, float logprob) {
  const float A = a.advantage[row], ratio = a.old ? std::exp(logprob - a.old[row]) : 1.0f, above = 1 + a.clip_high;
  float g;
  if (a.cispo) {
    g = -a.policy[row] * A * (ratio > above ? above : ratio);
  } else {
    const float clipped = ratio < 1 - a.clip_low ? 1 - a.clip_low : ratio > above ? above : ratio;
    g = ratio * A > clipped * A ? 0.0f : -a.policy[row] * (ratio * A);
  }
  return a.ref ? g - a.kl[row] * std::expm1(a.ref[row] - logprob) : g;
}

void one_row(const Arguments& a, Index row) {
  float* x = a.logits + row * a.stride;
  const Index n = a.vocabulary, token = a.tokens[row];
  const float picked = x[token] * a.factor, bonus = a.mode ? a.bonus[row] : 0.0f;
  // The token's own entry: g (1 - p), and the bonus
  const auto finish = [&](float g, float logprob, float entropy) {
    const float p = std::exp(logprob), rest = -std::expm1(logprob);
    x[token] = a.factor * (g * rest + bonus * (p > 0 ? p * (logprob + entropy) : 0.0f));
  };
  if (a.mode == 2) {
    gradient(x, n, a.factor, picked, a.logprobs[row], a.entropy[row], a.g[row], bonus);
    return finish(a.g[row], a.logprobs[row], a.entropy[row]);
  }
  const float m = maximum(x, n) * a.factor;
  const bool keep = a.mode == 1 && bonus == 0;
  Sums sums;
  for (Index i = 0; i < n; i += kBlock) {
    (keep ? sum_and_keep : sum_only)(x + i, std::min(kBlock, n - i), a.factor, m, sums);
  }
  const bool broken = std::isnan(sums.weighted);
  const double log_s = broken ? sums.weighted : std::log1p(sums.beyond_one()), s = 1 + sums.beyond_one();
  const float logprob = static_cast<float>(static_cast<double>(picked) - m - log_s);
  const float entropy = static_cast<float>(log_s - sums.weighted / s);
  a.logprobs[row] = logprob > 0 ? 0.0f : logprob;
  a.entropy[row] = entropy;
  if (a.mode == 0) return;
  const float g = slope(a, row, a.logprobs[row]);
  if (keep) {
    scale(x, n, static_cast<float>(-g * static_cast<double>(a.factor) / s));
  } else {
    gradient(x, n, a.factor, m, static_cast<float>(-log_s), entropy, g, bonus);
  }
  finish(g, a.logprobs[row], entropy);
}

}  // namespace

void row_loss(int mode, std::uintptr_t logits, std::uintptr_t tokens, std::uintptr_t logprobs, std::uintptr_t entropy,
              std::uintptr_t advantage, std::uintptr_t policy, std::uintptr_t kl, std::uintptr_t bonus, std::uintptr_t old,
              std::uintptr_t ref, std::uintptr_t g, std::int64_t rows, std::int64_t vocabulary, std::int64_t stride,
              float inverse_temperature, float clip_low, float clip_high, bool cispo, int threads) {
  const auto in = [](std::uintptr_t address) { return reinterpret_cast<const float*>(address); };
  const auto out = [](std::uintptr_t address) { return reinterpret_cast<float*>(address); };
  const Arguments a{mode,    out(logits), reinterpret_cast<const Index*>(tokens), out(logprobs), out(entropy), in(advantage),
                    in(policy), in(kl),   in(bonus), in(old), in(ref), in(g), vocabulary, stride, inverse_temperature,
                    clip_low, clip_high, cispo};
  std::atomic<Index> next{0};
  const auto work = [&] {
    for (Index row; (row = next++) < rows;) one_row(a, row);
  };
  const Index worth = rows * vocabulary / 400000;  // elements that outweigh the start of a thread
  std::vector<std::future<void>> helpers;
  for (Index i = 1; i < std::min<Index>({threads, rows, worth + 1}); ++i) {
    helpers.push_back(std::async(std::launch::async, work));
  }
  work();
  for (auto& helper : helpers) helper.get();
}

}  // namespace sslr1
