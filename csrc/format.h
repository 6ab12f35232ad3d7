// Number formats as integer grids, as in numerics/formats.py.
#pragma once

#include <cmath>
#include <cstdint>

namespace llm_fp4 {

struct Format {
  int exponent_bits, mantissa_bits;
  bool is_signed;

  int bits() const { return exponent_bits + mantissa_bits + (is_signed ? 1 : 0); }

  // of a code without its sign
  int64_t level(int code) const {
    const int field = code >> mantissa_bits, fraction = code & ((1 << mantissa_bits) - 1);
    return field == 0 ? fraction : static_cast<int64_t>((1 << mantissa_bits) + fraction) << (field - 1);
  }

  // in the unit of the standards, in which E2M1 reaches 6
  float standard_step() const { return std::ldexp(1.0f, 2 - mantissa_bits - (1 << (exponent_bits - 1))); }

  int64_t max_level() const { return level((1 << (exponent_bits + mantissa_bits)) - 1); }
};

}  // namespace llm_fp4
