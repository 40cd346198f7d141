// The causal convolution of width 4 with SiLU behind it. sslr1/ops/short_conv.py says what it computes.
#pragma once
#include <cstdint>

namespace sslr1 {

// x, out: float32 [rows, channels], x's rows `stride` floats apart; weight: float32 [4, channels], the last for the row itself;
// context: int64 [3, rows], the rows one, two and three before, -1 for none.
void causal_conv(std::uintptr_t x, std::uintptr_t weight, std::uintptr_t context, std::uintptr_t out, std::int64_t rows,
                 std::int64_t channels, std::int64_t stride, int threads);

// grad: float32 [rows, channels], dense; writes dx [rows, channels] and dweight [4, channels].
void causal_conv_backward(std::uintptr_t grad, std::uintptr_t x, std::uintptr_t weight, std::uintptr_t context, std::uintptr_t dx,
                          std::uintptr_t dweight, std::int64_t rows, std::int64_t channels, std::int64_t stride, int threads);

// One row for each of `samples` int64 [rows]: x, out float32 [rows, channels]; tails float32 [.., channels, 3], the rows before, moved
// on in place; weight float32 [channels, 4].
void causal_conv_step(std::uintptr_t tails, std::uintptr_t x, std::uintptr_t weight, std::uintptr_t samples, std::uintptr_t out,
                      std::int64_t rows, std::int64_t channels);

}  // namespace sslr1
