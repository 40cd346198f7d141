// A row of logits and what is made of it, piece by piece: sums that merge, statistics, the gradient of an element.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace sslr1 {
namespace {

// Stands for the exponent of -inf: e^-200 is 0 in float32, and -200 times that is too.
constexpr float kNothing = -200.f;

struct Arguments {
  float* logits;
  const long long* tokens;
  float *logprobs, *entropy;
  const float *advantage, *policy, *kl, *bonus, *old, *ref, *g;
  long long stride;
  int vocabulary;
  float inverse_temperature, clip_low, clip_high;
  double exact_inverse;  // of the temperature, for log-probs: of a logit of 90, rounding it to float would be 1e-5 of the ratio
  bool cispo;
  void* out;
  long long out_stride;
};

// A row as 16-byte quads, and edges: up to 3 elements before and 3 after them.
struct Row {
  const float* x;
  const float4* quads;
  int head, count, edges;

  __device__ Row(const Arguments& a, long long row) {
    x = a.logits + row * a.stride;
    head = min(static_cast<int>(-(reinterpret_cast<std::uintptr_t>(x) / 4) & 3), a.vocabulary);
    count = (a.vocabulary - head) / 4;
    edges = a.vocabulary - 4 * count;
    quads = reinterpret_cast<const float4*>(x + head);
  }
  __device__ int edge(int i) const { return i < head ? i : i + 4 * count; }
  __device__ int quad_of(int token) const { return (token - head) >> 2; }  // -1: before the first
  __device__ int place_of(int token) const { return (token - head) & 3; }  // in its quad
};

// Where a row's gradient goes: over the logits, or to memory apart from them.
template <typename Out>
struct Target {
  Out *x, *quads;
  bool aligned;

  __device__ Target(const Arguments& a, long long index, const Row& row) {
    x = static_cast<Out*>(a.out) + index * a.out_stride;
    quads = x + row.head;
    aligned = reinterpret_cast<std::uintptr_t>(quads) % (4 * sizeof(Out)) == 0;
  }
  // __stcs also keeps the compiler from making one branch of the two, with four stores of 4 bytes.
  __device__ void write(int quad, float4 value) const {
    Out* to = quads + 4ll * quad;
    if (!aligned) {
      to[0] = Out(value.x), to[1] = Out(value.y), to[2] = Out(value.z), to[3] = Out(value.w);
    } else if constexpr (sizeof(Out) == 4) {
      __stcs(reinterpret_cast<float4*>(to), value);
    } else {
      const __nv_bfloat162 low = __floats2bfloat162_rn(value.x, value.y), high = __floats2bfloat162_rn(value.z, value.w);
      __stcs(reinterpret_cast<uint2*>(to),
             make_uint2(reinterpret_cast<const unsigned&>(low), reinterpret_cast<const unsigned&>(high)));
    }
  }
};

// m: the largest logit; s = sum e^d and w = sum d e^d with d = (x - m) / temperature. A NaN or +inf stays in m. Where m is
// -inf, s and w say nothing, and add and merge drop them.
struct Sums {
  float m, s, w;
};

__device__ float4 none() { return make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY); }

__device__ float4 without(float4 x, int place) {
  return {place == 0 ? -INFINITY : x.x, place == 1 ? -INFINITY : x.y, place == 2 ? -INFINITY : x.z,
          place == 3 ? -INFINITY : x.w};
}

__device__ float max_or_nan(float a, float b) {
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}

__device__ Sums merge(Sums a, Sums b, float inverse_temperature) {
  const float m = max_or_nan(a.m, b.m);
  // fmaxf also turns -inf - -inf into kNothing
  const float da = fmaxf((a.m - m) * inverse_temperature, kNothing), ea = expf(da);
  const float db = fmaxf((b.m - m) * inverse_temperature, kNothing), eb = expf(db);
  return {m, a.s * ea + b.s * eb, (a.w + da * a.s) * ea + (b.w + db * b.s) * eb};
}

