// Tiles. Bytes moved: 3 written a pixel, and 3 (nearest) or 12 (bilinear, mostly from cache) read.
#pragma once
#include "picture.h"

namespace sslr1 {
namespace {

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

#ifdef SSLR1_X86
// 16 pixels at once; how many of n were packed.
TARGET_VBMI Index pack_by_permutes(const std::uint32_t* pixels, Index n, Byte* out) {
  Byte order[64] = {};
  for (int i = 0; i < 48; ++i) order[i] = static_cast<Byte>(i / 3 * 4 + i % 3);
  const __m512i without_fourth = _mm512_loadu_si512(order);
  Index i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m512i packed = _mm512_permutexvar_epi8(without_fourth, _mm512_load_si512(pixels + i));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 3 * i), _mm512_castsi512_si256(packed));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 3 * i + 32), _mm512_extracti32x4_epi32(packed, 2));
  }
  return i;
}
#endif

void pack(const Run& run, Index n, Byte* out) {
  Index i = 0;
#ifdef SSLR1_X86
  if (has_vbmi()) i = pack_by_permutes(run.pixel, n, out);
#endif
  gather_pixels(reinterpret_cast<const Byte*>(run.pixel + i), 4, out + 3 * i, n - i);
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
  pack(run, n, out);
}

// ---- bilinear tiles whose rows lie along rows of the picture: a row's means of neighbours serve the next row of pixels too

bool is_upright(const Tile& t) {
  const float* m = t.map;
  return t.mode & kBilinear && m[1] == 0 && m[3] == 0 && m[6] == 0 && m[7] == 0 && m[8] == 1;
}

// As locate; run.index is in bytes and of the column alone, run.inside says whether that is inside.
VECTORISED void locate_columns(const Tile& t, const Picture& p, Index x, Index n, Run& run) {
  const float m0 = t.map[0], m2 = t.map[2], width = static_cast<float>(p.width);
  const int left = static_cast<int>(p.held.left), right = static_cast<int>(p.held.right) - 1;
  const int first = static_cast<int>(x), count = static_cast<int>(n);
  for (int i = 0; i < count; ++i) {
    float u = m0 * (static_cast<float>(first + i) + 0.5f) + m2;
    run.inside[i] = (u >= 0) & (u < width);
    u = clamp(u - 0.5f, static_cast<float>(left), static_cast<float>(right));
    int column = static_cast<int>(u);
    column = column < right - 1 ? column : right - 1;
    run.right[i] = u - static_cast<float>(column);
    run.index[i] = 3 * (column - left);
  }
}

VECTORISED void mean_pairs(Index n, const Run& run, float (*means)[kRun]) {
  for (Index i = 0; i < n; ++i) {
    const std::uint32_t left = run.pair[0][2 * i], right = run.pair[0][2 * i + 1];
    const float a = run.right[i];
    means[0][i] = channel(left, 0) * (1 - a) + channel(left, 24) * a;
    means[1][i] = channel(left, 8) * (1 - a) + channel(right, 0) * a;
    means[2][i] = channel(left, 16) * (1 - a) + channel(right, 8) * a;
  }
}

#ifdef SSLR1_X86
// The same for points of which every 16 lie within kWindow bytes of a row.
constexpr Index kWindow = 128;

TARGET_VBMI void mean_pairs_by_permutes(const Byte* row, const Byte* end, Index n, const Run& run,
                                        float (*means)[kRun]) {
  const auto load = [](const Byte* from, Index readable) TARGET_VBMI {
    if (readable >= 64) return _mm512_loadu_si512(from);
    return _mm512_maskz_loadu_epi8(readable > 0 ? (1ull << readable) - 1 : 0, from);
  };
  for (Index i = 0; i < n; i += 16) {
    const int first = std::min(run.index[i], run.index[i + 15]);
    const Byte* from = row + first;
    const __m512i low = load(from, end - from), high = load(from + 64, end - from - 64);
    const __m512i at = _mm512_sub_epi32(_mm512_load_si512(run.index + i), _mm512_set1_epi32(first));
    const __m512 a = _mm512_load_ps(run.right + i), rest = _mm512_sub_ps(_mm512_set1_ps(1), a);
    const auto value = [&](int byte) TARGET_VBMI {
      const __m512i here = _mm512_add_epi32(at, _mm512_set1_epi32(byte));
      return _mm512_cvtepi32_ps(_mm512_maskz_permutex2var_epi8(0x1111111111111111, low, here, high));
    };
    for (int c = 0; c < 3; ++c) {
      const __m512 mean = _mm512_add_ps(_mm512_mul_ps(value(c), rest), _mm512_mul_ps(value(c + 3), a));
      _mm512_store_ps(means[c] + i, mean);
    }
  }
}
#endif

