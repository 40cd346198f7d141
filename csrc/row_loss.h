// Rows of logits to log-probs, entropies and gradients on the CPU. sslr1/ops/row_loss.py is the reference.
#pragma once
#include <cstdint>

namespace sslr1 {

// mode 0: statistics; 1: statistics and gradient; 2: gradient from the log-probs, entropies and slopes `g` given.
// logits: float [rows, vocabulary], `stride` elements apart, overwritten by the gradient; tokens: int64 [rows]; all others:
// float [rows], or 0: old on-policy, ref without KL, what a mode doesn't read.
void row_loss(int mode, std::uintptr_t logits, std::uintptr_t tokens, std::uintptr_t logprobs, std::uintptr_t entropy,
              std::uintptr_t advantage, std::uintptr_t policy, std::uintptr_t kl, std::uintptr_t bonus, std::uintptr_t old,
              std::uintptr_t ref, std::uintptr_t g, std::int64_t rows, std::int64_t vocabulary, std::int64_t stride,
              double inverse_temperature, float clip_low, float clip_high, bool cispo, int threads);

}  // namespace sslr1
