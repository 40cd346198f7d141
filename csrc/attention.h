// Attention of packed sequences. sslr1/ops/packed_attention.py says of what.
#pragma once
#include <cstdint>

namespace sslr1 {

// q: float32 [T, heads, d], k and v [T, heads_kv, d]: numbers of a head dense, tokens and heads so many floats apart as the strides
// say (q's two, k's, v's). own: int32 [sequences + 1]. Of completions and their prompts, group by group: boundaries int32
// [groups + 1] and row numbers int64, as a `Layout` has them.
struct Attention {
  std::uintptr_t q, k, v, own, queries, keys, query_rows, key_rows;
  std::int64_t q_token, q_head, k_token, k_head, v_token, v_head, tokens, heads, heads_kv, d, sequences, groups;
  double scale;
  bool causal;
};

// Writes out float32 [T, heads, d] and lse [heads, T], both dense.
void attention(const Attention& a, std::uintptr_t out, std::uintptr_t lse, int threads);

// Reads grad and out [T, heads, d] and lse, writes dq, dk and dv, all dense.
void attention_backward(const Attention& a, std::uintptr_t grad, std::uintptr_t out, std::uintptr_t lse, std::uintptr_t dq,
                        std::uintptr_t dk, std::uintptr_t dv, int threads);

}  // namespace sslr1
