// The gated delta rule, one token on: a thread takes a row.
#include "vectorised.h"
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=fast")
#endif

#include <algorithm>
#include <vector>

#include "delta_rule.h"
#include "exponential.h"
#include "normed.h"
#include "share.h"

namespace sslr1 {
namespace {

// One head's state and token. found: d_v floats for what the state says of k.
VECTORISED void step(float* state, const float* q, const float* k, const float* v, float g, float beta, float* out, float* found,
                     float* qk, Index d_k, Index d_v, float scale, bool l2norm) {
  const float by = decay(g), by_q = scale * (l2norm ? inverse_length(q, d_k) : 1), by_k = l2norm ? inverse_length(k, d_k) : 1;
  float along = 0;  // q k
  for (Index i = 0; i < d_k; ++i) qk[i] = q[i] * by_q, qk[d_k + i] = k[i] * by_k, along += qk[i] * qk[d_k + i];
  std::fill_n(found, d_v, 0.0f);
  for (Index i = 0; i < d_k; ++i) {
    const float factor = qk[d_k + i];
    for (Index j = 0; j < d_v; ++j) found[j] += factor * state[i * d_v + j];
  }
  for (Index j = 0; j < d_v; ++j) found[j] = beta * (v[j] - by * found[j]), out[j] = along * found[j];
  for (Index i = 0; i < d_k; ++i) {
    const float of_q = qk[i] * by, of_k = qk[d_k + i];
    float* row = state + i * d_v;
    for (Index j = 0; j < d_v; ++j) out[j] += of_q * row[j], row[j] = by * row[j] + of_k * found[j];
  }
}

}  // namespace

void delta_step(std::uintptr_t states, std::uintptr_t q, std::uintptr_t k, std::uintptr_t v, std::uintptr_t g,
                std::uintptr_t beta, std::uintptr_t samples, std::uintptr_t out, std::int64_t rows, std::int64_t key_heads,
                std::int64_t heads, std::int64_t d_k, std::int64_t d_v, double scale, bool l2norm, int threads) {
  const auto at = [](std::uintptr_t address) { return reinterpret_cast<float*>(address); };
  const Index* sample = reinterpret_cast<const Index*>(samples);
  const Index worth = rows * heads * d_k * d_v / 400000;  // numbers that outweigh the start of a thread
  share(rows, std::min<Index>(threads, worth + 1), [&](Index row) {
    std::vector<float> room(2 * d_k + d_v);
    for (Index head = 0; head < heads; ++head) {
      const Index key_head = row * key_heads + head / (heads / key_heads), here = row * heads + head;
      step(at(states) + (sample[row] * heads + head) * d_k * d_v, at(q) + key_head * d_k, at(k) + key_head * d_k,
           at(v) + here * d_v, at(g)[here], at(beta)[here], at(out) + here * d_v, room.data() + 2 * d_k, room.data(), d_k, d_v,
           static_cast<float>(scale), l2norm);
    }
  });
}

}  // namespace sslr1
