#include <algorithm>

#include "bfloat16.h"
#include "buffer.h"
#include "linear.h"
#include "parallel.h"

namespace llm_fp4 {
namespace {

constexpr int64_t kOutsOfAnItem = 128;  // at most so many outputs a thread takes at a time
constexpr int64_t kRowsOfAPass = 256;
constexpr int64_t kRowsOfAStream = 16;     // up to so many rows, codes are expanded in registers
constexpr int64_t kPairRowsOfAStream = 5;  // the same where panels are multiplied on bfloat16 units
constexpr int64_t kColumnsOfAPanel = 512;  // 64 x 512 floats, 128 KiB, stay in the second-level cache
constexpr int64_t kCachedBytes = 4096;  // of codes, shared by the rows: 32 KiB of floats stay in the first-level cache

// Row `r` of `count` to its places in FloatRows.
void arrange_floats(const float* from, int64_t in, float* to, int64_t count, int64_t r) {
  for (int64_t block = 0; block < in; block += kBlock) {
    for (int64_t nibble = 0; nibble < 8; ++nibble) {
      float* lanes = to + ((block / kBlock * 8 + nibble) * count + r) * 16;
      const float* column = from + block + nibble;
      if (block + kBlock <= in) {
        for (int64_t lane = 0; lane < 16; ++lane) lanes[lane] = column[lane * 8];
      } else {
        for (int64_t lane = 0; lane < 16; ++lane) lanes[lane] = block + nibble + lane * 8 < in ? column[lane * 8] : 0.0f;
      }
    }
  }
}

struct Call {
  const void* x;
  bool bfloat16;
  const float *scale, *bias;
  float* y;
};

void finish(const Weight& w, const Call& call, const float* sums, int64_t token, int64_t out, int64_t outs) {
  float* y = call.y + token * w.out + out;
  for (int64_t i = 0; i < outs; ++i) {
    const float value = sums[i] * (call.scale ? call.scale[out + i] : w.unit);
    y[i] = call.bias ? value + call.bias[out + i] : value;
  }
}

// Codes expanded in registers, anew for every few rows.
void stream(const Kernels& k, const Weight& w, const Call& call, int64_t first, int64_t some, int threads) {
  thread_local Buffer buffer;
  const int64_t padded = (w.in + kBlock - 1) / kBlock * kBlock;
  float* arranged = buffer.get<float>(some * padded);
  parallel_for(threads, (some + kFloatRows - 1) / kFloatRows, 1 + 8192 / (padded + 1), [&](int64_t begin, int64_t end) {
    thread_local Buffer row_buffer;
    float* row = row_buffer.get<float>(w.in);
    for (int64_t t = begin * kFloatRows; t < std::min(end * kFloatRows, some); ++t) {
      const int64_t group = t / kFloatRows * kFloatRows, count = std::min(kFloatRows, some - group);
      arrange_floats(float_row(call.x, call.bfloat16, first + t, w.in, row), w.in, arranged + group * padded, count, t - group);
    }
  });
  const int64_t outs = std::min(kOutsOfAnItem, std::max<int64_t>(8, w.out / (8 * threads) / 8 * 8));
  parallel_for(threads, w.out, outs, [&](int64_t begin, int64_t end) {
    for (int64_t group = 0; group < some; group += kFloatRows) {
      const int64_t count = std::min(kFloatRows, some - group);
      const int64_t parts = 1 + w.row_bytes * count / kCachedBytes;
      const int64_t bytes_at_once = (w.row_bytes / parts + 64) / 64 * 64;
      float sums[kFloatRows * kOutsOfAnItem] = {};
      for (int64_t at = 0; at < w.row_bytes; at += bytes_at_once) {
        const int64_t bytes = std::min(bytes_at_once, w.row_bytes - at);
        k.float_dot(w, {arranged + group * padded, count}, begin, end, at, bytes, sums, kOutsOfAnItem, at > 0);
      }
      for (int64_t r = 0; r < count; ++r) finish(w, call, sums + r * kOutsOfAnItem, first + group + r, begin, end - begin);
    }
  });
}

// Codes expanded once for many rows, a panel at a time.
void panels(const Kernels& k, const Weight& w, const Call& call, int64_t first, int64_t some, bool pairs, int threads) {
  const auto* x = static_cast<const char*>(call.x) + first * w.in * (call.bfloat16 ? 2 : 4);
  int64_t size = call.bfloat16 ? 2 : 4;
  thread_local Buffer float_buffer;
  if (call.bfloat16 && !pairs) {
    float* floats = float_buffer.get<float>(some * w.in);
    for (int64_t t = 0; t < some; ++t) float_row(call.x, true, first + t, w.in, floats + t * w.in);
    x = reinterpret_cast<const char*>(floats);
    size = 4;
  }
  parallel_for(threads, (w.out + kPanel - 1) / kPanel, 1, [&](int64_t begin, int64_t end) {
    thread_local Buffer panel_buffer, sums_buffer;
    float* panel = panel_buffer.get<float>(kPanel * kColumnsOfAPanel);
    float* sums = sums_buffer.get<float>(kPanel * kRowsOfAPass);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t out = item * kPanel, outs = std::min(kPanel, w.out - out);
      for (int64_t column = 0; column < w.in; column += kColumnsOfAPanel) {
        const int64_t columns = std::min(kColumnsOfAPanel, w.in - column);
        k.expand_floats(w, out, column / 2, (columns + kBlock - 1) / kBlock * kBlock / 2, pairs, panel);
        const auto product = pairs ? k.bfloat16_product : k.float_product;
        product(panel, columns, x + column * size, w.in, some, sums, column > 0);
      }
      for (int64_t t = 0; t < some; ++t) finish(w, call, sums + t * kPanel, first + t, out, outs);
    }
  });
}

}  // namespace

void float_linear(const Kernels& k, const Weight& w, const void* x, bool bfloat16, int64_t tokens, const float* scale,
                  const float* bias, float* y, int threads) {
  const Call call{x, bfloat16, scale, bias, y};
  for (int64_t first = 0; first < tokens; first += kRowsOfAPass) {
    const int64_t some = std::min(kRowsOfAPass, tokens - first);
    const bool exact = !w.scales || w.scale_type != ScaleType::kFloat16;  // levels times scales, in bfloat16
    const bool pairs = bfloat16 && exact && k.bfloat16_product && w.in % 2 == 0;
    const bool few = some <= (pairs ? kPairRowsOfAStream : kRowsOfAStream) || !k.float_product || w.in == 0;
    if (few) {
      stream(k, w, call, first, some, threads);
    } else {
      panels(k, w, call, first, some, pairs, threads);
    }
  }
}

}  // namespace llm_fp4
