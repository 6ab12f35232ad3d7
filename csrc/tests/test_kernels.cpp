// Every set of kernels this machine runs against plain loops: random shapes, formats, shifts, limbs and thread counts.
// Built on its own so that it also runs under AddressSanitizer and UndefinedBehaviorSanitizer.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "hadamard.h"
#include "tests/check.h"

using namespace llm_fp4;

namespace {

void test_quantize(const Kernels& k) {
  const Format formats[] = {{1, 2, true}, {2, 1, true}, {3, 0, true}, {1, 6, true}, {2, 2, false}, {2, 3, true}};
  const Format f = formats[below(6)];
  int most = 0;
  while (most < 7 && f.max_level() << (most + 1) <= 16383) ++most;
  const int max_shift = below(most + 1);
  const int64_t tokens = below(5), in = below(300);
  const bool wide = f.max_level() << max_shift > 127, per_token = below(2), bfloat16 = below(2), smooth = below(2), mixed = below(2);
  std::vector<float> x(tokens * in), factor(in), step(tokens + 1);
  std::vector<uint16_t> half(tokens * in);
  std::vector<uint8_t> shift(in);
  for (size_t i = 0; i < x.size(); ++i) {
    x[i] = any_float();
    uint32_t bits;
    std::memcpy(&bits, &x[i], 4);
    half[i] = static_cast<uint16_t>(bits >> 16);
    if (bfloat16) bits &= 0xFFFF0000u, std::memcpy(&x[i], &bits, 4);
  }
  for (auto& s : shift) s = static_cast<uint8_t>(below(max_shift + 1));
  for (auto& s : factor) s = 0.5f + static_cast<float>(below(100)) * 0.03f;
  const float scale = 0.1f + static_cast<float>(below(100)) * 0.01f;
  std::vector<int8_t> narrow(wide ? 0 : tokens * in);
  std::vector<int16_t> broad(wide ? tokens * in : 0);
  void* levels = wide ? static_cast<void*>(broad.data()) : narrow.data();
  const void* input = bfloat16 ? static_cast<const void*>(half.data()) : x.data();
  const float* divisor = smooth ? factor.data() : nullptr;
  quantize_input(k, {input, bfloat16, tokens, in, &scale, shift.data(), divisor, f, max_shift, per_token, levels, step.data(), mixed},
                 1 + below(3));
  for (int64_t t = 0; mixed && t < tokens; ++t) hadamard(x.data() + t * in, in, x.data() + t * in);
  bool good = true;
  for (int64_t t = 0; t < tokens; ++t) {
    float unit = scale;
    if (per_token) {
      float top = 0.0f;
      for (int64_t j = 0; j < in; ++j) {
        const float value = std::fabs(x[t * in + j]) * ((smooth ? 1.0f * (1.0f / factor[j]) : 1.0f) * std::ldexp(1.0f, shift[j]));
        top = std::isnan(value) || std::isnan(top) ? NAN : std::fmax(top, value);
      }
      unit = top == 0.0f ? 1.0f : top * (scale / static_cast<float>(f.max_level()));
      if (unit < 0x1p-126f) unit = 0x1p-126f;
    }
    bool numbers = true;
    for (int64_t j = 0; j < in; ++j) {
      float multiplier = 1.0f / unit;
      if (smooth) multiplier = multiplier * (1.0f / factor[j]);
      multiplier = multiplier * std::ldexp(1.0f, shift[j]);
      numbers &= !std::isnan(x[t * in + j] * multiplier);
      const int want = level_of(x[t * in + j] * multiplier, f) * (1 << (max_shift - shift[j]));
      good &= want == (wide ? broad[t * in + j] : narrow[t * in + j]);
    }
    const float stored = step[t], wanted = numbers ? unit * std::ldexp(1.0f, -max_shift) : NAN;
    good &= stored == wanted || (std::isnan(stored) && std::isnan(wanted));
  }
  expect(good, k.name, "quantize_input", tokens, in, 0);
}

void test_linear(const Kernels& k) {
  const Format formats[] = {{1, 2, true}, {2, 1, true}, {3, 0, true}, {1, 6, true}};
  const Format f = formats[below(4)];
  const int64_t tokens = below(8) ? below(30) : 90 + below(70), in = below(6) ? below(700) : 2000 + below(3000), out = below(200);
  const int bits = f.bits();
  const bool wide = below(2), per_token = below(2), with_bias = below(2);
  const int64_t row_bytes = bits == 4 ? (in + 1) / 2 : in;
  std::vector<uint8_t> codes(out * row_bytes);  // exactly as long as the kernels may read
  std::vector<int8_t> narrow(tokens * in);
  std::vector<int16_t> broad(tokens * in);
  std::vector<float> step(tokens + 1), scale(out), bias(out), y(tokens * out), x(tokens * in), z(tokens * out);
  for (auto& c : codes) c = static_cast<uint8_t>(below(256));
  if (bits == 4 && in % 2) {
    for (int64_t o = 0; o < out; ++o) codes[(o + 1) * row_bytes - 1] &= 15;
  }
  for (auto& v : narrow) v = static_cast<int8_t>(below(255) - 127);
  for (auto& v : broad) v = static_cast<int16_t>(below(2 * 16383 + 1) - 16383);
  for (auto* list : {&step, &scale, &bias}) {
    for (auto& v : *list) v = static_cast<float>(below(1000) + 1) * 0.01f;
  }
  const bool bfloat16 = below(2);
  std::vector<uint16_t> half(tokens * in);  // of int8 levels, which bfloat16 holds exactly
  for (size_t i = 0; i < x.size(); ++i) {
    x[i] = static_cast<float>(narrow[i]);
    uint32_t word;
    std::memcpy(&word, &x[i], 4);
    half[i] = static_cast<uint16_t>(word >> 16);
  }
  const void* float_x = bfloat16 ? static_cast<const void*>(half.data()) : x.data();
  const void* levels = wide ? static_cast<const void*>(broad.data()) : narrow.data();
  const Weight w = make_weight(codes.data(), out, in, f);
  const int threads = 1 + below(3);
  const float* added = with_bias ? bias.data() : nullptr;
  int_linear(k, w, {levels, wide, tokens, step.data(), per_token, scale.data(), added, y.data()}, threads);
  if (bits == 4) float_linear(k, w, float_x, bfloat16, tokens, scale.data(), nullptr, z.data(), threads);
  bool good = true, close = true;
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t o = 0; o < out; ++o) {
      int64_t sum = 0, narrow_sum = 0;
      for (int64_t j = 0; j < in; ++j) {
        const int code = bits == 4 ? codes[o * row_bytes + j / 2] >> (4 * (j % 2)) & 15 : codes[o * row_bytes + j];
        const int magnitude = static_cast<int>(f.level(code & ((1 << (bits - 1)) - 1)));
        const int level = code >> (bits - 1) ? -magnitude : magnitude;
        sum += level * (wide ? broad[t * in + j] : narrow[t * in + j]);
        narrow_sum += level * narrow[t * in + j];
      }
      float want = static_cast<float>(sum) * (step[per_token ? t : 0] * scale[o]);
      if (with_bias) want = want + bias[o];
      good &= want == y[t * out + o];
      // integers below 2^24: every order of float32 sums is exact
      if (bits == 4) close &= std::llabs(narrow_sum) >= 1 << 22 || static_cast<float>(narrow_sum) * scale[o] == z[t * out + o];
    }
  }
  expect(good, k.name, "int_linear", tokens, in, out);
  expect(close, k.name, "float_linear", tokens, in, out);
}

}  // namespace

int main(int count, char** arguments) {
  const int rounds = count > 1 ? std::atoi(arguments[1]) : 200;
  for (int round = 0; round < rounds; ++round) test_rows();
  for (int i = 0; const Kernels* k = available(i); ++i) {
    for (int round = 0; round < rounds; ++round) {
      test_quantize(*k);
      test_linear(*k);
      test_blocks(*k);
      test_half_scales(*k);
      test_decoder(*k);
    }
    std::printf("%s: %d rounds\n", k->name, rounds);
  }
  if (failures) std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}
