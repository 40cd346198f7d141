// Rendering plans on the CPU. The tables are those of sslr1/ops/render.py, whose reference says what they mean.
#pragma once
#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

namespace sslr1 {

using Image = std::tuple<std::uintptr_t, std::int64_t, std::int64_t>;  // address of uint8 [H, W, 3], H, W
using Table = std::pair<std::uintptr_t, std::int64_t>;                 // address of int64 or float32 [rows, …], rows

// Paint every canvas of a plan from `images`, of which the first is the atlas (image ATLAS = -1 of the tables).
// element_size 0: `out` gets the canvases one after the other, uint8 [pixels, 3]. 4 or 2: it gets the rows of their
// patches [n, 3 * temporal * patch * patch], elements of that size moved bit for bit from `values` [3, 256].
// Throws std::invalid_argument for images too large and blurs out of range; else the tables have been seen to fit.
void render(const std::vector<Image>& images, Table sources_int, Table sources_float, Table canvases, Table tiles_int,
            Table tiles_float, std::uintptr_t out, std::uintptr_t values, int element_size, std::int64_t patch,
            std::int64_t merge, std::int64_t temporal, int fill, int threads);

}  // namespace sslr1
