// Cost: surroundings reads 64 px a point; distinct compares each point it comes to with those chosen, in every turn, 32 numbers each; balanced takes count^2 * n distances; both stay in L1.
#include "vectorised.h"

#include "points.h"

#include <algorithm>
#include <cmath>

namespace sslr1 {

namespace {

struct Point {
  double y, x;
};

constexpr std::int64_t kSectors = 16, kRings = 2;  // of means; of samples there are twice as many rings

VECTORISED float difference(const float* one, const float* other) {
  float sum = 0;
  for (std::int64_t i = 0; i < kSectors; ++i) sum += std::abs(one[i] - other[i]);
  return sum;
}

// Whether the middle of a label, half of whose sides are `tall` and `wide`, lies nearer than that and `room` to a ring's.
bool covers(Point label, Point ring, double tall, double wide, double room) {
  const double dy = std::max(std::abs(label.y - ring.y) - tall, 0.0), dx = std::max(std::abs(label.x - ring.x) - wide, 0.0);
  return std::sqrt(dy * dy + dx * dx) < room;
}

}  // namespace

void surroundings(std::uintptr_t grey, std::int64_t height, std::int64_t width, std::uintptr_t spots, std::int64_t n,
                  std::uintptr_t offsets, std::array<double, 3> tones, std::uintptr_t looks, std::uintptr_t grains) {
  const auto* picture = reinterpret_cast<const float*>(grey);
  const auto *spot = reinterpret_cast<const Point*>(spots), *offset = reinterpret_cast<const Point*>(offsets);
  auto *look = reinterpret_cast<float*>(looks), *grain = reinterpret_cast<float*>(grains);
  const auto darkest = static_cast<float>(tones[0]), lightest = static_cast<float>(tones[1]), gain = static_cast<float>(tones[2]);
  constexpr std::int64_t kSamples = 2 * kRings * kSectors, kMeans = kRings * kSectors;
  for (std::int64_t i = 0; i < n; ++i, look += kMeans) {
    float sample[2 * kRings][kSectors];
    for (std::int64_t k = 0; k < kSamples; ++k) {
      const auto y = std::clamp<std::int64_t>(static_cast<std::int64_t>(std::floor(spot[i].y + offset[k].y)), 0, height - 1);
      const auto x = std::clamp<std::int64_t>(static_cast<std::int64_t>(std::floor(spot[i].x + offset[k].x)), 0, width - 1);
      sample[k / kSectors][k % kSectors] = std::clamp(picture[y * width + x], darkest, lightest) * gain;
    }
    double total = 0, outwards = 0, around = 0;
    for (std::int64_t ring = 0; ring < 2 * kRings; ++ring) {
      for (std::int64_t k = 0; k < kSectors; ++k) {
        const float next = sample[ring][(k + 1) % kSectors], pair = sample[ring][k] + next;
        float& mean = look[ring / 2 * kSectors + k];
        mean = ring % 2 ? (mean + pair) / 4 : pair;
        if (ring % 2) total += mean;
        around += std::abs(sample[ring][k] - next);
        if (ring) outwards += std::abs(sample[ring][k] - sample[ring - 1][k]);
      }
    }
    const auto mean = static_cast<float>(total / kMeans);
    for (std::int64_t k = 0; k < kMeans; ++k) look[k] -= mean;
    grain[i] = static_cast<float>((outwards / (kSamples - kSectors) + around / kSamples) / 2);
  }
}

std::vector<std::pair<std::int64_t, std::int64_t>> distinct(std::uintptr_t looks, std::uintptr_t grains,
                                                            std::uintptr_t places, std::uintptr_t order,
                                                            std::uintptr_t starts, std::int64_t n, std::int64_t count,
                                                            std::int64_t turns, double apart, std::array<double, 3> marks,
                                                            std::array<double, 16> sides, double least, double grain, double unlike) {
  const auto *look = reinterpret_cast<const float*>(looks), *own = reinterpret_cast<const float*>(grains);
  const auto *place = reinterpret_cast<const Point*>(places), *side = reinterpret_cast<const Point*>(sides.data());
  const auto *turn = reinterpret_cast<const std::int64_t*>(order), *start = reinterpret_cast<const std::int64_t*>(starts);
  const auto [tall, wide, room] = marks;
  constexpr std::int64_t kMeans = kRings * kSectors;
  std::vector<float> twice;  // what surrounds those chosen, its sectors twice over, so that turns are shifts
  std::vector<Point> labels;
  std::vector<std::pair<std::int64_t, std::int64_t>> chosen;
  const auto label_at = [&](Point at, std::int64_t k) { return Point{at.y + side[k].y, at.x + side[k].x}; };
  const auto free_side = [&](std::int64_t i) -> std::int64_t {
    const Point at = place[i];
    for (const auto& [j, _] : chosen) {
      const double dy = at.y - place[j].y, dx = at.x - place[j].x;
      if (std::sqrt(dy * dy + dx * dx) < apart) return -1;
    }
    for (const Point label : labels) {
      if (covers(label, at, tall, wide, room)) return -1;
    }
    for (std::int64_t step = 0; step < 8; ++step) {
      const std::int64_t k = (start[i] + 3 * step) % 8;
      const Point label = label_at(at, k);
      bool free = label.y > tall && label.x > wide && label.y < 1 - tall && label.x < 1 - wide;
      for (const auto& [j, _] : chosen) free &= !covers(label, place[j], tall, wide, room);
      for (const Point other : labels) {
        free &= std::abs(other.y - label.y) >= 2 * tall || std::abs(other.x - label.x) >= 2 * wide;
      }
      if (free) return k;
    }
    return -1;
  };
  std::vector<float> structure(static_cast<std::size_t>(n));
  const std::vector<float> even(2 * kMeans);
  const auto told = [&](std::int64_t i, const float* seen, float mean_grain, float mean_structure) {
    const float bound = std::max(static_cast<float>(least) + static_cast<float>(grain) * mean_grain,
                                 static_cast<float>(unlike) * mean_structure);
    for (std::int64_t t = -turns; t <= turns; ++t) {
      float apart_by = 0;
      for (std::int64_t ring = 0; ring < kRings; ++ring) {
        const float* from = seen + 2 * kSectors * ring + (t + kSectors) % kSectors;
        apart_by += difference(look + i * kMeans + ring * kSectors, from);
      }
      if (apart_by <= bound * static_cast<float>(kMeans)) return false;
    }
    return true;
  };
  for (std::int64_t at = 0; at < n && static_cast<std::int64_t>(chosen.size()) < count; ++at) {
    const std::int64_t i = turn[at], k = free_side(i);
    if (k < 0) continue;
    structure[i] = (difference(look + i * kMeans, even.data()) + difference(look + i * kMeans + kSectors, even.data())) / kMeans;
    bool fits = told(i, even.data(), own[i], 0);
    for (std::size_t seen = 0; fits && seen < chosen.size(); ++seen) {
      const std::int64_t j = chosen[seen].first;
      const float* from = twice.data() + 2 * kMeans * static_cast<std::int64_t>(seen);
      fits = told(i, from, (own[i] + own[j]) / 2, (structure[i] + structure[j]) / 2);
    }
    if (!fits) continue;
    chosen.emplace_back(i, k);
    labels.push_back(label_at(place[i], k));
    for (std::int64_t ring = 0; ring < kRings; ++ring) {
      for (int again = 0; again < 2; ++again) {
        const float* from = look + i * kMeans + ring * kSectors;
        twice.insert(twice.end(), from, from + kSectors);
      }
    }
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
