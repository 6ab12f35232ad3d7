// The orthonormal Walsh-Hadamard transform of runs of channels, as kernels/hadamard.py defines it.
#pragma once

#include <cstdint>

namespace llm_fp4 {

// y = the transformed row x, both (in,); every run of the largest power of two that divides `in`; y may be x
void hadamard(const float* x, int64_t in, float* y);

}  // namespace llm_fp4
