// One token through the blocks of a decoder with RMSNorm, rotary positions, grouped queries and a gated MLP.
// kernels/decoding.py declares the same structures with ctypes: fields of 8 bytes, so that nothing is padded.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "norm.h"

namespace llm_fp4 {

// A packed weight.
struct Operand {
  const uint8_t* codes;
  const float* scale;  // or null: of blocks
  const float* bias;  // or null
  int64_t out, exponent_bits, mantissa_bits;
  const uint8_t* block_scales;  // or null: `scale` is of rows
  int64_t block_size, scale_type;  // 0: E4M3, 1: E8M0, 2: float16
  const float* second;  // over the block scales, or null
};

// An input that all `count` operands read; `scale` null: it stays float. `hadamard`: it is transformed before it is rounded.
struct Site {
  int64_t in;
  const float* scale;
  const uint8_t* shift;
  const float* smooth;
  int64_t exponent_bits, mantissa_bits, is_signed, max_shift, per_token, hadamard, count;
  const Operand* operands;
  int64_t block_size, scale_type;  // 0, or the input is quantized block by block and `scale` lies over the blocks' scales
};

struct Block {
  Norm before_attention, of_queries, of_keys, before_mlp;
  Site qkv, output, gate_up, down;
  int64_t heads, kv_heads, head_dim;
  double attention_scale;
  float *keys, *values;  // (kv_heads, capacity, head_dim)
  int64_t capacity;
};

// The outputs of a row's operands, one after the other, into y; `norm`, where not null, comes first.
void site_linear(const Kernels&, const Norm* norm, const Site&, const float* x, float* y, int threads);

// The hidden row after the block, in place; its key and value are stored at `position`.
// cosine, sine: (rotary,) of the position, rotary <= head_dim and even.
void run_block(const Kernels&, const Block&, float* hidden, const float* cosine, const float* sine, int64_t rotary,
               int64_t position, int threads);

}  // namespace llm_fp4
