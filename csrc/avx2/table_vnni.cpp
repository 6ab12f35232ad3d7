// AVX2 with VNNI: machines without AVX-512, from Alder Lake on.
#define LLM_FP4_AVX_VNNI

#include <cpuid.h>

#include "avx2/dot.inl"
#include "avx2/avx2.h"
#include "common/arrange.inl"
#include "common/attend.inl"
#include "common/quantize.inl"
#include "common/quantize_blocks.inl"

namespace llm_fp4 {
namespace {

bool has_avx_vnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

}  // namespace

const Kernels& avx_vnni_kernels() {
  static const Kernels kernels = {
      "avx_vnni",
      [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_avx_vnni(); },
      row_top, quantize_row, arrange, dot, nullptr, nullptr, finish, quantize_blocks, avx2::block_dot, nullptr, nullptr, avx2::float_dot, nullptr, nullptr, nullptr, attend, gated};
  return kernels;
}

}  // namespace llm_fp4
