#include <cmath>

#include "bfloat16.h"
#include "buffer.h"
#include "hadamard.h"
#include "linear.h"
#include "parallel.h"

namespace llm_fp4 {
namespace {

constexpr float kSmallestStep = 0x1p-126f;  // as in kernels/ops.py
constexpr int64_t kElementsOfAThread = 16384;

float step_of(float top, float ratio_of_level) {
  if (top == 0.0f) return 1.0f;
  const float step = top * ratio_of_level;
  return step < kSmallestStep ? kSmallestStep : step;  // NaN stays
}

}  // namespace

void quantize_input(const Kernels& k, const QuantizeCall& call, int threads) {
  const float top = static_cast<float>(call.format.max_level());
  Quantizer q{call.in,
              call.shift,
              call.smooth,
              call.max_shift,
              call.format.mantissa_bits,
              call.format.is_signed ? -top : 0.0f,
              top,
              call.bfloat16 && !call.hadamard,
              call.format.max_level() << call.max_shift > 127};
  const float unit = std::ldexp(1.0f, -call.max_shift);
  const float ratio_of_level = call.scale[0] / top;
  const auto* x = static_cast<const char*>(call.x);
  auto* levels = static_cast<char*>(call.levels);
  const int64_t x_bytes = call.in * (call.bfloat16 ? 2 : 4), level_bytes = call.in * (q.wide ? 2 : 1);
  const int64_t chunk = 1 + kElementsOfAThread / (call.in + 1);
  parallel_for(threads, call.tokens, chunk, [&](int64_t begin, int64_t end) {
    thread_local Buffer buffer;
    float* transformed = call.hadamard ? buffer.get<float>(call.in) : nullptr;
    for (int64_t t = begin; t < end; ++t) {
      const void* row = x + t * x_bytes;
      if (call.hadamard) {
        hadamard(float_row(call.x, call.bfloat16, t, call.in, transformed), call.in, transformed);
        row = transformed;
      }
      float step = call.scale[0];
      if (call.per_token) step = step_of(k.row_top(q, row), ratio_of_level);
      const bool numbers = k.quantize_row(q, 1.0f / step, row, levels + t * level_bytes);
      call.step[t] = numbers ? step * unit : NAN;  // levels have no NaN: the row's step carries it to every output
    }
  });
}

void norm_quantize_input(const Kernels& k, const Norm& norm, const QuantizeCall& call, int threads) {
  const bool wide = call.format.max_level() << call.max_shift > 127;
  const int64_t level_bytes = call.in * (wide ? 2 : 1);
  parallel_for(threads, call.tokens, 1 + kElementsOfAThread / (call.in + 1), [&](int64_t begin, int64_t end) {
    thread_local Buffer buffer;
    float* row = buffer.get<float>(call.in);
    for (int64_t t = begin; t < end; ++t) {
      normalize(norm, float_row(call.x, call.bfloat16, t, call.in, row), call.in, row);
      QuantizeCall one = call;
      one.x = row;
      one.bfloat16 = false;
      one.tokens = 1;
      one.levels = static_cast<char*>(call.levels) + t * level_bytes;
      one.step = call.step + t;
      quantize_input(k, one, 1);
    }
  });
}

}  // namespace llm_fp4
