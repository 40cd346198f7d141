// Cost: sample_sums touches samples^2 pixels, reduced_grey a quarter to all of them; corners passes a dozen times over a
// picture of at most 192 px a side.
#include "look.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace sslr1 {

namespace {

std::vector<std::int64_t> grid(std::int64_t size, std::int64_t samples, std::int64_t stride) {
  std::vector<std::int64_t> found(static_cast<std::size_t>(samples));
  for (std::int64_t i = 0; i < samples; ++i) found[static_cast<std::size_t>(i)] = stride * ((2 * i + 1) * size / (2 * samples));
  return found;
}

}  // namespace

void sample(std::uintptr_t pixels, std::int64_t height, std::int64_t width, std::int64_t samples, std::uintptr_t out) {
  const auto* in = reinterpret_cast<const std::uint8_t*>(pixels);
  auto* to = reinterpret_cast<std::uint8_t*>(out);
  const auto columns = grid(width, samples, 3);
  for (const std::int64_t row : grid(height, samples, 3 * width)) {
    for (const std::int64_t column : columns) {
      for (int c = 0; c < 3; ++c) *to++ = in[row + column + c];
    }
  }
}

void sample_sums(std::uintptr_t pixels, std::int64_t height, std::int64_t width, std::int64_t samples, std::uintptr_t sums) {
  const auto* in = reinterpret_cast<const std::uint8_t*>(pixels);
  auto* out = reinterpret_cast<std::int32_t*>(sums);
  const std::int64_t stride = 3 * (samples + 1);
  const auto columns = grid(width, samples, 3), rows = grid(height, samples, 3 * width);
  std::fill(out, out + stride, 0);
  for (std::int64_t y = 0; y < samples; ++y) {
    const std::uint8_t* row = in + rows[static_cast<std::size_t>(y)];
    const std::int32_t* above = out + y * stride;
    std::int32_t* here = out + (y + 1) * stride;
    std::int32_t red = 0, green = 0, blue = 0;
    here[0] = here[1] = here[2] = 0;
    for (std::int64_t x = 0; x < samples; ++x) {
      const std::uint8_t* p = row + columns[static_cast<std::size_t>(x)];
      red += p[0], green += p[1], blue += p[2];
      here[3 * x + 3] = above[3 * x + 3] + red;
      here[3 * x + 4] = above[3 * x + 4] + green;
      here[3 * x + 5] = above[3 * x + 5] + blue;
    }
  }
}

void cell_means(std::uintptr_t sums, std::int64_t samples, std::int64_t height, std::int64_t width, double top, double left,
                double extent_y, double extent_x, std::int64_t rows, std::int64_t columns, std::uintptr_t means) {
  const auto* in = reinterpret_cast<const std::int32_t*>(sums);
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
  const std::int64_t stride = 3 * (samples + 1);
  const auto across = edges(left, extent_x, columns, width);
  for (const auto& [y0, y1] : edges(top, extent_y, rows, height)) {
    for (const auto& [x0, x1] : across) {
      const double count = static_cast<double>((y1 - y0) * (x1 - x0));
      for (int c = 0; c < 3; ++c) {
        const std::int32_t *low = in + y0 * stride + c, *high = in + y1 * stride + c;
        *out++ = static_cast<float>((high[3 * x1] - high[3 * x0] - low[3 * x1] + low[3 * x0]) / count);
      }
    }
  }
}

double contrast(std::uintptr_t sample, std::int64_t samples, std::array<std::int64_t, 3> y, std::array<std::int64_t, 3> x,
                const std::array<float, 12>& colour) {
  const auto* in = reinterpret_cast<const std::uint8_t*>(sample);
  constexpr float kLuma[3] = {0.299f, 0.587f, 0.114f};
  double sum = 0, squares = 0;
  std::int64_t count = 0;
  for (std::int64_t i = y[0]; i < y[1]; i += y[2]) {
    for (std::int64_t j = x[0]; j < x[1]; j += x[2], ++count) {
      const std::uint8_t* p = in + 3 * (i * samples + j);
      float luma = 0;
      for (std::size_t c = 0; c < 3; ++c) {
        const float* m = colour.data() + 4 * c;
        luma += kLuma[c] * std::clamp(m[0] * p[0] + m[1] * p[1] + m[2] * p[2] + m[3], 0.f, 255.f);
      }
      sum += luma, squares += static_cast<double>(luma) * luma;
    }
  }
  const double n = static_cast<double>(count), mean = sum / n;
  return std::sqrt(std::max(squares / n - mean * mean, 0.0));
}

