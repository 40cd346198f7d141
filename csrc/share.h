// Work shared by threads that live as long as it does.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <future>
#include <vector>

namespace sslr1 {

// Calls work(i) for every i below n, in no order, on at most `threads` threads, the caller's among them.
template <class Work>
void share(std::int64_t n, std::int64_t threads, const Work& work) {
  std::atomic<std::int64_t> next{0};
  const auto loop = [&] {
    for (std::int64_t i; (i = next++) < n;) work(i);
  };
  std::vector<std::future<void>> helpers;
  for (std::int64_t i = 1; i < std::min(threads, n); ++i) helpers.push_back(std::async(std::launch::async, loop));
  loop();
  for (auto& helper : helpers) helper.get();
}

}  // namespace sslr1
