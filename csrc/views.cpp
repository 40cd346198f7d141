// Cost: a view's contrast, of 2,209 single pixels at most, is nearly all of it.
#include "views.h"

#include "look.h"

#include <algorithm>
#include <cmath>

namespace sslr1 {
namespace {

constexpr double kLuma[3] = {0.299, 0.587, 0.114}, kPi = 3.141592653589793;

struct View {
  double top, left, height, width, flip, blur;
  Colour colour;
};

View crop(const BitGenerator& draw, double H, double W, const ViewRules& rules) {
  const auto random = [&] { return draw.next_double(draw.state); };
  double h = 0, w = 0;
  int i = 0;
  for (; i < 10; ++i) {
    const double pixels = (rules.low + (rules.high - rules.low) * random()) * H * W;
    const double ratio = std::exp(rules.ratio_low + rules.ratio_spread * random());
    h = std::sqrt(pixels / ratio), w = std::sqrt(pixels * ratio);
    if (h <= H && w <= W) break;
  }
  if (i == 10) h = std::min(h, H), w = std::min(w, W);
  const double top = (H - h) * random(), left = (W - w) * random();
  return {top, left, h, w, 0, 0, {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0}};
}

bool overlap(const View& a, const View& b, double H, double W, const ViewRules& rules) {
  const auto common = [](double p, double m, double q, double n) {
    return std::max(0.0, std::min(p + m, q + n) - std::max(p, q));
  };
  const double shared = common(a.top, a.height, b.top, b.height) * common(a.left, a.width, b.left, b.width);
  return shared >= rules.of_view * std::min(a.height * a.width, b.height * b.width) && shared >= rules.of_image * H * W;
}

// As colour.py's jitter(draw, mean, 0.8, 0.8, 0.8, 0.2).
Colour jitter(const BitGenerator& draw, const std::array<double, 3>& mean, const double* terms) {
  constexpr double kReach = 0.8, kHue = 0.2;
  const auto random = [&](double low, double high) { return low + (high - low) * draw.next_double(draw.state); };
  const double b = 1 + random(-1, 1) * kReach, c = 1 + random(-1, 1) * kReach, s = 1 + random(-1, 1) * kReach;
  const double angle = 2 * kPi * random(-kHue, kHue);
  const double cos = s * std::cos(angle), sin = s * std::sin(angle), scale = b * c;
  const double rest = (1 - c) * b * (kLuma[0] * mean[0] + kLuma[1] * mean[1] + kLuma[2] * mean[2]);
  const double keeps = scale * s, turns = scale * cos, tilts = scale * sin, greys = scale * (1 - s);
  Colour colour;
  for (int i = 0; i < 9; ++i, terms += 4) {
    colour[static_cast<std::size_t>(i / 3 * 4 + i % 3)] = keeps * terms[0] + turns * terms[1] + tilts * terms[2] + greys * terms[3];
  }
  colour[3] = colour[7] = colour[11] = rest;
  return colour;
}

double contrast_of(const View& v, std::uintptr_t sample, std::int64_t samples, double H, double W) {
  const auto ends = [samples](double start, double extent, double n) {
    const double count = static_cast<double>(samples);
    auto first = static_cast<std::int64_t>(std::floor(start * count / n));
    const auto last = static_cast<std::int64_t>(std::floor((start + extent) * count / n));
    first = std::clamp<std::int64_t>(first, 0, samples - 1);
    return std::array<std::int64_t, 3>{first, std::min(std::max(last, first + 1), samples),
                                       std::max<std::int64_t>((last - first) / 24, 1)};
  };
  std::array<float, 12> colour;
  std::transform(v.colour.begin(), v.colour.end(), colour.begin(), [](double x) { return static_cast<float>(x); });
  return contrast(sample, samples, ends(v.top, v.height, H), ends(v.left, v.width, W), colour);
}

}  // namespace

bool draw_views(const BitGenerator& draw, std::uintptr_t sample, std::int64_t samples, std::int64_t height,
                std::int64_t width, double side, const std::array<double, 3>& mean, std::uintptr_t terms,
                const std::function<Colour(const Colour&)>& greyed, const ViewRules& rules, std::uintptr_t out) {
  const double H = static_cast<double>(height), W = static_cast<double>(width);
  const auto random = [&] { return draw.next_double(draw.state); };
  View views[2];
  bool told = false;
  for (std::int64_t i = 0; i < rules.tries && !told; ++i) {
    do {
      for (View& v : views) v = crop(draw, H, W, rules);
    } while (!overlap(views[0], views[1], H, W, rules));
    for (View& v : views) {
      if (!rules.augmented) continue;
      v.flip = random() < 0.5;
      if (random() < 0.5) v.blur = (0.1 + (2.0 - 0.1) * random()) / 224 * side;
      if (random() < 0.8) v.colour = jitter(draw, mean, reinterpret_cast<const double*>(terms));
      if (random() < 0.2) v.colour = greyed(v.colour);
    }
    const auto shows = [&](const View& v) { return contrast_of(v, sample, samples, H, W) >= rules.flattest; };
    told = shows(views[0]) && shows(views[1]);
  }
  auto* to = reinterpret_cast<double*>(out);
  for (const View& v : views) {
    for (const double value : {v.top, v.left, v.height, v.width, v.flip, v.blur}) *to++ = value;
    to = std::copy(v.colour.begin(), v.colour.end(), to);
  }
  return told;
}

}  // namespace sslr1
