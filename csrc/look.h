// What puzzles ask about an image before they are drawn. sslr1/puzzles/look.py is the reference.
#pragma once
#include <array>
#include <cstdint>

namespace sslr1 {

// `samples` x `samples` pixels on a grid over uint8 [height, width, 3]: uint8 [samples, samples, 3].
void sample(std::uintptr_t pixels, std::int64_t height, std::int64_t width, std::int64_t samples, std::uintptr_t out);

// Mean RGB of rows x columns cells of a rectangle (px) of the image that `sample` was taken of: float [rows, columns, 3]. A
// cell has one sample at least.
void cell_means(std::uintptr_t sample, std::int64_t samples, std::int64_t height, std::int64_t width, double top, double left,
                double extent_y, double extent_x, std::int64_t rows, std::int64_t columns, std::uintptr_t means);

// Standard deviation of luma after a colour map (3x4, clipped to 0..255) of every step-th pixel of rows y0..y1 and columns
// x0..x1 of a sample, uint8 [samples, samples, 3].
double contrast(std::uintptr_t sample, std::int64_t samples, std::array<std::int64_t, 3> y, std::array<std::int64_t, 3> x,
                const std::array<float, 12>& colour);

// Mean grey of four (at step 1: one) of every step x step pixels: float [height / step, width / step].
void reduced_grey(std::uintptr_t pixels, std::int64_t height, std::int64_t width, std::int64_t step, std::uintptr_t grey);

// Shi and Tomasi's corners of a grey picture, float [height, width]: (y, x) of the peaks of the smaller eigenvalue of the
// 5 x 5 structure tensor among 7 x 7 neighbours, stronger than `grain` and than `share` of the strongest, and at least four
// pixels from the edge. Writes the strongest, at most `most`, to int64 [most, 2] and returns how many there are.
std::int64_t corners(std::uintptr_t grey, std::int64_t height, std::int64_t width, float grain, float share,
                     std::int64_t most, std::uintptr_t out);

}  // namespace sslr1
