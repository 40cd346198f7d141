// One row of logits in, its log-prob, its entropy and its gradient out.
//
// Cost: one read of the logits (4 bytes an element) for statistics, one write more (4 bytes, or 2) with the gradient; one
// exponential an element and pass. The gradient needs the row twice, and the rows in flight do not fit in L2: on Hopper a
// cluster of up to 8 blocks keeps the row in its shared memory, a piece a block, small enough for three blocks on a
// multiprocessor, so that one row's copies hide another's arithmetic. Elsewhere, or where the row is too long for that, one
// block a row reads it twice.
#include <cooperative_groups.h>

#include <climits>
#include <stdexcept>
#include <string>

#include "../row_loss.h"
#include "row.h"

namespace sslr1 {
namespace {

namespace cg = cooperative_groups;

enum Mode { kStatistics, kFused, kGradient };

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxBlocks = 8;         // the largest cluster that every device of that kind takes
constexpr int kChunk = 2 * kThreads;  // quads that arrive together
constexpr int kMaxChunks = 15;        // of 16 KB
constexpr int kReserved = 1024;       // bytes of shared memory that CUDA, or these kernels' small arrays, take from a block
// A piece for three blocks on a multiprocessor of 228 KB: up to V = 152,576 for 8 blocks.
constexpr int kGoodPiece = (228 * 1024) / 3 - kReserved - 512;

// One block a row, from memory: every mode on every device.
template <Mode kMode, typename Out>
__global__ void __launch_bounds__(kThreads, 2) streaming(const Arguments a) {
  constexpr int kQuads = 4;
  __shared__ Sums of_warp[kWarps];
  const int t = threadIdx.x;
  const long long index = blockIdx.x;
  const Row row(a, index);
  const int token = static_cast<int>(a.tokens[index]), token_quad = row.quad_of(token);
  const float picked = row.x[token];
  const float edge = t < row.edges ? row.x[row.edge(t)] : -INFINITY;
  float logprob;
  Gradient gradient;
  if constexpr (kMode == kGradient) {
    logprob = a.logprobs[index];
    const double zero = picked - logprob / a.exact_inverse;  // the logit whose log-prob is 0; from a far one, differences are rounded
    const float base = static_cast<float>(zero);
    gradient = {base,
                static_cast<float>((base - zero) * a.exact_inverse),
                1.f,
                a.entropy[index],
                a.bonus[index] * a.inverse_temperature,
                a.g[index] * a.inverse_temperature,
                a.inverse_temperature};
    __syncthreads();  // nobody overwrites the token's logit before everybody has it
  } else {
    Sums sums{row.edge(t) == token ? -INFINITY : edge, 1.f, 0.f};
    for (int start = t; start < row.count; start += kQuads * kThreads) {
      float4 x[kQuads];
#pragma unroll
      for (int i = 0; i < kQuads; ++i) {
        const int at = start + i * kThreads;
        x[i] = at < row.count ? row.quads[at] : none();
      }
#pragma unroll
      for (int i = 0; i < kQuads; ++i) {
        if (start + i * kThreads == token_quad) x[i] = without(x[i], row.place_of(token));
      }
      sums = add(sums, x, a.inverse_temperature);
    }
    sums = over_lanes<32>(sums, a.inverse_temperature);
    if (t % 32 == 0) of_warp[t / 32] = sums;
    __syncthreads();
    sums = over_lanes<kWarps>(of_warp[t % kWarps], a.inverse_temperature);
    const Statistics statistics(sums, picked, a);
    logprob = static_cast<float>(statistics.logprob);
    if (t == 0) {
      a.logprobs[index] = logprob;
      a.entropy[index] = statistics.entropy;
    }
    if constexpr (kMode == kFused) gradient = fused_gradient(a, index, statistics);
  }
  if constexpr (kMode != kStatistics) {
    const Target<Out> target(a, index, row);
    for (int start = t; start < row.count; start += kQuads * kThreads) {
      float4 x[kQuads];
#pragma unroll
      for (int i = 0; i < kQuads; ++i) {
        const int at = start + i * kThreads;
        if (at < row.count) x[i] = row.quads[at];
      }
#pragma unroll
      for (int i = 0; i < kQuads; ++i) {
        const int at = start + i * kThreads;
        if (at < row.count) target.write(at, gradient(x[i]));
      }
    }
    if (t < row.edges) target.x[row.edge(t)] = Out(gradient(edge));
    // The thread that wrote the token's element writes it again.
    const bool mine = token_quad >= 0 && token_quad < row.count ? token_quad % kThreads == t
                                                                : t < row.edges && row.edge(t) == token;
    if (mine) target.x[token] = Out(gradient.of_token(picked, logprob));
  }
}

#if __CUDA_ARCH__ >= 900
// Bulk copies and the barriers that count their bytes; each barrier is used once, so its phase is 0.

__device__ unsigned shared_address(const void* at) { return static_cast<unsigned>(__cvta_generic_to_shared(at)); }

__device__ void expect_copies(unsigned long long* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}

__device__ void start_copy(float4* to, const float4* from, int quads, unsigned long long* barrier) {
  const unsigned bytes = quads * sizeof(float4), at = shared_address(barrier);
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(at)
               : "memory");
}

__device__ void wait_for_copy(unsigned long long* barrier) {
  unsigned done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}\n"
        : "=r"(done)
        : "r"(shared_address(barrier))
        : "memory");
  } while (!done);
}
#endif

