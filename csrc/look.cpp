// Cost: sample touches samples^2 pixels, cell_means what of them lies in its rectangle, reduced_grey a quarter to all of them; corners passes a dozen times over a
// picture of at most 192 px a side.
#include "vectorised.h"

#include "look.h"
#include "memory.h"

#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>
#include <vector>

namespace sslr1 {
namespace {

std::vector<std::int64_t> grid(std::int64_t size, std::int64_t samples, std::int64_t stride) {
  std::vector<std::int64_t> found(static_cast<std::size_t>(samples));
  for (std::int64_t i = 0; i < samples; ++i) found[static_cast<std::size_t>(i)] = stride * ((2 * i + 1) * size / (2 * samples));
  return found;
}

VECTORISED void add(const std::uint8_t* from, std::int32_t* sums, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) sums[i] += from[i];
}

// Luma of n pixels, `step` bytes apart, after a colour map has clipped them.
VECTORISED void lumas_of(const std::uint8_t* from, std::int64_t step, std::int64_t n, const float* m, float* luma) {
  for (std::int64_t i = 0; i < n; ++i) {
    const float red = from[i * step], green = from[i * step + 1], blue = from[i * step + 2];
    const auto clipped = [](float x) { return x < 0.f ? 0.f : x > 255.f ? 255.f : x; };
    luma[i] = 0.299f * clipped(m[0] * red + m[1] * green + m[2] * blue + m[3]) +
              0.587f * clipped(m[4] * red + m[5] * green + m[6] * blue + m[7]) +
              0.114f * clipped(m[8] * red + m[9] * green + m[10] * blue + m[11]);
  }
}

// Of each of n places: the sum of 5, or the maximum of 7, neighbours that lie `step` apart.
VECTORISED void sums_of_five(const float* in, std::int64_t step, float* out, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    out[i] = in[i - 2 * step] + in[i - step] + in[i] + in[i + step] + in[i + 2 * step];
  }
}

VECTORISED void maxima_of_seven(const float* in, std::int64_t step, float* out, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    float most = in[i - 3 * step];
    for (int k = -2; k <= 3; ++k) most = in[i + k * step] > most ? in[i + k * step] : most;
    out[i] = most;
  }
}

VECTORISED void tensors(const float* left, const float* right, const float* above, const float* below, std::int64_t n,
                        float* xx, float* yy, float* xy) {
  for (std::int64_t x = 0; x < n; ++x) {
    const float dx = (right[x] - left[x]) / 2, dy = (below[x] - above[x]) / 2;
    xx[x] = dx * dx, yy[x] = dy * dy, xy[x] = dx * dy;
  }
}

VECTORISED float smaller_eigenvalues(const float* xx, const float* yy, const float* xy, float* out, std::int64_t n) {
  float largest = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    const float difference = xx[i] - yy[i];
    out[i] = (xx[i] + yy[i]) / 2 - std::sqrt(difference * difference / 4 + xy[i] * xy[i]);
    largest = out[i] > largest ? out[i] : largest;
  }
  return largest;
}

}  // namespace

void sample(std::uintptr_t pixels, std::int64_t height, std::int64_t width, std::int64_t samples, std::uintptr_t out) {
  const auto* in = reinterpret_cast<const std::uint8_t*>(pixels);
  auto* to = reinterpret_cast<std::uint8_t*>(out);
  const auto columns = grid(width, samples, 3), rows = grid(height, samples, 3 * width);
  const std::int64_t ahead = samples > 2 ? rows[2] - rows[0] : 0, end = 3 * height * width;
  for (const std::int64_t row : rows) {
    const std::int64_t next = row + ahead;  // too far away for the machine to foresee it
    for (std::int64_t x = 0; x < 3 * width && next + x < end; x += 64) __builtin_prefetch(in + next + x);
    for (const std::int64_t column : columns) {
      for (int c = 0; c < 3; ++c) *to++ = in[row + column + c];
    }
  }
}

void cell_means(std::uintptr_t sample, std::int64_t samples, std::int64_t height, std::int64_t width, double top, double left,
                double extent_y, double extent_x, std::int64_t rows, std::int64_t columns, std::uintptr_t means) {
  const auto* in = reinterpret_cast<const std::uint8_t*>(sample);
  auto* out = reinterpret_cast<float*>(means);
  const auto edges = [samples](double start, double extent, std::int64_t count, std::int64_t size) {
    std::vector<std::pair<std::int64_t, std::int64_t>> found;
    const auto at = [&](std::int64_t i) {
      const double place = (static_cast<double>(i) * (extent / static_cast<double>(count)) + start) *
                               (static_cast<double>(samples) / static_cast<double>(size)) + 0.5;
      return std::clamp<std::int64_t>(static_cast<std::int64_t>(place), 0, samples);
    };
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t first = std::min(at(i), samples - 1);
      found.emplace_back(first, std::max(at(i + 1), first + 1));
    }
    return found;
  };
  const auto across = edges(left, extent_x, columns, width);
  const std::int64_t first = across.front().first, last = across.back().second, n = 3 * (last - first);
  std::vector<std::int32_t> sums(static_cast<std::size_t>(n));  // of a band's columns
  for (const auto& [y0, y1] : edges(top, extent_y, rows, height)) {
    std::fill(sums.begin(), sums.end(), 0);
    for (std::int64_t y = y0; y < y1; ++y) add(in + 3 * (y * samples + first), sums.data(), n);
    for (const auto& [x0, x1] : across) {
      const double count = static_cast<double>((y1 - y0) * (x1 - x0));
      std::int64_t total[3] = {0, 0, 0};
      for (std::int64_t x = 3 * (x0 - first); x < 3 * (x1 - first); x += 3) {
        for (int c = 0; c < 3; ++c) total[c] += sums[static_cast<std::size_t>(x + c)];
      }
      for (const std::int64_t sum : total) *out++ = static_cast<float>(static_cast<double>(sum) / count);
    }
  }
}

