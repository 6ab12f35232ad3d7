// Few rows: codes are streamed once and expanded in registers; no expanded weight is written.
#include "avx512/avx512.h"

#include "avx512/codes.h"

namespace llm_fp4 {
namespace avx512 {
namespace {

constexpr int64_t kAhead = 4096;  // bytes of codes between what is multiplied and what is fetched meanwhile

template <int kRows, int kOuts, int kBits>
struct Tile {
  static constexpr int kOdd = kOuts * kRows <= 4;  // few sums: the odd columns get their own, for the latency's sake
  __m512i sum[kOuts][kRows][1 + kOdd];
  const uint8_t* codes[kOuts];
  const int8_t* rows;
  int64_t stride;

  // one run of 64 bytes of codes at `at`, the columns they stand for at `column`
  template <bool kTail>
  inline __attribute__((always_inline)) void step(const Codes& expand, int64_t at, int64_t column, __mmask64 mask) {
#pragma GCC unroll 8
    for (int o = 0; o < kOuts; ++o) {
      _mm_prefetch(reinterpret_cast<const char*>(codes[0] + kAhead + at * kOuts + o * 64), _MM_HINT_T0);
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
};

template <int kRows, int kOuts, int kBits>
void dot_tile(const Weight& w, const Rows& x, int64_t first, int32_t* sums, int64_t stride) {
  const Codes expand(w);
  Tile<kRows, kOuts, kBits> tile;
  tile.rows = x.data;
  tile.stride = x.stride;
#pragma GCC unroll 8
  for (int o = 0; o < kOuts; ++o) {
    tile.codes[o] = w.codes + (first + o) * w.row_bytes;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      for (__m512i& sum : tile.sum[o][r]) sum = _mm512_setzero_si512();
    }
  }
  constexpr int64_t kColumns = kBits == 4 ? 2 : 1;  // columns of a byte
  int64_t at = 0;
  for (; at + 64 <= w.row_bytes; at += 64) tile.template step<false>(expand, at, at * kColumns, 0);
  if (at < w.row_bytes) tile.template step<true>(expand, at, at * kColumns, first_bytes(w.row_bytes - at));
#pragma GCC unroll 8
  for (int o = 0; o < kOuts; ++o) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512i sum = tile.kOdd ? _mm512_add_epi32(tile.sum[o][r][0], tile.sum[o][r][tile.kOdd]) : tile.sum[o][r][0];
      sums[r * stride + o] = _mm512_reduce_add_epi32(sum);
    }
  }
}

template <int kRows, int kBits>
void dot_rows(const Weight& w, const Rows& x, int64_t first, int64_t last, int32_t* sums, int64_t stride) {
  constexpr int kOuts = kRows <= 2 ? 1 : kRows <= 4 ? 4 : 2;  // one row of codes at a time streams fastest
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

}  // namespace

void dot(const Weight& w, const Rows& x, int64_t first, int64_t last, int32_t* sums, int64_t stride) {
  return w.bits == 4 ? dot_bits<4>(w, x, first, last, sums, stride) : dot_bits<8>(w, x, first, last, sums, stride);
}

}  // namespace avx512
}  // namespace llm_fp4
