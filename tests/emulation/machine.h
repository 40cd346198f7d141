// A GPU of one cluster at a time, on the host, so that tests run CUDA kernels where there is no card. `__init__.py`
// translates a .cu file and builds it with this; include/ has what the project's kernels use of CUDA's headers.
//
// Modelled: threads are fibers, switched at every barrier, shuffle and vote and, in random order, between any two
// memory accesses. A cluster's blocks start at any time after each other; bulk copies arrive late. Found are, as a
// failed launch:
//   - accesses outside of the memory that the caller declared, of a shared variable or of the thread's own stack,
//   - reads of shared memory that nobody wrote (it holds NaNs, too),
//   - shared memory of a block that has not started or has left; a block that leaves before a copy into it has arrived,
//   - accesses, copies and shared memory that break the hardware's rules of alignment and size,
//   - deadlocks, barriers that are misused, bulk copies on a barrier that no fence has shown to them.
// Every access is seen since the kernel is compiled with -fsanitize=thread, whose calls end here instead of in libtsan
// (as the Linux kernel's KCSAN does it); alignment by -fsanitize=alignment likewise.
//
// Not modelled: the precision of CUDA's expf and its like, contraction to fused multiply-adds, weak memory order
// (writes are seen at once and in order), proxy fences beyond their presence after a barrier's initialisation, clusters
// side by side, registers, time. Not seen: memcpy and memset in a kernel, structs that a call takes from memory. Races
// are found where a drawn order makes them show.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
  unsigned x, y, z;
};

namespace emulation {

struct Launch {
  const void* kernel;
  dim3 grid, block;
  unsigned cluster;  // blocks, along x
  std::size_t dynamic_bytes;
};

// The host's side. What can fail returns whether it went well; the error's text is kept until the next one.
bool run(const Launch& launch, void (*thread)(const void*), const void* closure);
bool failed();  // since it was asked last
const char* error();
void allow_dynamic(const void* kernel, int bytes);
int capability();    // the device's major version
int shared_limit();  // bytes of shared memory that a block may ask for

// The device's side, called by a kernel's threads.
[[noreturn]] void fault(const std::string& what);
uint3 threadIdx();
uint3 blockIdx();
dim3 blockDim();
dim3 gridDim();
unsigned cluster_blocks();
unsigned block_rank();  // in its cluster
void sync_block();
void arrive_at_cluster();
void wait_for_cluster();
// Lanes of `mask` meet; each takes the value that lane `from` brought, or the set of lanes that brought other than 0.
std::uint64_t shuffle(unsigned mask, std::uint64_t value, unsigned from);
unsigned ballot(unsigned mask, bool value);

void* shared_variable(int id, std::size_t bytes, std::size_t alignment);
void* dynamic_shared(std::size_t alignment);
void* map_to_rank(const void* mine, unsigned rank);  // the same place in another block of the cluster
unsigned shared_offset(const void* at);              // what PTX calls an address in shared memory
void init_barrier(unsigned barrier, unsigned arrivals);
void fence_barriers();  // the async proxy sees the barriers initialised so far
void expect_bytes_and_arrive(unsigned barrier, unsigned bytes);
bool try_wait(unsigned barrier, unsigned parity);
void copy_in_bulk(unsigned to, std::uintptr_t from, unsigned bytes, unsigned barrier);

template <typename T>
T& shared(int id) {  // a shared variable, or an array of them
  return *static_cast<T*>(shared_variable(id, sizeof(T), alignof(T)));
}

}  // namespace emulation
