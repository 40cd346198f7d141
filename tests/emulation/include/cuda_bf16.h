// What the project's kernels use of bfloat16.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
  std::uint16_t bits;

  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float x) {  // to the nearest, ties to even
    std::uint32_t wide;
    std::memcpy(&wide, &x, sizeof wide);
    bits = std::isnan(x) ? 0x7FFF : (wide + 0x7FFF + (wide >> 16 & 1)) >> 16;
  }
};

struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
