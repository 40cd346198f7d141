// Each number is read once and written once; a norm's backward reads its rows twice, the second time from the caches.
#include "vectorised.h"

#include <cmath>

#include "elementwise.h"
#include "share.h"
#include "sigmoid.h"

namespace sslr1 {
namespace {

using Index = std::int64_t;
constexpr Index kLanes = 16;  // sums side by side, so that they become vectors
constexpr Index kRows = 64;   // that a thread takes at a time; a weight's gradient is summed in their order
constexpr Index kPiece = 1 << 15;

const float* floats(std::uintptr_t at) { return reinterpret_cast<const float*>(at); }
float* floats_to(std::uintptr_t at) { return reinterpret_cast<float*>(at); }

IN_EACH_CLONE float total(const float* lanes) {
  float sum = 0;
  for (Index i = 0; i < kLanes; ++i) sum += lanes[i];
  return sum;
}

// 1 / sqrt(mean x^2 + eps)
IN_EACH_CLONE float root(const float* x, Index n, float eps) {
  float lanes[kLanes] = {};
  Index i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (Index j = 0; j < kLanes; ++j) lanes[j] += x[i + j] * x[i + j];
  }
  for (; i < n; ++i) lanes[i % kLanes] += x[i] * x[i];
  return 1 / std::sqrt(total(lanes) / static_cast<float>(n) + eps);
}

VECTORISED void norm_rows(const float* x, const float* weight, float* out, Index rows, Index n, float eps, float plus) {
  for (Index row = 0; row < rows; ++row, x += n, out += n) {
    const float r = root(x, n, eps);
    for (Index i = 0; i < n; ++i) out[i] = x[i] * r * (weight[i] + plus);
  }
}

VECTORISED void norm_rows_backward(const float* grad, const float* x, const float* weight, float* dx, float* dweight, Index rows,
                                   Index n, float eps, float plus) {
  for (Index i = 0; i < n; ++i) dweight[i] = 0;
  for (Index row = 0; row < rows; ++row, grad += n, x += n, dx += n) {
    const float r = root(x, n, eps);
    float lanes[kLanes] = {};
    Index i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      for (Index j = 0; j < kLanes; ++j) lanes[j] += grad[i + j] * (weight[i + j] + plus) * x[i + j];
    }
    for (; i < n; ++i) lanes[i % kLanes] += grad[i] * (weight[i] + plus) * x[i];
    const float along = total(lanes) / static_cast<float>(n) * r * r;
    for (i = 0; i < n; ++i) {
      dweight[i] += grad[i] * (x[i] * r);
      dx[i] = (grad[i] * (weight[i] + plus) - x[i] * along) * r;
    }
  }
}

VECTORISED void swiglu_piece(const float* gate, const float* up, float* out, Index n) {
  for (Index i = 0; i < n; ++i) out[i] = gate[i] * sigmoid(gate[i]) * up[i];
}

VECTORISED void swiglu_piece_backward(const float* grad, const float* gate, const float* up, float* dgate, float* dup, Index n) {
  for (Index i = 0; i < n; ++i) {
    const float s = sigmoid(gate[i]), silu = gate[i] * s;
    dup[i] = grad[i] * silu;
    dgate[i] = grad[i] * up[i] * (s + silu * (1 - s));
  }
}

Index pieces(Index count, Index piece) { return (count + piece - 1) / piece; }

// For some milliseconds after each product torch's own threads wait at full speed: less work than that is done sooner alone.
Index worth(Index count, int threads) { return std::min<Index>(threads, count / 4000000 + 1); }

}  // namespace

void rms_norm(std::uintptr_t x, std::uintptr_t weight, std::uintptr_t out, std::int64_t rows, std::int64_t n, float eps, float plus,
              int threads) {
  share(pieces(rows, kRows), worth(rows * n, threads), [&](Index piece) {
    const Index first = piece * kRows;
    norm_rows(floats(x) + first * n, floats(weight), floats_to(out) + first * n, std::min(kRows, rows - first), n, eps, plus);
  });
}

void rms_norm_backward(std::uintptr_t grad, std::uintptr_t x, std::uintptr_t weight, std::uintptr_t dx, std::uintptr_t dweight,
                       std::int64_t rows, std::int64_t n, float eps, float plus, int threads) {
  const Index blocks = std::min<Index>(pieces(rows, kRows), 64), each = blocks ? pieces(rows, blocks) : 0;
  std::vector<float> sums(blocks * n, 0.0f);
  share(blocks, worth(rows * n, threads), [&](Index block) {
    const Index first = block * each, count = std::min(each, rows - first);
    if (count <= 0) return;
    norm_rows_backward(floats(grad) + first * n, floats(x) + first * n, floats(weight), floats_to(dx) + first * n,
                       sums.data() + block * n, count, n, eps, plus);
  });
  float* to = floats_to(dweight);
  for (Index i = 0; i < n; ++i) to[i] = 0;
  for (Index block = 0; block < blocks; ++block) {
    for (Index i = 0; i < n; ++i) to[i] += sums[block * n + i];
  }
}

void swiglu(std::uintptr_t gate, std::uintptr_t up, std::uintptr_t out, std::int64_t count, int threads) {
  share(pieces(count, kPiece), worth(count, threads), [&](Index piece) {
    const Index first = piece * kPiece;
    swiglu_piece(floats(gate) + first, floats(up) + first, floats_to(out) + first, std::min(kPiece, count - first));
  });
}

void swiglu_backward(std::uintptr_t grad, std::uintptr_t gate, std::uintptr_t up, std::uintptr_t dgate, std::uintptr_t dup,
                     std::int64_t count, int threads) {
  share(pieces(count, kPiece), worth(count, threads), [&](Index piece) {
    const Index first = piece * kPiece;
    swiglu_piece_backward(floats(grad) + first, floats(gate) + first, floats(up) + first, floats_to(dgate) + first,
                          floats_to(dup) + first, std::min(kPiece, count - first));
  });
}

}  // namespace sslr1
