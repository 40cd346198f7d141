// Pixels to patches. Bytes moved: 3 a pixel read, 3 * temporal * element_size written.
#pragma once
#include "paint.h"

namespace sslr1 {
namespace {

struct Layout {
  const Byte* values;  // [3, 256] elements
  Index element, patch, merge, temporal;
  bool streamed;  // past the caches, since there is more than they hold: sources stay there instead
  Byte planes[3][4][256];  // byte k of each element, for patch_by_permutes
  void (*make_patch)(const Byte* in, Index stride, const Layout& layout, Byte* out);
  Index row() const { return 3 * temporal * patch * patch * element; }
};

// A patch of P x P pixels (0: of layout.patch) to its row: a table lookup each, copied `temporal` times from L1.
template <class Element, int P>
void patch_by_table(const Byte* in, Index stride, const Layout& layout, Byte* out) {
  const Index side = P ? P : layout.patch, plane = side * side;
  auto* to = reinterpret_cast<Element*>(out);
  for (int c = 0; c < 3; ++c) {
    const Element *table = reinterpret_cast<const Element*>(layout.values) + 256 * c, *first = to;
    for (Index y = 0; y < side; ++y) {
      for (Index x = 0; x < side; ++x) *to++ = table[in[y * stride + 3 * x + c]];
    }
    for (Index t = 1; t < layout.temporal; ++t, to += plane) std::memcpy(to, first, sizeof(Element) * plane);
  }
}

#ifdef SSLR1_X86
// n bytes, a multiple of 16 and on a multiple of 16, past the caches.
TARGET_VBMI IN_EACH_CLONE void stream(const Byte* from, Byte* to, int n) {
  int i = 0;
  const auto quarter = [&] {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), bytes);
    i += 16;
  };
  while (i < n && reinterpret_cast<std::uintptr_t>(to + i) % 64) quarter();
  for (; i + 64 <= n; i += 64) _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
  while (i < n) quarter();
}

// The same with the table in registers: 64 lookups at once for each byte of the elements.
template <class Element, int P>
TARGET_VBMI void patch_by_permutes(const Byte* in, Index stride, const Layout& layout, Byte* out) {
  constexpr int kPlane = P * P, kSize = sizeof(Element);
  // On one page wherever the stack happens to be: what crosses from one to the next takes many times as long
  struct alignas(2048) Local {
    Byte plane[kPlane * kSize], order[64], channels[3][kPlane + 16];
  } local;
  static_assert(sizeof(Local) == 2048);
  auto& [plane, order, channels] = local;
  const bool streamed = layout.streamed && kPlane * kSize % 16 == 0 && reinterpret_cast<std::uintptr_t>(out) % 16 == 0;
  for (int i = 0; i < 64; ++i) order[i] = static_cast<Byte>(i % 16 * 3 + i / 16);
  const __m512i by_channel = _mm512_loadu_si512(order);
  for (int y = 0; y < P; ++y) {  // 16 values of each channel; the next row overwrites those after the P-th
    const __m512i pixels = _mm512_maskz_loadu_epi8((1ull << 3 * P) - 1, in + y * stride);
    const __m512i row = _mm512_permutexvar_epi8(by_channel, pixels);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(channels[0] + y * P), _mm512_castsi512_si128(row));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(channels[1] + y * P), _mm512_extracti32x4_epi32(row, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(channels[2] + y * P), _mm512_extracti32x4_epi32(row, 2));
  }
  const __m512i quarters = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i halves = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  for (int c = 0; c < 3; ++c) {
    __m512i table[kSize][4], byte[kSize], value[kSize];
    for (int k = 0; k < 4 * kSize; ++k) table[k / 4][k % 4] = _mm512_loadu_si512(layout.planes[c][k / 4] + k % 4 * 64);
    Byte* first = streamed ? plane : out;
    for (int i = 0; i < kPlane; i += 64) {
      const int start = std::min(i, kPlane - 64);  // the last 64 overlap those before
      __m512i at = _mm512_loadu_si512(channels[c] + start);  // and into the order that unpacking undoes
      at = kSize == 4 ? _mm512_permutexvar_epi32(quarters, at) : _mm512_permutexvar_epi64(halves, at);
      const __mmask64 upper = _mm512_movepi8_mask(at);
      for (int k = 0; k < kSize; ++k) {
        byte[k] = _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(table[k][0], at, table[k][1]),
                                         _mm512_permutex2var_epi8(table[k][2], at, table[k][3]));
      }
      const __m512i low = _mm512_unpacklo_epi8(byte[0], byte[1]), high = _mm512_unpackhi_epi8(byte[0], byte[1]);
      if constexpr (kSize == 4) {
        const __m512i low2 = _mm512_unpacklo_epi8(byte[2], byte[3]), high2 = _mm512_unpackhi_epi8(byte[2], byte[3]);
        value[0] = _mm512_unpacklo_epi16(low, low2);
        value[1] = _mm512_unpackhi_epi16(low, low2);
        value[2] = _mm512_unpacklo_epi16(high, high2);
        value[3] = _mm512_unpackhi_epi16(high, high2);
      } else {
        value[0] = low;
        value[1] = high;
      }
      for (int k = 0; k < kSize; ++k) _mm512_storeu_si512(first + start * kSize + 64 * k, value[k]);
    }
    // Not from the registers above: memory takes one stream of stores at twice the pace of two
    for (Index t = 0; t < layout.temporal; ++t, out += kPlane * kSize) {
      if (streamed) stream(plane, out, kPlane * kSize);
      if (!streamed && t) std::memcpy(out, first, kPlane * kSize);
    }
  }
}
#endif

template <class Element>
auto choose_patch(Index patch) -> decltype(Layout::make_patch) {
#ifdef SSLR1_X86
  if (has_vbmi()) {
    if (patch == 14) return patch_by_permutes<Element, 14>;
    if (patch == 16) return patch_by_permutes<Element, 16>;
  }
#endif
  if (patch == 14) return patch_by_table<Element, 14>;
  return patch == 16 ? patch_by_table<Element, 16> : patch_by_table<Element, 0>;
}

// A row of units to patches; its pixel (y, x) lies at in + y * down + x * across.
void patchify(const Byte* in, Index across, Index down, const Byte* end, Index width, const Layout& layout, Byte* out,
              Scratch& s) {
  const Index p = layout.patch, m = layout.merge;
  s.bytes.resize(3 * p * p);
  for (Index i = 0; i < width / p * m; ++i, out += layout.row()) {
    const Byte* from = in + i / m % m * p * down + (i / (m * m) * m + i % m) * p * across;
    if (across != 3) move_pixels(from, across, down, end, s.bytes.data(), 3 * p, p, p);
    across == 3 ? layout.make_patch(from, down, layout, out) : layout.make_patch(s.bytes.data(), 3 * p, layout, out);
  }
#ifdef SSLR1_X86
  if (layout.streamed) _mm_sfence();  // before another thread may read them
#endif
}

}  // namespace
}  // namespace sslr1
