#include <algorithm>

#include "buffer.h"
#include "linear.h"
#include "parallel.h"

namespace llm_fp4 {
namespace {

constexpr int64_t kOutsOfAnItem = 128;      // at most so many outputs a thread takes at a time where codes are streamed
constexpr int64_t kRowsOfAStream = 16;      // up to so many limb rows, codes are expanded in registers
constexpr int64_t kRowsOfAPass = 1024;      // limb rows arranged at a time
constexpr int64_t kRowsOfAnItem = 512;      // limb rows an expanded panel is multiplied with
constexpr int64_t kColumnsOfAPanel = 4096;  // 64 x 4096 levels, 256 KiB, stay in the second-level cache

struct Arranged {
  Rows rows;
  int32_t* sums;
};

// Limb rows of tokens [first, first + tokens), in this thread's buffers.
Arranged arrange_rows(const Kernels& k, const Weight& w, const LinearCall& call, int64_t first, int64_t tokens, int threads) {
  thread_local Buffer data, sums;
  const int64_t limbs = call.wide ? 2 : 1;
  // an odd number of cache lines: rows a power of two apart would share the same few sets of the cache
  const int64_t stride = (w.in + kBlock - 1) / kBlock * kBlock + 64;
  int8_t* rows = data.get<int8_t>(tokens * limbs * stride);
  int32_t* row_sums = sums.get<int32_t>(tokens * limbs);
  const auto* levels = static_cast<const char*>(call.levels) + first * w.in * limbs;  // a limb a byte
  parallel_for(threads, tokens, 1 + 32768 / stride, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      k.arrange(levels + t * w.in * limbs, call.wide, w.in, w.bits, rows + t * limbs * stride, stride, row_sums + t * limbs);
  });
  return {{rows, stride, tokens * limbs}, row_sums};
}

Finish finish_of(const Weight& w, const LinearCall& call, int64_t token, int64_t tokens, int64_t out, int64_t outs) {
  Finish f{};
  f.step = call.step + token * call.step_stride;
  f.step_stride = call.step_stride;
  f.scale = call.scale + out;
  f.bias = call.bias ? call.bias + out : nullptr;
  f.tokens = tokens;
  f.outs = outs;
  f.limbs = call.wide ? 2 : 1;
  f.offset = w.offset;
  f.y = call.y + token * w.out + out;
  f.y_stride = w.out;
  return f;
}

// Codes expanded in registers, anew for every few rows; the codes of an item stay in the cache meanwhile.
void stream(const Kernels& k, const Weight& w, const LinearCall& call, const Arranged& x, int64_t first, int64_t tokens,
            int threads) {
  const int64_t limbs = call.wide ? 2 : 1, step = kFewRows / limbs;
  const int64_t outs = std::min(kOutsOfAnItem, std::max<int64_t>(8, w.out / (8 * threads) / 8 * 8));
  parallel_for(threads, w.out, outs, [&](int64_t begin, int64_t end) {
    int32_t sums[kFewRows * kOutsOfAnItem];
    for (int64_t t = 0; t < tokens; t += step) {
      const int64_t some = std::min(step, tokens - t);
      const Rows rows{x.rows.data + t * limbs * x.rows.stride, x.rows.stride, some * limbs};
      k.dot(w, rows, begin, end, sums, kOutsOfAnItem);
      Finish f = finish_of(w, call, first + t, some, begin, end - begin);
      f.sums = sums;
      f.stride = kOutsOfAnItem;
      f.row_sums = x.sums + t * limbs;
      k.finish(f);
    }
  });
}

// Codes expanded once for many rows, a panel at a time.
void panels(const Kernels& k, const Weight& w, const LinearCall& call, const Arranged& x, int64_t first, int64_t tokens,
            int threads) {
  const int64_t limbs = call.wide ? 2 : 1, columns_of_a_byte = w.bits == 4 ? 2 : 1;
  const int64_t panel_count = (w.out + kPanel - 1) / kPanel;
  int64_t some = kRowsOfAnItem / limbs;  // tokens of an item: fewer where threads would else stand idle
  while (some > 96 && panel_count * ((tokens + some - 1) / some) < 6 * threads) some /= 2;
  const int64_t parts = (tokens + some - 1) / some;
  parallel_for(threads, panel_count * parts, 1, [&](int64_t begin, int64_t end) {
    thread_local Buffer panel_buffer, sums_buffer;
    uint8_t* panel = panel_buffer.get<uint8_t>(kPanel * kColumnsOfAPanel);
    int32_t* sums = sums_buffer.get<int32_t>(kPanel * kRowsOfAnItem);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t out = item / parts * kPanel, token = item % parts * some, count = std::min(some, tokens - token);
      const int8_t* rows = x.rows.data + token * limbs * x.rows.stride;
      const int64_t bytes_of_a_panel = kColumnsOfAPanel / columns_of_a_byte;
      for (int64_t at = 0; at < w.row_bytes; at += bytes_of_a_panel) {
        const int64_t bytes = std::min(bytes_of_a_panel, (w.row_bytes - at + 63) / 64 * 64), column = at * columns_of_a_byte;
        k.expand(w, out, at, bytes, panel);
        k.product(panel, bytes * columns_of_a_byte / 4, {rows + column, x.rows.stride, count * limbs}, sums, at > 0);
      }
      Finish f = finish_of(w, call, first + token, count, out, std::min(kPanel, w.out - out));
      f.sums = sums;
      f.stride = kPanel;
      f.row_sums = x.sums + token * limbs;
      k.finish(f);
    }
  });
}

}  // namespace

void int_linear(const Kernels& k, const Weight& w, const LinearCall& call, int threads) {
  if (call.tokens == 0 || w.out == 0) return;
  const int64_t limbs = call.wide ? 2 : 1;
  for (int64_t first = 0; first < call.tokens; first += kRowsOfAPass / limbs) {
    const int64_t tokens = std::min(kRowsOfAPass / limbs, call.tokens - first);
    const Arranged x = arrange_rows(k, w, call, first, tokens, threads);
    const bool in_registers = x.rows.count <= kRowsOfAStream || !k.product || w.in == 0;
    (in_registers ? stream : panels)(k, w, call, x, first, tokens, threads);
  }
}

}  // namespace llm_fp4
