// One query against cached keys and values, and the gate of an MLP. Included by each instruction set, whose flags
// vectorise it; sums run in sixteen lanes, so that all sets add in one order.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace llm_fp4 {
namespace {

constexpr int64_t kLanes = 16;

// e^x to two units in the last place, without branches; 0 below -87.
inline float exponential(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23
  x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
  const float n = (x * 1.44269504f + kRound) - kRound;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  float p = 1.9875691500e-4f;  // the minimax polynomial of Cephes' expf
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return p * power;
}

inline float sum_of(const float* lanes) {
  float sum = 0.0f;
  for (int64_t i = 0; i < kLanes; ++i) sum += lanes[i];
  return sum;
}

inline float inner_product(const float* __restrict a, const float* __restrict b, int64_t n) {
  float lanes[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] += a[j + i] * b[j + i];
  }
  for (; j < n; ++j) lanes[0] += a[j] * b[j];
  return sum_of(lanes);
}

// Softmax of scale * (keys q), applied to values: keys and values (tokens, d), q and y (d,), scores (tokens,) of working memory.
void attend(const float* __restrict q, const float* __restrict keys, const float* __restrict values, int64_t tokens, int64_t d,
            float scale, float* __restrict scores, float* __restrict y) {
  float top = -INFINITY;
  for (int64_t t = 0; t < tokens; ++t) {
    scores[t] = scale * inner_product(q, keys + t * d, d);
    top = scores[t] > top ? scores[t] : top;
  }
  for (int64_t t = 0; t < tokens; ++t) scores[t] = exponential(scores[t] - top);
  float lanes[kLanes] = {};
  int64_t t = 0;
  for (; t + kLanes <= tokens; t += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] += scores[t + i];
  }
  for (; t < tokens; ++t) lanes[0] += scores[t];
  const float inverse = 1.0f / sum_of(lanes);
  std::memset(y, 0, static_cast<size_t>(d) * sizeof(float));
  for (t = 0; t < tokens; ++t) {
    const float weight = scores[t];
    const float* __restrict row = values + t * d;
    for (int64_t j = 0; j < d; ++j) y[j] += weight * row[j];
  }
  for (int64_t j = 0; j < d; ++j) y[j] *= inverse;
}

// SiLU of `gate` times `up`.
void gated(const float* __restrict gate, const float* __restrict up, int64_t n, float* __restrict y) {
  for (int64_t j = 0; j < n; ++j) y[j] = gate[j] / (1.0f + exponential(-gate[j])) * up[j];
}

}  // namespace
}  // namespace llm_fp4