void reduced_grey(std::uintptr_t pixels, std::int64_t height, std::int64_t width, std::int64_t step, std::uintptr_t grey) {
  const auto* in = reinterpret_cast<const std::uint8_t*>(pixels);
  auto* out = reinterpret_cast<float*>(grey);
  const std::int64_t h = height / step, w = width / step, half = step / 2;
  for (std::int64_t y = 0; y < h; ++y) {
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

namespace {

// Sums over 5 x 5 neighbours, zeros outside, in place.
void box(std::vector<float>& picture, std::int64_t h, std::int64_t w) {
  std::vector<float> rows(picture.size());
  const auto around = [&](const float* in, std::int64_t x) {
    float sum = 0;
    for (std::int64_t i = std::max<std::int64_t>(x - 2, 0); i <= std::min(x + 2, w - 1); ++i) sum += in[i];
    return sum;
  };
  for (std::int64_t y = 0; y < h; ++y) {
    const float* in = picture.data() + y * w;
    float* out = rows.data() + y * w;
    for (std::int64_t x = 2; x < w - 2; ++x) out[x] = in[x - 2] + in[x - 1] + in[x] + in[x + 1] + in[x + 2];
    for (const std::int64_t x : {std::int64_t{0}, std::int64_t{1}, w - 2, w - 1}) {
      if (0 <= x && x < w) out[x] = around(in, x);
    }
  }
  for (std::int64_t y = 0; y < h; ++y) {
    float* out = picture.data() + y * w;
    std::fill(out, out + w, 0.f);
    for (std::int64_t i = std::max<std::int64_t>(y - 2, 0); i <= std::min(y + 2, h - 1); ++i) {
      const float* in = rows.data() + i * w;
      for (std::int64_t x = 0; x < w; ++x) out[x] += in[x];
    }
  }
}

}  // namespace

std::vector<std::tuple<float, std::int64_t, std::int64_t>> corners(std::uintptr_t grey, std::int64_t height, std::int64_t width,
                                                                   float grain, float share) {
  const auto* g = reinterpret_cast<const float*>(grey);
  const std::int64_t h = height, w = width;
  std::vector<float> xx(static_cast<std::size_t>(h * w)), yy(xx.size()), xy(xx.size());
  for (std::int64_t y = 0; y < h; ++y) {
    for (std::int64_t x = 0; x < w; ++x) {
      const std::int64_t i = y * w + x;
      const float dx = x > 0 && x < w - 1 ? (g[i + 1] - g[i - 1]) / 2 : 0.f;
      const float dy = y > 0 && y < h - 1 ? (g[i + w] - g[i - w]) / 2 : 0.f;
      const auto k = static_cast<std::size_t>(i);
      xx[k] = dx * dx / 25, yy[k] = dy * dy / 25, xy[k] = dx * dy / 25;
    }
  }
  box(xx, h, w), box(yy, h, w), box(xy, h, w);
  float strongest = 0;
  for (std::size_t k = 0; k < xx.size(); ++k) {
    const float difference = xx[k] - yy[k];
    xx[k] = (xx[k] + yy[k]) / 2 - std::sqrt(difference * difference / 4 + xy[k] * xy[k]);
    strongest = std::max(strongest, xx[k]);
  }
  const float least = std::max(grain, share * strongest);
  std::vector<std::tuple<float, std::int64_t, std::int64_t>> found;
  for (std::int64_t y = 4; y < h - 4; ++y) {
    for (std::int64_t x = 4; x < w - 4; ++x) {
      const float here = xx[static_cast<std::size_t>(y * w + x)];
      if (here <= least) continue;
      bool peak = true;
      for (std::int64_t j = y - 3; peak && j <= y + 3; ++j) {
        for (std::int64_t i = x - 3; i <= x + 3; ++i) peak &= xx[static_cast<std::size_t>(j * w + i)] <= here;
      }
      if (peak) found.emplace_back(here, y, x);
    }
  }
  std::stable_sort(found.begin(), found.end(), [](const auto& a, const auto& b) { return std::get<0>(a) > std::get<0>(b); });
  return found;
}

}  // namespace sslr1
