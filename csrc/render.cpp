// Bytes moved, per pixel of a canvas: 3 read from its sources (see paint.h) and 3, or the patches' 3 * temporal *
// element_size, written. Canvases are painted in strips that stay in cache until they are patches; a canvas that is one
// crop, flip or quarter turn of a source becomes patches straight from there. Mip levels and blurs are made only where
// tiles reach.
#include "levels.h"
#include "paint.h"
#include "patches.h"

#include <atomic>
#include <future>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>

namespace sslr1 {
namespace {

constexpr float kIdentity[12] = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0};
constexpr Index kBand = 64;       // rows of a mip level, a blur or a uint8 canvas that a thread takes at a time
constexpr Index kStreamed = 8 << 20;  // bytes of patches from which on they pass by the caches
// ns of work, roughly: starting a thread takes 25000, and often many more until the scheduler moves it to an idle core.
constexpr Index kWorthAThread = 400000;

struct Source {
  Index image, level;
  float sigma;
  Box needed;  // empty where no tile reads it
  Picture picture;
  Index unblurred;  // number among the mip levels made
};

struct Strip {  // rows of a canvas, or of a picture in the making
  Index owner, top, bottom;
};

Box join(const Box& a, const Box& b) {
  if (!a.height()) return b;
  return {std::min(a.top, b.top), std::min(a.left, b.left), std::max(a.bottom, b.bottom), std::max(a.right, b.right)};
}

void cut(std::vector<Strip>& strips, Index owner, Index top, Index bottom, Index rows) {
  for (; top < bottom; top += rows) strips.push_back({owner, top, std::min(top + rows, bottom)});
}

// Strips are dealt one by one; what comes out doesn't depend on who does which.
template <class F>
void share(const std::vector<Strip>& strips, Index work, int threads, F paint_strip) {
  std::atomic<std::size_t> next{0};
  const auto run = [&] {
    const auto scratch = std::make_unique<Scratch>();
    for (std::size_t i; (i = next++) < strips.size();) paint_strip(strips[i], *scratch);
  };
  const Index helpers = std::min({Index{threads}, static_cast<Index>(strips.size()), work / kWorthAThread + 1}) - 1;
  std::vector<std::future<void>> done;
  for (Index i = 0; i < helpers; ++i) done.push_back(std::async(std::launch::async, run));
  run();
  for (auto& helper : done) helper.get();
}

// Find out whether a tile is a crop, a flip or a quarter turn: floats are exact at the sizes asked for.
void place_exact(Tile& t, const Picture& p) {
  const float* m = t.map;
  const auto unit = [](float x) { return x == 1 || x == -1; };
  const auto whole = [](float x) { return x == std::floor(x) && std::abs(x) < 1 << 22; };
  const bool turned = m[0] == 0 && unit(m[1]) && unit(m[3]) && m[4] == 0;
  const bool straight = unit(m[0]) && m[1] == 0 && m[3] == 0 && unit(m[4]);
  t.exact = t.plain && (turned || straight) && whole(m[2]) && whole(m[5]) && m[6] == 0 && m[7] == 0 && m[8] == 1 &&
            std::max(t.height, t.width) < 1 << 22;
  if (!t.exact) return;
  const Index column = static_cast<Index>(m[2]) - (m[0] + m[1] < 0), row = static_cast<Index>(m[5]) - (m[3] + m[4] < 0);
  const auto cover = [](float step, Index start, Index limit, Index n, Index& from, Index& to) {
    from = std::clamp<Index>(step > 0 ? -start : start - limit + 1, 0, n);
    to = std::clamp<Index>(step > 0 ? limit - start : start + 1, from, n);
  };
  Box& c = t.covered;
  cover(turned ? m[1] : m[4], turned ? column : row, turned ? p.width : p.height, t.height, c.top, c.bottom);
  cover(turned ? m[3] : m[0], turned ? row : column, turned ? p.height : p.width, t.width, c.left, c.right);
  t.origin = p.at(row, column);
  t.across = 3 * static_cast<Index>(m[0]) + p.stride() * static_cast<Index>(m[3]);
  t.down = 3 * static_cast<Index>(m[1]) + p.stride() * static_cast<Index>(m[4]);
}

// The part of a height x width picture that a tile may read: at least 2 x 2 pixels, where there are so many.
Box reach(const Tile& t, Index height, Index width) {
  double low[2] = {1e9, 1e9}, high[2] = {-1e9, -1e9};
  for (int corner = 0; corner < 4; ++corner) {  // a rectangle's image is convex as long as z keeps its sign
    const double x = corner & 1 ? t.width - 0.5 : 0.5, y = corner & 2 ? t.height - 0.5 : 0.5;
    double point[3], size[3];
    for (int r = 0; r < 3; ++r) {
      const double a = t.map[3 * r] * x, b = t.map[3 * r + 1] * y, c = t.map[3 * r + 2];
      point[r] = a + b + c;
      size[r] = std::abs(a) + std::abs(b) + std::abs(c);
    }
    if (!(point[2] > 1e-3 * size[2])) return {0, 0, height, width};
    for (int r = 0; r < 2; ++r) {
      const double at = point[r] / point[2];
      const double slack = 1 + 1e-6 * (size[r] + std::abs(at) * size[2]) / point[2];  // a neighbour; float's rounding
      low[r] = std::min(low[r], at - slack);
      high[r] = std::max(high[r], at + slack);
    }
  }
  Index from[2], to[2];
  for (int r = 0; r < 2; ++r) {
    const double limit = static_cast<double>(r ? height : width);
    from[r] = static_cast<Index>(std::clamp(std::floor(low[r]), 0.0, std::max(limit - 2, 0.0)));
    to[r] = static_cast<Index>(std::clamp(std::ceil(high[r]), std::min(from[r] + 2.0, limit), limit));
  }
  return {from[1], from[0], to[1], to[0]};
}

// ---- the plan

std::vector<Picture> read_images(const std::vector<Image>& images) {
  std::vector<Picture> pictures;
  for (const auto& [address, h, w] : images) {  // floats and int32 count pixels
    if (std::max(h, w) >= 1 << 24 || h * w >= 1ll << 31) {
      throw std::invalid_argument("an image of " + std::to_string(h) + "x" + std::to_string(w) + " px is too large");
    }
    pictures.push_back({reinterpret_cast<Byte*>(address), h, w, {0, 0, h, w}});
  }
  return pictures;
}

std::vector<Source> read_sources(const std::vector<Picture>& images, Table ints, Table floats) {
  std::vector<Source> sources;
  for (Index q = 0; q < ints.second; ++q) {
    const Index* row = reinterpret_cast<const Index*>(ints.first) + 2 * q;
    const Index image = row[0], level = row[1];
    const float sigma = reinterpret_cast<const float*>(floats.first)[q];
    const Index h = images[image + 1].height, w = images[image + 1].width;
    if (!(sigma >= 0 && sigma < 1e6f)) throw std::invalid_argument("a source's blur is below 0 or over a million");
    sources.push_back({image, level, sigma, {}, {nullptr, h >> level, w >> level, {}}, 0});
  }
  return sources;
}

// Also notes which part of its source each tile needs.
std::vector<Tile> read_tiles(std::vector<Source>& sources, Table ints, Table floats) {
  std::vector<Tile> tiles;
  for (Index k = 0; k < ints.second; ++k) {
    const Index* row = reinterpret_cast<const Index*>(ints.first) + 7 * k;
    const float* numbers = reinterpret_cast<const float*>(floats.first) + 22 * k;
    Tile t{row[0], row[1], row[2], row[3], row[4], row[5], static_cast<int>(row[6])};
    std::copy_n(numbers, 9, t.map);
    std::copy_n(numbers + 9, 12, t.colour);
    t.alpha = numbers[21];
    t.opaque = t.flat = t.alpha == 1 && !(t.mode & kStencil);
    t.plain = t.opaque && std::equal(t.colour, t.colour + 12, kIdentity);
    for (int i = 0; i < 12; ++i) t.flat &= i % 4 == 3 || t.colour[i] == 0;
    if (!t.height || !t.width) continue;
    Source& s = sources[t.source];
    if (!t.flat) s.needed = join(s.needed, reach(t, s.picture.height, s.picture.width));
    tiles.push_back(t);
  }
  return tiles;
}

using Memory = std::vector<std::unique_ptr<Byte[]>>;

void reserve(Picture& p, const Box& held, Memory& memory) {
  memory.emplace_back(new Byte[3 * held.height() * held.width()]);
  p.held = held;
  p.pixels = memory.back().get();
}

// A picture one pixel wide or high as two, so that every pixel has neighbours to interpolate with.
void thicken(Picture& p, Memory& memory) {
  const Picture thin = p;
  const Box b = thin.held;
  reserve(p, {b.top, b.left, std::max(b.bottom, b.top + 2), std::max(b.right, b.left + 2)}, memory);
  for (Index y = p.held.top; y < p.held.bottom; ++y) {
    for (Index x = p.held.left; x < p.held.right; ++x) {
      std::memcpy(p.at(y, x), thin.at(std::min(y, b.bottom - 1), std::min(x, b.right - 1)), 3);
    }
  }
}

// Make what tiles need of each source; a mip level is made once for all that read it.
void make_sources(std::vector<Source>& sources, const std::vector<Picture>& images, Memory& memory, int threads) {
  std::vector<Source> levels;
  std::map<std::pair<Index, Index>, Index> numbers;
  std::vector<Strip> strips;
  Index work = 0;
  for (Source& s : sources) {
    const auto [entry, fresh] = numbers.try_emplace({s.image, s.level}, levels.size());
    if (fresh) levels.push_back({s.image, s.level, 0, {}, s.picture, 0});
    s.unblurred = entry->second;
    if (!s.needed.height()) continue;
    const Index rim = blur_radius(s.sigma);
    const Box& n = s.needed;
    Box& all = levels[s.unblurred].needed;
    all = join(all, {std::max<Index>(n.top - rim, 0), std::max<Index>(n.left - rim, 0),
                     std::min(n.bottom + rim, s.picture.height), std::min(n.right + rim, s.picture.width)});
  }
  for (Source& l : levels) {
    if (l.level && l.needed.height()) {
      reserve(l.picture, l.needed, memory);
      cut(strips, &l - levels.data(), l.needed.top, l.needed.bottom, kBand);
      work += ((l.needed.height() * l.needed.width()) << (2 * l.level)) / 5;
    } else {
      l.picture = images[l.image + 1];
    }
  }
  share(strips, work, threads, [&](const Strip& strip, Scratch& s) {
    const Source& l = levels[strip.owner];
    halve(images[l.image + 1], l.level, l.picture, strip.top, strip.bottom, s);
  });
  strips.clear();
  work = 0;
  for (Source& s : sources) {
    s.picture = levels[s.unblurred].picture;
    if (s.sigma == 0 || !s.needed.height()) continue;
    reserve(s.picture, s.needed, memory);
    cut(strips, &s - sources.data(), s.needed.top, s.needed.bottom, kBand);
    work += s.needed.height() * s.needed.width() * (blur_radius(s.sigma) + 1) / 2;
  }
  share(strips, work, threads, [&](const Strip& strip, Scratch& s) {
    const Source& source = sources[strip.owner];
    blur(levels[source.unblurred].picture, source.sigma, source.picture, strip.top, strip.bottom, s);
  });
  for (Source& s : sources) {
    if (s.needed.height() && std::min(s.picture.held.height(), s.picture.held.width()) == 1) thicken(s.picture, memory);
  }
}

}  // namespace

