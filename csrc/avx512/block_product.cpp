// Many rows with block scales: an expanded panel times limb rows, exact within a block, then block after block in float32.
#include <immintrin.h>

#include <cstring>

#include "avx512/avx512.h"
#include "avx512/codes.h"
#include "avx512/transpose.h"

namespace llm_fp4 {
namespace avx512 {
namespace {

constexpr int kVectors = kPanel / 16;
constexpr int kTile = 3;  // 3 x 4 exact sums, 3 x 4 float ones, 4 weights and 1 input of 32 registers

// the sums of one row of x
struct RowOfTile {
  const int8_t* limbs;
  const int32_t* corrections;
  const float* scales;
};

template <int kLanes, int kRows>
void tile(const uint8_t* panel, const float* scales, int64_t blocks, const BlockRows& x, int64_t first, float* sums, bool more) {
  RowOfTile row[kRows];
  __m512 sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    row[r] = {x.limbs.data + (first + r) * x.limbs.stride, x.corrections + (first + r) * x.lanes, x.scales + (first + r) * x.lanes};
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[r][v] = more ? _mm512_loadu_ps(sums + r * kPanel + v * 16) : _mm512_setzero_ps();
  }
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t lane = b * kLanes, dword = lane / 16 * 32 + lane % 16;  // of the even columns; the odd ones stand 16 behind
    __m512i exact[kRows][kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) exact[r][v] = _mm512_set1_epi32(row[r].corrections[lane]);
    }
    for (int64_t half = dword; half <= dword + 16; half += 16) {
#pragma GCC unroll 4
      for (int64_t d = half; d < half + kLanes; ++d) {
        __m512i weight[kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) weight[v] = _mm512_load_si512(panel + (d * kVectors + v) * 64);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          int32_t four;
          std::memcpy(&four, row[r].limbs + d * 4, 4);
          const __m512i input = _mm512_set1_epi32(four);
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) exact[r][v] = _mm512_dpbusd_epi32(exact[r][v], weight[v], input);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512 of_input = _mm512_set1_ps(row[r].scales[lane]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const __m512 scale = _mm512_mul_ps(_mm512_load_ps(scales + (b * kVectors + v) * 16), of_input);
        sum[r][v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact[r][v]), scale, sum[r][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(sums + r * kPanel + v * 16, sum[r][v]);
  }
}

template <int kLanes>
void of_lanes(const uint8_t* panel, const float* scales, int64_t blocks, const BlockRows& x, float* sums, bool more) {
  int64_t r = 0;
  for (; r + kTile <= x.limbs.count; r += kTile) tile<kLanes, kTile>(panel, scales, blocks, x, r, sums + r * kPanel, more);
  if (x.limbs.count - r == 2) tile<kLanes, 2>(panel, scales, blocks, x, r, sums + r * kPanel, more);
  if (x.limbs.count - r == 1) tile<kLanes, 1>(panel, scales, blocks, x, r, sums + r * kPanel, more);
}

}  // namespace

void expand_scales(const Weight& w, int64_t first_out, int64_t first_run, int64_t runs, int lanes, float* scales) {
  const LaneScales of(w);
  for (int64_t run = 0; run < runs; ++run) {
    for (int64_t group = 0; group < kVectors; ++group) {
      __m512i lane[16];
      for (int64_t i = 0; i < 16; ++i) {
        const int64_t out = first_out + group * 16 + i;
        lane[i] = out < w.out ? _mm512_castps_si512(of.of_run(w, out, first_run + run)) : _mm512_setzero_si512();
      }
      transpose(lane);
      for (int64_t i = 0; i < 16; i += lanes) {
        float* to = scales + ((run * 16 + i) / lanes * kVectors + group) * 16;
        _mm512_store_si512(to, lane[i]);
      }
    }
  }
}

void block_product(const uint8_t* panel, const float* scales, int64_t runs, int lanes, const BlockRows& x, float* sums, bool more) {
  const int64_t blocks = runs * 16 / lanes;
  switch (lanes) {
    case 1: return of_lanes<1>(panel, scales, blocks, x, sums, more);
    case 2: return of_lanes<2>(panel, scales, blocks, x, sums, more);
    case 4: return of_lanes<4>(panel, scales, blocks, x, sums, more);
    case 8: return of_lanes<8>(panel, scales, blocks, x, sums, more);
    default: return of_lanes<16>(panel, scales, blocks, x, sums, more);
  }
}

}  // namespace avx512
}  // namespace llm_fp4
