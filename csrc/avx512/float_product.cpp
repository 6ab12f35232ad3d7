// Weight-only products of many rows: 64 outputs are expanded to floats, or to pairs of bfloat16, and multiplied by a
// register-blocked kernel. The levels of 4-bit formats, E4M3 or E8M0 scales included, are exact in bfloat16.
#include <immintrin.h>

#include "avx512/avx512.h"
#include "avx512/codes.h"
#include "avx512/float_tile.h"
#include "avx512/transpose.h"

namespace llm_fp4 {
namespace avx512 {
namespace {

struct Multiply {
  using Input = float;
  static __m512 broadcast(const float* x) { return _mm512_set1_ps(*x); }
  static __m512 add(__m512 sum, __m512 weight, __m512 x) { return _mm512_fmadd_ps(weight, x, sum); }
};

}  // namespace

void expand_floats(const Weight& w, int64_t first_out, int64_t first_byte, int64_t bytes, bool pairs, float* panel) {
  const __m512 table = _mm512_loadu_ps(w.levels);
  const LaneScales scales(w);
  for (int64_t group = 0; group < kPanel / 16; ++group) {
    for (int64_t at = 0; at < bytes; at += 64) {
      const __mmask64 mask = first_bytes(w.row_bytes - first_byte - at);
      __m512i codes[16], scale[16];
      for (int64_t i = 0; i < 16; ++i) {
        const int64_t out = first_out + group * 16 + i;
        const uint8_t* from = w.codes + out * w.row_bytes + first_byte + at;
        codes[i] = out < w.out ? _mm512_maskz_loadu_epi8(mask, from) : _mm512_setzero_si512();
        _mm_prefetch(reinterpret_cast<const char*>(from) + 256, _MM_HINT_T0);
        if (w.scales && mask)
          scale[i] = out < w.out ? _mm512_castps_si512(scales.of_run(w, out, (first_byte + at) / 64)) : _mm512_setzero_si512();
      }
      transpose(codes);  // now the i-th holds 8 columns from 8 * i on of 16 outputs
      if (w.scales && mask) transpose(scale);
      float* to = panel + at * (pairs ? 1 : 2) * kPanel + group * 16;
      for (int64_t i = 0; i < 16; ++i) {
        __m512 level[8];
#pragma GCC unroll 8
        for (int nibble = 0; nibble < 8; ++nibble) {
          level[nibble] = _mm512_permutexvar_ps(_mm512_srli_epi32(codes[i], 4 * nibble), table);
          if (w.scales && mask) level[nibble] = _mm512_mul_ps(level[nibble], _mm512_castsi512_ps(scale[i]));
        }
#pragma GCC unroll 8
        for (int nibble = 0; nibble < 8; ++nibble) {
          if (!pairs) {
            _mm512_store_ps(to + (i * 8 + nibble) * kPanel, level[nibble]);
          } else if (nibble % 2 == 0) {
            const __m512i both = _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(level[nibble]), 16),
                                                 _mm512_castps_si512(level[nibble + 1]));
            _mm512_store_ps(to + (i * 4 + nibble / 2) * kPanel, _mm512_castsi512_ps(both));
          }
        }
      }
    }
  }
}

void float_product(const float* panel, int64_t columns, const void* x, int64_t stride, int64_t rows, float* sums, bool more) {
  product_of<Multiply>(panel, columns, static_cast<const float*>(x), stride, rows, sums, more);
}

}  // namespace avx512
}  // namespace llm_fp4
