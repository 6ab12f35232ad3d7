// Weight-only products of many bfloat16 rows on AVX512-BF16: Zen 4, Cooper Lake, Sapphire Rapids and later.
#include <immintrin.h>

#include "avx512/avx512.h"
#include "avx512/float_tile.h"

namespace llm_fp4 {
namespace avx512 {
namespace {

struct Multiply {
  using Input = int32_t;  // two columns
  static __m512 broadcast(const int32_t* x) {
    int32_t pair;
    __builtin_memcpy(&pair, x, 4);  // rows start at any column
    return _mm512_castsi512_ps(_mm512_set1_epi32(pair));
  }
  static __m512 add(__m512 sum, __m512 weight, __m512 x) { return _mm512_dpbf16_ps(sum, (__m512bh)weight, (__m512bh)x); }
};

}  // namespace

// `columns` and `stride` even
void bfloat16_product(const float* panel, int64_t columns, const void* x, int64_t stride, int64_t rows, float* sums, bool more) {
  product_of<Multiply>(panel, columns / 2, static_cast<const int32_t*>(x), stride / 2, rows, sums, more);
}

}  // namespace avx512
}  // namespace llm_fp4
