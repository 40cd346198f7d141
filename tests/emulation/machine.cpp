// See machine.h. Nothing in here is compiled with a sanitizer.
#include "machine.h"

#include <dlfcn.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <random>
#include <utility>
#include <vector>

namespace emulation {
namespace {

constexpr unsigned kMaxBlocks = 8, kMaxThreads = 1024;  // of a cluster, of a block
constexpr std::size_t kStack = (32 << 10) + 320;        // not a power of 2, or their tops would share sets of the cache
constexpr std::uint64_t kCanary = 0x5A5A0FF1CE5A5A5A;   // at a stack's end
constexpr std::size_t kStaticLimit = 48 << 10;  // of shared variables; of dynamic memory that needs no permission
constexpr std::size_t kStatic = 64 << 10;       // shared variables lie below it, dynamic memory above
constexpr std::size_t kArena = 320 << 10;       // a block's shared memory, gaps included
constexpr std::size_t kGap = 64;                // bytes before each shared variable
constexpr unsigned kAccesses = 1024;            // from one switch between accesses to the next, at most

constexpr const char *kShuffle = "a shuffle", *kVote = "a vote";

enum Order { kRandom, kInTurn, kLastFirst };
enum State : unsigned char { kOutside, kFresh, kWritten };  // of a byte of shared memory

struct Block;

struct Fiber {
  jmp_buf context;
  bool made = false;  // has a context
  bool idle = false;  // is between two kernels
  Block* block;
  unsigned index;             // in the block
  long cluster_arrival = -1;  // the phase of the cluster's barrier that it arrived in and has not awaited
  const char* waits_for;
};

struct Barrier {
  unsigned arrived = 0;
  long phase = 0;
  std::vector<Fiber*> waiting;
};

struct Meeting {  // of some lanes of a warp; two sets of values, since one lane may read while another brings the next
  Barrier barrier;
  std::uint64_t values[2][32];
  const char* what;
};

struct CopyBarrier {
  unsigned arrivals, pending;
  long bytes = 0;
  bool fenced = false;
  Barrier barrier;
};

struct Block {
  uint3 index;
  unsigned rank, alive;
  bool started = false;
  int copies = 0;  // under way into it
  Barrier barrier;
  std::vector<std::map<unsigned, Meeting>> warps;  // by mask
  std::map<unsigned, CopyBarrier> copy_barriers;   // by address
};

struct Memory {
  std::uintptr_t start, end;
  bool readable, writable;
};

struct Variable {
  std::size_t offset, bytes;
};

struct Machine {
  Order order = kRandom;
  std::mt19937_64 rng;
  int capability = 9, shared_limit = 227 << 10;
  std::vector<Memory> memory;  // sorted, apart from each other
  std::map<const void*, std::size_t> allowed_dynamic;
  std::string error, launches, kept;
  bool failed = false;

  char *stacks = nullptr, *shared;
  std::vector<unsigned char> state;  // of each byte of shared memory
  std::vector<Fiber> fibers{kMaxBlocks * kMaxThreads};
  jmp_buf scheduler;
  Fiber* now = nullptr;

