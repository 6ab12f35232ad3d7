#include <algorithm>

#include "bfloat16.h"
#include "buffer.h"
#include "hadamard.h"
#include "linear.h"
#include "parallel.h"

namespace llm_fp4 {
namespace {

constexpr int64_t kOutsOfAnItem = 128;  // at most so many outputs a thread takes at a time
constexpr int64_t kRowsOfAPass = 512;
constexpr int64_t kColumnsOfAPanel = 2048;  // 64 x 2048 levels, 128 KiB, stay in the second-level cache beside as much of scales

BlockQuantizer quantizer_of(const BlockInput& call, int64_t in) {
  const Format& f = call.format;
  const float step = f.standard_step(), largest = static_cast<float>(f.max_level()) * step;
  return {in, call.blocks.block_size, call.blocks.type == ScaleType::kE8m0, call.blocks.second, step, largest, std::ilogb(largest), f.mantissa_bits,
          static_cast<float>(f.max_level()), call.bfloat16 && !call.hadamard};
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

// Rows of a pass as block_dot reads them.
struct Arranged {
  int8_t* limbs;
  int64_t stride;
  int32_t* corrections;
  float* scales;
  int64_t lanes;

  BlockRows rows(int64_t first, int64_t count) const {
    return {{limbs + first * stride, stride, count}, corrections + first * lanes, scales + first * lanes, lanes};
  }
};

struct Outputs {
  float unit;
  const float* bias;
  float* y;
  int64_t out;

  void take(const float* sums, int64_t token, int64_t first, int64_t outs) const {
    float* to = y + token * out + first;
    for (int64_t i = 0; i < outs; ++i) {
      const float value = sums[i] * unit;
      to[i] = bias ? value + bias[first + i] : value;
    }
  }
};

// Codes expanded in registers, anew for every few rows.
void stream(const Kernels& k, const Weight& w, const Arranged& x, int64_t some, const Outputs& to, int threads) {
  const int64_t outs = std::min(kOutsOfAnItem, std::max<int64_t>(8, w.out / (8 * threads) / 8 * 8));
  parallel_for(threads, w.out, outs, [&](int64_t begin, int64_t end) {
    float sums[kFloatRows * kOutsOfAnItem];
    for (int64_t t = 0; t < some; t += kFloatRows) {
      const int64_t count = std::min(kFloatRows, some - t);
      k.block_dot(w, x.rows(t, count), begin, end, sums, kOutsOfAnItem);
      for (int64_t r = 0; r < count; ++r) to.take(sums + r * kOutsOfAnItem, t + r, begin, end - begin);
    }
  });
}

// Codes expanded once for many rows, a panel at a time.
void panels(const Kernels& k, const Weight& w, const Arranged& x, int lanes, int64_t tokens, const Outputs& to, int threads) {
  for (int64_t t = 0; t < tokens; ++t) {
    int32_t* of_lanes = x.corrections + t * x.lanes;
    for (int64_t lane = 0; lane < x.lanes; lane += lanes) {
      for (int64_t i = 1; i < lanes; ++i) of_lanes[lane] += of_lanes[lane + i];
    }
  }
  const int64_t panel_count = (w.out + kPanel - 1) / kPanel;
  int64_t some = tokens;  // of an item: fewer where threads would else stand idle
  while (some > 96 && panel_count * ((tokens + some - 1) / some) < 6 * threads) some = (some + 1) / 2;
  const int64_t parts = (tokens + some - 1) / some;
  parallel_for(threads, panel_count * parts, 1, [&](int64_t begin, int64_t end) {
    thread_local Buffer panel_buffer, scale_buffer, sums_buffer;
    uint8_t* panel = panel_buffer.get<uint8_t>(kPanel * kColumnsOfAPanel);
    float* scales = scale_buffer.get<float>(kPanel * kColumnsOfAPanel / kLane / lanes);
    float* sums = sums_buffer.get<float>(kPanel * kRowsOfAPass);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t out = item / parts * kPanel, token = item % parts * some, count = std::min(some, tokens - token);
      for (int64_t column = 0; column < w.in; column += kColumnsOfAPanel) {
        const int64_t runs = (std::min(kColumnsOfAPanel, w.in - column) + kBlock - 1) / kBlock;
        k.expand(w, out, column / 2, runs * kBlock / 2, panel);
        k.expand_scales(w, out, column / kBlock, runs, lanes, scales);
        BlockRows rows = x.rows(token, count);
        rows.limbs.data += column;
        rows.corrections += column / kLane;
        rows.scales += column / kLane;
        k.block_product(panel, scales, runs, lanes, rows, sums, column > 0);
      }
      for (int64_t t = 0; t < count; ++t) to.take(sums + t * kPanel, token + t, out, std::min(kPanel, w.out - out));
    }
  });
}

}  // namespace

void block_linear(const Kernels& k, const Weight& w, const BlockInput& call, const float* bias, float* y, int threads) {
  thread_local Buffer limb_buffer, correction_buffer, scale_buffer;
  if (call.tokens == 0 || w.out == 0) return;
  const BlockQuantizer q = quantizer_of(call, w.in);
  const float unit = w.unit * (q.standard_step * q.second);
  // rows an odd number of cache lines apart do not share the same few sets of the cache
  const int64_t padded = (w.in + kBlock - 1) / kBlock * kBlock, stride = padded + 64, lanes = padded / kLane;
  const auto* x = static_cast<const char*>(call.x);
  const int64_t row_bytes = w.in * (call.bfloat16 ? 2 : 4);
  for (int64_t first = 0; first < call.tokens; first += kRowsOfAPass) {
    const int64_t some = std::min(kRowsOfAPass, call.tokens - first);
    const Arranged rows{limb_buffer.get<int8_t>(some * stride), stride, correction_buffer.get<int32_t>(some * lanes),
                        scale_buffer.get<float>(some * lanes), lanes};
    parallel_for(threads, some, 1 + 8192 / stride, [&](int64_t begin, int64_t end) {
      thread_local Buffer buffer;
      float* transformed = call.hadamard ? buffer.get<float>(w.in) : nullptr;
      for (int64_t t = begin; t < end; ++t) {
        const void* row = x + (first + t) * row_bytes;
        if (call.hadamard) {
          hadamard(float_row(call.x, call.bfloat16, first + t, w.in, transformed), w.in, transformed);
          row = transformed;
        }
        quantize_row(k, w, q, row,
                     {rows.limbs + t * stride, stride, rows.corrections + t * lanes, rows.scales + t * lanes, lanes});
      }
    });
    const Outputs to{unit, bias, y + first * w.out, w.out};
    if (some <= kBlockRowsOfAStream || !k.block_product || w.in == 0) {
      stream(k, w, rows, some, to, threads);
    } else {
      panels(k, w, rows, std::min(w.block_size, q.block_size) / static_cast<int>(kLane), some, to, threads);
    }
  }
}

}  // namespace llm_fp4
