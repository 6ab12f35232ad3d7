#include "linear.h"

namespace llm_fp4 {

Weight make_weight(const uint8_t* codes, int64_t out, int64_t in, Format format) {
  Weight w{};
  w.codes = codes;
  w.out = out;
  w.in = in;
  w.bits = format.bits();
  w.row_bytes = w.bits == 4 ? (in + 1) / 2 : in;
  w.offset = static_cast<int>(format.max_level());
  for (int code = 0; w.bits == 4 && code < 16; ++code) {
    const int level = static_cast<int>(format.level(code & 7)) * (code & 8 ? -1 : 1);
    w.table[code] = static_cast<uint8_t>(level + w.offset);
    w.levels[code] = static_cast<float>(level);
  }
  return w;
}

}  // namespace llm_fp4
