// What the renderer works on: pictures, tiles, a thread's own memory.
#pragma once
#include "vectorised.h"

#include "render.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace sslr1 {
namespace {

using Byte = std::uint8_t;
using Index = std::int64_t;

constexpr int kBilinear = 1, kStencil = 2;
constexpr Index kRun = 256;    // pixels that go through the stages of sampling together, in L1
constexpr Index kChunk = 512;  // floats that a blur sums together, in L1

struct Box {
  Index top = 0, left = 0, bottom = 0, right = 0;
  Index height() const { return bottom - top; }
  Index width() const { return right - left; }
};

struct Picture {  // height x width pixels, of which the box `held` lies at `pixels`, row after row
  Byte* pixels;
  Index height, width;
  Box held;
  Index stride() const { return 3 * held.width(); }
  Byte* at(Index y, Index x) const { return pixels + (y - held.top) * stride() + 3 * (x - held.left); }
  const Byte* end() const { return pixels + held.height() * stride(); }
};

struct Tile {
  Index canvas, top, left, height, width, source;
  int mode;
  float map[9], colour[12], alpha;
  bool opaque;         // no stencil, no alpha
  bool plain;          // opaque, and no colour map
  bool flat;           // opaque, and one colour whatever the source
  bool exact;          // plain, and pixels land on pixels: the rest is for these
  Box covered;         // the part of the tile that the picture covers
  const Byte* origin;  // where the tile's pixel (0, 0) lies in the picture, or would
  Index across, down;  // bytes from there to the next column and row
};

struct alignas(64) Run {  // pixels on their way through the stages of sampling
  std::int32_t index[kRun];        // of the (upper left) pixel within the box that the picture holds
  std::int32_t inside[kRun];       // 0 or 1: whether the point lies in the picture
  float right[kRun], down[kRun];   // weights of the right and the lower neighbours
  std::uint32_t pair[2][2 * kRun];  // left and right neighbour of the upper and the lower row, see blend
  float means[2][3][kRun];          // of neighbours in an even and an odd row of the picture, see paint_upright
  float red[kRun], green[kRun], blue[kRun];
  std::uint32_t pixel[kRun];
};

struct Scratch {  // a thread's own
  Run run;
  std::vector<Byte> canvas, bytes, means;
  std::vector<float> floats;
};

template <class Word>
inline Word load(const Byte* p) {
  Word word;
  std::memcpy(&word, p, sizeof(Word));
  return word;
}

inline std::uint32_t load_pixel(const Byte* p) {
  return load<std::uint16_t>(p) | static_cast<std::uint32_t>(p[2]) << 16;
}

// n pixels `step` bytes apart, two at a time: a store spoils 2 bytes after it, which the next one mends.
inline void gather_pixels(const Byte* from, Index step, Byte* to, Index n) {
  Index i = 0;
  for (; i + 2 < n; i += 2) {
    const std::uint64_t left = load<std::uint32_t>(from + i * step), right = load<std::uint32_t>(from + (i + 1) * step);
    const std::uint64_t both = (left & 0xffffff) | right << 24;
    std::memcpy(to + 3 * i, &both, 8);
  }
  for (; i < n; ++i) std::memcpy(to + 3 * i, from + i * step, 3);
}

inline float clamp(float x, float lowest, float highest) {  // not a number gives the lowest
  x = x > lowest ? x : lowest;
  return x < highest ? x : highest;
}

inline int to_byte(float x) { return static_cast<int>(clamp(x, 0, 255) + 0.5f); }

inline float channel(std::uint32_t pixel, int shift) {
  return static_cast<float>(static_cast<int>(pixel >> shift & 255));
}

}  // namespace
}  // namespace sslr1
