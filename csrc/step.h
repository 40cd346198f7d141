// What stands between the products of a decode step, for float32 rows on the CPU. sslr1/ops/decode_rows.py, decode_attend.py and
// decode_delta.py say what they compute.
#pragma once
#include <cstdint>

namespace sslr1 {

// x [rows, width] -> out, its RMS norm times weight or 1 + weight.
void step_norm(std::uintptr_t x, std::uintptr_t weight, std::uintptr_t out, std::int64_t rows, std::int64_t width, double eps,
               bool zero_centred);

// gate_up [rows, 2 width] -> out [rows, width]
void step_swiglu(std::uintptr_t gate_up, std::uintptr_t out, std::int64_t rows, std::int64_t width);

struct StepAttention {
  std::uintptr_t qkv, cos, sin, q_norm, k_norm, prompt_k, prompt_v, prompt_lengths, own_k, own_v, samples, written, out;
  std::int64_t rows, stride, heads, heads_kv, d, rotary, longest, group_size, room;
  double scale, eps;
  bool zero_centred, gated;
};
void step_attention(const StepAttention& a, int threads);

// rows [rows, stride]: queries, keys and values (`channels` of them), z, b, a.
struct StepDelta {
  std::uintptr_t rows, weight, A_log, dt_bias, norm, states, tails, samples, out;
  std::int64_t count, stride, key_heads, heads, d_k, d_v;
  double eps;
};
void step_delta(const StepDelta& a, int threads);

}  // namespace sslr1