  Launch launch;
  void (*thread)(const void*);
  const void* closure;
  std::map<int, Variable> variables;
  std::size_t static_bytes, static_end;
  std::vector<Block> blocks;
  unsigned alive;
  Barrier barrier;
  std::deque<Fiber*> ready;
  std::vector<std::function<void()>> events;  // blocks that start, copies that arrive
  std::uint64_t patience;                     // switches an event
  std::uint64_t window;                       // the next thread is drawn from so many, the last that became ready
  std::uint64_t until_switch;                 // accesses
} m;

std::string name(const Fiber& f) {
  const uint3 b = f.block->index;
  const auto text = [](unsigned x) { return std::to_string(x); };
  return "thread " + text(f.index) + " of block " + text(b.x) + "," + text(b.y) + "," + text(b.z);
}

// --- fibers ----------------------------------------------------------------------------------------------------------

void to_scheduler() {
  if (!_setjmp(m.now->context)) _longjmp(m.scheduler, 1);
}

void wait(const char* what) {
  m.now->waits_for = what;
  to_scheduler();
}

void yield() {
  m.ready.push_back(m.now);
  to_scheduler();
}

void release(Barrier& b) {
  b.arrived = 0;
  ++b.phase;
  m.ready.insert(m.ready.end(), b.waiting.begin(), b.waiting.end());
  b.waiting.clear();
}

long arrive(Barrier& b, unsigned members) {
  const long phase = b.phase;
  if (++b.arrived == members) release(b);
  return phase;
}

void wait_for(Barrier& b, long phase, const char* what) {
  if (b.phase != phase) return;
  b.waiting.push_back(m.now);
  wait(what);
}

char* stack(const Fiber& f) { return m.stacks + (&f - m.fibers.data()) * kStack; }
std::uint64_t& canary(const Fiber& f) { return *reinterpret_cast<std::uint64_t*>(stack(f)); }

void leave() {
  Fiber& f = *m.now;
  Block& block = *f.block;
  if (canary(f) != kCanary) fault("overflows its stack");
  if (f.cluster_arrival >= 0) fault("leaves with an arrival at the cluster's barrier that it has not awaited");
  --block.alive, --m.alive;
  if (block.barrier.arrived && block.barrier.arrived == block.alive) release(block.barrier);
  if (m.barrier.arrived && m.barrier.arrived == m.alive) release(m.barrier);
  if (!block.alive && block.copies) fault("its block leaves before a bulk copy into it has arrived");
  f.idle = true;
  to_scheduler();
}

void live() {
  for (;;) {
    m.thread(m.closure);
    leave();
  }
}

void resume(Fiber& f) {
  if (_setjmp(m.scheduler)) return;
  m.now = &f;
  if (f.made) _longjmp(f.context, 1);
  f.made = true;
  canary(f) = kCanary;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stack(f);
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, live, 0);
  setcontext(&context);
}

Fiber* next() {
  if (m.order == kRandom) {
    const std::size_t from_last = m.rng() % std::min<std::size_t>(m.ready.size(), m.window);
    std::swap(m.ready[m.ready.size() - 1 - from_last], m.ready.back());
  }
  Fiber* f = m.order == kInTurn ? m.ready.front() : m.ready.back();
  m.order == kInTurn ? m.ready.pop_front() : m.ready.pop_back();
  return f;
}

void next_event() {
  const std::size_t size = m.events.size(), i = m.order == kRandom ? m.rng() % size : m.order == kInTurn ? 0 : size - 1;
  const auto event = std::move(m.events[i]);
  m.events.erase(m.events.begin() + i);
  event();
}

std::string deadlock(unsigned threads) {
  std::map<std::string, int> waiting;
  for (unsigned i = 0; i < m.blocks.size() * kMaxThreads; ++i) {
    const Fiber& f = m.fibers[i];
    if (i % kMaxThreads < threads && !f.idle) ++waiting[f.waits_for];
  }
  std::string text = "deadlock:";
  for (const auto& [what, count] : waiting) text += " " + std::to_string(count) + " threads wait for " + what + ",";
  text.back() = '.';
  return text;
}

void make_fresh(const Block& b, const Variable& v) {
  std::memset(&m.state[b.rank * kArena + v.offset], kFresh, v.bytes);
}

void* declare(int id, Variable v) {
  const auto [found, added] = m.variables.emplace(id, v);
  for (const Block& b : m.blocks) {
    if (added && b.started) make_fresh(b, v);
  }
  return m.shared + m.now->block->rank * kArena + found->second.offset;
}

void run_cluster(unsigned first) {
  const dim3 grid = m.launch.grid, block = m.launch.block;
  const unsigned threads = block.x * block.y * block.z;
  m.blocks.assign(m.launch.cluster, {});
  m.alive = m.launch.cluster * threads;
  m.barrier = {};
  m.ready.clear();
  m.events.clear();
  std::fill(m.state.begin(), m.state.end(), kOutside);
  m.patience = std::array{16ull, 2048ull, ~0ull}[m.rng() % 3];  // events come soon, now and then, when nothing else can
  m.window = std::array{4ull, 64ull, ~0ull}[m.rng() % 3];  // a warp runs far ahead of others, or all run side by side
  for (unsigned rank = 0; rank < m.launch.cluster; ++rank) {
    Block& b = m.blocks[rank];
    const unsigned i = first + rank;
    b.index = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
    b.rank = rank;
    b.alive = threads;
    b.warps.resize((threads + 31) / 32);
    m.events.push_back([&b, threads] {
      std::memset(m.shared + b.rank * kArena, 0xFF, kArena);
      for (const auto& [id, variable] : m.variables) make_fresh(b, variable);
      b.started = true;
      for (unsigned t = 0; t < threads; ++t) {
        Fiber& f = m.fibers[b.rank * kMaxThreads + t];
        f.made = f.made && f.idle;  // one that a fault left in the middle of a kernel starts anew
        f.idle = false;
        f.block = &b;
        f.index = t;
        f.cluster_arrival = -1;
        m.ready.push_back(&f);
      }
    });
  }
  while (m.alive && m.error.empty()) {
    const bool due = m.order == kRandom && !m.events.empty() && m.rng() % m.patience == 0;
    if (!m.ready.empty() && !due) {
      resume(*next());
      m.now = nullptr;
    } else if (!m.events.empty()) {
      next_event();
    } else {
      m.error = deadlock(threads);
    }
  }
}

// --- memory ----------------------------------------------------------------------------------------------------------

std::vector<Memory>::iterator first_after(std::uintptr_t at) {
  const auto before = [](std::uintptr_t at, const Memory& piece) { return at < piece.start; };
  return std::upper_bound(m.memory.begin(), m.memory.end(), at, before);
}

char* reserve(std::size_t bytes) {
  const int kind = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  return static_cast<char*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, kind, -1, 0));
}

