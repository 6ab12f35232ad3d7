#include <algorithm>
#include <cstring>

#include "buffer.h"
#include "linear.h"
#include "parallel.h"

namespace llm_fp4 {

void float_linear(const Kernels& k, const Weight& w, const float* x, int64_t tokens, const float* scale, const float* bias, float* y,
                  int threads) {
  thread_local Buffer buffer;
  const int64_t stride = (w.in + kBlock - 1) / kBlock * kBlock + 16;
  float* rows = buffer.get<float>(std::min(tokens, kFewRows) * stride);
  for (int64_t first = 0; first < tokens; first += kFewRows) {
    const int64_t count = std::min(kFewRows, tokens - first);
    for (int64_t r = 0; r < count; ++r) {
      const float* from = x + (first + r) * w.in;
      float* to = rows + r * stride;
      int64_t block = 0;
      for (; block + kBlock <= w.in; block += kBlock) {
        for (int64_t nibble = 0; nibble < 8; ++nibble) {
          for (int64_t lane = 0; lane < 16; ++lane) to[block + nibble * 16 + lane] = from[block + lane * 8 + nibble];
        }
      }
      std::memset(to + block, 0, static_cast<size_t>(stride - block) * sizeof(float));
      for (int64_t j = block; j < w.in; ++j) to[block + j % 8 * 16 + (j - block) / 8] = from[j];
    }
    parallel_for(threads, w.out, 32, [&](int64_t begin, int64_t end) {
      k.float_dot(w, rows, stride, count, begin, end, scale, bias, y + first * w.out, w.out);
    });
  }
}

}  // namespace llm_fp4
