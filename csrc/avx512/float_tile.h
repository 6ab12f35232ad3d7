// The loop that float and bfloat16 products share: rows of x times a panel's 64 outputs.
#pragma once

#include <immintrin.h>

#include "kernels.h"

namespace llm_fp4 {
namespace {

constexpr int kVectors = kPanel / 16;
constexpr int64_t kRun = 64;  // steps summed before they are added to what came before: short sums round less
constexpr int kTile = 6;  // 6 x 4 sums, 4 weights and 1 input of 32 registers

// Step: Input is what one broadcast reads, one column or two.
template <typename Step, int kRows>
void tile_of(const float* panel, int64_t steps, const typename Step::Input* x, int64_t stride, float* sums, bool more) {
  for (int64_t begin = 0; begin < steps; begin += kRun) {
    const int64_t end = begin + kRun < steps ? begin + kRun : steps;
    __m512 sum[kRows][kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[r][v] = _mm512_setzero_ps();
    }
    for (int64_t s = begin; s < end; ++s) {
      __m512 weight[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) weight[v] = _mm512_load_ps(panel + (s * kVectors + v) * 16);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const __m512 input = Step::broadcast(x + r * stride + s);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sum[r][v] = Step::add(sum[r][v], weight[v], input);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        float* to = sums + r * kPanel + v * 16;
        _mm512_storeu_ps(to, more || begin > 0 ? _mm512_add_ps(_mm512_loadu_ps(to), sum[r][v]) : sum[r][v]);
      }
    }
  }
}

template <typename Step>
void product_of(const float* panel, int64_t steps, const typename Step::Input* x, int64_t stride, int64_t rows, float* sums, bool more) {
  int64_t r = 0;
  for (; r + kTile <= rows; r += kTile) tile_of<Step, kTile>(panel, steps, x + r * stride, stride, sums + r * kPanel, more);
  x += r * stride;
  sums += r * kPanel;
  switch (rows - r) {
    case 1: return tile_of<Step, 1>(panel, steps, x, stride, sums, more);
    case 2: return tile_of<Step, 2>(panel, steps, x, stride, sums, more);
    case 3: return tile_of<Step, 3>(panel, steps, x, stride, sums, more);
    case 4: return tile_of<Step, 4>(panel, steps, x, stride, sums, more);
    case 5: return tile_of<Step, 5>(panel, steps, x, stride, sums, more);
    default: return;
  }
}

}  // namespace
}  // namespace llm_fp4
