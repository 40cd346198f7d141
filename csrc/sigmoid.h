// 1 / (1 + e^-y). Behind vectorised.h.
#pragma once
#include "exponential.h"

namespace sslr1 {

IN_EACH_CLONE float sigmoid(float y) {
  const float size = y < 0 ? -y : y;
  const float e = size < -kLowest ? exponential<float, std::uint32_t>(-size) : 0.0f;
  const float of_size = 1 / (1 + e);
  return y < 0 ? e * of_size : of_size + (y - y);  // NaN stays
}

}  // namespace sslr1
