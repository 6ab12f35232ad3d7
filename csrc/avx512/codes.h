// 4-bit and 8-bit codes to unsigned levels in registers.
#pragma once

#include <immintrin.h>

#include "kernels.h"

namespace llm_fp4 {
namespace {

inline __mmask64 first_bytes(int64_t n) { return n >= 64 ? ~__mmask64{0} : (__mmask64{1} << n) - 1; }

struct Codes {
  explicit Codes(const Weight& w)
      : table(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w.table)))),
        offset(_mm512_set1_epi8(static_cast<char>(w.offset))) {}

  // the 64 even and the 64 odd columns of 64 bytes
  void nibbles(__m512i bytes, __m512i& even, __m512i& odd) const {
    const __m512i low = _mm512_set1_epi8(15);
    even = _mm512_shuffle_epi8(table, _mm512_and_si512(bytes, low));
    odd = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low));
  }

  // 64 columns of 64 bytes of sign and magnitude
  __m512i bytes(__m512i codes) const {
    const __m512i magnitude = _mm512_and_si512(codes, _mm512_set1_epi8(127));
    return _mm512_mask_sub_epi8(_mm512_add_epi8(offset, magnitude), _mm512_movepi8_mask(codes), offset, magnitude);
  }

  __m512i table, offset;
};

// Stored scales of blocks to one float a lane of 8 columns, for runs of 128 columns; E4M3 without its factor 2^8.
struct LaneScales {
  explicit LaneScales(const Weight& w) : of_a_run(w.scales ? kBlock / w.block_size : 1) {
    alignas(16) uint8_t place[16];
    for (int lane = 0; lane < 16; ++lane) place[lane] = static_cast<uint8_t>(w.scales ? lane * kLane / w.block_size : 0);
    places = _mm_load_si128(reinterpret_cast<const __m128i*>(place));
    wide_places = _mm512_cvtepu8_epi32(places);
  }

  __m512 of_run(const Weight& w, int64_t out, int64_t run) const {
    const int64_t at = run * of_a_run, left = w.blocks - at < of_a_run ? w.blocks - at : of_a_run;
    const __mmask16 mask = static_cast<__mmask16>((1u << left) - 1);
    if (w.scale_type == ScaleType::kFloat16) {
      const __m256i halves = _mm256_maskz_loadu_epi16(mask, w.scales + 2 * (out * w.blocks + at));
      return _mm512_permutexvar_ps(wide_places, _mm512_cvtph_ps(halves));
    }
    const __m128i stored = _mm_shuffle_epi8(_mm_maskz_loadu_epi8(mask, w.scales + out * w.blocks + at), places);
    if (w.scale_type == ScaleType::kE8m0) {
      const __m512i code = _mm512_cvtepu8_epi32(stored);
      const __m512i bits = _mm512_max_epu32(_mm512_slli_epi32(code, 23), _mm512_set1_epi32(0x400000));  // code 0: 2^-127
      const __mmask16 none = _mm512_cmpeq_epi32_mask(code, _mm512_set1_epi32(255));
      return _mm512_castsi512_ps(_mm512_mask_mov_epi32(bits, none, _mm512_set1_epi32(0x7FC00000)));
    }
    // as float16 the same bits mean 2^-8 of the value, subnormals too
    const __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(stored), 7);  // sign, a copy of it, exponent, fraction
    const __mmask16 none = _mm256_cmpeq_epi16_mask(_mm256_slli_epi16(wide, 2), _mm256_set1_epi16(static_cast<short>(0xFE00)));
    const __m512 value = _mm512_cvtph_ps(_mm256_and_si256(wide, _mm256_set1_epi16(static_cast<short>(0xBFFF))));
    return _mm512_mask_mov_ps(value, none, _mm512_castsi512_ps(_mm512_set1_epi32(0x7FC00000)));
  }

  int64_t of_a_run;
  __m128i places;
  __m512i wide_places;
};

}  // namespace
}  // namespace llm_fp4
