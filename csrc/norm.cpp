#include "norm.h"

#include <cmath>

namespace llm_fp4 {
namespace {

constexpr int64_t kLanes = 16;  // of the sums, in this order in the reference too

template <typename Term>
double sum(int64_t n, Term term) {
  double lanes[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] += term(j + i);
  }
  for (int64_t i = 0; j + i < n; ++i) lanes[i] += term(j + i);
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

}  // namespace

void normalize(const Norm& norm, const float* x, int64_t in, float* y) {
  const double count = static_cast<double>(in);
  double mean = 0.0;
  if (norm.centered) mean = sum(in, [&](int64_t j) { return static_cast<double>(x[j]); }) / count;
  const double squares = sum(in, [&](int64_t j) {
    const double d = static_cast<double>(x[j]) - mean;
    return d * d;
  });
  const double inverse = 1.0 / std::sqrt(squares / count + norm.eps);
  for (int64_t j = 0; j < in; ++j) {
    const float value = static_cast<float>((static_cast<double>(x[j]) - mean) * inverse) * norm.weight[j];
    y[j] = norm.bias ? value + norm.bias[j] : value;
  }
}

}  // namespace llm_fp4
