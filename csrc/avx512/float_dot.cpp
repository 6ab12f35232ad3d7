// Weight-only products of few float rows: a nibble selects its level from a register of sixteen floats.
#include <immintrin.h>

#include "avx512/codes.h"
#include "avx512/avx512.h"

namespace llm_fp4 {
namespace avx512 {
namespace {

constexpr int64_t kAhead = 4096;  // bytes of codes between what is multiplied and what is fetched meanwhile

template <int kRows, int kOuts>
struct Tile {
  static constexpr int kParts = kOuts == 1 ? 4 : 1;  // sums of one output and row, for the latency's sake
  __m512 sum[kOuts][kRows][kParts];

  // a run whose sums are multiplied with the scales of their lanes' blocks
  inline __attribute__((always_inline)) void step(__m512 table, const __m512i (&codes)[kOuts], const float* rows,
                                                  const __m512 (&scale)[kOuts]) {
    Tile run;
    run.clear();
    run.step(table, codes, rows);
#pragma GCC unroll 4
    for (int o = 0; o < kOuts; ++o) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sum[o][r][0] = _mm512_fmadd_ps(run.total(o, r), scale[o], sum[o][r][0]);
    }
  }

  inline __attribute__((always_inline)) void clear() {
#pragma GCC unroll 4
    for (int o = 0; o < kOuts; ++o) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        for (__m512& part : sum[o][r]) part = _mm512_setzero_ps();
      }
    }
  }

  inline __attribute__((always_inline)) __m512 total(int o, int r) const {
    __m512 all = sum[o][r][0];
    for (int part = 1; part < kParts; ++part) all = _mm512_add_ps(all, sum[o][r][part]);
    return all;
  }

  inline __attribute__((always_inline)) void step(__m512 table, const __m512i (&codes)[kOuts], const float* rows) {
#pragma GCC unroll 8
    for (int nibble = 0; nibble < 8; ++nibble) {
      __m512 level[kOuts];
#pragma GCC unroll 4
      for (int o = 0; o < kOuts; ++o) level[o] = _mm512_permutexvar_ps(_mm512_srli_epi32(codes[o], 4 * nibble), table);  // low 4 bits
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const __m512 x = _mm512_load_ps(rows + (nibble * kRows + r) * 16);
#pragma GCC unroll 4
        for (int o = 0; o < kOuts; ++o) {
          __m512& part = sum[o][r][nibble % kParts];
          part = _mm512_fmadd_ps(level[o], x, part);
        }
      }
    }
  }
};

template <int kRows, int kOuts, bool kBlocks>
void dot_tile(const Weight& w, const FloatRows& x, int64_t out, int64_t first_byte, int64_t bytes, float* sums, int64_t stride,
              bool more) {
  const __m512 table = _mm512_loadu_ps(w.levels);
  const LaneScales scales(w);
  Tile<kRows, kOuts> tile;
  tile.clear();
  const uint8_t* codes = w.codes + out * w.row_bytes + first_byte;
  const float* rows = x.data + first_byte * 2 * kRows;
  const int64_t ahead = (1 + kAhead / (bytes * kOuts + 1)) * kOuts;  // outputs whose codes are fetched meanwhile
  for (int64_t at = 0; at < bytes; at += 64) {
    __m512i packed[kOuts];
#pragma GCC unroll 4
    for (int o = 0; o < kOuts; ++o) {
      packed[o] = _mm512_maskz_loadu_epi8(first_bytes(bytes - at), codes + o * w.row_bytes + at);
      _mm_prefetch(reinterpret_cast<const char*>(codes + (o + ahead) * w.row_bytes + at), _MM_HINT_T0);
    }
    if (kBlocks) {
      __m512 scale[kOuts];
#pragma GCC unroll 4
      for (int o = 0; o < kOuts; ++o) scale[o] = scales.of_run(w, out + o, (first_byte + at) / 64);
      tile.step(table, packed, rows + at * 2 * kRows, scale);
    } else {
      tile.step(table, packed, rows + at * 2 * kRows);
    }
  }
#pragma GCC unroll 4
  for (int o = 0; o < kOuts; ++o) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      sums[r * stride + o] = _mm512_reduce_add_ps(tile.total(o, r)) + (more ? sums[r * stride + o] : 0.0f);
    }
  }
}

template <int kRows, bool kBlocks>
void dot_rows_of(const Weight& w, const FloatRows& x, int64_t first, int64_t last, int64_t first_byte, int64_t bytes, float* sums,
              int64_t stride, bool more) {
  constexpr int kOuts = kRows <= 2 ? 1 : 4;  // one row of codes at a time streams fastest
  int64_t out = first;
  for (; out + kOuts <= last; out += kOuts) dot_tile<kRows, kOuts, kBlocks>(w, x, out, first_byte, bytes, sums + (out - first), stride, more);
  for (; out < last; ++out) dot_tile<kRows, 1, kBlocks>(w, x, out, first_byte, bytes, sums + (out - first), stride, more);
}

template <int kRows>
void dot_rows(const Weight& w, const FloatRows& x, int64_t first, int64_t last, int64_t first_byte, int64_t bytes, float* sums,
              int64_t stride, bool more) {
  if (w.scales) return dot_rows_of<kRows, true>(w, x, first, last, first_byte, bytes, sums, stride, more);
  return dot_rows_of<kRows, false>(w, x, first, last, first_byte, bytes, sums, stride, more);
}

}  // namespace

void float_dot(const Weight& w, const FloatRows& x, int64_t first, int64_t last, int64_t first_byte, int64_t bytes, float* sums,
               int64_t stride, bool more) {
  switch (x.count) {
    case 1: return dot_rows<1>(w, x, first, last, first_byte, bytes, sums, stride, more);
    case 2: return dot_rows<2>(w, x, first, last, first_byte, bytes, sums, stride, more);
    case 3: return dot_rows<3>(w, x, first, last, first_byte, bytes, sums, stride, more);
    default: return dot_rows<4>(w, x, first, last, first_byte, bytes, sums, stride, more);
  }
}

}  // namespace avx512
}  // namespace llm_fp4
