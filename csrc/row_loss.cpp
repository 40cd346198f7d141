// A row is read from memory once and written once: its three passes (maximum, sums, gradient) find it in L2. One exponential an
// element, a second one where the entropy has a gradient. Sums are taken in lanes of fixed width, blocks of them in double, so a
// row's result is the same on every machine with the same exponential, whatever the other rows hold.
#include "vectorised.h"

#include "exponential.h"
#include "row_loss.h"
#include "share.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace sslr1 {
namespace {

using Index = std::int64_t;
constexpr int kLanes = 16;
constexpr Index kBlock = 4096;  // elements whose sums stay in float

// Vectors of the language's own (GCC, Clang), so that the sums' order is the same whatever registers there are.
using Floats = float __attribute__((vector_size(4 * kLanes)));
using Bits = std::uint32_t __attribute__((vector_size(4 * kLanes)));

IN_EACH_CLONE Floats load(const float* x, Index n) {  // -inf after the n-th
  Floats v = Floats{} - std::numeric_limits<float>::infinity();
  std::memcpy(&v, x, 4 * std::min<Index>(n, kLanes));
  return v;
}

VECTORISED float maximum(const float* x, Index n) {
  Floats most = load(x, 0);
  for (Index i = 0; i < n; i += kLanes) {
    const Floats v = n - i >= kLanes ? load(x + i, kLanes) : load(x + i, n - i);
    most = v > most ? v : most;
  }
  float found = most[0];
  for (int l = 1; l < kLanes; ++l) found = std::max(found, most[l]);
  return found;
}

// How a row adds up: `peaks` elements equal the maximum m and count 1 each, the others' e^(x - m) is `rest`. Kept apart, since a
// token that is nearly certain has a gradient of 1 - p = rest / (1 + rest), which 1 + rest in float would round away.
struct Sums {
  double peaks = 0, rest = 0, weighted = 0;  // weighted: sum of (x - m) e^(x - m)
  double beyond_one() const { return peaks - 1 + rest; }
};

// Adds n <= kBlock elements, with e^((x - top) factor) in place of e^(x - m), which is written over them where `keep`.
template <bool keep>
IN_EACH_CLONE void sum_block(float* x, Index n, float factor, float top, Sums& sums) {
  Floats peaks{}, rest{}, weighted{};
  for (Index i = 0; i < n; i += kLanes) {
    Floats d = ((n - i >= kLanes ? load(x + i, kLanes) : load(x + i, n - i)) - top) * factor;
    d = d < kLowest ? Floats{} + kLowest : d;  // -inf times 0
    const Floats e = d > kLowest ? exponential<Floats, Bits>(d) : Floats{} + (d - d);  // NaN stays
    peaks += d < 0 ? Floats{} : Floats{} + 1.0f;
    rest += d < 0 ? e : Floats{};
    weighted += d * e;
    if (keep) std::memcpy(x + i, &e, 4 * std::min<Index>(n - i, kLanes));
  }
  for (int l = 0; l < kLanes; ++l) sums.peaks += peaks[l], sums.rest += rest[l], sums.weighted += weighted[l];
}

VECTORISED void sum_and_keep(float* x, Index n, float factor, float top, Sums& sums) {
  sum_block<true>(x, n, factor, top, sums);
}

VECTORISED void sum_only(float* x, Index n, float factor, float top, Sums& sums) {
  sum_block<false>(x, n, factor, top, sums);
}

VECTORISED void scale(float* x, Index n, float by) {
  for (Index i = 0; i < n; ++i) x[i] *= by;
}

// x -> factor * p * (bonus * (log p + entropy) - g), where log p = (x - near) * factor + offset: `near` is close to the logits that
// matter, or differences would be rounded
VECTORISED void gradient(float* x, Index n, float factor, float near, float offset, float entropy, float g, float bonus) {
  for (Index i = 0; i < n; ++i) {
    float d = (x[i] - near) * factor + offset;
    d = d > 0 ? 0.0f : d < kLowest ? kLowest : d;
    const float p = d > kLowest ? exponential<float, std::uint32_t>(d) : d - d;  // NaN stays
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
  double inverse_temperature;
  float clip_low, clip_high;
  bool cispo;
};

// d loss / d logp, as `slope` of the reference has it.
float slope(const Arguments& a, Index row, double logprob) {
  const float A = a.advantage[row], above = 1 + a.clip_high;
  const float ratio = a.old ? static_cast<float>(std::exp(logprob - a.old[row])) : 1.0f;
  float g;
  if (a.cispo) {
    g = -a.policy[row] * A * (ratio > above ? above : ratio);
  } else {
    const float clipped = ratio < 1 - a.clip_low ? 1 - a.clip_low : ratio > above ? above : ratio;
    g = ratio * A > clipped * A ? 0.0f : -a.policy[row] * (ratio * A);
  }
  return a.ref ? g - a.kl[row] * static_cast<float>(std::expm1(a.ref[row] - logprob)) : g;
}

void one_row(const Arguments& a, Index row) {
  float* x = a.logits + row * a.stride;
  const Index n = a.vocabulary, token = a.tokens[row];
  const double inverse = a.inverse_temperature;  // of a logit of 90, its rounding to float would be 1e-5 of the ratio
  const float picked = x[token], bonus = a.mode ? a.bonus[row] : 0.0f, factor = static_cast<float>(inverse);
  // The token's own entry: g (1 - p), and the bonus
  const auto finish = [&](float g, float logprob, float entropy) {
    const float p = std::exp(logprob), rest = -std::expm1(logprob);
    x[token] = factor * (g * rest + bonus * (p > 0 ? p * (logprob + entropy) : 0.0f));
  };
  if (a.mode == 2) {
    const double zero = picked - a.logprobs[row] / inverse;  // the logit whose log-prob is 0
    const float near = static_cast<float>(zero);
    gradient(x, n, factor, near, static_cast<float>((near - zero) * inverse), a.entropy[row], a.g[row], bonus);
    return finish(a.g[row], a.logprobs[row], a.entropy[row]);
  }
  const float top = maximum(x, n);
  const bool keep = a.mode == 1 && bonus == 0;
  Sums sums;
  for (Index i = 0; i < n; i += kBlock) {
    (keep ? sum_and_keep : sum_only)(x + i, std::min(kBlock, n - i), factor, top, sums);
  }
  const bool broken = std::isnan(sums.weighted);
  const double log_s = broken ? sums.weighted : std::log1p(sums.beyond_one()), s = 1 + sums.beyond_one();
  double logprob = (static_cast<double>(picked) - top) * inverse - log_s;
  logprob = logprob > 0 ? 0.0 : logprob;
  const float entropy = static_cast<float>(log_s - sums.weighted / s);
  a.logprobs[row] = static_cast<float>(logprob);
  a.entropy[row] = entropy;
  if (a.mode == 0) return;
  const float g = slope(a, row, logprob);
  if (keep) {
    scale(x, n, static_cast<float>(-g * inverse / s));
  } else {
    gradient(x, n, factor, top, static_cast<float>(-log_s), entropy, g, bonus);
  }
  finish(g, a.logprobs[row], entropy);
}

}  // namespace

void row_loss(int mode, std::uintptr_t logits, std::uintptr_t tokens, std::uintptr_t logprobs, std::uintptr_t entropy,
              std::uintptr_t advantage, std::uintptr_t policy, std::uintptr_t kl, std::uintptr_t bonus, std::uintptr_t old,
              std::uintptr_t ref, std::uintptr_t g, std::int64_t rows, std::int64_t vocabulary, std::int64_t stride,
              double inverse_temperature, float clip_low, float clip_high, bool cispo, int threads) {
  const auto in = [](std::uintptr_t address) { return reinterpret_cast<const float*>(address); };
  const auto out = [](std::uintptr_t address) { return reinterpret_cast<float*>(address); };
  const Arguments a{mode,    out(logits), reinterpret_cast<const Index*>(tokens), out(logprobs), out(entropy), in(advantage),
                    in(policy), in(kl),   in(bonus), in(old), in(ref), in(g), vocabulary, stride, inverse_temperature,
                    clip_low, clip_high, cispo};
  const Index worth = rows * vocabulary / 400000;  // elements that outweigh the start of a thread
  share(rows, std::min<Index>(threads, worth + 1), [&](Index row) { one_row(a, row); });
}

}  // namespace sslr1
