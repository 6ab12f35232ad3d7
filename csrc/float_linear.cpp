#include <algorithm>
#include <cstring>

#include "buffer.h"
#include "linear.h"
#include "parallel.h"

namespace llm_fp4 {
namespace {

constexpr int64_t kOutsOfAnItem = 128;  // at most so many outputs a thread takes at a time
constexpr int64_t kRowsOfAPass = 256;
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

}  // namespace

void float_linear(const Kernels& k, const Weight& w, const float* x, int64_t tokens, const float* scale, const float* bias, float* y,
                  int threads) {
  thread_local Buffer buffer;
  const int64_t padded = (w.in + kBlock - 1) / kBlock * kBlock;
  for (int64_t first = 0; first < tokens; first += kRowsOfAPass) {
    const int64_t some = std::min(kRowsOfAPass, tokens - first);
    float* arranged = buffer.get<float>(some * padded);
    parallel_for(threads, (some + kFloatRows - 1) / kFloatRows, 1 + 8192 / (padded + 1), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin * kFloatRows; t < std::min(end * kFloatRows, some); ++t) {
        const int64_t group = t / kFloatRows * kFloatRows, count = std::min(kFloatRows, some - group);
        arrange_floats(x + (first + t) * w.in, w.in, arranged + group * padded, count, t - group);
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
        for (int64_t r = 0; r < count; ++r) {
          float* out = y + (first + group + r) * w.out;
          for (int64_t i = begin; i < end; ++i) {
            const float value = sums[r * kOutsOfAnItem + i - begin] * scale[i];
            out[i] = bias ? value + bias[i] : value;
          }
        }
      }
    });
  }
}

}  // namespace llm_fp4
