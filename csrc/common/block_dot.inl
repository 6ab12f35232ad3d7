// Products of weights with block scales in plain C++: what the vector kernels are tested against. Included after quantize.inl.
#include <cmath>

namespace llm_fp4 {
namespace {

// The scale of a row's column; E4M3 without its factor 2^8, as the vector kernels leave it to the end.
inline float block_scale(const Weight& w, int64_t out, int64_t column) {
  const int64_t at = out * w.blocks + column / w.block_size;
  if (w.scale_type == ScaleType::kFloat16) {
    const int half = w.scales[2 * at] | w.scales[2 * at + 1] << 8, field = half >> 10 & 31, fraction = half & 1023;
    const float magnitude = field == 31 ? (fraction ? NAN : INFINITY)
                                        : std::ldexp(static_cast<float>(field ? 1024 + fraction : fraction), (field ? field : 1) - 25);
    return half & 0x8000 ? -magnitude : magnitude;
  }
  const int code = w.scales[at];
  if (w.scale_type == ScaleType::kE8m0) return code == 255 ? NAN : std::ldexp(1.0f, code - 127);
  const int field = code >> 3 & 15, fraction = code & 7;
  if ((code & 127) == 127) return NAN;
  const float magnitude = std::ldexp(static_cast<float>(field ? 8 + fraction : fraction), (field ? field - 1 : 0) - 9 - 8);
  return code & 128 ? -magnitude : magnitude;
}

inline float fold(float* lanes) {
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

void block_dot(const Weight& w, const BlockRows& x, int64_t first, int64_t last, float* sums, int64_t stride) {
  for (int64_t out = first; out < last; ++out) {
    const uint8_t* codes = w.codes + out * w.row_bytes;
    for (int64_t r = 0; r < x.limbs.count; ++r) {
      const int8_t* row = x.limbs.data + r * x.limbs.stride;
      float total[16] = {};
      for (int64_t begin = 0; begin < w.in; begin += kLane) {
        const int64_t lane = begin / kLane, end = begin + kLane < w.in ? begin + kLane : w.in;
        int32_t sum = x.corrections[r * x.lanes + lane];
        for (int64_t j = begin; j < end; ++j) {
          const int level = w.table[codes[j / 2] >> (4 * (j & 1)) & 15];
          sum += level * row[j / kBlock * kBlock + j % kBlock / 2 + (j & 1) * (kBlock / 2)];
        }
        const float scale = block_scale(w, out, begin) * x.scales[r * x.lanes + lane];
        total[lane % 16] += static_cast<float>(sum) * scale;
      }
      sums[r * stride + out - first] = fold(total);
    }
  }
}

}  // namespace
}  // namespace llm_fp4
