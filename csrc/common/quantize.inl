// Rows of an input to levels. Included by each instruction set, whose flags vectorise it; every operation is exact or
// rounds once in the reference's order, so all sets agree bit for bit.
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace llm_fp4 {
namespace {

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float load(const float* x, int64_t j) { return x[j]; }
inline float load(const uint16_t* x, int64_t j) { return as_float(uint32_t{x[j]} << 16); }  // bfloat16

inline float power_of_two(int n) { return as_float(static_cast<uint32_t>(n + 127) << 23); }

template <bool kSmooth, bool kShift>
inline float multiplier(float inverse, const float* smooth, const uint8_t* shift, int64_t j) {
  if (kSmooth) inverse = inverse * (1.0f / smooth[j]);
  if (kShift) inverse = inverse * power_of_two(shift[j]);
  return inverse;
}

// The nearest level of a format with m mantissa bits, half to even; `value` is in steps.
inline float rounded(float value, float low, float top, int m) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds half to even what is below 2^22
  const uint32_t m_bits = static_cast<uint32_t>(m) << 23, smallest = m_bits + (127u << 23);
  value = value < low ? low : value;
  value = value > top ? top : value;
  const uint32_t power = as_bits(value) & 0x7F800000u;  // 2^floor(log2|value|)
  const uint32_t exponent = (static_cast<int32_t>(power) > static_cast<int32_t>(smallest) ? power : smallest) - m_bits;
  const float spacing = as_float(exponent), inverse_spacing = as_float((254u << 23) - exponent);
  return ((value * inverse_spacing + kRound) - kRound) * spacing;
}

template <typename Input, bool kSmooth, bool kShift>
float top_of(const Quantizer& q, const Input* __restrict x) {
  const float* __restrict smooth = q.smooth;
  const uint8_t* __restrict shift = q.shift;
  int32_t top = 0;  // of non-negative floats the bits are in order, and those of NaN above all
  for (int64_t j = 0; j < q.in; ++j) {
    const float value = load(x, j) * multiplier<kSmooth, kShift>(1.0f, smooth, shift, j);
    const int32_t bits = static_cast<int32_t>(as_bits(value) & 0x7FFFFFFFu);
    top = bits > top ? bits : top;
  }
  return as_float(static_cast<uint32_t>(top));
}

// Returns whether all of the row are numbers; what is none gets level 0.
template <typename Input, bool kSmooth, bool kShift, typename Level>
bool levels_of(const Quantizer& q, float inverse, const Input* __restrict x, Level* __restrict levels) {
  const float* __restrict smooth = q.smooth;
  const uint8_t* __restrict shift = q.shift;
  const float low = q.low, top = q.top;
  const int m = q.mantissa_bits, max_shift = q.max_shift;
  int32_t numbers = 1;
  for (int64_t j = 0; j < q.in; ++j) {
    const float value = load(x, j) * multiplier<kSmooth, kShift>(inverse, smooth, shift, j);
    const bool number = value == value;
    numbers &= number;
    float level = rounded(value, low, top, m);
    level = number ? level : 0.0f;
    if (kShift) level = level * power_of_two(max_shift - shift[j]);
    levels[j] = static_cast<Level>(static_cast<int32_t>(level));
  }
  return numbers != 0;
}

template <typename Input>
float row_top_of(const Quantizer& q, const Input* x) {
  if (q.smooth) return q.shift ? top_of<Input, true, true>(q, x) : top_of<Input, true, false>(q, x);
  return q.shift ? top_of<Input, false, true>(q, x) : top_of<Input, false, false>(q, x);
}

template <typename Input, typename Level>
bool row_levels_of(const Quantizer& q, float inverse, const Input* x, Level* levels) {
  if (q.smooth) {
    if (q.shift) return levels_of<Input, true, true>(q, inverse, x, levels);
    return levels_of<Input, true, false>(q, inverse, x, levels);
  }
  if (q.shift) return levels_of<Input, false, true>(q, inverse, x, levels);
  return levels_of<Input, false, false>(q, inverse, x, levels);
}

float row_top(const Quantizer& q, const void* x) {
  return q.bfloat16 ? row_top_of(q, static_cast<const uint16_t*>(x)) : row_top_of(q, static_cast<const float*>(x));
}

bool quantize_row(const Quantizer& q, float inverse, const void* x, void* levels) {
  auto* narrow = static_cast<int8_t*>(levels);
  auto* wide = static_cast<int16_t*>(levels);
  if (q.bfloat16) {
    auto* row = static_cast<const uint16_t*>(x);
    return q.wide ? row_levels_of(q, inverse, row, wide) : row_levels_of(q, inverse, row, narrow);
  }
  auto* row = static_cast<const float*>(x);
  return q.wide ? row_levels_of(q, inverse, row, wide) : row_levels_of(q, inverse, row, narrow);
}

}  // namespace
}  // namespace llm_fp4
