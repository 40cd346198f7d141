// One token a row of float32 logits; sslr1/ops/sampling.py says which.
#pragma once
#include <cstdint>

namespace sslr1 {

// logits [rows, vocabulary], rows `stride` floats apart; uniforms: float64 [rows]; aside: uint8 [vocabulary], 1 for ids that are never
// drawn, or 0; temperature 0 is greedy. Writes tokens int64 and logprobs float32 [rows].
void draw(std::uintptr_t logits, std::uintptr_t uniforms, std::uintptr_t aside, std::uintptr_t tokens, std::uintptr_t logprobs,
          std::int64_t rows, std::int64_t vocabulary, std::int64_t stride, double temperature, int threads);

}  // namespace sslr1
