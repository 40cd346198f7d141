// Kept blocks lie in a list, the one let go last in front: it is the likeliest to be in cache, and the list is short. One may be
// half as large again as what is asked for: the patches of two batches differ by more than a size class.
#include "memory.h"

#include <cstdlib>
#include <list>
#include <mutex>
#include <new>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace sslr1 {
namespace {

constexpr std::int64_t kPage = 4096, kHuge = 4 << 20;  // bytes from which on huge pages are asked for

struct Kept {
  std::uint8_t* data;
  std::int64_t size;
};

struct Pool {
  std::mutex mutex;
  std::list<Kept> blocks;
  std::int64_t bytes = 0;
};

Pool& pool() {
  static auto* const the_pool = new Pool;  // never destroyed: blocks may be let go while the process ends
  return *the_pool;
}

// Rounded up so that sizes an eighth apart share blocks.
std::int64_t size_class(std::int64_t bytes) {
  std::int64_t step = kPage;
  while (step * 16 <= bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

}  // namespace

Block::Block(std::int64_t bytes) : bytes_(bytes), size_(size_class(bytes > 0 ? bytes : 1)) {
  Pool& p = pool();
  {
    const std::lock_guard<std::mutex> lock(p.mutex);
    for (auto kept = p.blocks.begin(); kept != p.blocks.end(); ++kept) {
      if (kept->size < size_ || kept->size > size_ / 2 * 3) continue;
      data_ = kept->data;
      size_ = kept->size;
      p.bytes -= size_;
      p.blocks.erase(kept);
      return;
    }
  }
  data_ = static_cast<std::uint8_t*>(std::aligned_alloc(kPage, static_cast<std::size_t>(size_)));
  if (!data_) throw std::bad_alloc();
#ifdef __linux__
  if (size_ >= kHuge) madvise(data_, static_cast<std::size_t>(size_), MADV_HUGEPAGE);  // a wish: may go unmet
#endif
}

Block::~Block() {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  p.blocks.push_front({data_, size_});
  p.bytes += size_;
  while (p.bytes > kKept) {
    std::free(p.blocks.back().data);
    p.bytes -= p.blocks.back().size;
    p.blocks.pop_back();
  }
}

}  // namespace sslr1
