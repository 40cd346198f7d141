// Pairs of views that similarity shows. sslr1/puzzles/similarity.py's pair_of_views is the reference, draw by draw.
#pragma once
#include <array>
#include <cstdint>
#include <functional>

namespace sslr1 {

struct BitGenerator {  // NumPy's bitgen_t: what the capsule of a bit generator points to
  void* state;
  std::uint64_t (*next_uint64)(void*);
  std::uint32_t (*next_uint32)(void*);
  double (*next_double)(void*);
  std::uint64_t (*next_raw)(void*);
};

using Colour = std::array<double, 12>;

struct ViewRules {
  std::int64_t tries;
  double low, high;                // of a crop's area, share of the image
  double ratio_low, ratio_spread;  // logarithm of its aspect ratio: lowest, and highest less lowest
  double of_view, of_image;        // least overlap of a pair, shares of the smaller crop and of the image
  bool augmented;                  // mirrored, blurred, recoloured
  double flattest;                 // least contrast
};

// Pairs of crops of a height x width image and their augmentations are drawn until both show something, `tries` times at most;
// whether they do. sample: uint8 [samples, samples, 3] of the image; mean: its RGB; terms: double [9, 4], see colour.py;
// greyed: takes all that isn't luma out of a colour map. Writes double [2, 18]: top, left, height, width, flip, blur, 12 of the
// colour map.
bool draw_views(const BitGenerator& draw, std::uintptr_t sample, std::int64_t samples, std::int64_t height,
                std::int64_t width, double side, const std::array<double, 3>& mean, std::uintptr_t terms,
                const std::function<Colour(const Colour&)>& greyed, const ViewRules& rules, std::uintptr_t out);

}  // namespace sslr1
