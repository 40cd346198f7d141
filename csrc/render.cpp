// Bytes moved: a blur reads a picture once and passes twice over a float copy; each canvas pixel is written once per tile over it, each source pixel read once (nearest) or four times
// (bilinear, mostly from cache); patchify reads a canvas once and writes `temporal` copies of its values.
#include "render.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <thread>

namespace sslr1 {
namespace {

struct Image {
  std::uint8_t* data;
  std::int64_t height, width;
  explicit Image(const Picture& p)
      : data(reinterpret_cast<std::uint8_t*>(std::get<0>(p))), height(std::get<1>(p)), width(std::get<2>(p)) {}
};

// Work is dealt item by item; results don't depend on who does what.
template <class F>
void parallel_for(std::int64_t count, int threads, F work) {
  const int n = static_cast<int>(std::min<std::int64_t>(std::max(threads, 1), count));
  if (n <= 1) {
    for (std::int64_t i = 0; i < count; ++i) work(i);
    return;
  }
  std::atomic<std::int64_t> next{0};
  auto run = [&] {
    for (std::int64_t i; (i = next.fetch_add(1)) < count;) work(i);
  };
  std::vector<std::thread> helpers;
  for (int i = 1; i < n; ++i) helpers.emplace_back(run);
  run();
  for (auto& helper : helpers) helper.join();
}

std::uint8_t to_byte(float x) { return static_cast<std::uint8_t>(std::floor(std::min(std::max(x, 0.f), 255.f) + 0.5f)); }

const float kIdentity[12] = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0};

void paint_tile(const Image& canvas, const Image& source, const std::int64_t* t, const float* f, float fill) {
  const std::int64_t top = t[1], left = t[2], height = t[3], width = t[4];
  const bool bilinear = t[6] != 0;
  const float *m = f, *colour = f + 9, alpha = f[21];
  const bool plain = std::equal(colour, colour + 12, kIdentity) && alpha == 1.f;
  const bool projective = m[6] != 0.f || m[7] != 0.f || m[8] != 1.f;
  const std::int64_t H = source.height, W = source.width;
  const bool shift = !bilinear && !projective && plain && m[0] == 1.f && m[1] == 0.f && m[3] == 0.f && m[4] == 1.f &&
                     m[2] == std::floor(m[2]) && m[5] == std::floor(m[5]) && m[2] >= 0 && m[5] >= 0 &&
                     static_cast<std::int64_t>(m[2]) + width <= W && static_cast<std::int64_t>(m[5]) + height <= H;
  for (std::int64_t y = 0; y < height; ++y) {
    std::uint8_t* out = canvas.data + ((top + y) * canvas.width + left) * 3;
    if (shift) {  // an exact crop is a row copy
      const auto row = static_cast<std::int64_t>(m[5]) + y, column = static_cast<std::int64_t>(m[2]);
      std::memcpy(out, source.data + (row * W + column) * 3, static_cast<std::size_t>(width) * 3);
      continue;
    }
    const float yc = static_cast<float>(y) + 0.5f;
    for (std::int64_t x = 0; x < width; ++x, out += 3) {
      const float xc = static_cast<float>(x) + 0.5f;
      float u = m[0] * xc + m[1] * yc + m[2], v = m[3] * xc + m[4] * yc + m[5];
      if (projective) {
        const float z = m[6] * xc + m[7] * yc + m[8];
        u /= z;
        v /= z;
      }
      float rgb[3];
      if (!(u >= 0 && u < static_cast<float>(W) && v >= 0 && v < static_cast<float>(H))) {
        rgb[0] = rgb[1] = rgb[2] = fill;
      } else if (!bilinear) {
        const std::uint8_t* p = source.data + (static_cast<std::int64_t>(v) * W + static_cast<std::int64_t>(u)) * 3;
        for (int c = 0; c < 3; ++c) rgb[c] = p[c];
      } else {
        u -= 0.5f;
        v -= 0.5f;
        const float fl = std::floor(u), ft = std::floor(v), a = u - fl, b = v - ft;
        const auto l = static_cast<std::int64_t>(fl), s = static_cast<std::int64_t>(ft);
        const std::int64_t x0 = std::clamp<std::int64_t>(l, 0, W - 1), x1 = std::clamp<std::int64_t>(l + 1, 0, W - 1);
        const std::int64_t y0 = std::clamp<std::int64_t>(s, 0, H - 1), y1 = std::clamp<std::int64_t>(s + 1, 0, H - 1);
        const std::uint8_t *p00 = source.data + (y0 * W + x0) * 3, *p01 = source.data + (y0 * W + x1) * 3;
        const std::uint8_t *p10 = source.data + (y1 * W + x0) * 3, *p11 = source.data + (y1 * W + x1) * 3;
        for (int c = 0; c < 3; ++c) {
          rgb[c] = (p00[c] * (1 - a) + p01[c] * a) * (1 - b) + (p10[c] * (1 - a) + p11[c] * a) * b;
        }
      }
      for (int c = 0; c < 3; ++c) {
        float value = rgb[c];
        if (!plain) {
          const float* k = colour + 4 * c;
          value = k[0] * rgb[0] + k[1] * rgb[1] + k[2] * rgb[2] + k[3];
          value = std::min(std::max(value, 0.f), 255.f);
          if (alpha != 1.f) value = alpha * value + (1 - alpha) * static_cast<float>(out[c]);
        }
        out[c] = to_byte(value);
      }
    }
  }
}

template <class T>
void patchify_canvas(const Image& canvas, const T* table, T* out, std::int64_t p, std::int64_t m, std::int64_t temporal) {
  const std::int64_t unit = p * m;
  for (std::int64_t by = 0; by < canvas.height / unit; ++by) {
    for (std::int64_t bx = 0; bx < canvas.width / unit; ++bx) {
      for (std::int64_t inner = 0; inner < m * m; ++inner) {
        const std::int64_t y0 = by * unit + inner / m * p, x0 = bx * unit + inner % m * p;
        for (int c = 0; c < 3; ++c) {
          T* first = out;
          for (std::int64_t y = 0; y < p; ++y) {
            const std::uint8_t* in = canvas.data + ((y0 + y) * canvas.width + x0) * 3 + c;
            for (std::int64_t x = 0; x < p; ++x) *out++ = table[c * 256 + in[3 * x]];
          }
          for (std::int64_t t = 1; t < temporal; ++t, out += p * p) std::copy(first, first + p * p, out);
        }
      }
    }
  }
}

}  // namespace

