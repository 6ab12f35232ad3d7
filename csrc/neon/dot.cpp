// Few rows with SDOT, which multiplies signed by signed: weights enter as their levels, and the offset that the sums of other
// sets hold is added at the end.
#include <arm_neon.h>

#include <cstring>

#include "neon/neon.h"

namespace llm_fp4 {
namespace neon {
namespace {

struct Levels {
  explicit Levels(const Weight& w) : bits(w.bits) {
    int8_t signed_levels[16] = {};
    for (int i = 0; i < 16; ++i) signed_levels[i] = static_cast<int8_t>(w.table[i] - w.offset);
    table = vld1q_s8(signed_levels);
  }

  int8x16_t low(uint8x16_t codes) const { return vqtbl1q_s8(table, vandq_u8(codes, vdupq_n_u8(15))); }
  int8x16_t high(uint8x16_t codes) const { return vqtbl1q_s8(table, vshrq_n_u8(codes, 4)); }

  // sign and magnitude
  static int8x16_t byte(uint8x16_t codes) {
    const int8x16_t sign = vshrq_n_s8(vreinterpretq_s8_u8(codes), 7);
    return vsubq_s8(veorq_s8(vreinterpretq_s8_u8(vandq_u8(codes, vdupq_n_u8(127))), sign), sign);
  }

  int bits;
  int8x16_t table;
};

// one run of 64 bytes of codes and the columns they stand for
template <int kRows>
inline void step(const Levels& levels, const uint8_t* codes, const int8_t* column, int64_t stride, int32x4_t (&sum)[kRows]) {
  for (int part = 0; part < 64; part += 16) {
    const uint8x16_t packed = vld1q_u8(codes + part);
    if (levels.bits == 4) {
      const int8x16_t even = levels.low(packed), odd = levels.high(packed);
      for (int r = 0; r < kRows; ++r) {
        const int8_t* row = column + r * stride + part;
        sum[r] = vdotq_s32(vdotq_s32(sum[r], even, vld1q_s8(row)), odd, vld1q_s8(row + 64));
      }
    } else {
      const int8x16_t level = Levels::byte(packed);
      for (int r = 0; r < kRows; ++r) sum[r] = vdotq_s32(sum[r], level, vld1q_s8(column + r * stride + part));
    }
  }
}

template <int kRows>
void dot_rows(const Weight& w, const Rows& x, int64_t first, int64_t last, int32_t* sums, int64_t stride) {
  const Levels levels(w);
  const int64_t columns_of_a_byte = w.bits == 4 ? 2 : 1;
  int32_t offsets[kRows];
  for (int r = 0; r < kRows; ++r) {
    int32x4_t sum = vdupq_n_s32(0);
    for (int64_t j = 0; j < (w.row_bytes + 63) / 64 * 64 * columns_of_a_byte; j += 16)  // zeros fill a row beyond its end
      sum = vdotq_s32(sum, vld1q_s8(x.data + r * x.stride + j), vdupq_n_s8(1));
    offsets[r] = static_cast<int32_t>(static_cast<uint32_t>(w.offset) * static_cast<uint32_t>(vaddvq_s32(sum)));
  }
  for (int64_t out = first; out < last; ++out) {
    const uint8_t* codes = w.codes + out * w.row_bytes;
    int32x4_t sum[kRows];
    for (int r = 0; r < kRows; ++r) sum[r] = vdupq_n_s32(0);
    int64_t at = 0;
    for (; at + 64 <= w.row_bytes; at += 64) {
      __builtin_prefetch(codes + at + 4096);
      step<kRows>(levels, codes + at, x.data + at * columns_of_a_byte, x.stride, sum);
    }
    if (at < w.row_bytes) {
      uint8_t rest[64] = {};
      std::memcpy(rest, codes + at, static_cast<size_t>(w.row_bytes - at));
      step<kRows>(levels, rest, x.data + at * columns_of_a_byte, x.stride, sum);
    }
    for (int r = 0; r < kRows; ++r)
      sums[r * stride + out - first] = static_cast<int32_t>(static_cast<uint32_t>(vaddvq_s32(sum[r])) + static_cast<uint32_t>(offsets[r]));
  }
}

}  // namespace

void dot(const Weight& w, const Rows& x, int64_t first, int64_t last, int32_t* sums, int64_t stride) {
  switch (x.count) {
    case 1: return dot_rows<1>(w, x, first, last, sums, stride);
    case 2: return dot_rows<2>(w, x, first, last, sums, stride);
    case 3: return dot_rows<3>(w, x, first, last, sums, stride);
    case 4: return dot_rows<4>(w, x, first, last, sums, stride);
    case 5: return dot_rows<5>(w, x, first, last, sums, stride);
    case 6: return dot_rows<6>(w, x, first, last, sums, stride);
    case 7: return dot_rows<7>(w, x, first, last, sums, stride);
    default: return dot_rows<8>(w, x, first, last, sums, stride);
  }
}

}  // namespace neon
}  // namespace llm_fp4
