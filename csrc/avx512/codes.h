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

}  // namespace
}  // namespace llm_fp4
