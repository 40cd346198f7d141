// Cost: one read of the logits, 4 bytes an element; one exponential an element and one more per new maximum.
// One block a row. Each thread keeps (m, s, w): running maximum, sum of e^(x-m), sum of (x-m) e^(x-m); then
// lse = m + log s, entropy = log s - w / s.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "row_logprobs.h"

namespace sslr1 {
namespace {

constexpr int kThreads = 512;

struct Sums {
  float m, s, w;
};

__device__ Sums merge(Sums a, Sums b) {
  if (a.s == 0.f) return b;
  if (b.s == 0.f) return a;
  const float m = fmaxf(a.m, b.m), da = a.m - m, db = b.m - m, ea = expf(da), eb = expf(db);
  return {m, a.s * ea + b.s * eb, (a.w + da * a.s) * ea + (b.w + db * b.s) * eb};
}

__device__ Sums add(Sums a, float x) {
  if (x > a.m) {
    const float d = a.m - x, e = a.s == 0.f ? 0.f : expf(d);
    a.w = a.s == 0.f ? 0.f : (a.w + d * a.s) * e;
    a.s = a.s * e + 1.f;
    a.m = x;
    return a;
  }
  const float d = x - a.m, e = expf(d);
  a.s += e;
  a.w += d * e;
  return a;
}

__global__ void __launch_bounds__(kThreads)
    kernel(const float* logits, const long long* tokens, float* logprobs, float* entropy, long long vocabulary,
           long long stride, float inverse_temperature) {
  const long long row = blockIdx.x;
  const float* x = logits + row * stride;
  Sums sums{-INFINITY, 0.f, 0.f};
  bool bad = false;
  for (long long i = threadIdx.x; i < vocabulary; i += kThreads) {
    const float value = x[i] * inverse_temperature;
    bad |= isnan(value);
    if (value > -INFINITY) sums = add(sums, value);
  }
  for (int offset = 16; offset; offset >>= 1) {
    sums = merge(sums, {__shfl_xor_sync(~0u, sums.m, offset), __shfl_xor_sync(~0u, sums.s, offset),
                        __shfl_xor_sync(~0u, sums.w, offset)});
  }
  __shared__ Sums part[kThreads / 32];
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sums;
  bad = __syncthreads_or(bad);
  if (threadIdx.x == 0) {
    for (int i = 1; i < kThreads / 32; ++i) sums = merge(sums, part[i]);
    const float log_s = logf(sums.s);
    const float picked = x[tokens[row]] * inverse_temperature;
    logprobs[row] = bad ? NAN : fminf(picked - sums.m - log_s, 0.f);
    entropy[row] = bad ? NAN : log_s - sums.w / sums.s;
  }
}

}  // namespace

void row_logprobs(std::uintptr_t logits, std::uintptr_t tokens, std::uintptr_t logprobs, std::uintptr_t entropy,
                  std::int64_t rows, std::int64_t vocabulary, std::int64_t stride, float inverse_temperature,
                  std::uintptr_t stream) {
  if (rows == 0) return;
  kernel<<<static_cast<unsigned>(rows), kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(
      reinterpret_cast<const float*>(logits), reinterpret_cast<const long long*>(tokens),
      reinterpret_cast<float*>(logprobs), reinterpret_cast<float*>(entropy), vocabulary, stride, inverse_temperature);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) {
    throw std::runtime_error(std::string("row_logprobs: ") + cudaGetErrorString(error));
  }
}

}  // namespace sslr1
