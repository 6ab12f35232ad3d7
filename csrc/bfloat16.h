#pragma once

#include <cstdint>
#include <cstring>

namespace llm_fp4 {

inline void widen(const uint16_t* bfloat16, int64_t count, float* y) {
  for (int64_t j = 0; j < count; ++j) {
    const uint32_t bits = uint32_t{bfloat16[j]} << 16;
    std::memcpy(&y[j], &bits, 4);
  }
}

}  // namespace llm_fp4
