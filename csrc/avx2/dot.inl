// Products of codes with limb rows in 256-bit registers. Included twice: with AVX2's own multiplication, and with VNNI's.
#include <immintrin.h>

#include <cstring>

#include "kernels.h"

namespace llm_fp4 {
namespace {

// sum + products of 32 unsigned levels of 4-bit formats (at most 128) and 32 signed ones, four to a sum
inline __m256i add_products(__m256i sum, __m256i levels, __m256i input) {
#if defined(LLM_FP4_AVX_VNNI)
  return _mm256_dpbusd_avx_epi32(sum, levels, input);
#else
  // exact: two products reach at most 2 * 128 * 128 = 32768 in magnitude, and that only below zero
  return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(levels, input), _mm256_set1_epi16(1)));
#endif
}

// the same of any unsigned levels
inline __m256i add_wide_products(__m256i sum, __m256i levels, __m256i input) {
#if defined(LLM_FP4_AVX_VNNI)
  return _mm256_dpbusd_avx_epi32(sum, levels, input);
#else
  const __m256i zero = _mm256_setzero_si256();
  const __m256i low = _mm256_srai_epi16(_mm256_unpacklo_epi8(zero, input), 8);
  const __m256i high = _mm256_srai_epi16(_mm256_unpackhi_epi8(zero, input), 8);
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_unpacklo_epi8(levels, zero), low));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_unpackhi_epi8(levels, zero), high));
#endif
}

inline __m256i load_bytes(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

inline int32_t total(__m256i v) {
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xB1)));
}

// kOuts outputs of kRows rows; runs of 32 bytes of codes, the last one copied so that no byte beyond the row is read
template <int kRows, int kOuts, int kBits>
void dot_tile(const Weight& w, const Rows& x, int64_t first, int32_t* sums, int64_t stride) {
  const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w.table)));
  const __m256i offset = _mm256_set1_epi8(static_cast<char>(w.offset)), low = _mm256_set1_epi8(15);
  __m256i sum[kOuts][kRows];
#pragma GCC unroll 8
  for (int o = 0; o < kOuts; ++o) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sum[o][r] = _mm256_setzero_si256();
  }
  for (int64_t at = 0; at < w.row_bytes; at += 32) {
    const int64_t left = w.row_bytes - at;
#pragma GCC unroll 8
    for (int o = 0; o < kOuts; ++o) {
      const uint8_t* from = w.codes + (first + o) * w.row_bytes + at;
      __m256i packed;
      if (left >= 32) {
        packed = load_bytes(from);
      } else {
        alignas(32) uint8_t tail[32] = {};
        std::memcpy(tail, from, static_cast<size_t>(left));
        packed = load_bytes(tail);
      }
      if (kBits == 4) {
        const __m256i even = _mm256_shuffle_epi8(table, _mm256_and_si256(packed, low));
        const __m256i odd = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(packed, 4), low));
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const int8_t* row = x.data + r * x.stride + at / 64 * kBlock + at % 64;
          sum[o][r] = add_products(sum[o][r], even, load_bytes(row));
          sum[o][r] = add_products(sum[o][r], odd, load_bytes(row + kBlock / 2));
        }
      } else {
        // offset + magnitude or offset - magnitude: the sign, moved to every bit, flips and adds one
        const __m256i negative = _mm256_cmpgt_epi8(_mm256_setzero_si256(), packed);
        const __m256i magnitude = _mm256_and_si256(packed, _mm256_set1_epi8(127));
        const __m256i level = _mm256_add_epi8(offset, _mm256_sub_epi8(_mm256_xor_si256(magnitude, negative), negative));
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) sum[o][r] = add_wide_products(sum[o][r], level, load_bytes(x.data + r * x.stride + at));
      }
    }
  }
#pragma GCC unroll 8
  for (int o = 0; o < kOuts; ++o) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sums[r * stride + o] = total(sum[o][r]);
  }
}

template <int kRows, int kBits>
void dot_rows(const Weight& w, const Rows& x, int64_t first, int64_t last, int32_t* sums, int64_t stride) {
  constexpr int kOuts = kRows == 1 ? 4 : kRows <= 4 ? 2 : 1;
  int64_t out = first;
  for (; out + kOuts <= last; out += kOuts) dot_tile<kRows, kOuts, kBits>(w, x, out, sums + (out - first), stride);
  for (; out < last; ++out) dot_tile<kRows, 1, kBits>(w, x, out, sums + (out - first), stride);
}

template <int kBits>
void dot_bits(const Weight& w, const Rows& x, int64_t first, int64_t last, int32_t* sums, int64_t stride) {
  switch (x.count) {
    case 1: return dot_rows<1, kBits>(w, x, first, last, sums, stride);
    case 2: return dot_rows<2, kBits>(w, x, first, last, sums, stride);
    case 3: return dot_rows<3, kBits>(w, x, first, last, sums, stride);
    case 4: return dot_rows<4, kBits>(w, x, first, last, sums, stride);
    case 5: return dot_rows<5, kBits>(w, x, first, last, sums, stride);
    case 6: return dot_rows<6, kBits>(w, x, first, last, sums, stride);
    case 7: return dot_rows<7, kBits>(w, x, first, last, sums, stride);
    default: return dot_rows<8, kBits>(w, x, first, last, sums, stride);
  }
}

void dot(const Weight& w, const Rows& x, int64_t first, int64_t last, int32_t* sums, int64_t stride) {
  return w.bits == 4 ? dot_bits<4>(w, x, first, last, sums, stride) : dot_bits<8>(w, x, first, last, sums, stride);
}

}  // namespace
}  // namespace llm_fp4
