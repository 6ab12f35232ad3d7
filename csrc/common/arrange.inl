// Levels to limb rows in the order of the codes, and sums to outputs. Included by each instruction set.
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace llm_fp4 {
namespace {

template <typename Level, typename Limb>
int32_t arrange_limb(const Level* __restrict levels, int64_t in, int bits, int8_t* __restrict row, int64_t stride, Limb limb) {
  int32_t sum = 0;
  int64_t block = 0;
  if (bits == 4) {
    for (; block + kBlock <= in; block += kBlock) {
      for (int64_t j = 0; j < kBlock / 2; ++j) {
        const int8_t even = limb(levels[block + 2 * j]), odd = limb(levels[block + 2 * j + 1]);
        row[block + j] = even;
        row[block + kBlock / 2 + j] = odd;
        sum += even + odd;
      }
    }
    std::memset(row + block, 0, static_cast<size_t>(stride - block));
    for (int64_t j = block; j < in; ++j) {
      const int8_t level = limb(levels[j]);
      row[block + (j - block) / 2 + (j & 1) * kBlock / 2] = level;
      sum += level;
    }
    return sum;
  }
  for (int64_t j = 0; j < in; ++j) {
    row[j] = limb(levels[j]);
    sum += row[j];
  }
  std::memset(row + in, 0, static_cast<size_t>(stride - in));
  return sum;
}

void arrange(const void* levels, bool wide, int64_t in, int bits, int8_t* rows, int64_t stride, int32_t* row_sums) {
  if (!wide) {
    row_sums[0] = arrange_limb(static_cast<const int8_t*>(levels), in, bits, rows, stride, [](int8_t v) { return v; });
    return;
  }
  const auto* v = static_cast<const int16_t*>(levels);  // v = 128 * high + low
  row_sums[0] = arrange_limb(v, in, bits, rows, stride, [](int16_t level) { return static_cast<int8_t>(level >> 7); });
  row_sums[1] = arrange_limb(v, in, bits, rows + stride, stride, [](int16_t level) { return static_cast<int8_t>(level & 127); });
}

// The exact sum of products without the weights' offset; unsigned, for intermediate sums may wrap.
inline int32_t signed_sum(int32_t sum, int32_t row_sum, int offset) {
  return static_cast<int32_t>(static_cast<uint32_t>(sum) - static_cast<uint32_t>(offset) * static_cast<uint32_t>(row_sum));
}

void finish(const Finish& f) {
  const int64_t outs = f.outs;
  const float* __restrict scale = f.scale;
  const float* __restrict bias = f.bias;
  for (int64_t t = 0; t < f.tokens; ++t) {
    const int32_t* __restrict sums = f.sums + t * f.limbs * f.stride;
    const int32_t* row_sums = f.row_sums + t * f.limbs;
    float* __restrict y = f.y + t * f.y_stride;
    const float step = f.step[t * f.step_stride];
    if (f.limbs == 1) {
      const int32_t row_sum = row_sums[0];
      for (int64_t i = 0; i < outs; ++i) y[i] = static_cast<float>(signed_sum(sums[i], row_sum, f.offset)) * (step * scale[i]);
    } else {
      for (int64_t i = 0; i < outs; ++i) {
        const int64_t high = signed_sum(sums[i], row_sums[0], f.offset);
        const int64_t low = signed_sum(sums[f.stride + i], row_sums[1], f.offset);
        y[i] = static_cast<float>(high * 128 + low) * (step * scale[i]);
      }
    }
    if (bias) {
      for (int64_t i = 0; i < outs; ++i) y[i] = y[i] + bias[i];
    }
  }
}

}  // namespace
}  // namespace llm_fp4
