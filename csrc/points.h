// Which points a puzzle can mark. sslr1/puzzles/points.py is the reference.
#pragma once
#include <cstdint>
#include <vector>

namespace sslr1 {

// Numbers of the first `count` of n points, taken in `order` (int64 [n]), that lie at least `apart` from those before them in
// `places` (double [n, 2]), and whose surroundings of (2 * radius + 1)^2 px in a grey picture, float [height, width], correlate
// with theirs by `alike` at most; fewer where there are not so many. spots: double [n, 2], (y, x) in px of it.
std::vector<std::int64_t> distinct(std::uintptr_t grey, std::int64_t height, std::int64_t width, std::uintptr_t spots,
                                   std::uintptr_t places, std::uintptr_t order, std::int64_t n, std::int64_t count,
                                   std::int64_t radius, double apart, double alike);

// Ranks (int64 [count, n]) of the distance of each of n `refs` (double [count, n, 2]) to its own of `places` (double [count, 2])
// among its distances to all of them, and weights (double [count, count], of point and rank): 0 where no ref of the point has
// the rank, otherwise so that all rows and columns add up to 1. False where there are no such weights.
bool balanced(std::uintptr_t refs, std::uintptr_t places, std::int64_t count, std::int64_t n, std::uintptr_t ranks,
              std::uintptr_t weights);

}  // namespace sslr1
