// Many rows: a register-blocked product of an expanded panel with limb rows.
#include <immintrin.h>

#include <cstring>

#include "avx512/avx512.h"

namespace llm_fp4 {
namespace avx512 {
namespace {

constexpr int kVectors = kPanel / 16;
constexpr int kTile = 6;  // 6 x 4 sums, 4 weights and 1 input of 32 registers

template <int kRows>
void tile(const uint8_t* panel, int64_t dwords, const int8_t* rows, int64_t stride, int32_t* sums, bool more) {
  __m512i sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[r][v] = more ? _mm512_loadu_si512(sums + r * kPanel + v * 16) : _mm512_setzero_si512();
  }
  for (int64_t d = 0; d < dwords; ++d) {
    __m512i weight[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) weight[v] = _mm512_load_si512(panel + (d * kVectors + v) * 64);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      int32_t four;
      std::memcpy(&four, rows + r * stride + d * 4, 4);
      const __m512i input = _mm512_set1_epi32(four);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[r][v] = _mm512_dpbusd_epi32(sum[r][v], weight[v], input);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_si512(sums + r * kPanel + v * 16, sum[r][v]);
  }
}

}  // namespace

void product(const uint8_t* panel, int64_t dwords, const Rows& x, int32_t* sums, bool more) {
  int64_t r = 0;
  for (; r + kTile <= x.count; r += kTile) tile<kTile>(panel, dwords, x.data + r * x.stride, x.stride, sums + r * kPanel, more);
  const int8_t* rest = x.data + r * x.stride;
  switch (x.count - r) {
    case 1: return tile<1>(panel, dwords, rest, x.stride, sums + r * kPanel, more);
    case 2: return tile<2>(panel, dwords, rest, x.stride, sums + r * kPanel, more);
    case 3: return tile<3>(panel, dwords, rest, x.stride, sums + r * kPanel, more);
    case 4: return tile<4>(panel, dwords, rest, x.stride, sums + r * kPanel, more);
    case 5: return tile<5>(panel, dwords, rest, x.stride, sums + r * kPanel, more);
    default: return;
  }
}

}  // namespace avx512
}  // namespace llm_fp4
