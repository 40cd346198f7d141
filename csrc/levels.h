// Mip levels and blurs. Bytes moved: a level reads each pixel below it once; a blur passes over floats twice, in L2.
#pragma once
#include "picture.h"

namespace sslr1 {
namespace {

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

}  // namespace
}  // namespace sslr1