double contrast(std::uintptr_t sample, std::int64_t samples, std::array<std::int64_t, 3> y, std::array<std::int64_t, 3> x,
                const std::array<float, 12>& colour) {
  const auto* in = reinterpret_cast<const std::uint8_t*>(sample);
  const std::int64_t columns = (x[1] - x[0] + x[2] - 1) / x[2];
  std::vector<float> lumas(static_cast<std::size_t>(columns));
  double sum = 0, squares = 0;
  std::int64_t count = 0;
  for (std::int64_t i = y[0]; i < y[1]; i += y[2], count += columns) {
    lumas_of(in + 3 * (i * samples + x[0]), 3 * x[2], columns, colour.data(), lumas.data());
    for (const float luma : lumas) sum += luma, squares += static_cast<double>(luma) * luma;
  }
  const double n = static_cast<double>(count), mean = sum / n;
  return std::sqrt(std::max(squares / n - mean * mean, 0.0));
}

void reduced_grey(std::uintptr_t pixels, std::int64_t height, std::int64_t width, std::int64_t step, std::uintptr_t grey) {
  const auto* in = reinterpret_cast<const std::uint8_t*>(pixels);
  auto* out = reinterpret_cast<float*>(grey);
  const std::int64_t h = height / step, w = width / step, half = step / 2, end = 3 * height * width;
  for (std::int64_t y = 0; y < h; ++y) {
    for (std::int64_t row = 3 * (y + 1) * step * width, i = 0; i < 3 * width; i += 64) {  // as in sample
      if (row + i < end) __builtin_prefetch(in + row + i);
      if (step > 1 && row + 3 * half * width + i < end) __builtin_prefetch(in + row + 3 * half * width + i);
    }
    for (std::int64_t x = 0; x < w; ++x) {
      const std::uint8_t* p = in + 3 * (y * step * width + x * step);
      int sum = p[0] + p[1] + p[2];
      if (step > 1) {
        for (const std::uint8_t* q : {p + 3 * half, p + 3 * half * width, p + 3 * half * (width + 1)}) sum += q[0] + q[1] + q[2];
      }
      out[y * w + x] = static_cast<float>(sum) / (step > 1 ? 12.f : 3.f);
    }
  }
}

std::int64_t corners(std::uintptr_t grey, std::int64_t height, std::int64_t width, float grain, float share,
                     std::int64_t most, std::uintptr_t out) {
  constexpr std::int64_t kRim = 4;  // of zeros around every picture
  const auto* g = reinterpret_cast<const float*>(grey);
  const std::int64_t h = height, w = width, stride = w + 2 * kRim, size = (h + 2 * kRim) * stride;
  if (h < 2 * kRim || w < 2 * kRim) return 0;
  const Block memory(5 * size * static_cast<std::int64_t>(sizeof(float)));
  auto* pictures = reinterpret_cast<float*>(memory.data());
  std::fill(pictures, pictures + 5 * size, 0.f);
  const auto at = [&](std::int64_t number, std::int64_t y) {
    return pictures + number * size + (y + kRim) * stride + kRim;
  };
  for (std::int64_t y = 0; y < h; ++y) {
    const float *row = g + y * w, *above = row - w, *below = row + w;
    if (y == 0 || y == h - 1) above = below = row;  // no gradient across the edge
    const auto tensors_of = [&](std::int64_t x, std::int64_t n, std::int64_t aside) {
      tensors(row + x - aside, row + x + aside, above + x, below + x, n, at(0, y) + x, at(1, y) + x, at(2, y) + x);
    };
    tensors_of(0, 1, 0), tensors_of(1, w - 2, 1), tensors_of(w - 1, 1, 0);
  }
  for (int number = 0; number < 3; ++number) {
    for (std::int64_t y = 0; y < h; ++y) sums_of_five(at(number, y), 1, at(3, y), w);
    for (std::int64_t y = 0; y < h; ++y) sums_of_five(at(3, y), stride, at(number, y), w);
  }
  float strongest = 0;
  for (std::int64_t y = 0; y < h; ++y) {
    strongest = std::max(strongest, smaller_eigenvalues(at(0, y), at(1, y), at(2, y), at(3, y), w));
  }
  const float least = std::max(25 * grain, share * strongest);  // of sums: means of 25 would be as good
  std::vector<std::tuple<float, std::int64_t, std::int64_t>> found;
  for (std::int64_t y = 1; y < h - 1; ++y) maxima_of_seven(at(3, y) + kRim, 1, at(4, y) + kRim, w - 2 * kRim);
  for (std::int64_t y = kRim; y < h - kRim; ++y) {
    const float *strength = at(3, y), *peak = at(0, y);
    maxima_of_seven(at(4, y) + kRim, stride, at(0, y) + kRim, w - 2 * kRim);
    for (std::int64_t x = kRim; x < w - kRim; ++x) {
      if (strength[x] == peak[x] && strength[x] > least) found.emplace_back(strength[x], y, x);
    }
  }
  std::stable_sort(found.begin(), found.end(), [](const auto& a, const auto& b) { return std::get<0>(a) > std::get<0>(b); });
  auto* to = reinterpret_cast<std::int64_t*>(out);
  if (static_cast<std::int64_t>(found.size()) > most) found.resize(static_cast<std::size_t>(most));
  for (const auto& [strength, y, x] : found) *to++ = y, *to++ = x;
  return static_cast<std::int64_t>(found.size());
}

}  // namespace sslr1
