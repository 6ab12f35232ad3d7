// RMSNorm and LayerNorm of a row, as kernels/norm.py defines them.
#pragma once

#include <cstdint>

namespace llm_fp4 {

struct Norm {
  const float* weight;  // (in,); null: no norm at all
  const float* bias;    // (in,) or null
  double eps;
  int64_t centered;  // 1: LayerNorm, 0: RMSNorm
};

// y = the normalized x, both (in,); y may be x
void normalize(const Norm&, const float* x, int64_t in, float* y);

}  // namespace llm_fp4
