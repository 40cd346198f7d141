// Norms and SwiGLU on the CPU, float32. sslr1/ops/elementwise.py says what they compute.
#pragma once
#include <cstdint>

namespace sslr1 {

// x, out: [rows, n], dense; out = (weight + plus) * x / sqrt(mean x^2 + eps).
void rms_norm(std::uintptr_t x, std::uintptr_t weight, std::uintptr_t out, std::int64_t rows, std::int64_t n, float eps, float plus,
              int threads);

// grad, x, dx: [rows, n], dense; dweight: [n].
void rms_norm_backward(std::uintptr_t grad, std::uintptr_t x, std::uintptr_t weight, std::uintptr_t dx, std::uintptr_t dweight,
                       std::int64_t rows, std::int64_t n, float eps, float plus, int threads);

// out = gate * sigmoid(gate) * up, of `count` numbers each.
void swiglu(std::uintptr_t gate, std::uintptr_t up, std::uintptr_t out, std::int64_t count, int threads);

void swiglu_backward(std::uintptr_t grad, std::uintptr_t gate, std::uintptr_t up, std::uintptr_t dgate, std::uintptr_t dup,
                     std::int64_t count, int threads);

}  // namespace sslr1
