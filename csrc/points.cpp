// Cost: distinct reads the surroundings of the points it comes to, balanced takes count^2 * n distances; both stay in L1.
#include "points.h"

#include <algorithm>
#include <cmath>

namespace sslr1 {

std::vector<std::int64_t> distinct(std::uintptr_t grey, std::int64_t height, std::int64_t width, std::uintptr_t spots,
                                   std::uintptr_t places, std::uintptr_t order, std::int64_t n, std::int64_t count,
                                   std::int64_t radius, double apart, double alike) {
  const auto* picture = reinterpret_cast<const float*>(grey);
  const auto *spot = reinterpret_cast<const double*>(spots), *place = reinterpret_cast<const double*>(places);
  const auto* turn = reinterpret_cast<const std::int64_t*>(order);
  const std::int64_t side = 2 * radius + 1, pixels = side * side;
  std::vector<float> patches(static_cast<std::size_t>(count * pixels));  // of zero mean and unit norm, of those chosen
  std::vector<std::int64_t> chosen;
  for (std::int64_t k = 0; k < n && static_cast<std::int64_t>(chosen.size()) < count; ++k) {
    const std::int64_t i = turn[k], top = static_cast<std::int64_t>(std::floor(spot[2 * i])) - radius;
    const std::int64_t left = static_cast<std::int64_t>(std::floor(spot[2 * i + 1])) - radius;
    const bool near = std::any_of(chosen.begin(), chosen.end(), [&](std::int64_t j) {
      const double dy = place[2 * i] - place[2 * j], dx = place[2 * i + 1] - place[2 * j + 1];
      return std::sqrt(dy * dy + dx * dx) < apart;
    });
    if (near) continue;
    float* patch = patches.data() + static_cast<std::int64_t>(chosen.size()) * pixels;
    float sum = 0, squares = 0;
    for (std::int64_t y = 0; y < side; ++y) {
      const float* row = picture + std::clamp<std::int64_t>(top + y, 0, height - 1) * width;
      for (std::int64_t x = 0; x < side; ++x) {
        sum += patch[y * side + x] = row[std::clamp<std::int64_t>(left + x, 0, width - 1)];
      }
    }
    const float mean = sum / static_cast<float>(pixels);
    for (std::int64_t p = 0; p < pixels; ++p) {
      patch[p] -= mean;
      squares += patch[p] * patch[p];
    }
    const float norm = std::max(std::sqrt(squares), 1e-6f);
    for (std::int64_t p = 0; p < pixels; ++p) patch[p] /= norm;
    bool same = false;
    for (const float* seen = patches.data(); !same && seen < patch; seen += pixels) {
      float correlation = 0;
      for (std::int64_t p = 0; p < pixels; ++p) correlation += seen[p] * patch[p];
      same = correlation > static_cast<float>(alike);
    }
    if (!same) chosen.push_back(i);
  }
  return chosen;
}

bool balanced(std::uintptr_t refs, std::uintptr_t places, std::int64_t count, std::int64_t n, std::uintptr_t ranks,
              std::uintptr_t weights) {
  const auto *ref = reinterpret_cast<const double*>(refs), *place = reinterpret_cast<const double*>(places);
  auto* rank = reinterpret_cast<std::int64_t*>(ranks);
  auto* weight = reinterpret_cast<double*>(weights);
  std::fill(weight, weight + count * count, 0.0);
  std::vector<double> distances(static_cast<std::size_t>(count)), columns(distances.size()), rows(distances.size());
  for (std::int64_t i = 0; i < count; ++i) {
    for (std::int64_t k = 0; k < n; ++k, ref += 2) {
      for (std::int64_t j = 0; j < count; ++j) {
        const double dy = ref[0] - place[2 * j], dx = ref[1] - place[2 * j + 1];
        distances[static_cast<std::size_t>(j)] = std::sqrt(dy * dy + dx * dx);
      }
      std::int64_t nearer = 0;
      for (const double distance : distances) nearer += distance < distances[static_cast<std::size_t>(i)];
      *rank++ = nearer;
      weight[i * count + nearer] = 1;
    }
  }
  const auto add_up = [&] {
    std::fill(columns.begin(), columns.end(), 0.0), std::fill(rows.begin(), rows.end(), 0.0);
    for (std::int64_t i = 0; i < count * count; ++i) {
      columns[static_cast<std::size_t>(i % count)] += weight[i], rows[static_cast<std::size_t>(i / count)] += weight[i];
    }
  };
  add_up();
  const auto empty = [](double sum) { return sum == 0; };
  if (std::any_of(columns.begin(), columns.end(), empty) || std::any_of(rows.begin(), rows.end(), empty)) return false;
  double off = 1;
  for (int sweep = 0; sweep < 25 && off >= 1e-3; ++sweep) {  // Sinkhorn's: columns, then rows, to a sum of 1
    for (std::int64_t i = 0; i < count * count; ++i) weight[i] /= columns[static_cast<std::size_t>(i % count)];
    add_up();
    for (std::int64_t i = 0; i < count * count; ++i) weight[i] /= rows[static_cast<std::size_t>(i / count)];
    add_up();
    if (sweep % 5 < 4) continue;
    off = 0;
    for (const double sum : columns) off = std::max(off, std::abs(sum - 1));
  }
  return off <= 0.02;
}

}  // namespace sslr1
