// A row is read three times while it is in the nearest caches: for its maxima, for blocks' sums of exponentials, and for the block
// that is drawn from. Sums run in an order that the length fixes.
#include "vectorised.h"

#include "draw.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "exponential.h"
#include "share.h"

namespace sslr1 {
namespace {

using Index = std::int64_t;
constexpr Index kBlock = 256;
constexpr int kLanes = 16;
constexpr float kNone = -std::numeric_limits<float>::infinity();

IN_EACH_CLONE float power(float x) {  // e^x, x <= 0
  return x > kLowest ? exponential<float, std::uint32_t>(x) : 0.0f;
}

// Of n scaled logits the drawable ones to x, kNone for others, and the largest of all, NaN where there is one.
VECTORISED float scaled(const float* logits, const std::uint8_t* aside, float temperature, float* x, float* outside, Index n) {
  float top = kNone, odd = 0;
  for (Index i = 0; i < n; ++i) {
    const float value = logits[i] / temperature;
    const bool out = aside && aside[i];
    top = value > top ? value : top;
    odd += value - value == 0 || value == kNone ? 0.0f : 1.0f;  // NaN and +inf
    x[i] = out ? kNone : value;
    outside[i] = out ? value : kNone;
  }
  return odd > 0 ? std::numeric_limits<float>::quiet_NaN() : top;
}

VECTORISED float largest(const float* x, Index n) {
  float top = kNone;
  for (Index i = 0; i < n; ++i) top = x[i] > top ? x[i] : top;
  return top;
}

// Weights e^(x - top) in place of n numbers, and their sum.
VECTORISED double weigh(float* x, float top, Index n) {
  double sums[kLanes] = {};
  Index i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) x[i + l] = power(x[i + l] - top), sums[l] += x[i + l];
  }
  for (; i < n; ++i) x[i] = power(x[i] - top), sums[0] += x[i];
  double sum = 0;
  for (int l = 0; l < kLanes; ++l) sum += sums[l];
  return sum;
}

}  // namespace

void draw(std::uintptr_t logits, std::uintptr_t uniforms, std::uintptr_t aside, std::uintptr_t tokens, std::uintptr_t logprobs,
          std::int64_t rows, std::int64_t vocabulary, std::int64_t stride, double temperature, int threads) {
  const Index V = vocabulary, blocks = (V + kBlock - 1) / kBlock;
  const float by = temperature == 0 ? 1.0f : static_cast<float>(temperature);
  share(rows, std::min<Index>(threads, rows * V / 500000 + 1), [&](Index row) {
    const float* from = reinterpret_cast<const float*>(logits) + row * stride;
    std::vector<float> room(2 * V);
    float *x = room.data(), *outside = x + V;
    const float whole = scaled(from, reinterpret_cast<const std::uint8_t*>(aside), by, x, outside, V);
    const float top = largest(x, V);
    Index& token = reinterpret_cast<Index*>(tokens)[row];
    float& logprob = reinterpret_cast<float*>(logprobs)[row];
    token = 0, logprob = std::numeric_limits<float>::quiet_NaN();
    if (!std::isfinite(whole) || !std::isfinite(top)) return;
    if (temperature == 0) token = std::max_element(x, x + V) - x;
    std::vector<double> sums(blocks);
    double total = 0, left = 0;
    for (Index b = 0; b < blocks; ++b) {
      const Index start = b * kBlock, n = std::min(kBlock, V - start);
      total += sums[b] = weigh(x + start, top, n);
      if (aside) left += weigh(outside + start, whole, n);
    }
    if (temperature != 0) {
      const double target = reinterpret_cast<const double*>(uniforms)[row] * total;
      double before = 0;
      Index chosen = -1, last = 0;
      for (Index b = 0; b < blocks && chosen < 0; ++b) {
        if (!(sums[b] > 0)) continue;
        last = b;
        if (before + sums[b] > target) {
          chosen = b;
        } else {
          before += sums[b];
        }
      }
      if (chosen < 0) chosen = last, before -= sums[last];
      double sum = before;
      for (Index i = chosen * kBlock; i < std::min(V, (chosen + 1) * kBlock); ++i) {
        if (!(x[i] > 0)) continue;
        token = i, sum += x[i];
        if (sum > target) break;
      }
    }
    total = total * std::exp(static_cast<double>(top) - whole) + left;
    logprob = static_cast<float>(static_cast<double>(from[token] / by - whole) - std::log(total));
  });
}

}  // namespace sslr1
