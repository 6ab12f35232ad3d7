// Products of weights and inputs with block scales: half a run of 128 columns gives eight exact sums, one a lane of 8.
#include <immintrin.h>

#include <cstring>

#include "avx2/avx2.h"
#include "avx2/lane_scales.h"

namespace llm_fp4 {
namespace avx2 {
namespace {

inline __m256i load_bytes(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

// 32 unsigned levels of 4-bit formats (at most 128) times 32 signed ones, four to a sum; exact: two products reach at most
// 2 * 128 * 128 = 32768 in magnitude, and that only below zero
inline __m256i products(__m256i levels, __m256i input) {
  return _mm256_madd_epi16(_mm256_maddubs_epi16(levels, input), _mm256_set1_epi16(1));
}

// lanes 0-7 and 8-15, folded in halves
inline float fold(__m256 low, __m256 high) {
  const __m256 eight = _mm256_add_ps(low, high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

template <int kRows>
void dot_rows(const Weight& w, const BlockRows& x, int64_t first, int64_t last, float* sums, int64_t stride) {
  const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w.table)));
  const __m256i low = _mm256_set1_epi8(15);
  const LaneScales scales(w);
  for (int64_t out = first; out < last; ++out) {
    __m256 sum[kRows][2];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = _mm256_setzero_ps();
    const uint8_t* codes = w.codes + out * w.row_bytes;
    for (int64_t run = 0; run < w.row_bytes; run += 64) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const int64_t at = run + half * 32;
        if (at >= w.row_bytes) break;
        alignas(32) uint8_t tail[32] = {};
        const uint8_t* from = codes + at;
        if (w.row_bytes - at < 32) {
          std::memcpy(tail, from, static_cast<size_t>(w.row_bytes - at));
          from = tail;
        }
        const __m256i packed = load_bytes(from);
        const __m256i even = _mm256_shuffle_epi8(table, _mm256_and_si256(packed, low));
        const __m256i odd = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(packed, 4), low));
        const __m256 scale = scales.of_half_run(w, out, at / 32);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const int8_t* row = x.limbs.data + r * x.limbs.stride + run * 2 + half * 32;
          const int64_t lane = r * x.lanes + at / 4;
          __m256i exact = _mm256_add_epi32(load_bytes(x.corrections + lane), products(even, load_bytes(row)));
          exact = _mm256_add_epi32(exact, products(odd, load_bytes(row + kBlock / 2)));
          const __m256 both = _mm256_mul_ps(scale, _mm256_loadu_ps(x.scales + lane));
          sum[r][half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(exact), both, sum[r][half]);  // the product is exact
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sums[r * stride + out - first] = fold(sum[r][0], sum[r][1]);
  }
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

}  // namespace avx2
}  // namespace llm_fp4