std::string hex(std::uintptr_t x) {
  char text[20];
  std::snprintf(text, sizeof text, "%#zx", std::size_t{x});
  return text;
}

// As a place in this library, which Python turns into a line of the source.
std::string place(const void* code) {
  Dl_info info;
  if (!code || !dladdr(code, &info)) return "";
  return " [code " + hex(static_cast<const char*>(code) - static_cast<char*>(info.dli_fbase) - 1) + "]";
}

void check_access(std::uintptr_t at, std::size_t bytes, bool write, const void* code) {
  const auto check = [&](bool good, const char* what) {
    if (good) return;
    const std::string verb = write ? "writes " : "reads ";
    fault(verb + std::to_string(bytes) + " bytes at " + hex(at) + ", " + what + place(code));
  };
  const std::uintptr_t offset = at - reinterpret_cast<std::uintptr_t>(m.shared);
  if (offset < kMaxBlocks * kArena) {
    const unsigned rank = offset / kArena;
    check(rank < m.blocks.size() && m.blocks[rank].started, "shared memory of a block that has not started");
    check(m.blocks[rank].alive, "shared memory of a block that has left");
    for (unsigned char* state = &m.state[offset]; state < &m.state[offset] + bytes; ++state) {
      check(*state != kOutside, "outside of any shared variable");
      check(write || *state == kWritten, "shared memory that nobody has written");
      if (write) *state = kWritten;
    }
    return;
  }
  const auto after = first_after(at);
  check(after != m.memory.begin() && at + bytes <= (after - 1)->end, "outside of the kernel's memory");
  check(write ? (after - 1)->writable : (after - 1)->readable, "memory that it is not to");
}

