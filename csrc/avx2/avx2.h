#pragma once

#include "kernels.h"

namespace llm_fp4 {
namespace avx2 {

void float_dot(const Weight&, const float* rows, int64_t row_stride, int64_t count, int64_t first, int64_t last, const float* scale,
               const float* bias, float* y, int64_t y_stride);

}  // namespace avx2
}  // namespace llm_fp4
