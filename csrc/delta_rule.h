// The gated delta rule. sslr1/ops/delta_rule.py says what it computes, delta_chunks.py by which formulas.
#pragma once
#include <cstdint>

namespace sslr1 {

// q, k: float32 [T, key_heads, d_k]; v: float32 [T, heads, d_v], rows of a token dense, tokens so many floats apart as the strides
// say; g, beta: float32 [T, heads]. spans: int64 [sequences, 4]: first row, tokens, whether it is a prompt, and the prompt's
// place in `firsts`' steps; in packed order, completions behind their prompt. firsts: int64 [steps]: where the states behind the
// prompts' chunks of each number begin. states: float32 [chunks, heads, d_k, d_v].
struct DeltaRule {
  std::uintptr_t q, k, v, g, beta;
  std::int64_t q_stride, k_stride, v_stride;
  std::uintptr_t spans, firsts, states;
  std::int64_t sequences, key_heads, heads, d_k, d_v;
  double scale;
  bool l2norm;
};

// Writes out float32 [T, heads, d_v] and states.
void delta_rule(const DeltaRule& a, std::uintptr_t out, int threads);

// grad: float32 [T, heads, d_v]; reads states; writes gradients, float32 and dense: dq, dk [T, key_heads, d_k], dv, dg, dbeta.
void delta_rule_backward(const DeltaRule& a, std::uintptr_t grad, std::uintptr_t dq, std::uintptr_t dk, std::uintptr_t dv,
                         std::uintptr_t dg, std::uintptr_t dbeta, int threads);

// states: float32 [samples, heads, d_k, d_v], moved on in place for samples int64 [rows]; q, k, v, g, beta, out as above with rows
// for T, all dense.
void delta_step(std::uintptr_t states, std::uintptr_t q, std::uintptr_t k, std::uintptr_t v, std::uintptr_t g,
                std::uintptr_t beta, std::uintptr_t samples, std::uintptr_t out, std::int64_t rows, std::int64_t key_heads,
                std::int64_t heads, std::int64_t d_k, std::int64_t d_v, double scale, bool l2norm, int threads);

}  // namespace sslr1
