// Few rows: codes are streamed once and expanded in registers; no expanded weight is written.
#include "avx512/avx512.h"

#include <algorithm>

#include "avx512/codes.h"

namespace llm_fp4 {
namespace avx512 {
namespace {

constexpr int64_t kAhead = 4096;        // bytes of codes between what is multiplied and what is fetched meanwhile
constexpr int64_t kInCache = 24 << 10;  // bytes of limb rows that stay in the first-level cache beside the codes

// Sums over the lanes of four vectors.
inline __m128i totals(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// `bytes` bytes of codes of each of kOuts outputs.
template <int kRows, int kOuts, int kBits>
struct Tile {
  static constexpr int kOdd = kOuts * kRows <= 4;  // few sums: the odd columns get their own, for the latency's sake
  // One row of codes after the other is fetched ahead by the processor itself, and best so; it does not see through
  // several at once.
  static constexpr bool kFetch = kOuts > 1;
  __m512i sum[kOuts][kRows][1 + kOdd];
  const uint8_t* codes[kOuts];
  int64_t ahead;
  const int8_t* rows;
  int64_t stride;

  // one run of 64 bytes of codes at `at`, the columns they stand for at `column`
  template <bool kTail>
  inline __attribute__((always_inline)) void step(const Codes& expand, int64_t at, int64_t column, __mmask64 mask) {
#pragma GCC unroll 8
    for (int o = 0; o < kOuts; ++o) {
      if (kFetch) _mm_prefetch(reinterpret_cast<const char*>(codes[o] + ahead + at), _MM_HINT_T0);
      const __m512i packed = kTail ? _mm512_maskz_loadu_epi8(mask, codes[o] + at) : _mm512_loadu_si512(codes[o] + at);
      if (kBits == 4) {
        __m512i even, odd;
        expand.nibbles(packed, even, odd);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const int8_t* row = rows + r * stride + column;
          sum[o][r][0] = _mm512_dpbusd_epi32(sum[o][r][0], even, _mm512_loadu_si512(row));
          sum[o][r][kOdd] = _mm512_dpbusd_epi32(sum[o][r][kOdd], odd, _mm512_loadu_si512(row + 64));
        }
      } else {
        const __m512i level = expand.bytes(packed);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r)
          sum[o][r][0] = _mm512_dpbusd_epi32(sum[o][r][0], level, _mm512_loadu_si512(rows + r * stride + column));
      }
    }
  }

  inline __attribute__((always_inline)) __m512i total(int o, int r) const {
    return kOdd ? _mm512_add_epi32(sum[o][r][0], sum[o][r][kOdd]) : sum[o][r][0];
  }
};

template <int kRows, int kOuts, int kBits>
void dot_tile(const Weight& w, const Rows& x, int64_t first, int64_t first_byte, int64_t bytes, int32_t* sums, int64_t stride,
              bool more) {
  constexpr int64_t kColumns = kBits == 4 ? 2 : 1;  // columns of a byte
  const Codes expand(w);
  Tile<kRows, kOuts, kBits> tile;
  tile.rows = x.data + first_byte * kColumns;
  tile.stride = x.stride;
  tile.ahead = (1 + kAhead / (bytes * kOuts + 1)) * kOuts * w.row_bytes;
#pragma GCC unroll 8
  for (int o = 0; o < kOuts; ++o) {
    tile.codes[o] = w.codes + (first + o) * w.row_bytes + first_byte;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      for (__m512i& sum : tile.sum[o][r]) sum = _mm512_setzero_si512();
    }
  }
  int64_t at = 0;
  for (; at + 64 <= bytes; at += 64) tile.template step<false>(expand, at, at * kColumns, 0);
  if (at < bytes) tile.template step<true>(expand, at, at * kColumns, first_bytes(bytes - at));
#pragma GCC unroll 8
  for (int o = 0; o < kOuts; ++o) {
    const __m512i none = _mm512_setzero_si512();
    alignas(16) int32_t total[(kRows + 3) / 4 * 4];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r += 4) {
      _mm_store_si128(reinterpret_cast<__m128i*>(total + r),
                      totals(tile.total(o, r), r + 1 < kRows ? tile.total(o, r + 1) : none,
                             r + 2 < kRows ? tile.total(o, r + 2) : none, r + 3 < kRows ? tile.total(o, r + 3) : none));
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      int32_t& sum = sums[r * stride + o];
      sum = more ? static_cast<int32_t>(static_cast<uint32_t>(sum) + static_cast<uint32_t>(total[r])) : total[r];
    }
  }
}

template <int kRows, int kBits>
void dot_rows(const Weight& w, const Rows& x, int64_t first, int64_t last, int32_t* sums, int64_t stride) {
  constexpr int kOuts = kRows <= 4 ? 1 : 2;
  // a run of all rows that the outputs share out of the first-level cache; two rows are read fast enough out of the second
  constexpr int64_t kRun = kInCache / kRows / (kBits == 4 ? 2 : 1) / 64 * 64;
  const int64_t run = kRows <= 2 || w.row_bytes <= kRun + kRun / 4 ? w.row_bytes : kRun;
  for (int64_t at = 0; at < w.row_bytes || at == 0; at += run) {
    const int64_t bytes = std::min(run, w.row_bytes - at);
    int64_t out = first;
    for (; out + kOuts <= last; out += kOuts)
      dot_tile<kRows, kOuts, kBits>(w, x, out, at, bytes, sums + (out - first), stride, at > 0);
    for (; out < last; ++out) dot_tile<kRows, 1, kBits>(w, x, out, at, bytes, sums + (out - first), stride, at > 0);
    if (run == 0) break;
  }
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

}  // namespace

void dot(const Weight& w, const Rows& x, int64_t first, int64_t last, int32_t* sums, int64_t stride) {
  return w.bits == 4 ? dot_bits<4>(w, x, first, last, sums, stride) : dot_bits<8>(w, x, first, last, sums, stride);
}

}  // namespace avx512
}  // namespace llm_fp4
