#pragma once

#include "kernels.h"

namespace llm_fp4 {
namespace avx512 {

void dot(const Weight&, const Rows&, int64_t first, int64_t last, int32_t* sums, int64_t stride);
void block_dot(const Weight&, const BlockRows&, int64_t first, int64_t last, float* sums, int64_t stride);
void expand_scales(const Weight&, int64_t first_out, int64_t first_run, int64_t runs, int lanes, float* scales);
void block_product(const uint8_t* panel, const float* scales, int64_t runs, int lanes, const BlockRows&, float* sums, bool more);
void expand(const Weight&, int64_t first_out, int64_t first_byte, int64_t bytes, uint8_t* panel);
void product(const uint8_t* panel, int64_t dwords, const Rows&, int32_t* sums, bool more);
void expand_floats(const Weight&, int64_t first_out, int64_t first_byte, int64_t bytes, bool pairs, float* panel);
void float_product(const float* panel, int64_t columns, const void* x, int64_t stride, int64_t rows, float* sums, bool more);
void bfloat16_product(const float* panel, int64_t columns, const void* x, int64_t stride, int64_t rows, float* sums, bool more);
void float_dot(const Weight&, const FloatRows&, int64_t first, int64_t last, int64_t first_byte, int64_t bytes, float* sums,
               int64_t stride, bool more);

}  // namespace avx512
}  // namespace llm_fp4
