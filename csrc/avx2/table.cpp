// AVX2: every x86-64 machine since Haswell and Excavator.
#include "avx2/dot.inl"
#include "avx2/avx2.h"
#include "common/arrange.inl"
#include "common/attend.inl"
#include "common/quantize.inl"
#include "common/quantize_blocks.inl"

namespace llm_fp4 {

const Kernels& avx2_kernels() {
  static const Kernels kernels = {"avx2",
                                  [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); },
                                  row_top, quantize_row, arrange, dot, nullptr, nullptr, finish, quantize_blocks, avx2::block_dot, nullptr, nullptr, avx2::float_dot, nullptr, nullptr, nullptr,
                                  attend, gated};
  return kernels;
}

}  // namespace llm_fp4