void paint(const std::vector<Picture>& sources, const std::vector<Picture>& canvases, std::uintptr_t tiles_int,
           std::uintptr_t tiles_float, std::int64_t tile_count, int fill, int threads) {
  const auto* ints = reinterpret_cast<const std::int64_t*>(tiles_int);
  const auto* floats = reinterpret_cast<const float*>(tiles_float);
  std::vector<std::vector<std::int64_t>> tiles_of(canvases.size());
  for (std::int64_t k = 0; k < tile_count; ++k) {
    const std::int64_t* t = ints + 7 * k;
    if (t[0] < 0 || t[0] >= static_cast<std::int64_t>(canvases.size()) || t[5] < 0 ||
        t[5] >= static_cast<std::int64_t>(sources.size())) {
      throw std::invalid_argument("a tile names a canvas or a source that is not there");
    }
    tiles_of[static_cast<std::size_t>(t[0])].push_back(k);
  }
  parallel_for(static_cast<std::int64_t>(canvases.size()), threads, [&](std::int64_t i) {
    const Image canvas(canvases[static_cast<std::size_t>(i)]);
    std::memset(canvas.data, fill, static_cast<std::size_t>(canvas.height * canvas.width * 3));
    for (const std::int64_t k : tiles_of[static_cast<std::size_t>(i)]) {
      const std::int64_t* t = ints + 7 * k;
      paint_tile(canvas, Image(sources[static_cast<std::size_t>(t[5])]), t, floats + 22 * k, static_cast<float>(fill));
    }
  });
}

void blur(const Picture& source, const Picture& target, std::uintptr_t taps_address, std::int64_t radius, int threads) {
  const Image in(source), out(target);
  const auto* taps = reinterpret_cast<const float*>(taps_address);
  const std::int64_t H = in.height, n = in.width * 3, count = 2 * radius + 1;
  std::vector<float> rows(static_cast<std::size_t>(H * n), 0.f);  // after the horizontal pass
  parallel_for(H, threads, [&](std::int64_t y) {
    std::vector<float> wide(static_cast<std::size_t>(n + 6 * radius));
    const std::uint8_t* pixels = in.data + y * n;
    for (std::int64_t i = 0; i < n; ++i) wide[static_cast<std::size_t>(i + 3 * radius)] = pixels[i];
    for (std::int64_t i = 0; i < 3 * radius; ++i) {
      wide[static_cast<std::size_t>(i)] = pixels[i % 3];
      wide[static_cast<std::size_t>(n + 3 * radius + i)] = pixels[n - 3 + i % 3];
    }
    float* row = rows.data() + y * n;
    for (std::int64_t k = 0; k < count; ++k) {
      const float tap = taps[k];
      const float* from = wide.data() + 3 * k;
      for (std::int64_t i = 0; i < n; ++i) row[i] += tap * from[i];
    }
  });
  parallel_for(H, threads, [&](std::int64_t y) {
    std::vector<float> sum(static_cast<std::size_t>(n), 0.f);
    for (std::int64_t k = 0; k < count; ++k) {
      const float tap = taps[k];
      const float* from = rows.data() + std::clamp<std::int64_t>(y + k - radius, 0, H - 1) * n;
      for (std::int64_t i = 0; i < n; ++i) sum[static_cast<std::size_t>(i)] += tap * from[i];
    }
    for (std::int64_t i = 0; i < n; ++i) out.data[y * n + i] = to_byte(sum[static_cast<std::size_t>(i)]);
  });
}

void patchify(const std::vector<Picture>& canvases, std::uintptr_t table, std::uintptr_t out, int element_size,
              std::int64_t patch, std::int64_t merge, std::int64_t temporal, int threads) {
  if (element_size != 2 && element_size != 4) throw std::invalid_argument("element_size must be 2 or 4");
  std::vector<std::int64_t> start;
  std::int64_t total = 0;
  for (const auto& picture : canvases) {
    start.push_back(total);
    total += std::get<1>(picture) * std::get<2>(picture) * 3 * temporal;
  }
  parallel_for(static_cast<std::int64_t>(canvases.size()), threads, [&](std::int64_t i) {
    const Image canvas(canvases[static_cast<std::size_t>(i)]);
    const std::int64_t offset = start[static_cast<std::size_t>(i)];
    if (element_size == 4) {
      patchify_canvas(canvas, reinterpret_cast<const std::uint32_t*>(table), reinterpret_cast<std::uint32_t*>(out) + offset,
                      patch, merge, temporal);
    } else {
      patchify_canvas(canvas, reinterpret_cast<const std::uint16_t*>(table), reinterpret_cast<std::uint16_t*>(out) + offset,
                      patch, merge, temporal);
    }
  });
}

}  // namespace sslr1
