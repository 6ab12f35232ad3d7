// Rows of an input that arrives in float32 or bfloat16.
#pragma once

#include <cstdint>
#include <cstring>

namespace llm_fp4 {

// Row `t` of `x` as float32, in place or in `buffer`.
inline const float* float_row(const void* x, bool bfloat16, int64_t t, int64_t in, float* buffer) {
  if (!bfloat16) return static_cast<const float*>(x) + t * in;
  const auto* half = static_cast<const uint16_t*>(x) + t * in;
  for (int64_t j = 0; j < in; ++j) {
    const uint32_t bits = uint32_t{half[j]} << 16;
    std::memcpy(&buffer[j], &bits, 4);
  }
  return buffer;
}

}  // namespace llm_fp4
