// Painting plans on the CPU. The tables are those of sslr1/ops/render.py, which is the reference.
#pragma once
#include <cstdint>
#include <tuple>
#include <vector>

namespace sslr1 {

using Picture = std::tuple<std::uintptr_t, std::int64_t, std::int64_t>;  // address of uint8 [H, W, 3], H, W

// Paint `tile_count` tiles in order; canvases are filled first and worked on in parallel.
// tiles_int: int64 [K, 7], tiles_float: float32 [K, 22], both checked by the caller.
void paint(const std::vector<Picture>& sources, const std::vector<Picture>& canvases, std::uintptr_t tiles_int,
           std::uintptr_t tiles_float, std::int64_t tile_count, int fill, int threads);

// Separable convolution of a picture with `taps` (float32, 2 * radius + 1 of them, summing to 1), edges repeated.
void blur(const Picture& source, const Picture& target, std::uintptr_t taps, std::int64_t radius, int threads);

// Canvases, one behind the other, to rows of patches: table [3, 256] and out [n, 3 * temporal * patch * patch] hold
// elements of element_size bytes (4: float32, 2: bfloat16), which are only moved.
void patchify(const std::vector<Picture>& canvases, std::uintptr_t table, std::uintptr_t out, int element_size,
              std::int64_t patch, std::int64_t merge, std::int64_t temporal, int threads);

}  // namespace sslr1