VECTORISED void mean_rows(const float (*upper)[kRun], const float (*lower)[kRun], float b, bool inside,
                          float fill, Index n, Run& run) {
  const int row = inside;
  for (Index i = 0; i < n; ++i) {
    const float red = upper[0][i] * (1 - b) + lower[0][i] * b;
    const float green = upper[1][i] * (1 - b) + lower[1][i] * b;
    const float blue = upper[2][i] * (1 - b) + lower[2][i] * b;
    run.red[i] = run.inside[i] & row ? red : fill;
    run.green[i] = run.inside[i] & row ? green : fill;
    run.blue[i] = run.inside[i] & row ? blue : fill;
  }
}

VECTORISED void mean_rows_plain(const float (*upper)[kRun], const float (*lower)[kRun], float b, bool inside,
                                std::uint32_t fill, Index n, Run& run) {
  const int row = inside;
  for (Index i = 0; i < n; ++i) {
    const int red = static_cast<int>(upper[0][i] * (1 - b) + lower[0][i] * b + 0.5f);
    const int green = static_cast<int>(upper[1][i] * (1 - b) + lower[1][i] * b + 0.5f);
    const int blue = static_cast<int>(upper[2][i] * (1 - b) + lower[2][i] * b + 0.5f);
    run.pixel[i] = run.inside[i] & row ? static_cast<std::uint32_t>(red | green << 8 | blue << 16) : fill;
  }
}

constexpr Index kAhead = 4;  // rows: the next ones lie too far apart for the machine to foresee them

// n <= kRun columns from x on of rows top..bottom of such a tile; `out` is where column x of row `top` starts.
void paint_upright(const Tile& t, const Picture& p, Index top, Index bottom, Index x, Index n, Byte* out, Index stride,
                   Byte fill, Run& run) {
  const Index padded = (n + 15) / 16 * 16;
  const float height = static_cast<float>(p.height), highest = static_cast<float>(p.held.bottom - 1);
  locate_columns(t, p, x, padded, run);
  bool near = false;
#ifdef SSLR1_X86
  near = has_vbmi();
  for (Index i = 0; i < n; i += 16) near &= std::abs(run.index[i + 15] - run.index[i]) + 6 <= kWindow;
#endif
  const Index low = std::min(run.index[0], run.index[padded - 1]), high = std::max(run.index[0], run.index[padded - 1]);
  const auto mean_row = [&](Index y, float (*means)[kRun]) {
    const Byte* row = p.at(y, p.held.left);
    if (y + kAhead < p.held.bottom) {
      for (Index i = low; i < high; i += 64) __builtin_prefetch(row + kAhead * p.stride() + i);
    }
#ifdef SSLR1_X86
    if (near) return mean_pairs_by_permutes(row, p.end(), n, run, means);
#endif
    const bool last = y == p.held.bottom - 1;  // where a word of 8 bytes must not begin with the last pair
    for (Index i = 0; i < n; ++i) {
      const Byte* from = row + run.index[i];
      const std::uint64_t pair = last ? load<std::uint64_t>(from - 2) >> 16 : load<std::uint64_t>(from);
      std::memcpy(run.pair[0] + 2 * i, &pair, 8);
    }
    mean_pairs(n, run, means);
  };
  Index held[2] = {-1, -1};
  for (Index y = top; y < bottom; ++y, out += stride) {
    const float place = t.map[4] * (static_cast<float>(y) + 0.5f) + t.map[5];
    const float v = clamp(place - 0.5f, static_cast<float>(p.held.top), highest);
    const Index row = std::min(static_cast<Index>(v), p.held.bottom - 2);
    const float b = v - static_cast<float>(row);
    const bool inside = place >= 0 && place < height;
    if (!inside && t.mode & kStencil) continue;
    for (const Index r : {row, row + 1}) {
      if (held[r & 1] != r) mean_row(r, run.means[r & 1]);
      held[r & 1] = r;
    }
    const auto *upper = run.means[row & 1], *lower = run.means[(row + 1) & 1];
    if (t.plain) {
      mean_rows_plain(upper, lower, b, inside, fill * 0x010101u, n, run);
    } else {
      mean_rows(upper, lower, b, inside, fill, n, run);
      for (Index i = 0; i < n && !t.opaque; ++i) run.pixel[i] = load_pixel(out + 3 * i);
      finish(t, n, run);
    }
    pack(run, n, out);
  }
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
  } else if (is_upright(t)) {
    for (Index x = 0; x < t.width; x += kRun) {
      paint_upright(t, p, top, bottom, x, std::min(kRun, t.width - x), out + 3 * x, stride, fill, run);
    }
  } else {
    for (Index y = top; y < bottom; ++y, out += stride) {
      for (Index x = 0; x < t.width; x += kRun) sample(t, p, y, x, std::min(kRun, t.width - x), out + 3 * x, fill, run);
    }
  }
}

}  // namespace
}  // namespace sslr1