// A cluster a row, kept in shared memory: kFused on Hopper and later.
template <typename Out>
__global__ void __launch_bounds__(kThreads, 3) clustered(const Arguments a) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) float4 piece[];
  __shared__ unsigned long long arrived[kMaxChunks];
  __shared__ Sums of_warp[kWarps], of_block[kMaxBlocks];
  const auto cluster = cg::this_cluster();
  const int t = threadIdx.x, lane = t % 32, blocks = cluster.num_blocks(), rank = cluster.block_rank();
  const long long index = blockIdx.x / blocks;
  const Row row(a, index);
  const int share = (row.count + blocks - 1) / blocks, first = min(rank * share, row.count);
  const int count = min(share, row.count - first);
  const float4* quads = row.quads + first;
  if (t == 0) {
    for (int c = 0; c * kChunk < count; ++c) expect_copies(arrived + c);
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // the copies see the barriers
    for (int c = 0; c * kChunk < count; ++c) {
      start_copy(piece + c * kChunk, quads + c * kChunk, min(kChunk, count - c * kChunk), arrived + c);
    }
  }
  __cluster_barrier_arrive_relaxed();  // awaited before the first write to another block: it runs by then
  const int token = static_cast<int>(a.tokens[index]), token_quad = row.quad_of(token) - first;
  const float picked = row.x[token];
  const bool has_edge = rank == 0 && t < row.edges;
  const float edge = has_edge ? row.x[row.edge(t)] : -INFINITY;
  __syncthreads();  // the threads see the barriers

  Sums sums{row.edge(t) == token ? -INFINITY : edge, 1.f, 0.f};
  for (int c = 0; c * kChunk < count; ++c) {
    wait_for_copy(arrived + c);
    float4 x[kChunk / kThreads];
#pragma unroll
    for (int i = 0; i < kChunk / kThreads; ++i) {
      const int at = c * kChunk + i * kThreads + t;
      x[i] = at < count ? piece[at] : none();
      if (at == token_quad) x[i] = without(x[i], row.place_of(token));
    }
    sums = add(sums, x, a.inverse_temperature);
  }
  sums = over_lanes<32>(sums, a.inverse_temperature);
  if (lane == 0) of_warp[t / 32] = sums;
  __syncthreads();
  __cluster_barrier_wait();
  if (t < 32) {
    sums = over_lanes<kWarps>(of_warp[lane % kWarps], a.inverse_temperature);
    if (lane < blocks) *cluster.map_shared_rank(of_block + rank, lane) = sums;
  }
  cluster.sync();  // after it no block touches another, and all have read the token's logit: free to overwrite and exit
  sums = over_lanes<kMaxBlocks>(lane < blocks ? of_block[lane] : Sums{-INFINITY, 0.f, 0.f}, a.inverse_temperature);

  const Statistics statistics(sums, picked, a);
  if (rank == 0 && t == 0) {
    a.logprobs[index] = static_cast<float>(statistics.logprob);
    a.entropy[index] = statistics.entropy;
  }
  const Gradient gradient = fused_gradient(a, index, statistics);
  const Target<Out> target(a, index, row);
