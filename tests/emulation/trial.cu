// Small kernels for test_machine.py: what the machine must do, and mistakes that it must find.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <stdexcept>

namespace trial {

namespace cg = cooperative_groups;

__device__ unsigned shared_address(const void* at) { return static_cast<unsigned>(__cvta_generic_to_shared(at)); }

__device__ void start_copy(void* to, const void* from, unsigned bytes, unsigned long long* barrier) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

// What `task` asks of each thread goes to out[grid's index of it].
__global__ void kernel(int task, const int* in, int* out) {
  extern __shared__ __align__(64) int4 dynamic[];
  __shared__ int of_thread[64], lonely;
  __shared__ unsigned long long barrier;
  const auto cluster = cg::this_cluster();
  const unsigned t = threadIdx.x + blockDim.x * threadIdx.y, threads = blockDim.x * blockDim.y,
                 rank = cluster.block_rank();
  const unsigned index = (blockIdx.x + gridDim.x * blockIdx.y) * threads + t;
  if (task >= 20 && t == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&barrier)) : "memory");
    if (task != 25) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  switch (task) {
    case 0: {  // shuffles and votes
      int found = __shfl_sync(~0u, t, 3) + 100 * __shfl_xor_sync(~0u, t, 1) + 10000 * __shfl_down_sync(~0u, t, 2);
      if (t % 32 < 8) found += 1000000 * __ballot_sync(0xFFu, t & 1);
      out[index] = __all_sync(~0u, t % 32 < 31) || !__any_sync(~0u, t % 32 == 31) ? -1 : found;
      break;
    }
    case 1:  // the thread opposite, by shared memory
      of_thread[t] = in[index];
      __syncthreads();
      out[index] = of_thread[threads - 1 - t];
      break;
    case 2:  // the same thread of the next block
      cluster.sync();
      cluster.map_shared_rank(of_thread, (rank + 1) % cluster.num_blocks())[t] = in[index];
      cluster.sync();
      out[index] = of_thread[t];
      break;
    case 3:  // half of a block leaves early
      if (t >= threads / 2) return;
      of_thread[t] = in[index];
      __syncthreads();
      out[index] = of_thread[threads / 2 - 1 - t];
      break;
    case 4:  // lane 0 to the others of its warp
      if (t % 32 == 0) of_thread[t] = in[index];
      __syncwarp();
      out[index] = of_thread[t / 32 * 32];
      break;
    // mistakes
    case 8: t % 2 ? __any_sync(~0u, 1) : __shfl_sync(~0u, 1, 0); break;
    case 9: __shfl_sync(0x55555555u, t, t % 2); break;
    case 10: t % 32 ? __syncthreads() : __syncwarp(); break;
    case 11: out[index] = of_thread[t]; break;  // nobody wrote it
    case 12: of_thread[t + 1] = 1; break;       // the last one is beyond
    case 13: out[index] = in[index + 1]; break;
    case 14: const_cast<int*>(in)[index] = 1; break;
    case 15: *reinterpret_cast<long long*>(out + index) = 1; break;   // 8 bytes at any 4
    case 16: *cluster.map_shared_rank(&lonely, rank ^ 1) = 1; break;  // it may not run yet, or no more
    case 17: cluster.map_shared_rank(&lonely, cluster.num_blocks()); break;
    case 18: __cluster_barrier_arrive_relaxed(); break;  // and never waits
    case 19:
      __cluster_barrier_arrive_relaxed();
      __cluster_barrier_arrive_relaxed();
      break;
    // copies, by thread 0, of 16 bytes
    case 20:
    case 25:
      if (t == 0) start_copy(dynamic, in, 16, &barrier);
      __syncthreads();
      for (unsigned done = 0; !done;) {
        asm volatile(
            "{\n"
            ".reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0;\n"
            "selp.u32 %0, 1, 0, p;\n"
            "}\n"
            : "=r"(done)
            : "r"(shared_address(&barrier))
            : "memory");
      }
      out[index] = dynamic[0].w;
      break;
    case 21:  // awaits nothing
      if (t == 0) start_copy(dynamic, in, 16, &barrier);
      break;
    case 22:
      if (t == 0) start_copy(dynamic, in + 1, 16, &barrier);
      break;
    case 23:  // more than there is
      if (t == 0) start_copy(dynamic, in, 64, &barrier);
      break;
    case 24:
      if (t == 0) start_copy(dynamic, in, 16, &barrier), start_copy(dynamic, in, 16, &barrier);
      break;
  }
}

// Addresses are ints'; `bytes` of dynamic shared memory a block.
void run(int task, std::uintptr_t in, std::uintptr_t out, int blocks, int cluster, int threads, int bytes) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks / 2, 2);
  config.blockDim = dim3(threads / 2, 2);
  config.dynamicSmemBytes = bytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  const auto error =
      cudaLaunchKernelEx(&config, kernel, task, reinterpret_cast<const int*>(in), reinterpret_cast<int*>(out));
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

}  // namespace trial