void on_access(const void* pointer, std::size_t bytes, bool write, const void* code) {
  if (!m.now) return;  // the host's part of the file
  const auto at = reinterpret_cast<std::uintptr_t>(pointer);
  if (at - reinterpret_cast<std::uintptr_t>(stack(*m.now)) < kStack) return;
  if (m.order == kRandom && m.until_switch-- == 0) {
    m.until_switch = m.rng() % kAccesses;
    yield();
  }
  check_access(at, bytes, write, code);
}

CopyBarrier& copy_barrier(unsigned address) {
  const auto at = m.blocks[address / kArena].copy_barriers.find(address);
  if (at == m.blocks[address / kArena].copy_barriers.end()) fault("uses a barrier of copies that is not initialised");
  return at->second;
}

void complete_if_done(CopyBarrier& b) {
  if (b.pending || b.bytes) return;
  b.pending = b.arrivals;
  release(b.barrier);
}

Meeting& meet(unsigned mask, std::uint64_t value, const char* what) {
  Fiber& f = *m.now;
  const unsigned lane = f.index % 32;
  if (!(mask >> lane & 1)) fault("takes part in " + std::string(what) + " whose mask leaves it out");
  Meeting& meeting = f.block->warps[f.index / 32][mask];
  if (!meeting.barrier.arrived) meeting.what = what;
  if (meeting.what != what) fault("comes to " + std::string(what) + ", other lanes to " + meeting.what);
  meeting.values[meeting.barrier.phase & 1][lane] = value;
  wait_for(meeting.barrier, arrive(meeting.barrier, __builtin_popcount(mask)), what);
  return meeting;
}

}  // namespace

// --- the host's side -------------------------------------------------------------------------------------------------

bool run(const Launch& launch, void (*thread)(const void*), const void* closure) {
  const std::size_t threads = std::size_t{launch.block.x} * launch.block.y * launch.block.z;
  const std::size_t allowed = std::max(m.allowed_dynamic[launch.kernel], kStaticLimit);
  m.error.clear();
  m.failed = true;
  if (threads < 1 || threads > kMaxThreads) {
    m.error = "a block of " + std::to_string(threads) + " threads";
  } else if (launch.cluster < 1 || launch.cluster > kMaxBlocks || launch.grid.x % launch.cluster) {
    m.error = "clusters of " + std::to_string(launch.cluster) + " blocks in a grid of " + std::to_string(launch.grid.x);
  } else if (launch.dynamic_bytes > allowed) {
    m.error = std::to_string(launch.dynamic_bytes) + " bytes of dynamic shared memory; allowed are " +
              std::to_string(allowed);
  }
  if (!m.error.empty()) return false;
  if (!m.stacks) {
    m.stacks = reserve(m.fibers.size() * kStack);
    m.shared = reserve(kMaxBlocks * kArena);
  }
  m.launch = launch;
  m.thread = thread;
  m.closure = closure;
  m.variables.clear();
  m.static_bytes = m.static_end = 0;
  m.until_switch = m.rng() % kAccesses;
  m.state.resize(launch.cluster * kArena);
  std::vector<unsigned> firsts;
  for (unsigned i = 0; i < launch.grid.x * launch.grid.y * launch.grid.z; i += launch.cluster) firsts.push_back(i);
  if (m.order == kRandom) std::shuffle(firsts.begin(), firsts.end(), m.rng);
  if (m.order == kLastFirst) std::reverse(firsts.begin(), firsts.end());
  for (unsigned first : firsts) {
    if (m.error.empty()) run_cluster(first);
  }
  for (std::size_t x : std::array<std::size_t, 4>{launch.grid.x, launch.cluster, threads, launch.dynamic_bytes}) {
    m.launches += std::to_string(x) + " ";
  }
  m.launches += std::to_string(m.static_bytes) + "\n";
  m.failed = !m.error.empty();
  return !m.failed;
}

bool failed() { return std::exchange(m.failed, false); }
const char* error() { return m.error.c_str(); }
void allow_dynamic(const void* kernel, int bytes) { m.allowed_dynamic[kernel] = bytes; }
int capability() { return m.capability; }
int shared_limit() { return m.shared_limit; }

