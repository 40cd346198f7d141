// 1 / length of a row of q or k. Behind vectorised.h.
#pragma once
#include <cmath>

#include "products.h"

namespace sslr1 {

constexpr float kEpsilon = 1e-6f;  // under the root

IN_EACH_CLONE float inverse_length(const float* x, Index n) {
  float sum = kEpsilon;
  for (Index i = 0; i < n; ++i) sum += x[i] * x[i];
  return 1 / std::sqrt(sum);
}

}  // namespace sslr1
