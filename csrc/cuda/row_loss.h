// One row of logits in, its log-prob, its entropy and its gradient out; the formulas are in sslr1/ops/row_loss.py.
#pragma once
#include <cstdint>

namespace sslr1 {

// Addresses are the device's, 0 where absent. logits: float32 [rows, vocabulary], rows `stride` elements apart; tokens: int64
// [rows]; out: float32 or bfloat16 [rows, vocabulary], `out_stride` elements apart, either the logits themselves or apart from
// them; everything else float32 [rows]. Throws std::runtime_error with CUDA's message if the launch fails.
//   mode 0: writes logprobs and entropy
//   mode 1: the same, and writes the gradient to out; reads advantage, policy, kl, bonus and, if given, old and ref
//   mode 2: writes the gradient to out; reads logprobs, entropy, g and bonus. A token whose logit is -inf makes the row NaN.
void row_loss_cuda(int mode, std::uintptr_t logits, std::uintptr_t tokens, std::uintptr_t logprobs,
                   std::uintptr_t entropy, std::uintptr_t advantage, std::uintptr_t policy, std::uintptr_t kl,
                   std::uintptr_t bonus, std::uintptr_t old, std::uintptr_t ref, std::uintptr_t g, std::int64_t rows,
                   std::int64_t vocabulary, std::int64_t stride, double inverse_temperature, float clip_low,
                   float clip_high, bool cispo, std::uintptr_t out, std::int64_t out_stride, bool out_bfloat16,
                   std::uintptr_t stream);

}  // namespace sslr1