// --- the device's side -----------------------------------------------------------------------------------------------

void fault(const std::string& what) {
  m.error = name(*m.now) + " " + what;
  _longjmp(m.scheduler, 1);
}

uint3 threadIdx() {
  const dim3 size = m.launch.block;
  const unsigned i = m.now->index;
  return {i % size.x, i / size.x % size.y, i / size.x / size.y};
}

uint3 blockIdx() { return m.now->block->index; }
dim3 blockDim() { return m.launch.block; }
dim3 gridDim() { return m.launch.grid; }
unsigned cluster_blocks() { return m.launch.cluster; }
unsigned block_rank() { return m.now->block->rank; }

void sync_block() {
  Block& b = *m.now->block;
  wait_for(b.barrier, arrive(b.barrier, b.alive), "__syncthreads");
}

void arrive_at_cluster() {
  if (m.now->cluster_arrival >= 0) fault("arrives at the cluster's barrier twice without waiting");
  m.now->cluster_arrival = arrive(m.barrier, m.alive);
}

void wait_for_cluster() {
  if (m.now->cluster_arrival < 0) fault("waits for the cluster's barrier without having arrived");
  wait_for(m.barrier, m.now->cluster_arrival, "the cluster's barrier");
  m.now->cluster_arrival = -1;
}

std::uint64_t shuffle(unsigned mask, std::uint64_t value, unsigned from) {
  if (!(mask >> from & 1)) fault("takes a value from lane " + std::to_string(from) + ", which the mask leaves out");
  const Meeting& meeting = meet(mask, value, kShuffle);
  return meeting.values[~meeting.barrier.phase & 1][from];
}

unsigned ballot(unsigned mask, bool value) {
  const Meeting& meeting = meet(mask, value, kVote);
  unsigned lanes = 0;
  for (int i = 0; i < 32; ++i) lanes |= (mask >> i & 1 && meeting.values[~meeting.barrier.phase & 1][i] ? 1u : 0u) << i;
  return lanes;
}

void* shared_variable(int id, std::size_t bytes, std::size_t alignment) {
  const auto round_up = [alignment](std::size_t x) { return (x + alignment - 1) / alignment * alignment; };
  if (!m.variables.count(id)) {
    m.static_bytes = round_up(m.static_bytes) + bytes;
    m.static_end = round_up(m.static_end + kGap) + bytes;
    const std::size_t dynamic = std::max(m.launch.dynamic_bytes, m.allowed_dynamic[m.launch.kernel]);
    if (m.static_bytes > kStaticLimit || m.static_bytes + dynamic > std::size_t(m.shared_limit)) {
      fault("has " + std::to_string(m.static_bytes) + " bytes of shared variables beside " + std::to_string(dynamic) +
            " bytes of dynamic shared memory, more than there are");
    }
  }
  return declare(id, {m.static_end - bytes, bytes});
}

void* dynamic_shared(std::size_t alignment) {  // no better aligned than asked for
  return declare(-1, {kStatic + alignment, m.launch.dynamic_bytes});
}

void* map_to_rank(const void* mine, unsigned rank) {
  if (rank >= m.launch.cluster) fault("maps to block " + std::to_string(rank) + ", beyond its cluster");
  return m.shared + shared_offset(mine) % kArena + rank * kArena;
}

unsigned shared_offset(const void* at) {
  const std::size_t offset = static_cast<const char*>(at) - m.shared;
  if (offset / kArena != m.now->block->rank) fault("takes for shared memory of its block what isn't");
  return offset;
}

void init_barrier(unsigned barrier, unsigned arrivals) {
  on_access(m.shared + barrier, 8, true, __builtin_return_address(0));
  CopyBarrier& b = m.now->block->copy_barriers[barrier];
  b = {};
  b.arrivals = b.pending = arrivals;
}

void fence_barriers() {
  for (auto& [_, b] : m.now->block->copy_barriers) b.fenced = true;
}

