// Rows of an input to levels under a scale for each block, found as the row arrives. Included after quantize.inl by each
// instruction set; the same roundings in the same order as kernels/blocks.py.
#include <cmath>

namespace llm_fp4 {
namespace {

// The nearest value of E4M3, 448 at most; NaN stays.
inline float nearest_e4m3(float v) {
  constexpr float kStep = 0x1p-9f;  // of its subnormals
  return rounded(v * (1 / kStep), 0.0f, 448.0f / kStep, 3) * kStep;
}

// The power of two under `top` after rounding that to m mantissa bits, over the one under the format's largest value.
inline float power_scale(float top, int m, int largest) {
  const uint32_t bits = as_bits(top);
  if (top == 0.0f) return 1.0f;
  if (top != top) return top;
  int exponent = static_cast<int>(bits >> 23) - 127;
  // half a spacing below the next power of two belongs to it
  if ((bits & 0x7FFFFFu) >= 0x800000u - (0x800000u >> (m + 1))) exponent += 1;
  if (bits == 0x7F800000u) exponent = 0;  // as frexp has it
  const int code = exponent - largest + 127;
  return as_float(static_cast<uint32_t>(code < 2 ? 2 : code > 254 ? 254 : code) << 23);
}

template <typename Input>
inline float top_of_block(const Input* __restrict x, int64_t n) {
  int32_t top = 0;  // of non-negative floats the bits are in order, and those of NaN above all
  for (int64_t j = 0; j < n; ++j) {
    const int32_t bits = static_cast<int32_t>(as_bits(load(x, j)) & 0x7FFFFFFFu);
    top = bits > top ? bits : top;
  }
  return as_float(static_cast<uint32_t>(top));
}

// Returns whether all of the block are numbers; what is none gets level 0.
template <typename Input>
inline bool levels_of_block(const Input* __restrict x, int64_t n, float inverse, float top, int m, int8_t* __restrict levels) {
  int32_t numbers = 1;
  for (int64_t j = 0; j < n; ++j) {
    const float value = load(x, j) * inverse;
    const bool number = value == value;
    numbers &= number;
    const float level = rounded(value, -top, top, m);
    levels[j] = static_cast<int8_t>(static_cast<int32_t>(number ? level : 0.0f));
  }
  return numbers != 0;
}

template <typename Input, int kSize>  // kSize: of a full block where it is known, so that its loops are unrolled; else 0
void blocks_of(const BlockQuantizer& q, const Input* __restrict x, int8_t* __restrict levels, float* __restrict scales,
               float* __restrict inverses) {
  const int64_t size = kSize ? kSize : q.block_size, full = q.in / size, count = (q.in + size - 1) / size;
  for (int64_t b = 0; b < full; ++b) scales[b] = top_of_block(x + b * size, size);
  if (full < count) scales[full] = top_of_block(x + full * size, q.in - full * size);
  for (int64_t b = 0; b < count; ++b) {
    const float scale = q.e8m0 ? power_scale(scales[b], q.mantissa_bits, q.largest_exponent)
                               : nearest_e4m3(scales[b] / q.second / q.largest);
    const float step = scale * q.standard_step * q.second;
    scales[b] = scale;
    inverses[b] = step > 0.0f ? 1.0f / step : 0.0f;
  }
  for (int64_t b = 0; b < count; ++b) {
    const int64_t at = b * size;
    const bool numbers = b < full ? levels_of_block(x + at, size, inverses[b], q.top, q.mantissa_bits, levels + at)
                                  : levels_of_block(x + at, q.in - at, inverses[b], q.top, q.mantissa_bits, levels + at);
    if (!numbers) scales[b] = NAN;  // levels have no NaN: the block's scale carries it to every output
  }
}

template <typename Input>
void blocks_of_any(const BlockQuantizer& q, const Input* x, int8_t* levels, float* scales, float* inverses) {
  switch (q.block_size) {
    case 16: return blocks_of<Input, 16>(q, x, levels, scales, inverses);
    case 32: return blocks_of<Input, 32>(q, x, levels, scales, inverses);
    default: return blocks_of<Input, 0>(q, x, levels, scales, inverses);
  }
}

void quantize_blocks(const BlockQuantizer& q, const void* x, int8_t* levels, float* scales, float* inverses) {
  if (q.bfloat16) return blocks_of_any(q, static_cast<const uint16_t*>(x), levels, scales, inverses);
  return blocks_of_any(q, static_cast<const float*>(x), levels, scales, inverses);
}

}  // namespace
}  // namespace llm_fp4
