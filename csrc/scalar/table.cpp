// Plain C++ for any machine; also what the other instruction sets are tested against.
#include "common/arrange.inl"
#include "common/attend.inl"
#include "common/quantize.inl"
#include "common/quantize_blocks.inl"
#include "common/block_dot.inl"
#include "kernels.h"

namespace llm_fp4 {
namespace {

// column j of a row of codes stands at this place of an arranged limb row
inline int64_t place(int64_t j) { return j / kBlock * kBlock + j % kBlock / 2 + (j & 1) * (kBlock / 2); }

inline uint8_t unsigned_level(const Weight& w, const uint8_t* codes, int64_t j) {
  if (w.bits == 4) return w.table[codes[j / 2] >> (4 * (j & 1)) & 15];
  const int magnitude = codes[j] & 127;
  return static_cast<uint8_t>(codes[j] & 128 ? w.offset - magnitude : w.offset + magnitude);
}

void dot(const Weight& w, const Rows& x, int64_t first, int64_t last, int32_t* sums, int64_t stride) {
  for (int64_t out = first; out < last; ++out) {
    const uint8_t* codes = w.codes + out * w.row_bytes;
    uint32_t sum[kFewRows] = {};  // wraps where an intermediate sum would overflow
    for (int64_t j = 0; j < w.in; ++j) {
      const int level = unsigned_level(w, codes, j);
      const int8_t* column = x.data + (w.bits == 4 ? place(j) : j);
      for (int64_t r = 0; r < x.count; ++r) sum[r] += static_cast<uint32_t>(level * column[r * x.stride]);
    }
    for (int64_t r = 0; r < x.count; ++r) sums[r * stride + out - first] = static_cast<int32_t>(sum[r]);
  }
}

void float_dot(const Weight& w, const FloatRows& x, int64_t first, int64_t last, int64_t first_byte, int64_t bytes, float* sums,
               int64_t stride, bool more) {
  const int64_t begin = first_byte * 2, end = begin + bytes * 2 < w.in ? begin + bytes * 2 : w.in;
  for (int64_t out = first; out < last; ++out) {
    const uint8_t* codes = w.codes + out * w.row_bytes;
    for (int64_t r = 0; r < x.count; ++r) {
      float sum[16] = {};  // one of each lane, as the vector kernels add them
      for (int64_t j = begin; j < end; ++j) {
        const int64_t lane = j % kBlock / 8, nibble = j % 8;
        const float level = w.levels[codes[j / 2] >> (4 * (j & 1)) & 15];
        const float value = w.scales ? level * block_scale(w, out, j) : level;
        sum[lane] += value * x.data[((j / kBlock * 8 + nibble) * x.count + r) * 16 + lane];
      }
      float total = 0.0f;
      for (float part : sum) total += part;
      float& to = sums[r * stride + out - first];
      to = more ? to + total : total;
    }
  }
}

}  // namespace

const Kernels& scalar_kernels() {
  static const Kernels kernels = {"scalar", [] { return true; }, row_top, quantize_row, arrange, dot, nullptr, nullptr, finish,
                                  quantize_blocks, block_dot, nullptr, nullptr, float_dot, nullptr, nullptr, nullptr, attend, gated};
  return kernels;
}

}  // namespace llm_fp4