template <int kQuads>
__device__ Sums add(Sums a, const float4 (&x)[kQuads], float inverse_temperature) {
  float m = a.m;
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    m = max_or_nan(m, max_or_nan(max_or_nan(x[i].x, x[i].y), max_or_nan(x[i].z, x[i].w)));
  }
  const float shift = fmaxf((a.m - m) * inverse_temperature, kNothing), scale = expf(shift);
  a.w = (a.w + shift * a.s) * scale;
  a.s *= scale;
  a.m = m;
  const auto one = [&](float value) {
    const float d = fmaxf((value - m) * inverse_temperature, kNothing), e = expf(d);
    a.s += e;
    a.w += d * e;
  };
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    one(x[i].x);
    one(x[i].y);
    one(x[i].z);
    one(x[i].w);
  }
  return a;
}

// Merges lanes 0 to kLanes - 1. Rounding depends on the order, so every thread takes lane 0's result: were they to differ,
// one row could be clipped for some threads only.
template <int kLanes>
__device__ Sums over_lanes(Sums a, float inverse_temperature) {
#pragma unroll
  for (int offset = kLanes / 2; offset; offset /= 2) {
    const Sums other{__shfl_xor_sync(~0u, a.m, offset), __shfl_xor_sync(~0u, a.s, offset),
                     __shfl_xor_sync(~0u, a.w, offset)};
    a = merge(a, other, inverse_temperature);
  }
  return {__shfl_sync(~0u, a.m, 0), __shfl_sync(~0u, a.s, 0), __shfl_sync(~0u, a.w, 0)};
}

// d loss / d logprob. Comparisons are such that a NaN ratio stays NaN.
__device__ float slope(const Arguments& a, long long row, double logprob) {
  const float ratio = a.old ? expf(static_cast<float>(logprob - a.old[row])) : 1.f;
  const float high = 1.f + a.clip_high, low = 1.f - a.clip_low;
  const float advantage = a.advantage[row], capped = ratio > high ? high : ratio;
  float g;
  if (a.cispo) {
    g = -a.policy[row] * advantage * capped;
  } else {
    const float free = ratio * advantage, clipped = (capped < low ? low : capped) * advantage;
    g = free > clipped ? 0.f : -a.policy[row] * free;
  }
  if (a.ref) g += a.kl[row] * (1.f - expf(static_cast<float>(a.ref[row] - logprob)));
  return g;
}

// d loss / d logit: with t = (x - base) / temperature + offset, p = scale e^t and log p + entropy = t + surprise. `bonus` and
// `g` are divided by the temperature already.
struct Gradient {
  float base, offset, scale, surprise, bonus, g, inverse_temperature;

  __device__ float operator()(float x) const {
    const float t = (x - base) * inverse_temperature + offset;
    return expf(t) * scale * (bonus * (fmaxf(t, kNothing) + surprise) - g);  // t = -inf: 0 times something finite
  }
  __device__ float4 operator()(float4 x) const {
    return {(*this)(x.x), (*this)(x.y), (*this)(x.z), (*this)(x.w)};
  }
  __device__ float of_token(float x, float logprob) const {  // 1 - p to full precision
    const float t = (x - base) * inverse_temperature + offset;
    return expf(t) * scale * (bonus * (fmaxf(t, kNothing) + surprise)) - g * expm1f(logprob);
  }
};

// Of a row from its token's logit and the sums over all others: apart, so that 1 - p and log p of a token that is nearly
// certain are not lost to rounding.
struct Statistics {
  float m, s, log_s, entropy;
  double logprob;
  bool sound;

  __device__ Statistics(Sums others, float picked, const Arguments& a) {
    const float inverse_temperature = a.inverse_temperature;
    const Sums all = merge(others, {picked, 1.f, 0.f}, inverse_temperature);
    const float beyond_one = others.s * expf(fmaxf((others.m - picked) * inverse_temperature, kNothing));
    m = all.m;
    s = all.s;
    sound = fabsf(m) < INFINITY;  // not NaN, not +inf, not -inf throughout
    log_s = picked == m ? log1pf(beyond_one) : logf(s);
    logprob = sound ? fmin((static_cast<double>(picked) - m) * a.exact_inverse - log_s, 0.) : NAN;
    entropy = sound ? log_s - all.w / s : NAN;
  }
};

__device__ Gradient fused_gradient(const Arguments& a, long long row, const Statistics& of) {
  return {of.m,
          0.f,
          of.sound ? 1.f / of.s : NAN,
          of.entropy - of.log_s,
          a.bonus[row] * a.inverse_temperature,
          slope(a, row, of.logprob) * a.inverse_temperature,
          a.inverse_temperature};
}

}  // namespace
}  // namespace sslr1