void expect_bytes_and_arrive(unsigned barrier, unsigned bytes) {
  CopyBarrier& b = copy_barrier(barrier);
  if (!b.pending) fault("arrives once too often at a barrier of copies");
  --b.pending;
  b.bytes += bytes;
  complete_if_done(b);
}

bool try_wait(unsigned barrier, unsigned parity) {
  CopyBarrier& b = copy_barrier(barrier);
  if (m.order == kRandom && m.rng() % 8 == 0) yield();  // it may give up at any time
  if ((b.barrier.phase & 1) != parity) return true;
  if (m.order == kRandom && m.rng() % 8 == 0) return false;
  wait_for(b.barrier, b.barrier.phase, "a bulk copy");
  return true;
}

void copy_in_bulk(unsigned to, std::uintptr_t from, unsigned bytes, unsigned barrier) {
  CopyBarrier& b = copy_barrier(barrier);
  if (!b.fenced) fault("starts a bulk copy on a barrier that no fence has shown to the async proxy");
  if (to % 16 || from % 16 || bytes % 16 || !bytes) {
    fault("starts a bulk copy of " + std::to_string(bytes) + " bytes from " + hex(from) + " to " + hex(to) +
          ", not all of them multiples of 16");
  }
  check_access(from, bytes, false, nullptr);
  for (unsigned i = 0; i < bytes; ++i) {
    if (m.state[to + i] == kOutside) fault("starts a bulk copy to memory outside of any shared variable");
  }
  Block& block = m.blocks[to / kArena];
  ++block.copies;
  m.events.push_back([&block, &b, to, from, bytes] {
    std::memcpy(m.shared + to, reinterpret_cast<const void*>(from), bytes);
    std::memset(&m.state[to], kWritten, bytes);
    --block.copies;
    b.bytes -= bytes;
    complete_if_done(b);
  });
}

}  // namespace emulation

// --- for Python, and for the compiler's sanitizers -------------------------------------------------------------------

using emulation::m;
using emulation::on_access;

extern "C" {

void emulation_configure(int order, std::uint64_t seed, int capability, int shared_limit) {
  m.order = static_cast<emulation::Order>(order);
  m.rng.seed(seed);
  m.capability = capability;
  m.shared_limit = shared_limit;
}

void emulation_forget_memory() { m.memory.clear(); }

void emulation_declare_memory(std::uintptr_t start, std::size_t bytes, bool readable, bool writable) {
  m.memory.insert(emulation::first_after(start), {start, start + bytes, readable, writable});
}

// A line a launch since the last call: grid, cluster, block; bytes of dynamic and of static shared memory
const char* emulation_launches() {
  m.kept = std::move(m.launches);
  m.launches.clear();
  return m.kept.c_str();
}

const char* emulation_keep(const char* text) { return (m.kept = text).c_str(); }

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
#define ACCESS(bytes)                                                                             \
  void __tsan_read##bytes(void* at) { on_access(at, bytes, false, __builtin_return_address(0)); } \
  void __tsan_write##bytes(void* at) { on_access(at, bytes, true, __builtin_return_address(0)); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
void __tsan_read_range(void* at, std::size_t bytes) { on_access(at, bytes, false, __builtin_return_address(0)); }
void __tsan_write_range(void* at, std::size_t bytes) { on_access(at, bytes, true, __builtin_return_address(0)); }

struct Mismatch {
  const char* file;
  unsigned line, column;
  const void* type;
  unsigned char log_alignment, kind;
};

void __ubsan_handle_type_mismatch_v1(const Mismatch* found, std::uintptr_t at) {
  if (!m.now) return;
  const std::string multiple = std::to_string(1u << found->log_alignment), line = std::to_string(found->line);
  const std::string where = std::string(found->file) + ":" + line;
  emulation::fault("uses address " + emulation::hex(at) + ", no multiple of " + multiple + " [" + where + "]");
}
}