void render(const std::vector<Image>& images, Table sources_int, Table sources_float, Table canvases, Table tiles_int,
            Table tiles_float, std::uintptr_t out, std::uintptr_t values, int element_size, std::int64_t patch,
            std::int64_t merge, std::int64_t temporal, int fill, int threads) {
  const Index element = element_size, unit = element ? patch * merge : kBand;
  const Index* sizes = reinterpret_cast<const Index*>(canvases.first);
  std::vector<Strip> strips;
  std::vector<Index> starts;
  Index pixels = 0, work = 0;
  for (Index i = 0; i < canvases.second; ++i) {
    const Index h = sizes[2 * i], w = sizes[2 * i + 1];
    starts.push_back(pixels);
    pixels += h * w;
    cut(strips, i, 0, h, unit);
  }
  Memory memory;
  const std::vector<Picture> pictures = read_images(images);
  std::vector<Source> sources = read_sources(pictures, sources_int, sources_float);
  std::vector<Tile> tiles = read_tiles(sources, tiles_int, tiles_float);
  make_sources(sources, pictures, memory, threads);
  std::vector<std::vector<const Tile*>> tiles_of(starts.size());
  for (Tile& t : tiles) {
    if (!t.flat) place_exact(t, sources[t.source].picture);
    tiles_of[t.canvas].push_back(&t);
    work += t.height * t.width * (t.flat || t.exact ? 0 : 2);
  }
  Layout layout{reinterpret_cast<const Byte*>(values), element, patch, merge, temporal, false, {}, nullptr};
  if (element) {
    layout.streamed = pixels / (patch * patch) * layout.row() >= kStreamed;
    for (Index i = 0; i < 768; ++i) {
      for (Index k = 0; k < element; ++k) layout.planes[i / 256][k][i % 256] = layout.values[i * element + k];
    }
    layout.make_patch = element == 4 ? choose_patch<std::uint32_t>(patch) : choose_patch<std::uint16_t>(patch);
  }
  work += element ? pixels : pixels / 5;
  share(strips, work, threads, [&](const Strip& strip, Scratch& s) {
    const auto [canvas, top, bottom] = strip;
    const Index height = sizes[2 * canvas], width = sizes[2 * canvas + 1], start = starts[canvas] + top * width;
    auto* rows = reinterpret_cast<Byte*>(out) + 3 * start;
    auto* patches = reinterpret_cast<Byte*>(out) + (element ? start / (patch * patch) * layout.row() : 0);
    if (element) {
      const Tile* t = tiles_of[canvas].size() == 1 ? tiles_of[canvas][0] : nullptr;
      if (t && t->exact && t->covered.height() == height && t->covered.width() == width) {  // needn't be painted first
        const Byte* end = sources[t->source].picture.end();
        patchify(t->origin + top * t->down, t->across, t->down, end, width, layout, patches, s);
        return;
      }
      s.canvas.resize(3 * unit * width);
      rows = s.canvas.data();
    }
    const auto& over = tiles_of[canvas];
    const bool whole = !over.empty() && over[0]->opaque && over[0]->height == height && over[0]->width == width;
    if (!whole) std::memset(rows, fill, 3 * (bottom - top) * width);
    for (const Tile* t : over) {
      const Index first = std::max(top, t->top), last = std::min(bottom, t->top + t->height);
      if (first >= last) continue;
      paint(*t, sources[t->source].picture, first - t->top, last - t->top, rows + 3 * ((first - top) * width + t->left),
            3 * width, static_cast<Byte>(fill), s.run);
    }
    if (element) patchify(rows, 3, 3 * width, nullptr, width, layout, patches, s);
  });
}

}  // namespace sslr1
