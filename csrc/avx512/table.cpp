// AVX-512 with VNNI: Cascade Lake, Ice Lake, Zen 4 and later.
#include "avx512/avx512.h"

#include "common/arrange.inl"
#include "common/attend.inl"
#include "common/quantize.inl"
#include "common/quantize_blocks.inl"

namespace llm_fp4 {

const Kernels& avx512_kernels() {
  static const Kernels kernels = {
      "avx512",
      [] {
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
      },
      row_top, quantize_row, arrange, avx512::dot, avx512::expand, avx512::product, finish,
      quantize_blocks, avx512::block_dot, avx512::expand_scales, avx512::block_product, avx512::float_dot,
      avx512::expand_floats, avx512::float_product,
      __builtin_cpu_supports("avx512bf16") ? avx512::bfloat16_product : nullptr, attend, gated};
  return kernels;
}

}  // namespace llm_fp4
