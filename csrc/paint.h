// Painting of pixels: mip levels, blurs, tiles. Bytes moved: a level reads each pixel below it once; a blur passes over
// floats twice, in L2; a tile writes 3 bytes a pixel and reads 3 (nearest) or 12 (bilinear, mostly from cache).
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

struct Picture {  // height x width pixels, of which the box `held` lies at `pixels`, row behind row
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

// n pixels `step` bytes apart, two at a time: a store spoils 2 bytes behind it, which the next one mends.
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

// ---- mip levels and blurs

// Means of the 2x2 box at every byte, from means of two, rounded up: one too many where that and a pair both rounded.
VECTORISED void box_means(const Byte* upper, const Byte* lower, Byte* means, Index n) {
  for (Index i = 0; i < n; ++i) {
    const Byte a = upper[i], b = upper[i + 3], c = lower[i], d = lower[i + 3];
    const Byte p = static_cast<Byte>((a + b + 1) >> 1), q = static_cast<Byte>((c + d + 1) >> 1);
    const Byte excess = ((a ^ b) | (c ^ d)) & (p ^ q) & 1;
    means[i] = static_cast<Byte>(((p + q + 1) >> 1) - excess);
  }
}

// Rows top..bottom of the box that a mip level holds, by halving the image `level` times.
void halve(const Picture& image, Index level, const Picture& to, Index top, Index bottom, Scratch& s) {
  Index rows = (bottom - top) << level, columns = to.held.width() << level, stride = image.stride();
  const Byte* from = image.at(top << level, to.held.left << level);
  s.means.resize(3 * columns);
  s.bytes.resize(3 * (rows / 2) * (columns / 2));
  for (Index l = 1; l <= level; ++l, stride = 3 * columns) {
    rows /= 2;
    columns /= 2;
    Byte* out = l == level ? to.at(top, to.held.left) : s.bytes.data();  // in place from the second on
    for (Index y = 0; y < rows; ++y) {
      box_means(from + 2 * y * stride, from + (2 * y + 1) * stride, s.means.data(), 6 * columns - 3);
      gather_pixels(s.means.data(), 6, out + 3 * y * columns, columns);
    }
    from = out;
  }
}

VECTORISED void to_floats(const Byte* in, float* out, Index n) {
  for (Index i = 0; i < n; ++i) out[i] = in[i];
}

VECTORISED void to_bytes(const float* in, Byte* out, Index n) {
  for (Index i = 0; i < n; ++i) out[i] = static_cast<Byte>(to_byte(in[i]));
}

VECTORISED void set_taps(float s, const float* c, float t, const float* a, const float* b, float* __restrict out,
                         Index n) {
  for (Index i = 0; i < n; ++i) out[i] = s * c[i] + t * (a[i] + b[i]);
}

VECTORISED void add_taps(float s, const float* a, const float* b, float t, const float* c, const float* d,
                         float* __restrict out, Index n) {
  for (Index i = 0; i < n; ++i) out[i] += s * (a[i] + b[i]) + t * (c[i] + d[i]);
}

// n floats of the sum over k of taps[|k|] times what lies at window[radius + k] + i.
void convolve(const std::vector<const float*>& window, const std::vector<float>& taps, Index i, float* out, Index n) {
  const Index radius = static_cast<Index>(window.size()) / 2;
  const auto at = [&](Index k) { return window[radius + k] + i; };
  set_taps(taps[0], at(0), taps[1], at(-1), at(1), out, n);
  for (Index k = 2; k <= radius; k += 2) {
    const Index l = std::min(k + 1, radius);  // the last one's tap may be zero
    add_taps(taps[k], at(-k), at(k), taps[k + 1], at(-l), at(l), out, n);
  }
}

Index blur_radius(float sigma) {
  return sigma > 0 ? std::max<Index>(1, static_cast<Index>(std::ceil(3.0 * sigma))) : 0;
}

// Rows top..bottom of the box that a blurred picture holds, edges repeated at the picture's own border.
void blur(const Picture& from, double sigma, const Picture& to, Index top, Index bottom, Scratch& s) {
  const Index radius = blur_radius(static_cast<float>(sigma)), n = 3 * to.held.width(), padded = (n + 15) / 16 * 16;
  std::vector<double> weights(radius + 1);
  std::vector<float> taps(radius + 2, 0.f);
  double sum = 0;
  for (Index k = 0; k <= radius; ++k) {
    weights[k] = std::exp(-0.5 * (k / sigma) * (k / sigma));
    sum += k ? 2 * weights[k] : weights[k];
  }
  for (Index k = 0; k <= radius; ++k) taps[k] = static_cast<float>(weights[k] / sum);
  const Index first = std::max<Index>(top - radius, 0), last = std::min(bottom + radius, from.height) - 1;
  const Index left = std::max<Index>(to.held.left - radius, 0), right = std::min(to.held.right + radius, from.width);
  const Index before = 3 * (left - to.held.left + radius), inner = 3 * (right - left), all = n + 6 * radius;
  s.floats.resize(16 + (last - first + 1) * padded + all);
  float* rows = s.floats.data() + (-reinterpret_cast<std::uintptr_t>(s.floats.data()) / 4 & 15);  // on a cache line
  float* wide = rows + (last - first + 1) * padded;
  std::vector<const float*> window(2 * radius + 1);
  for (Index y = first; y <= last; ++y) {
    const Byte* row = from.at(y, left);
    for (Index i = 0; i < before; ++i) wide[i] = row[i % 3];
    to_floats(row, wide + before, inner);
    for (Index i = before + inner; i < all; ++i) wide[i] = row[inner - 3 + i % 3];
    for (Index k = 0; k <= 2 * radius; ++k) window[k] = wide + 3 * k;
    float* out = rows + (y - first) * padded;
    for (Index i = 0; i < n; i += kChunk) convolve(window, taps, i, out + i, std::min(kChunk, n - i));
  }
  for (Index i = 0; i < n; i += kChunk) {
    for (Index y = top; y < bottom; ++y) {
      for (Index k = -radius; k <= radius; ++k) {
        window[radius + k] = rows + (std::clamp<Index>(y + k, 0, from.height - 1) - first) * padded;
      }
      convolve(window, taps, i, wide, std::min(kChunk, n - i));
      to_bytes(wide, to.at(y, to.held.left) + i, std::min(kChunk, n - i));
    }
  }
}

// ---- tiles

// out (y, x) = the pixel at from + y * down + x * across; `end` is the end of the picture.
void move_pixels(const Byte* from, Index across, Index down, const Byte* end, Byte* out, Index stride, Index height,
                 Index width) {
  constexpr Index kSide = 32;  // of blocks whose source lines stay in L1
  if (across == 3) {
    for (Index y = 0; y < height; ++y) std::memcpy(out + y * stride, from + y * down, 3 * width);
    return;
  }
  for (Index top = 0; top < height; top += kSide) {
    for (Index left = 0; left < width; left += kSide) {
      const Index h = std::min(kSide, height - top), w = std::min(kSide, width - left);
      const Byte* corner = from + top * down + left * across;
      const bool at_end = end - corner < std::max<Index>(0, (h - 1) * down) + std::max<Index>(0, (w - 1) * across) + 4;
      for (Index y = 0; y < h; ++y) {
        Byte* to = out + (top + y) * stride + 3 * left;
        for (Index x = 0; at_end && x < w; ++x) std::memcpy(to + 3 * x, corner + y * down + x * across, 3);
        if (!at_end) gather_pixels(corner + y * down, across, to, w);
      }
    }
  }
}

// Where n points of a tile from pixel (y, x) on lie, in the reference's order of operations.
template <bool kProjective>
IN_EACH_CLONE void locate_points(const Tile& t, const Picture& p, Index y, Index x, Index n, Run& run) {
  const int neighbour = t.mode & kBilinear;
  const float m0 = t.map[0], m1 = t.map[1], m2 = t.map[2], m3 = t.map[3], m4 = t.map[4], m5 = t.map[5];
  const float m6 = t.map[6], m7 = t.map[7], m8 = t.map[8], yc = static_cast<float>(y) + 0.5f;
  const float width = static_cast<float>(p.width), height = static_cast<float>(p.height), half = neighbour ? 0.5f : 0;
  const int left = static_cast<int>(p.held.left), right = static_cast<int>(p.held.right) - 1;
  const int top = static_cast<int>(p.held.top), bottom = static_cast<int>(p.held.bottom) - 1;
  const int first = static_cast<int>(x), count = static_cast<int>(n);
  for (int i = 0; i < count; ++i) {
    const float xc = static_cast<float>(first + i) + 0.5f;
    float u = m0 * xc + m1 * yc + m2, v = m3 * xc + m4 * yc + m5;
    if (kProjective) {
      const float z = m6 * xc + m7 * yc + m8;
      u /= z;
      v /= z;
    }
    run.inside[i] = (u >= 0) & (u < width) & (v >= 0) & (v < height);
    // At the rim the pair of neighbours is the last one, with all the weight on one of them: edges are repeated
    u = clamp(u - half, static_cast<float>(left), static_cast<float>(right));
    v = clamp(v - half, static_cast<float>(top), static_cast<float>(bottom));
    int column = static_cast<int>(u), row = static_cast<int>(v);
    column = column < right - neighbour ? column : right - neighbour;
    row = row < bottom - neighbour ? row : bottom - neighbour;
    run.right[i] = u - static_cast<float>(column);
    run.down[i] = v - static_cast<float>(row);
    run.index[i] = (row - top) * (right + 1 - left) + (column - left);
  }
}

VECTORISED void locate(const Tile& t, const Picture& p, Index y, Index x, Index n, Run& run) {
  const bool projective = t.map[6] != 0 || t.map[7] != 0 || t.map[8] != 1;
  projective ? locate_points<true>(t, p, y, x, n, run) : locate_points<false>(t, p, y, x, n, run);
}

// Channel c of point i. Of 8 bytes an upper pair is the first 6, a lower one the last 6: no word leaves the picture.
IN_EACH_CLONE float blend(const Run& run, Index i, int c) {
  const std::uint32_t *upper = run.pair[0] + 2 * i, *lower = run.pair[1] + 2 * i;
  const float a = run.right[i], b = run.down[i];
  const float top = channel(upper[0], 8 * c) * (1 - a) + channel(upper[c > 0], c ? 8 * c - 8 : 24) * a;
  const float bottom = channel(lower[c > 1], c > 1 ? 0 : 16 + 8 * c) * (1 - a) + channel(lower[1], 8 + 8 * c) * a;
  return top * (1 - b) + bottom * b;
}

VECTORISED void interpolate(float fill, Index n, Run& run) {
  for (Index i = 0; i < n; ++i) {
    const float red = blend(run, i, 0), green = blend(run, i, 1), blue = blend(run, i, 2);
    run.red[i] = run.inside[i] ? red : fill;
    run.green[i] = run.inside[i] ? green : fill;
    run.blue[i] = run.inside[i] ? blue : fill;
  }
}

VECTORISED void interpolate_plain(std::uint32_t fill, Index n, Run& run) {
  for (Index i = 0; i < n; ++i) {
    const int red = static_cast<int>(blend(run, i, 0) + 0.5f), green = static_cast<int>(blend(run, i, 1) + 0.5f);
    const int pixel = red | green << 8 | static_cast<int>(blend(run, i, 2) + 0.5f) << 16;
    run.pixel[i] = run.inside[i] ? static_cast<std::uint32_t>(pixel) : fill;
  }
}

VECTORISED void unpack(Index n, Run& run) {
  for (Index i = 0; i < n; ++i) {
    run.red[i] = channel(run.pixel[i], 0);
    run.green[i] = channel(run.pixel[i], 8);
    run.blue[i] = channel(run.pixel[i], 16);
  }
}

// Colour map, then alpha over what run.pixel holds. Where a tile has none of one, its numbers alter nothing.
template <bool kIsStencil, bool kOpaque>
IN_EACH_CLONE void finish_points(const Tile& t, Index n, Run& run) {
  const float alpha = static_cast<float>(kIsStencil ? static_cast<double>(t.alpha) / 255 : t.alpha);
  const float beta = static_cast<float>(1 - static_cast<double>(t.alpha));
  float c[12];
  std::copy_n(t.colour, 12, c);
  for (Index i = 0; i < n; ++i) {
    const float green = run.green[i], red = kIsStencil ? green : run.red[i], blue = kIsStencil ? green : run.blue[i];
    const float covered = run.inside[i] ? run.red[i] : 0.f;
    const float cover = kIsStencil ? covered * alpha : alpha, rest = kIsStencil ? 1 - cover : beta;
    const float r = clamp(c[0] * red + c[1] * green + c[2] * blue + c[3], 0, 255);
    const float g = clamp(c[4] * red + c[5] * green + c[6] * blue + c[7], 0, 255);
    const float b = clamp(c[8] * red + c[9] * green + c[10] * blue + c[11], 0, 255);
    const auto over = [&](float value, int shift) {
      return kOpaque ? static_cast<int>(value + 0.5f) : to_byte(cover * value + rest * channel(run.pixel[i], shift));
    };
    run.pixel[i] = static_cast<std::uint32_t>(over(r, 0) | over(g, 8) << 8 | over(b, 16) << 16);
  }
}

VECTORISED void finish(const Tile& t, Index n, Run& run) {
  if (t.mode & kStencil) {
    finish_points<true, false>(t, n, run);
  } else {
    t.opaque ? finish_points<false, true>(t, n, run) : finish_points<false, false>(t, n, run);
  }
}

// n pixels of a tile from (y, x) on, through every stage that the tile needs.
void sample(const Tile& t, const Picture& p, Index y, Index x, Index n, Byte* out, Byte fill, Run& run) {
  const Index stride = p.stride();
  const std::uint32_t nothing = fill * 0x010101u;
  locate(t, p, y, x, n, run);
  if (t.mode & kBilinear) {
    for (Index i = 0; i < n; ++i) {
      const Byte* from = p.pixels + 3 * static_cast<Index>(run.index[i]);
      std::memcpy(run.pair[0] + 2 * i, from, 8);
      std::memcpy(run.pair[1] + 2 * i, from + stride - 2, 8);
    }
    t.plain ? interpolate_plain(nothing, n, run) : interpolate(fill, n, run);
  } else {
    for (Index i = 0; i < n; ++i) {
      const std::uint32_t pixel = load_pixel(p.pixels + 3 * static_cast<Index>(run.index[i]));
      run.pixel[i] = run.inside[i] ? pixel : nothing;
    }
    if (!t.plain) unpack(n, run);
  }
  if (!t.plain) {
    for (Index i = 0; i < n && !t.opaque; ++i) run.pixel[i] = load_pixel(out + 3 * i);
    finish(t, n, run);
  }
  gather_pixels(reinterpret_cast<const Byte*>(run.pixel), 4, out, n);
}

// Rows top..bottom of a tile; `out` is where row `top` of it starts.
void paint(const Tile& t, const Picture& p, Index top, Index bottom, Byte* out, Index stride, Byte fill, Run& run) {
  const auto fill_rows = [&](int red, int green, int blue) {
    const Byte pixel[3] = {static_cast<Byte>(red), static_cast<Byte>(green), static_cast<Byte>(blue)};
    for (Index x = 0; x < t.width; ++x) std::memcpy(out + 3 * x, pixel, 3);
    for (Index y = top + 1; y < bottom; ++y) std::memcpy(out + (y - top) * stride, out, 3 * t.width);
  };
  if (t.flat) {
    fill_rows(to_byte(t.colour[3]), to_byte(t.colour[7]), to_byte(t.colour[11]));
  } else if (t.exact) {
    const Box& c = t.covered;
    const Index first = std::max(top, c.top), last = std::min(bottom, c.bottom);
    if (c.height() < t.height || c.width() < t.width) fill_rows(fill, fill, fill);
    if (first >= last || !c.width()) return;
    move_pixels(t.origin + first * t.down + c.left * t.across, t.across, t.down, p.end(),
                out + (first - top) * stride + 3 * c.left, stride, last - first, c.width());
  } else {
    for (Index y = top; y < bottom; ++y, out += stride) {
      for (Index x = 0; x < t.width; x += kRun) sample(t, p, y, x, std::min(kRun, t.width - x), out + 3 * x, fill, run);
    }
  }
}

}  // namespace
}  // namespace sslr1
