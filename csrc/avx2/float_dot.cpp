// Weight-only products of few float rows: three bits of a nibble select a magnitude, the fourth is the sign.
#include <immintrin.h>

#include <cstring>

#include "avx2/avx2.h"
#include "avx2/lane_scales.h"

namespace llm_fp4 {
namespace avx2 {
namespace {

inline float total(__m256 v) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_shuffle_ps(sum, sum, 1)));
}

template <int kRows, bool kBlocks>
void dot_rows_of(const Weight& w, const float* rows, int64_t first, int64_t last, int64_t first_byte, int64_t bytes,
              float* sums, int64_t stride, bool more) {
  const __m256 table = _mm256_loadu_ps(w.levels);
  const __m256 sign = _mm256_set1_ps(-0.0f);
  const LaneScales scales(w);
  for (int64_t out = first; out < last; ++out) {
    __m256 sum[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sum[r] = _mm256_setzero_ps();
    const uint8_t* codes = w.codes + out * w.row_bytes + first_byte;
    for (int64_t at = 0; at < bytes; at += 32) {
      alignas(32) uint8_t tail[32] = {};
      const uint8_t* from = codes + at;
      if (bytes - at < 32) {
        std::memcpy(tail, from, static_cast<size_t>(bytes - at));
        from = tail;
      }
      const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
      const float* block = rows + (first_byte + at) / 64 * kBlock * kRows + at % 64 / 4;
      __m256 run[kRows];  // where blocks have scales: the sums of a lane before they are multiplied with it
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) run[r] = kBlocks ? _mm256_setzero_ps() : sum[r];
#pragma GCC unroll 8
      for (int nibble = 0; nibble < 8; ++nibble) {
        const __m256i code = _mm256_srli_epi32(packed, 4 * nibble);
        const __m256 magnitude = _mm256_permutevar8x32_ps(table, code);
        const __m256 level = _mm256_xor_ps(magnitude, _mm256_and_ps(_mm256_castsi256_ps(_mm256_slli_epi32(code, 28)), sign));
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) run[r] = _mm256_fmadd_ps(level, _mm256_loadu_ps(block + (nibble * kRows + r) * 16), run[r]);
      }
      const __m256 scale = kBlocks ? scales.of_half_run(w, out, (first_byte + at) / 32) : sign;
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sum[r] = kBlocks ? _mm256_fmadd_ps(run[r], scale, sum[r]) : run[r];
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      float& to = sums[r * stride + out - first];
      to = total(sum[r]) + (more ? to : 0.0f);
    }
  }
}

template <int kRows>
void dot_rows(const Weight& w, const float* rows, int64_t first, int64_t last, int64_t first_byte, int64_t bytes, float* sums,
              int64_t stride, bool more) {
  if (w.scales) return dot_rows_of<kRows, true>(w, rows, first, last, first_byte, bytes, sums, stride, more);
  return dot_rows_of<kRows, false>(w, rows, first, last, first_byte, bytes, sums, stride, more);
}

}  // namespace

void float_dot(const Weight& w, const FloatRows& x, int64_t first, int64_t last, int64_t first_byte, int64_t bytes, float* sums,
               int64_t stride, bool more) {
  switch (x.count) {
    case 1: return dot_rows<1>(w, x.data, first, last, first_byte, bytes, sums, stride, more);
    case 2: return dot_rows<2>(w, x.data, first, last, first_byte, bytes, sums, stride, more);
    case 3: return dot_rows<3>(w, x.data, first, last, first_byte, bytes, sums, stride, more);
    default: return dot_rows<4>(w, x.data, first, last, first_byte, bytes, sums, stride, more);
  }
}

}  // namespace avx2
}  // namespace llm_fp4
