// Which points a puzzle can mark. sslr1/puzzles/points.py is the reference.
#pragma once
#include <array>
#include <cstdint>
#include <utility>
#include <vector>

namespace sslr1 {

// What surrounds n spots (double [n, 2], (y, x) in px of a grey picture, float [height, width]): looks (float [n, 2, 16]), of zero
// mean, of px at `offsets` (double [4, 16, 2]) from them, clipped to the first two of `tones` and multiplied by the third, 2 x 2
// together; grains (float [n]), how much neighbouring ones differ.
void surroundings(std::uintptr_t grey, std::int64_t height, std::int64_t width, std::uintptr_t spots, std::int64_t n,
                  std::uintptr_t offsets, std::array<double, 3> tones, std::uintptr_t looks, std::uintptr_t grains);

// (number, side of its label) of the first `count` of n points, taken in `order` (int64 [n]), that lie at least `apart` from those
// before them in `places` (double [n, 2]); whose look, of `looks` (float [n, 2, 16]), differs from theirs and from an even one, in
// any turn by up to `turns` of 16, by more than `least` and `grain` times their mean of `grains` (float [n]), and by more than
// `unlike` times their mean difference from an even one; and that have room for
// `marks`: half the height and the width of a label, whose middle is at the first free one of `sides` (8 of (y, x)) from `starts`
// (int64 [n]) on, and how far others' labels stay from a point. Fewer where there are not so many.
std::vector<std::pair<std::int64_t, std::int64_t>> distinct(std::uintptr_t looks, std::uintptr_t grains,
                                                            std::uintptr_t places, std::uintptr_t order,
                                                            std::uintptr_t starts, std::int64_t n, std::int64_t count,
                                                            std::int64_t turns, double apart, std::array<double, 3> marks,
                                                            std::array<double, 16> sides, double least, double grain, double unlike);

// Ranks (int64 [count, n]) of the distance of each of n `refs` (double [count, n, 2]) to its own of `places` (double [count, 2])
// among its distances to all of them, and weights (double [count, count], of point and rank): 0 where no ref of the point has
// the rank, otherwise so that all rows and columns add up to 1. False where there are no such weights.
bool balanced(std::uintptr_t refs, std::uintptr_t places, std::int64_t count, std::int64_t n, std::uintptr_t ranks,
              std::uintptr_t weights);

}  // namespace sslr1
