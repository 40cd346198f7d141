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

// c [ROWS, 16 VECTORS] (+)= a [ROWS, depth] @ b [depth, 16 VECTORS]; a's strides are free, b's and c's rows lie ldb and ldc apart.
template <int ROWS, int VECTORS>
IN_EACH_CLONE void tile(const float* a, Index a_row, Index a_column, const float* b, Index ldb, float* c, Index ldc, Index depth,
                        bool add) {
  Floats sums[ROWS][VECTORS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) sums[r][v] = add ? load(c + r * ldc + v * kLanes) : Floats{};
  }
  for (Index i = 0; i < depth; ++i, a += a_column, b += ldb) {
    Floats row[VECTORS];
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) row[v] = load(b + v * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) sums[r][v] += a[r * a_row] * row[v];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) store(c + r * ldc + v * kLanes, sums[r][v]);
  }
}

enum Shape { kFull, kLower, kUpper };  // of a: what is beyond its diagonal is not read

template <int ROWS>
IN_EACH_CLONE void tiles(Index columns, const float* a, Index a_row, Index a_column, const float* b, Index ldb, float* c, Index ldc,
                         Index depth, bool add) {
  if (columns > kLanes) {
    tile<ROWS, 2>(a, a_row, a_column, b, ldb, c, ldc, depth, add);
  } else {
    tile<ROWS, 1>(a, a_row, a_column, b, ldb, c, ldc, depth, add);
  }
}

// c [m, n] (+)= a [m, depth] @ b [depth, n]; n a multiple of 16, and m one of 4 where a has a shape.
IN_EACH_CLONE void product(Index m, Index n, Index depth, const float* a, Index a_row, Index a_column, const float* b, Index ldb,
                           float* c, Index ldc, bool add, Shape shape = kFull) {
  for (Index j = 0; j < n; j += 2 * kLanes) {
    Index i = 0;
    for (; i + 4 <= m; i += 4) {
      const Index from = shape == kUpper ? i : 0, to = shape == kLower ? std::min(depth, i + 4) : depth;
      tiles<4>(n - j, a + i * a_row + from * a_column, a_row, a_column, b + from * ldb + j, ldb, c + i * ldc + j, ldc, to - from, add);
    }
    for (; i < m; ++i) tiles<1>(n - j, a + i * a_row, a_row, a_column, b + j, ldb, c + i * ldc + j, ldc, depth, add);
  }
}

// Numbers of a and b change places, so that S by S of them are turned, where S is a power of 2.
template <int S>
IN_EACH_CLONE void turn(Floats& a, Floats& b) {
#ifdef __clang__
  for (int l = 0; l < kLanes; ++l) {
    if (l & S) std::swap(a[l], b[l - S]);
  }
#else
  using Places = std::int32_t __attribute__((vector_size(4 * kLanes)));
#define EACH(f) f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), f(13), f(14), f(15)
#define OF_A(l) (l & S ? l - S + kLanes : l)
#define OF_B(l) (l & S ? l + kLanes : l + S)
  const Floats first = a;
  a = __builtin_shuffle(first, b, Places{EACH(OF_A)}), b = __builtin_shuffle(first, b, Places{EACH(OF_B)});
#undef OF_B
#undef OF_A
#undef EACH
#endif
}

template <int S>
IN_EACH_CLONE void turn_all(Floats* x) {
#pragma GCC unroll 16
  for (int r = 0; r < kLanes; ++r) {
    if (!(r & S)) turn<S>(x[r], x[r + S]);
  }
}

// to [columns, rows] = a [rows, columns]
IN_EACH_CLONE void transpose(const float* a, Index rows, Index columns, Index lda, float* to, Index ldt) {
  const Index m = rows / kLanes * kLanes, n = columns / kLanes * kLanes;
  for (Index i = 0; i < m; i += kLanes) {
    for (Index j = 0; j < n; j += kLanes) {
      Floats x[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) x[r] = load(a + (i + r) * lda + j);
      turn_all<1>(x), turn_all<2>(x), turn_all<4>(x), turn_all<8>(x);
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) store(to + (j + r) * ldt + i, x[r]);
    }
  }
  for (Index i = 0; i < rows; ++i) {
    for (Index j = i < m ? n : 0; j < columns; ++j) to[j * ldt + i] = a[i * lda + j];
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
