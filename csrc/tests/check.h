// What the tests share: random numbers, the level of a number written without the kernels' tricks, and a count of failures.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <random>

#include "dispatch.h"
#include "linear.h"

namespace llm_fp4 {

inline std::mt19937 random_bits(20231025);
inline int failures = 0;

inline int below(int n) { return static_cast<int>(random_bits() % static_cast<unsigned>(n)); }

inline float normal() {
  static std::normal_distribution<float> distribution(0.0f, 4.0f);
  return distribution(random_bits);
}

inline float any_float() {
  switch (below(40)) {
    case 0: return NAN;
    case 1: return below(2) ? INFINITY : -INFINITY;
    case 2: return 0.0f;
    case 3: return 1e-40f;
    case 4: return static_cast<float>(below(64) - 32) * 0.5f;  // ties
    default: return normal();
  }
}

inline void expect(bool good, const char* set, const char* what, int64_t tokens, int64_t in, int64_t out) {
  if (good) return;
  ++failures;
  std::printf("%s: %s differs at %lld x %lld x %lld\n", set, what, (long long)tokens, (long long)in, (long long)out);
}

// Eq. 8-9 of arXiv:2310.16836
inline int level_of(float x, const Format& f) {
  const float top = static_cast<float>(f.max_level()), low = f.is_signed ? -top : 0.0f;
  if (std::isnan(x)) return 0;
  x = x < low ? low : x > top ? top : x;
  int exponent = 0;
  std::frexp(x, &exponent);
  const float spacing = std::ldexp(1.0f, x == 0.0f ? 0 : std::max(exponent - 1 - f.mantissa_bits, 0));
  return static_cast<int>(std::nearbyint(x / spacing) * spacing);
}

inline int level_of_code(int code, const Format& f) {
  const int sign = code >> (f.bits() - 1) & 1;
  const int magnitude = static_cast<int>(f.level(code & ((1 << (f.bits() - 1)) - 1)));
  return sign ? -magnitude : magnitude;
}

void test_blocks(const Kernels&);
void test_half_scales(const Kernels&);
void test_decoder(const Kernels&);
// norms and Hadamard transforms, which no instruction set has for itself
void test_rows();

}  // namespace llm_fp4
