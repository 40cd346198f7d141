// e^x for x in kLowest..0, a number or a vector: Cephes' polynomial on [-ln 2 / 2, ln 2 / 2], error under 2 units in the last
// place. Of NaN it makes anything. Behind vectorised.h.
#pragma once
#include <cstdint>
#include <cstring>

namespace sslr1 {

constexpr float kLowest = -87.0f;  // below it e^x counts as 0

template <class F, class B>
IN_EACH_CLONE F exponential(F x) {
  const F shifted = x * 1.44269504088896341f + 12582912.0f;  // which rounds to a whole number, in the low bits
  const F whole = shifted - 12582912.0f;
  F r = x - whole * 0.693359375f;
  r = r - whole * -2.12194440e-4f;
  F y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  B exponent, bits;  // unsigned: they wrap
  std::memcpy(&exponent, &shifted, sizeof shifted);
  std::memcpy(&bits, &y, sizeof y);
  bits += exponent << 23;  // the low bits of 12582912 itself are 0
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

IN_EACH_CLONE float decay(float x) {  // e^x, x <= 0
  return x > kLowest ? exponential<float, std::uint32_t>(x) : x <= kLowest ? 0.0f : x;  // NaN stays
}

}  // namespace sslr1