#pragma unroll 2
  for (int i = t; i < count; i += kThreads) target.write(first + i, gradient(piece[i]));
  if (has_edge) target.x[row.edge(t)] = Out(gradient(edge));
  // The thread that wrote the token's element writes it again.
  const bool mine = token_quad >= 0 && token_quad < count ? token_quad % kThreads == t
                                                          : has_edge && row.edge(t) == token;
  if (mine) target.x[token] = Out(gradient.of_token(picked, static_cast<float>(statistics.logprob)));
#endif
}

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("row_loss: ") + cudaGetErrorString(error));
}

// Blocks and bytes of shared memory each for a row, or 0 blocks if clusters cannot hold it.
struct Plan {
  int blocks, bytes;
};

Plan plan(int vocabulary, void (*kernel)(Arguments)) {
  int device, major, limit;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  if (major < 9) return {0, 0};
  check(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  limit -= kReserved;
  const auto piece = [&](int blocks) { return (vocabulary / 4 + blocks - 1) / blocks * static_cast<int>(sizeof(float4)); };
  int blocks = 1;
  while (blocks < kMaxBlocks && piece(blocks) > kGoodPiece) blocks *= 2;
  if (piece(blocks) > min(limit, kMaxChunks * kChunk * static_cast<int>(sizeof(float4)))) return {0, 0};
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit));
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
  return {blocks, piece(blocks)};
}

template <typename Out>
void launch(int mode, unsigned rows, const Arguments& a, cudaStream_t stream) {
  if (mode == kStatistics) {
    streaming<kStatistics, float><<<rows, kThreads, 0, stream>>>(a);
  } else if (mode == kGradient) {
    streaming<kGradient, Out><<<rows, kThreads, 0, stream>>>(a);
  } else if (mode != kFused) {
    throw std::runtime_error("row_loss: mode is " + std::to_string(mode) + ": 0, 1 or 2");
  } else if (const Plan best = plan(a.vocabulary, clustered<Out>); best.blocks) {
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(best.blocks), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = rows * best.blocks;
    config.blockDim = kThreads;
    config.dynamicSmemBytes = best.bytes;
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = 1;
    check(cudaLaunchKernelEx(&config, clustered<Out>, a));
  } else {
    streaming<kFused, Out><<<rows, kThreads, 0, stream>>>(a);
  }
  check(cudaGetLastError());
}

}  // namespace

void row_loss_cuda(int mode, std::uintptr_t logits, std::uintptr_t tokens, std::uintptr_t logprobs,
                   std::uintptr_t entropy, std::uintptr_t advantage, std::uintptr_t policy, std::uintptr_t kl,
                   std::uintptr_t bonus, std::uintptr_t old, std::uintptr_t ref, std::uintptr_t g, std::int64_t rows,
                   std::int64_t vocabulary, std::int64_t stride, double inverse_temperature, float clip_low,
                   float clip_high, bool cispo, std::uintptr_t out, std::int64_t out_stride, bool out_bfloat16,
                   std::uintptr_t stream) {
  if (rows == 0) return;
  if (vocabulary < 1 || vocabulary > INT_MAX - 4 * 4 * kThreads || rows > INT_MAX / kMaxBlocks) {
    throw std::runtime_error("row_loss: " + std::to_string(rows) + " rows of " + std::to_string(vocabulary) +
                             " logits: at least 1 and less than 2^31 of either; split the rows");
  }
  const auto read = [](std::uintptr_t address) { return reinterpret_cast<const float*>(address); };
  const Arguments a{reinterpret_cast<float*>(logits),
                    reinterpret_cast<const long long*>(tokens),
                    reinterpret_cast<float*>(logprobs),
                    reinterpret_cast<float*>(entropy),
                    read(advantage),
                    read(policy),
                    read(kl),
                    read(bonus),
                    read(old),
                    read(ref),
                    read(g),
                    stride,
                    static_cast<int>(vocabulary),
                    static_cast<float>(inverse_temperature),
                    clip_low,
                    clip_high,
                    inverse_temperature,
                    cispo,
                    reinterpret_cast<void*>(out),
                    out_stride};
  (out_bfloat16 ? launch<__nv_bfloat16> : launch<float>)(mode, static_cast<unsigned>(rows), a,
                                                         reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace sslr1
