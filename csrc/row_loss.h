// One row of logits in, its log-prob, its entropy and its gradient out. sslr1/ops/row_loss.py has the formulas and the reference.
#pragma once
#include <cstdint>

namespace sslr1 {

// mode 0: writes logprobs and entropy
// mode 1: the same, and writes the gradient; reads advantage, policy, kl, bonus and, if given, old and ref
// mode 2: writes the gradient; reads logprobs, entropy, g and bonus. A token whose logit is -inf makes the row NaN.
// An address is 0 for what a mode doesn't read, `old` on-policy and `ref` without KL. logits: float32 [rows, vocabulary], rows
// `stride` elements apart; tokens: int64 [rows]; all others: float32 [rows]. On the CPU the gradient overwrites the logits.
void row_loss(int mode, std::uintptr_t logits, std::uintptr_t tokens, std::uintptr_t logprobs, std::uintptr_t entropy,
              std::uintptr_t advantage, std::uintptr_t policy, std::uintptr_t kl, std::uintptr_t bonus, std::uintptr_t old,
              std::uintptr_t ref, std::uintptr_t g, std::int64_t rows, std::int64_t vocabulary, std::int64_t stride,
              double inverse_temperature, float clip_low, float clip_high, bool cispo, int threads);

// Addresses are the device's. out: float32 or bfloat16 [rows, vocabulary], `out_stride` elements apart, either the logits
// themselves or apart from them. Throws std::runtime_error with CUDA's message if the launch fails.
void row_loss_cuda(int mode, std::uintptr_t logits, std::uintptr_t tokens, std::uintptr_t logprobs,
                   std::uintptr_t entropy, std::uintptr_t advantage, std::uintptr_t policy, std::uintptr_t kl,
                   std::uintptr_t bonus, std::uintptr_t old, std::uintptr_t ref, std::uintptr_t g, std::int64_t rows,
                   std::int64_t vocabulary, std::int64_t stride, double inverse_temperature, float clip_low,
                   float clip_high, bool cispo, std::uintptr_t out, std::int64_t out_stride, bool out_bfloat16,
                   std::uintptr_t stream);

}  // namespace sslr1
