// What the project's kernels use of CUDA's runtime and of PTX, on the machine of ../machine.h. What is missing doesn't
// compile: add it here.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <type_traits>
#include <typeinfo>

#include "../machine.h"

#define __global__
#define __device__ inline __attribute__((always_inline))  // a struct that a call takes from memory is an access unseen
#define __launch_bounds__(...)
#define UNSEEN __attribute__((no_sanitize("thread")))  // its accesses aren't the kernel's

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }

template <typename T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}

template <typename T>
void __stcs(T* to, T value) {
  *to = value;
}

// --- threads ---------------------------------------------------------------------------------------------------------

inline void __syncthreads() { emulation::sync_block(); }
inline void __cluster_barrier_arrive_relaxed() { emulation::arrive_at_cluster(); }
inline void __cluster_barrier_wait() { emulation::wait_for_cluster(); }

namespace emulation {

UNSEEN inline unsigned lane() {
  const uint3 t = threadIdx();
  const dim3 size = blockDim();
  return (t.x + size.x * (t.y + size.y * t.z)) % 32;
}

template <typename T>
UNSEEN T shuffle_any(unsigned mask, T value, unsigned from) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = shuffle(mask, bits, from);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace emulation

template <typename T>
T __shfl_sync(unsigned mask, T value, int from) {
  return emulation::shuffle_any(mask, value, from % 32);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return emulation::shuffle_any(mask, value, emulation::lane() ^ lanes);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by) {
  const unsigned lane = emulation::lane();
  return emulation::shuffle_any(mask, value, lane + by < 32 ? lane + by : lane);
}
inline unsigned __ballot_sync(unsigned mask, int value) { return emulation::ballot(mask, value); }
inline int __any_sync(unsigned mask, int value) { return emulation::ballot(mask, value) != 0; }
inline int __all_sync(unsigned mask, int value) { return emulation::ballot(mask, value) == mask; }
inline void __syncwarp(unsigned mask = ~0u) { emulation::ballot(mask, true); }

// --- PTX: an instruction is a function of its name with _ for . and ::, its operands in order, less _ ----------------

inline std::size_t __cvta_generic_to_shared(const void* at) { return emulation::shared_offset(at); }
inline std::size_t __cvta_generic_to_global(const void* at) { return reinterpret_cast<std::size_t>(at); }

namespace emulation::ptx {

inline void max_NaN_f32(float& out, float a, float b) { out = std::isnan(a) || std::isnan(b) ? NAN : a < b ? b : a; }
inline void selp_u32(unsigned& out, unsigned a, unsigned b, bool which) { out = which ? a : b; }
inline void fence_proxy_async_shared_cta() { fence_barriers(); }
inline void mbarrier_init_shared_cta_b64(unsigned barrier, unsigned arrivals) { init_barrier(barrier, arrivals); }
inline void mbarrier_arrive_expect_tx_shared_cta_b64(unsigned barrier, unsigned bytes) {
  expect_bytes_and_arrive(barrier, bytes);
}
inline void mbarrier_try_wait_parity_shared_cta_b64(bool& done, unsigned barrier, unsigned parity) {
  done = try_wait(barrier, parity);
}
inline void cp_async_bulk_shared_cluster_global_mbarrier_complete_tx_bytes(unsigned to, std::uintptr_t from,
                                                                           unsigned bytes, unsigned barrier) {
  copy_in_bulk(to, from, bytes, barrier);
}

}  // namespace emulation::ptx

// --- the host's side -------------------------------------------------------------------------------------------------

using cudaStream_t = struct Stream*;
enum cudaError_t { cudaSuccess, cudaErrorLaunchFailure };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };
enum { cudaSharedmemCarveoutMaxShared = 100 };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? emulation::capability() : emulation::shared_limit();
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return emulation::failed() ? cudaErrorLaunchFailure : cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return emulation::error(); }

template <typename... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    emulation::allow_dynamic(reinterpret_cast<const void*>(kernel), value);
  }
  return cudaSuccess;
}

namespace emulation {

template <typename... P>
bool run_kernel(void (*kernel)(P...), dim3 grid, dim3 block, unsigned cluster, std::size_t bytes,
                const P&... arguments) {
  const auto thread = [&]() UNSEEN { kernel(arguments...); };
  const auto call = [](const void* closure) UNSEEN { (*static_cast<decltype(thread)*>(closure))(); };
  return run({reinterpret_cast<const void*>(kernel), grid, block, cluster, bytes}, call, &thread);
}

// kernel<<<grid, block, bytes, stream>>>(arguments)
template <typename... P>
auto launch(void (*kernel)(P...), dim3 grid, dim3 block, std::size_t bytes = 0, cudaStream_t = nullptr) {
  return [=](const P&... arguments) { run_kernel(kernel, grid, block, 1, bytes, arguments...); };
}

// A function of numbers and addresses for Python's ctypes: returns its exception's message.
extern "C" const char* emulation_keep(const char*);
template <auto>
struct Entry;
template <typename... P, void (*function)(P...)>
struct Entry<function> {
  static const char* call(P... arguments) {
    try {
      function(arguments...);
      return nullptr;
    } catch (const std::exception& error) {
      return emulation_keep(error.what());
    }
  }
};

}  // namespace emulation

template <typename... P, typename... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* c, void (*kernel)(P...), A&&... arguments) {
  unsigned cluster = 1;
  for (unsigned i = 0; i < c->numAttrs; ++i) {
    if (c->attrs[i].id == cudaLaunchAttributeClusterDimension) cluster = c->attrs[i].val.clusterDim.x;
  }
  const bool well =
      emulation::run_kernel<P...>(kernel, c->gridDim, c->blockDim, cluster, c->dynamicSmemBytes, arguments...);
  return well ? cudaSuccess : cudaErrorLaunchFailure;
}

// Mangled, a function's type says what it takes: a letter a parameter.
#define EMULATION_ENTRY(function)                                                          \
  extern "C" {                                                                             \
  const char* emulation_signature = typeid(decltype(function)).name();                     \
  const void* emulation_entry = reinterpret_cast<void*>(emulation::Entry<function>::call); \
  }
