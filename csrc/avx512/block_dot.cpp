// Products of weights and inputs with block scales, few rows: a run of 128 columns gives sixteen exact sums, one a lane of 8.
#include <immintrin.h>

#include <algorithm>

#include "avx512/avx512.h"
#include "avx512/codes.h"

namespace llm_fp4 {
namespace avx512 {
namespace {

constexpr int64_t kAhead = 4096;  // bytes of codes between what is multiplied and what is fetched meanwhile

template <int kRows, int kOuts>
void dot_tile(const Weight& w, const BlockRows& x, const LaneScales& scales, int64_t first, float* sums, int64_t stride) {
  const Codes expand(w);
  __m512 sum[kOuts][kRows];
#pragma GCC unroll 8
  for (int o = 0; o < kOuts; ++o) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sum[o][r] = _mm512_setzero_ps();
  }
  const uint8_t* codes = w.codes + first * w.row_bytes;
  const int64_t ahead = (1 + kAhead / (w.row_bytes * kOuts + 1)) * kOuts * w.row_bytes;
  for (int64_t at = 0; at < w.row_bytes; at += 64) {
    const __mmask64 mask = first_bytes(w.row_bytes - at);
#pragma GCC unroll 8
    for (int o = 0; o < kOuts; ++o) {
      const uint8_t* from = codes + o * w.row_bytes + at;
      if (kOuts > 1) _mm_prefetch(reinterpret_cast<const char*>(from + ahead), _MM_HINT_T0);
      __m512i even, odd;
      expand.nibbles(_mm512_maskz_loadu_epi8(mask, from), even, odd);
      const __m512 scale = scales.of_run(w, first + o, at / 64);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const int8_t* row = x.limbs.data + r * x.limbs.stride + at * 2;
        const int64_t lane = r * x.lanes + at / 4;
        __m512i exact = _mm512_dpbusd_epi32(_mm512_loadu_si512(x.corrections + lane), even, _mm512_loadu_si512(row));
        exact = _mm512_dpbusd_epi32(exact, odd, _mm512_loadu_si512(row + 64));
        const __m512 both = _mm512_mul_ps(scale, _mm512_loadu_ps(x.scales + lane));
        sum[o][r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact), both, sum[o][r]);  // the product is exact
      }
    }
  }
#pragma GCC unroll 8
  for (int o = 0; o < kOuts; ++o) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sums[r * stride + o] = _mm512_reduce_add_ps(sum[o][r]);
  }
}

template <int kRows>
void dot_rows(const Weight& w, const BlockRows& x, int64_t first, int64_t last, float* sums, int64_t stride) {
  constexpr int kOuts = kRows <= 2 ? 1 : 4;  // one row of codes at a time streams fastest
  const LaneScales scales(w);
  int64_t out = first;
  for (; out + kOuts <= last; out += kOuts) dot_tile<kRows, kOuts>(w, x, scales, out, sums + (out - first), stride);
  for (; out < last; ++out) dot_tile<kRows, 1>(w, x, scales, out, sums + (out - first), stride);
}

}  // namespace

void block_dot(const Weight& w, const BlockRows& x, int64_t first, int64_t last, float* sums, int64_t stride) {
  switch (x.limbs.count) {
    case 1: return dot_rows<1>(w, x, first, last, sums, stride);
    case 2: return dot_rows<2>(w, x, first, last, sums, stride);
    case 3: return dot_rows<3>(w, x, first, last, sums, stride);
    default: return dot_rows<4>(w, x, first, last, sums, stride);
  }
}

}  // namespace avx512
}  // namespace llm_fp4
