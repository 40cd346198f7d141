// A thread takes a block of channels and goes through all rows, so that what several completions give to their prompt's last rows,
// and all rows to the weight, adds up in one order. x is read once, and in the backward once more to make y again.
#include "vectorised.h"

#include "causal_conv.h"
#include "share.h"
#include "sigmoid.h"

namespace sslr1 {
namespace {

using Index = std::int64_t;
constexpr Index kBlock = 64;  // channels
constexpr Index kWidth = 4;

struct Block {
  const float* x;
  const float* weight;
  const Index* context;
  Index rows, channels, stride, first, size;

  IN_EACH_CLONE void sums(Index row, const float** at, float* y) const {
    static const float zeros[kBlock] = {};
    at[kWidth - 1] = x + row * stride + first;
    for (Index j = 1; j < kWidth; ++j) {
      const Index before = context[(j - 1) * rows + row];
      at[kWidth - 1 - j] = before < 0 ? zeros : x + before * stride + first;
    }
    const float* w = weight + first;
    for (Index i = 0; i < size; ++i) {
      y[i] = at[3][i] * w[3 * channels + i] + at[2][i] * w[2 * channels + i] + at[1][i] * w[channels + i] + at[0][i] * w[i];
    }
  }
};

VECTORISED void forward(const Block& b, float* out) {
  float y[kBlock];
  const float* at[kWidth];
  for (Index row = 0; row < b.rows; ++row) {
    b.sums(row, at, y);
    float* to = out + row * b.channels + b.first;
    for (Index i = 0; i < b.size; ++i) to[i] = y[i] * sigmoid(y[i]);
  }
}

VECTORISED void backward(const Block& b, const float* grad, float* dx, float* dweight) {
  float y[kBlock], dw[kWidth][kBlock] = {};
  const float* at[kWidth];
  for (Index row = 0; row < b.rows; ++row) std::fill_n(dx + row * b.channels + b.first, b.size, 0.0f);
  for (Index row = 0; row < b.rows; ++row) {
    b.sums(row, at, y);
    const float* g = grad + row * b.channels + b.first;
    for (Index i = 0; i < b.size; ++i) {
      const float s = sigmoid(y[i]);
      y[i] = g[i] * s * (1 + y[i] * (1 - s));
    }
    for (Index j = 0; j < kWidth; ++j) {
      const Index before = j ? b.context[(j - 1) * b.rows + row] : row;
      if (before < 0) continue;
      float* to = dx + before * b.channels + b.first;
      const float *w = b.weight + (kWidth - 1 - j) * b.channels + b.first, *from = at[kWidth - 1 - j];
      for (Index i = 0; i < b.size; ++i) to[i] += y[i] * w[i], dw[kWidth - 1 - j][i] += y[i] * from[i];
    }
  }
  for (Index j = 0; j < kWidth; ++j) std::copy_n(dw[j], b.size, dweight + j * b.channels + b.first);
}

VECTORISED void step(float* tail, const float* x, const float* weight, float* out, Index channels) {
  for (Index i = 0; i < channels; ++i) {
    float* t = tail + 3 * i;
    const float* w = weight + kWidth * i;
    out[i] = x[i] * w[3] + t[2] * w[2] + t[1] * w[1] + t[0] * w[0];
    t[0] = t[1], t[1] = t[2], t[2] = x[i];
  }
  for (Index i = 0; i < channels; ++i) out[i] *= sigmoid(out[i]);
}

template <class Work>
void each_block(std::uintptr_t x, std::uintptr_t weight, std::uintptr_t context, Index rows, Index channels, Index stride,
                int threads, const Work& work) {
  const Index worth = rows * channels / 100000;  // numbers that outweigh the start of a thread
  share((channels + kBlock - 1) / kBlock, std::min<Index>(threads, worth + 1), [&](Index block) {
    const Index first = block * kBlock;
    work(Block{reinterpret_cast<const float*>(x), reinterpret_cast<const float*>(weight),
               reinterpret_cast<const Index*>(context), rows, channels, stride, first, std::min(kBlock, channels - first)});
  });
}

}  // namespace

void causal_conv(std::uintptr_t x, std::uintptr_t weight, std::uintptr_t context, std::uintptr_t out, std::int64_t rows,
                 std::int64_t channels, std::int64_t stride, int threads) {
  each_block(x, weight, context, rows, channels, stride, threads,
             [&](const Block& b) { forward(b, reinterpret_cast<float*>(out)); });
}

void causal_conv_backward(std::uintptr_t grad, std::uintptr_t x, std::uintptr_t weight, std::uintptr_t context, std::uintptr_t dx,
                          std::uintptr_t dweight, std::int64_t rows, std::int64_t channels, std::int64_t stride, int threads) {
  each_block(x, weight, context, rows, channels, stride, threads, [&](const Block& b) {
    backward(b, reinterpret_cast<const float*>(grad), reinterpret_cast<float*>(dx), reinterpret_cast<float*>(dweight));
  });
}

void causal_conv_step(std::uintptr_t tails, std::uintptr_t x, std::uintptr_t weight, std::uintptr_t samples, std::uintptr_t out,
                      std::int64_t rows, std::int64_t channels) {
  const Index* sample = reinterpret_cast<const Index*>(samples);
  for (Index row = 0; row < rows; ++row) {
    step(reinterpret_cast<float*>(tails) + sample[row] * channels * 3, reinterpret_cast<const float*>(x) + row * channels,
         reinterpret_cast<const float*>(weight), reinterpret_cast<float*>(out) + row * channels, channels);
  }
}

}  // namespace sslr1
