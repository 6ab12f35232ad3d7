#include <algorithm>

#include "buffer.h"
#include "linear.h"
#include "parallel.h"

namespace llm_fp4 {
namespace {

constexpr int64_t kOutsOfAnItem = 128;  // at most so many outputs a thread takes at a time
constexpr int64_t kRowsOfAPass = 512;

BlockQuantizer quantizer_of(const BlockInput& call, int64_t in) {
  const Format& f = call.format;
  const float step = f.standard_step(), largest = static_cast<float>(f.max_level()) * step;
  return {in, call.blocks.block_size, call.blocks.type == ScaleType::kE8m0, call.blocks.second, step, largest, std::ilogb(largest), f.mantissa_bits,
          static_cast<float>(f.max_level()), call.bfloat16};
}

// One row's places in BlockRows.
struct Places {
  int8_t* limbs;
  int64_t stride;
  int32_t* corrections;
  float* scales;
  int64_t lanes;
};

void quantize_row(const Kernels& k, const Weight& w, const BlockQuantizer& q, const void* x, const Places& to) {
  thread_local Buffer level_buffer, scale_buffer;
  int8_t* levels = level_buffer.get<int8_t>(w.in + kLane);
  const int64_t blocks = (w.in + q.block_size - 1) / q.block_size;
  float* scales = scale_buffer.get<float>(2 * blocks);
  k.quantize_blocks(q, x, levels, scales, scales + blocks);
  int32_t sum;
  k.arrange(levels, false, w.in, w.bits, to.limbs, to.stride, &sum);
  std::fill(levels + w.in, levels + w.in + kLane, int8_t{0});
  const int64_t full = (w.in + kLane - 1) / kLane, lanes_of_a_block = q.block_size / kLane;
  for (int64_t lane = 0; lane < full; ++lane) {
    int32_t lane_sum = 0;
    for (int64_t j = 0; j < kLane; ++j) lane_sum += levels[lane * kLane + j];
    to.corrections[lane] = -w.offset * lane_sum;
  }
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t end = std::min((b + 1) * lanes_of_a_block, full);
    for (int64_t lane = b * lanes_of_a_block; lane < end; ++lane) to.scales[lane] = scales[b];
  }
  std::fill(to.corrections + full, to.corrections + to.lanes, 0);
  std::fill(to.scales + full, to.scales + to.lanes, 0.0f);
}

}  // namespace

void block_linear(const Kernels& k, const Weight& w, const BlockInput& call, const float* bias, float* y, int threads) {
  thread_local Buffer limb_buffer, correction_buffer, scale_buffer;
  if (call.tokens == 0 || w.out == 0) return;
  const BlockQuantizer q = quantizer_of(call, w.in);
  const float unit = w.unit * (q.standard_step * q.second);
  const int64_t padded = (w.in + kBlock - 1) / kBlock * kBlock, stride = padded + 64, lanes = padded / kLane;
  const auto* x = static_cast<const char*>(call.x);
  const int64_t row_bytes = w.in * (call.bfloat16 ? 2 : 4);
  for (int64_t first = 0; first < call.tokens; first += kRowsOfAPass) {
    const int64_t some = std::min(kRowsOfAPass, call.tokens - first);
    int8_t* limbs = limb_buffer.get<int8_t>(some * stride);
    int32_t* corrections = correction_buffer.get<int32_t>(some * lanes);
    float* scales = scale_buffer.get<float>(some * lanes);
    parallel_for(threads, some, 1 + 8192 / stride, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        quantize_row(k, w, q, x + (first + t) * row_bytes, {limbs + t * stride, stride, corrections + t * lanes, scales + t * lanes, lanes});
    });
    const int64_t outs = std::min(kOutsOfAnItem, std::max<int64_t>(8, w.out / (8 * threads) / 8 * 8));
    parallel_for(threads, w.out, outs, [&](int64_t begin, int64_t end) {
      float sums[kFloatRows * kOutsOfAnItem];
      for (int64_t t = 0; t < some; t += kFloatRows) {
        const int64_t count = std::min(kFloatRows, some - t);
        const BlockRows rows{{limbs + t * stride, stride, count}, corrections + t * lanes, scales + t * lanes, lanes};
        k.block_dot(w, rows, begin, end, sums, kOutsOfAnItem);
        for (int64_t r = 0; r < count; ++r) {
          float* out = y + (first + t + r) * w.out;
          for (int64_t i = begin; i < end; ++i) {
            const float value = sums[r * kOutsOfAnItem + i - begin] * unit;
            out[i] = bias ? value + bias[i] : value;
          }
        }
      }
    });
  }
}

}  // namespace llm_fp4
