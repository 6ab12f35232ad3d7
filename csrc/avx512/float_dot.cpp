// Weight-only products of few float rows: a nibble selects its level from a register of sixteen floats.
#include <immintrin.h>

#include "avx512/codes.h"
#include "avx512/avx512.h"

namespace llm_fp4 {
namespace avx512 {
namespace {

template <int kRows, int kOuts>
struct Tile {
  __m512 sum[kOuts][kRows];

  inline __attribute__((always_inline)) void step(__m512 table, const __m512i (&codes)[kOuts], const float* rows, int64_t stride) {
#pragma GCC unroll 8
    for (int nibble = 0; nibble < 8; ++nibble) {
      __m512 level[kOuts];
#pragma GCC unroll 4
      for (int o = 0; o < kOuts; ++o) level[o] = _mm512_permutexvar_ps(_mm512_srli_epi32(codes[o], 4 * nibble), table);  // low 4 bits
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const __m512 x = _mm512_loadu_ps(rows + r * stride + nibble * 16);
#pragma GCC unroll 4
        for (int o = 0; o < kOuts; ++o) sum[o][r] = _mm512_fmadd_ps(level[o], x, sum[o][r]);
      }
    }
  }
};

template <int kRows, int kOuts>
void dot_tile(const Weight& w, const float* rows, int64_t stride, int64_t out, const float* scale, const float* bias, float* y,
              int64_t y_stride) {
  const __m512 table = _mm512_loadu_ps(w.levels);
  Tile<kRows, kOuts> tile;
#pragma GCC unroll 4
  for (int o = 0; o < kOuts; ++o) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) tile.sum[o][r] = _mm512_setzero_ps();
  }
  const uint8_t* codes = w.codes + out * w.row_bytes;
  int64_t at = 0;
  for (; at < w.row_bytes; at += 64) {
    __m512i packed[kOuts];
#pragma GCC unroll 4
    for (int o = 0; o < kOuts; ++o) packed[o] = _mm512_maskz_loadu_epi8(first_bytes(w.row_bytes - at), codes + o * w.row_bytes + at);
    tile.step(table, packed, rows + at * 2, stride);
  }
#pragma GCC unroll 4
  for (int o = 0; o < kOuts; ++o) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const float value = _mm512_reduce_add_ps(tile.sum[o][r]) * scale[out + o];
      y[r * y_stride + out + o] = bias ? value + bias[out + o] : value;
    }
  }
}

template <int kRows>
void dot_rows(const Weight& w, const float* rows, int64_t stride, int64_t first, int64_t last, const float* scale, const float* bias,
              float* y, int64_t y_stride) {
  constexpr int kOuts = kRows <= 4 ? 4 : 2;
  int64_t out = first;
  for (; out + kOuts <= last; out += kOuts) dot_tile<kRows, kOuts>(w, rows, stride, out, scale, bias, y, y_stride);
  for (; out < last; ++out) dot_tile<kRows, 1>(w, rows, stride, out, scale, bias, y, y_stride);
}

}  // namespace

void float_dot(const Weight& w, const float* rows, int64_t stride, int64_t count, int64_t first, int64_t last, const float* scale,
               const float* bias, float* y, int64_t y_stride) {
  switch (count) {
    case 1: return dot_rows<1>(w, rows, stride, first, last, scale, bias, y, y_stride);
    case 2: return dot_rows<2>(w, rows, stride, first, last, scale, bias, y, y_stride);
    case 3: return dot_rows<3>(w, rows, stride, first, last, scale, bias, y, y_stride);
    case 4: return dot_rows<4>(w, rows, stride, first, last, scale, bias, y, y_stride);
    case 5: return dot_rows<5>(w, rows, stride, first, last, scale, bias, y, y_stride);
    case 6: return dot_rows<6>(w, rows, stride, first, last, scale, bias, y, y_stride);
    case 7: return dot_rows<7>(w, rows, stride, first, last, scale, bias, y, y_stride);
    default: return dot_rows<8>(w, rows, stride, first, last, scale, bias, y, y_stride);
  }
}

}  // namespace avx512
}  // namespace llm_fp4
