// Blocks of memory that are handed out again after their last user has let them go. Fresh pages cost more to touch for the first
// time than the renderer costs to fill them.
#pragma once
#include <cstdint>

namespace sslr1 {

// At least `bytes` bytes, 64-byte aligned, contents unspecified. Thread-safe; throws std::bad_alloc.
class Block {
 public:
  explicit Block(std::int64_t bytes);
  ~Block();  // keeps the memory for the next Block of about this size, unless kKept bytes are kept already
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  std::uint8_t* data() const { return data_; }
  std::int64_t bytes() const { return bytes_; }

  static constexpr std::int64_t kKept = 128 << 20;  // the oldest are given back first

 private:
  std::uint8_t* data_;
  std::int64_t bytes_, size_;
};

}  // namespace sslr1
