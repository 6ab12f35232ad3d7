// Many rows with USDOT, which multiplies unsigned by signed, as VNNI does: the same panels, sixteen bytes at a time.
#include <arm_neon.h>

#include <algorithm>
#include <cstring>

#include "neon/neon.h"

namespace llm_fp4 {
namespace neon {
namespace {

constexpr int kVectors = 4;  // of a tile: 16 outputs, 4 columns each
constexpr int kTile = 6;     // 6 x 4 sums, 4 weights and 1 input of 32 registers

template <int kRows>
void tile(const uint8_t* panel, int64_t dwords, const int8_t* rows, int64_t stride, int32_t* sums, bool more) {
  int32x4_t sum[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) sum[r][v] = more ? vld1q_s32(sums + r * kPanel + v * 4) : vdupq_n_s32(0);
  }
  for (int64_t d = 0; d < dwords; ++d) {
    uint8x16_t weight[kVectors];
    for (int v = 0; v < kVectors; ++v) weight[v] = vld1q_u8(panel + d * kPanel * 4 + v * 16);
    for (int r = 0; r < kRows; ++r) {
      int32_t four;
      std::memcpy(&four, rows + r * stride + d * 4, 4);
      const int8x16_t input = vreinterpretq_s8_s32(vdupq_n_s32(four));
      for (int v = 0; v < kVectors; ++v) sum[r][v] = vusdotq_s32(sum[r][v], weight[v], input);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) vst1q_s32(sums + r * kPanel + v * 4, sum[r][v]);
  }
}

// the four dwords of sixteen unsigned levels, to the places of one output
inline void scatter(uint8x16_t levels, uint8_t* to) {
  uint8_t bytes[16];
  vst1q_u8(bytes, levels);
  for (int i = 0; i < 4; ++i) std::memcpy(to + i * kPanel * 4, bytes + i * 4, 4);
}

}  // namespace

void expand(const Weight& w, int64_t first_out, int64_t first_byte, int64_t bytes, uint8_t* panel) {
  const uint8x16_t table = vld1q_u8(w.table), offset = vdupq_n_u8(static_cast<uint8_t>(w.offset));
  for (int64_t i = 0; i < kPanel; ++i) {
    const int64_t out = first_out + i;
    for (int64_t at = 0; at < bytes; at += 16) {
      const int64_t left = out < w.out ? w.row_bytes - first_byte - at : 0;
      uint8_t run[16] = {};
      if (left > 0) std::memcpy(run, w.codes + out * w.row_bytes + first_byte + at, static_cast<size_t>(std::min<int64_t>(left, 16)));
      const uint8x16_t codes = vld1q_u8(run);
      uint8_t* to = panel + i * 4;
      if (w.bits == 4) {  // of each 64 bytes the low nibbles, then the high ones
        to += (at / 64 * 32 + at % 64 / 4) * kPanel * 4;
        scatter(vqtbl1q_u8(table, vandq_u8(codes, vdupq_n_u8(15))), to);
        scatter(vqtbl1q_u8(table, vshrq_n_u8(codes, 4)), to + 16 * kPanel * 4);
      } else {
        const uint8x16_t magnitude = vandq_u8(codes, vdupq_n_u8(127));
        const uint8x16_t minus = vcgeq_u8(codes, vdupq_n_u8(128));
        scatter(vbslq_u8(minus, vsubq_u8(offset, magnitude), vaddq_u8(offset, magnitude)), to + at / 4 * kPanel * 4);
      }
    }
  }
}

void product(const uint8_t* panel, int64_t dwords, const Rows& x, int32_t* sums, bool more) {
  for (int64_t r = 0; r < x.count; r += kTile) {
    const int8_t* rows = x.data + r * x.stride;
    for (int64_t out = 0; out < kPanel; out += kVectors * 4) {
      const uint8_t* part = panel + out * 4;
      int32_t* to = sums + r * kPanel + out;
      switch (std::min<int64_t>(kTile, x.count - r)) {
        case 1: tile<1>(part, dwords, rows, x.stride, to, more); break;
        case 2: tile<2>(part, dwords, rows, x.stride, to, more); break;
        case 3: tile<3>(part, dwords, rows, x.stride, to, more); break;
        case 4: tile<4>(part, dwords, rows, x.stride, to, more); break;
        case 5: tile<5>(part, dwords, rows, x.stride, to, more); break;
        default: tile<6>(part, dwords, rows, x.stride, to, more);
      }
    }
  }
}

}  // namespace neon
}  // namespace llm_fp4
