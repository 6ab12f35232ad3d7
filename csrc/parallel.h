// Work shared among threads: those of the OpenMP runtime torch has loaded, or threads of our own where there is none.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace llm_fp4 {

// Calls work(context) on `threads` threads at once, this one among them, and waits.
void run_on_threads(int threads, void (*work)(void*), void* context);

// Calls body(begin, end) for chunks of [0, items); whoever is free takes the next chunk.
template <typename Body>
void parallel_for(int threads, int64_t items, int64_t chunk, const Body& body) {
  struct Shared {
    std::atomic<int64_t> next;
    int64_t items, chunk;
    const Body& body;
  } shared{{0}, items, chunk, body};
  const auto work = [](void* context) {
    Shared& s = *static_cast<Shared*>(context);
    for (int64_t begin; (begin = s.next.fetch_add(s.chunk, std::memory_order_relaxed)) < s.items;)
      s.body(begin, std::min(begin + s.chunk, s.items));
  };
  const int64_t chunks = (items + chunk - 1) / chunk;
  if (threads <= 1 || chunks <= 1) return work(&shared);
  run_on_threads(static_cast<int>(std::min<int64_t>(threads, chunks)), work, &shared);
}

}  // namespace llm_fp4
