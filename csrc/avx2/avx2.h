#pragma once

#include "kernels.h"

namespace llm_fp4 {
namespace avx2 {

void block_dot(const Weight&, const BlockRows&, int64_t first, int64_t last, float* sums, int64_t stride);
void float_dot(const Weight&, const FloatRows&, int64_t first, int64_t last, int64_t first_byte, int64_t bytes, float* sums,
               int64_t stride, bool more);

}  // namespace avx2
}  // namespace llm_fp4
