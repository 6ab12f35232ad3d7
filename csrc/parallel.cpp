#include "parallel.h"

#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace llm_fp4 {
namespace {

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// The entry of the OpenMP runtime in this process (libgomp, or libomp's equal), found rather than linked: a second
// runtime beside torch's would keep its own threads spinning on the same cores.
Parallel find_openmp() {
#if defined(__linux__)
  return reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#else
  return nullptr;
#endif
}

}  // namespace

void run_on_threads(int threads, void (*work)(void*), void* context) {
  static const Parallel openmp = find_openmp();
  if (openmp) return openmp(work, context, static_cast<unsigned>(threads), 0);
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(work, context);
  work(context);
  for (std::thread& other : others) other.join();
}

}  // namespace llm_fp4
