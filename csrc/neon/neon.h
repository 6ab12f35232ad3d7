#pragma once

#include "kernels.h"

namespace llm_fp4 {
namespace neon {

// with SDOT
void dot(const Weight&, const Rows&, int64_t first, int64_t last, int32_t* sums, int64_t stride);
// with USDOT
void expand(const Weight&, int64_t first_out, int64_t first_byte, int64_t bytes, uint8_t* panel);
void product(const uint8_t* panel, int64_t dwords, const Rows&, int32_t* sums, bool more);

}  // namespace neon
}  // namespace llm_fp4
