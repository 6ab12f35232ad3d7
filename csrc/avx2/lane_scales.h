// Stored scales of blocks to one float a lane of 8 columns, for half runs of 64 columns; E4M3 without its factor 2^8.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "kernels.h"

namespace llm_fp4 {
namespace {

struct LaneScales {
  explicit LaneScales(const Weight& w) {
    alignas(16) uint8_t place[16] = {};
    for (int lane = 0; lane < 8; ++lane) place[lane] = static_cast<uint8_t>(w.scales ? lane * kLane / w.block_size : 0);
    places = _mm_load_si128(reinterpret_cast<const __m128i*>(place));
    wide_places = _mm256_cvtepu8_epi32(places);
  }

  __m256 of_half_run(const Weight& w, int64_t out, int64_t half) const {
    const int64_t at = half * 64 / w.block_size, of_a_half = w.block_size < 64 ? 64 / w.block_size : 1;
    const int64_t left = w.blocks - at < of_a_half ? w.blocks - at : of_a_half;
    if (w.scale_type == ScaleType::kFloat16) {
      alignas(16) uint16_t halves[8] = {};
      std::memcpy(halves, w.scales + 2 * (out * w.blocks + at), static_cast<size_t>(2 * left));
      const __m256 value = of_halves(_mm256_cvtepu16_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(halves))));
      return _mm256_permutevar8x32_ps(value, wide_places);
    }
    uint64_t bytes = 0;
    std::memcpy(&bytes, w.scales + out * w.blocks + at, static_cast<size_t>(left));
    const __m256i code = _mm256_cvtepu8_epi32(_mm_shuffle_epi8(_mm_cvtsi64_si128(static_cast<int64_t>(bytes)), places));
    const __m256i nan = _mm256_set1_epi32(0x7FC00000);
    if (w.scale_type == ScaleType::kE8m0) {
      const __m256i bits = _mm256_max_epu32(_mm256_slli_epi32(code, 23), _mm256_set1_epi32(0x400000));  // code 0: 2^-127
      return _mm256_castsi256_ps(_mm256_blendv_epi8(bits, nan, _mm256_cmpeq_epi32(code, _mm256_set1_epi32(255))));
    }
    const __m256i magnitude = _mm256_and_si256(code, _mm256_set1_epi32(127));
    const __m256 value = _mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(magnitude, 20)), _mm256_set1_ps(0x1p112f));
    const __m256i sign = _mm256_slli_epi32(_mm256_xor_si256(code, magnitude), 24);
    const __m256i bits = _mm256_or_si256(_mm256_castps_si256(value), sign);
    return _mm256_castsi256_ps(_mm256_blendv_epi8(bits, nan, _mm256_cmpeq_epi32(magnitude, _mm256_set1_epi32(127))));
  }

  // the float16 numbers in dwords; this processor may lack the instruction
  static __m256 of_halves(__m256i half) {
    const __m256i magnitude = _mm256_and_si256(half, _mm256_set1_epi32(0x7FFF));
    const __m256i shifted = _mm256_slli_epi32(magnitude, 13);
    const __m256 value = _mm256_mul_ps(_mm256_castsi256_ps(shifted), _mm256_set1_ps(0x1p112f));  // subnormals too
    const __m256i special = _mm256_or_si256(shifted, _mm256_set1_epi32(0x7F800000));  // infinity and NaN
    const __m256i bits =
        _mm256_blendv_epi8(_mm256_castps_si256(value), special, _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(0x7BFF)));
    return _mm256_castsi256_ps(_mm256_or_si256(bits, _mm256_slli_epi32(_mm256_xor_si256(half, magnitude), 16)));
  }

  __m128i places;
  __m256i wide_places;
};

}  // namespace
}  // namespace llm_fp4
