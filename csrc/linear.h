// Whole operations: how rows and outputs are shared among threads and brought to the kernels.
#pragma once

#include "format.h"
#include "kernels.h"
#include "norm.h"

namespace llm_fp4 {

struct QuantizeCall {
  const void* x;
  bool bfloat16;
  int64_t tokens, in;
  const float* scale;  // the static step, or the clipping ratio
  const uint8_t* shift;
  const float* smooth;
  Format format;
  int max_shift;
  bool per_token;
  void* levels;
  float* step;
};

struct LinearCall {
  const void* levels;  // int8 or int16 (integer products), float32 (weight only)
  bool wide;
  int64_t tokens;
  const float* step;
  int64_t step_stride;
  const float* scale;
  const float* bias;
  float* y;
};

Weight make_weight(const uint8_t* codes, int64_t out, int64_t in, Format format);

void quantize_input(const Kernels&, const QuantizeCall&, int threads);
// of the normalized input
void norm_quantize_input(const Kernels&, const Norm&, const QuantizeCall&, int threads);
void int_linear(const Kernels&, const Weight&, const LinearCall&, int threads);
void float_linear(const Kernels&, const Weight&, const float* x, int64_t tokens, const float* scale, const float* bias, float* y,
                  int threads);

}  // namespace llm_fp4
