// 64-bit ARM: SDOT (Cortex-A76, Neoverse N1, Apple M1 and later), USDOT beside it (Neoverse V1 and N2, Apple M2 and later).
// What is neither a product of few nor of many rows is the plain code, which NEON, always there, vectorises.
#if defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__linux__) && defined(__aarch64__)
#include <sys/auxv.h>
#endif

#include "neon/neon.h"

namespace llm_fp4 {
namespace {

#if defined(LLM_FP4_NEON_EMULATED)  // the tests, on another machine
bool has_dot() { return true; }
bool has_i8mm() { return true; }
#elif defined(__APPLE__)
bool has(const char* feature) {
  int value = 0;
  size_t size = sizeof(value);
  return sysctlbyname(feature, &value, &size, nullptr, 0) == 0 && value != 0;
}
bool has_dot() { return has("hw.optional.arm.FEAT_DotProd"); }
bool has_i8mm() { return has("hw.optional.arm.FEAT_I8MM"); }
#elif defined(__linux__)
constexpr unsigned long kDot = 1ul << 20, kI8mm = 1ul << 13;  // HWCAP_ASIMDDP, HWCAP2_I8MM
bool has_dot() { return (getauxval(AT_HWCAP) & kDot) != 0; }
bool has_i8mm() { return (getauxval(AT_HWCAP2) & kI8mm) != 0; }
#else
bool has_dot() { return false; }
bool has_i8mm() { return false; }
#endif

}  // namespace

const Kernels& neon_kernels() {
  static const Kernels kernels = [] {
    Kernels k = scalar_kernels();
    k.name = "neon";
    k.supported = has_dot;
    k.dot = neon::dot;
    return k;
  }();
  return kernels;
}

const Kernels& neon_i8mm_kernels() {
  static const Kernels kernels = [] {
    Kernels k = neon_kernels();
    k.name = "neon_i8mm";
    k.supported = [] { return has_dot() && has_i8mm(); };
    k.expand = neon::expand;
    k.product = neon::product;
    return k;
  }();
  return kernels;
}

}  // namespace llm_fp4
