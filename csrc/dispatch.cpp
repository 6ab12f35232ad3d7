#include "dispatch.h"

#include <atomic>
#include <cstring>

namespace llm_fp4 {
namespace {

using Getter = const Kernels& (*)();

constexpr Getter kBestFirst[] = {
#if defined(LLM_FP4_AMX)
    amx_kernels,
#endif
#if defined(LLM_FP4_X86)
    avx512_kernels, avx_vnni_kernels, avx2_kernels,
#endif
#if defined(LLM_FP4_NEON)
    neon_i8mm_kernels, neon_kernels,
#endif
    scalar_kernels};

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels* available(int index) {
  for (Getter get : kBestFirst) {
    if (get().supported() && index-- == 0) return &get();
  }
  return nullptr;
}

const Kernels& kernels() {
  const Kernels* current = chosen.load(std::memory_order_acquire);
  return current ? *current : *available(0);
}

bool select(const char* name) {
  if (!name || !*name) {
    chosen.store(available(0), std::memory_order_release);
    return true;
  }
  for (int i = 0; const Kernels* k = available(i); ++i) {
    if (std::strcmp(k->name, name) == 0) {
      chosen.store(k, std::memory_order_release);
      return true;
    }
  }
  return false;
}

}  // namespace llm_fp4
