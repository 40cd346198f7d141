// Log-prob of one token and entropy of each row of logits, read once.
#pragma once
#include <cstdint>

namespace sslr1 {

// logits: device float32 [rows, vocabulary], `stride` elements apart; tokens: int64 [rows]; logprobs, entropy: float32
// [rows]. Throws std::runtime_error with CUDA's message if the launch fails.
void row_logprobs(std::uintptr_t logits, std::uintptr_t tokens, std::uintptr_t logprobs, std::uintptr_t entropy,
                  std::int64_t rows, std::int64_t vocabulary, std::int64_t stride, float inverse_temperature,
                  std::uintptr_t stream);

}  // namespace sslr1
