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
  bool hadamard = false;  // whether rows are transformed first
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

// Scales of blocks of columns and the scale over them; those of an input are E4M3 or E8M0.
struct BlockScales {
  const uint8_t* data;
  int block_size;
  ScaleType type;
  float second;
};

// An input that is quantized block by block as it arrives; `blocks.data` is null.
struct BlockInput {
  const void* x;
  bool bfloat16;
  int64_t tokens;
  Format format;
  BlockScales blocks;
  bool hadamard = false;
};

constexpr int64_t kBlockRowsOfAStream = 12;  // up to so many rows with block scales, codes are expanded in registers

Weight make_weight(const uint8_t* codes, int64_t out, int64_t in, Format format);

Weight make_block_weight(const uint8_t* codes, int64_t out, int64_t in, Format, const BlockScales&);

void quantize_input(const Kernels&, const QuantizeCall&, int threads);
// of the normalized input
void norm_quantize_input(const Kernels&, const Norm&, const QuantizeCall&, int threads);
void int_linear(const Kernels&, const Weight&, const LinearCall&, int threads);
// of weights and inputs that both have block scales
void block_linear(const Kernels&, const Weight&, const BlockInput&, const float* bias, float* y, int threads);
// `scale` null: the weight has block scales
void float_linear(const Kernels&, const Weight&, const void* x, bool bfloat16, int64_t tokens, const float* scale, const float* bias,
                  float* y, int threads);

}  // namespace llm_fp4
