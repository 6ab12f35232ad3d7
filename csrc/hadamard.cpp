#include "hadamard.h"

#include <cmath>
#include <cstring>

namespace llm_fp4 {

void hadamard(const float* x, int64_t in, float* y) {
  if (in == 0) return;  // null pointers are no rows to move
  const int64_t size = in & -in;
  const float unit = static_cast<float>(1.0 / std::sqrt(static_cast<double>(size)));
  std::memmove(y, x, static_cast<size_t>(in) * sizeof(float));
  for (int64_t half = 1; half < size; half *= 2) {  // stage by stage as in the reference, so that sums round alike
    for (int64_t pair = 0; pair < in; pair += 2 * half) {
      float *__restrict low = y + pair, *__restrict high = y + pair + half;
      for (int64_t j = 0; j < half; ++j) {
        const float a = low[j], b = high[j];
        low[j] = a + b;
        high[j] = a - b;
      }
    }
  }
  for (int64_t j = 0; j < in; ++j) y[j] = y[j] * unit;
}

}  // namespace llm_fp4
