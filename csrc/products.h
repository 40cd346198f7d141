// Small matrix products that stay in registers and the nearest caches. Behind vectorised.h; what includes it may let the compiler
// fuse multiplications and additions.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

namespace sslr1 {

using Index = std::int64_t;
constexpr int kLanes = 16;

using Floats = float __attribute__((vector_size(4 * kLanes)));

IN_EACH_CLONE Index up(Index n, Index to) { return (n + to - 1) / to * to; }

IN_EACH_CLONE Floats load(const float* x) {
  Floats v;
  std::memcpy(&v, x, sizeof v);
  return v;
}

IN_EACH_CLONE void store(float* x, Floats v) { std::memcpy(x, &v, sizeof v); }

// c [4, 16 VECTORS] (+)= a [4, depth] @ b [depth, 16 VECTORS]; a's strides are free, b's and c's rows lie ldb and ldc apart.
template <int VECTORS>
IN_EACH_CLONE void tile(const float* a, Index a_row, Index a_column, const float* b, Index ldb, float* c, Index ldc, Index depth,
                        bool add) {
  Floats sums[4][VECTORS];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) sums[r][v] = add ? load(c + r * ldc + v * kLanes) : Floats{};
  }
  for (Index i = 0; i < depth; ++i, a += a_column, b += ldb) {
    Floats row[VECTORS];
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) row[v] = load(b + v * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) sums[r][v] += a[r * a_row] * row[v];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) store(c + r * ldc + v * kLanes, sums[r][v]);
  }
}

enum Shape { kFull, kLower, kUpper };  // of a: what is beyond its diagonal is not read

// c [m, n] (+)= a [m, depth] @ b [depth, n]; m a multiple of 4, n of 16.
IN_EACH_CLONE void product(Index m, Index n, Index depth, const float* a, Index a_row, Index a_column, const float* b, Index ldb,
                           float* c, Index ldc, bool add, Shape shape = kFull) {
  for (Index j = 0; j < n; j += 32) {
    for (Index i = 0; i < m; i += 4) {
      const Index from = shape == kUpper ? i : 0, to = shape == kLower ? std::min(depth, i + 4) : depth;
      const float *left = a + i * a_row + from * a_column, *right = b + from * ldb + j;
      if (n - j > 16) {
        tile<2>(left, a_row, a_column, right, ldb, c + i * ldc + j, ldc, to - from, add);
      } else {
        tile<1>(left, a_row, a_column, right, ldb, c + i * ldc + j, ldc, to - from, add);
      }
    }
  }
}

IN_EACH_CLONE void transpose(const float* a, Index rows, Index columns, Index lda, float* to, Index ldt) {
  for (Index j = 0; j < columns; j += 16) {
    for (Index i = 0; i < rows; ++i) {
      for (Index l = 0; l < 16; ++l) to[(j + l) * ldt + i] = a[i * lda + j + l];
    }
  }
}

IN_EACH_CLONE float dot(const float* a, const float* b, Index n) {
  Floats sums{};
  for (Index i = 0; i < n; i += kLanes) sums += load(a + i) * load(b + i);
  float found = 0;
  for (int l = 0; l < kLanes; ++l) found += sums[l];
  return found;
}


}  // namespace sslr1
