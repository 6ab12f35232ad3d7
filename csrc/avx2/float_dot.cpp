// Weight-only products of few float rows: three bits of a nibble select a magnitude, the fourth is the sign.
#include <immintrin.h>

#include <cstring>

#include "avx2/avx2.h"

namespace llm_fp4 {
namespace avx2 {
namespace {

inline float total(__m256 v) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_shuffle_ps(sum, sum, 1)));
}

template <int kRows>
void dot_one(const Weight& w, const float* rows, int64_t stride, int64_t out, float* values) {
  const __m256 table = _mm256_loadu_ps(w.levels);
  const __m256 sign = _mm256_set1_ps(-0.0f);
  __m256 sum[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) sum[r] = _mm256_setzero_ps();
  const uint8_t* codes = w.codes + out * w.row_bytes;
  for (int64_t at = 0; at < w.row_bytes; at += 32) {
    alignas(32) uint8_t tail[32] = {};
    const uint8_t* from = codes + at;
    if (w.row_bytes - at < 32) {
      std::memcpy(tail, from, static_cast<size_t>(w.row_bytes - at));
      from = tail;
    }
    const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    const float* block = rows + at / 64 * kBlock + at % 64 / 4;
#pragma GCC unroll 8
    for (int nibble = 0; nibble < 8; ++nibble) {
      const __m256i code = _mm256_srli_epi32(packed, 4 * nibble);
      const __m256 magnitude = _mm256_permutevar8x32_ps(table, code);
      const __m256 level = _mm256_xor_ps(magnitude, _mm256_and_ps(_mm256_castsi256_ps(_mm256_slli_epi32(code, 28)), sign));
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sum[r] = _mm256_fmadd_ps(level, _mm256_loadu_ps(block + r * stride + nibble * 16), sum[r]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) values[r] = total(sum[r]);
}

}  // namespace

void float_dot(const Weight& w, const float* rows, int64_t stride, int64_t count, int64_t first, int64_t last, const float* scale,
               const float* bias, float* y, int64_t y_stride) {
  for (int64_t out = first; out < last; ++out) {
    for (int64_t r = 0; r < count;) {
      float values[4];
      const float* some = rows + r * stride;
      const int64_t n = count - r >= 4 ? 4 : count - r >= 2 ? 2 : 1;
      n == 4 ? dot_one<4>(w, some, stride, out, values) : n == 2 ? dot_one<2>(w, some, stride, out, values) : dot_one<1>(w, some, stride, out, values);
      for (int64_t i = 0; i < n; ++i, ++r) y[r * y_stride + out] = bias ? values[i] * scale[out] + bias[out] : values[i] * scale[out];
    }
  }
}

}  // namespace avx2
}  // namespace llm_fp4
