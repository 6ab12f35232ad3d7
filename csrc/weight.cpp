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
  w.unit = 1.0f;
  return w;
}

Weight make_block_weight(const uint8_t* codes, int64_t out, int64_t in, Format format, const BlockScales& scales) {
  Weight w = make_weight(codes, out, in, format);
  w.scales = scales.data;
  w.block_size = scales.block_size;
  w.blocks = (in + scales.block_size - 1) / scales.block_size;
  w.scale_type = scales.type;
  w.unit = format.standard_step() * scales.second * (scales.type == ScaleType::kE4m3 ? 256.0f : 1.0f);  // E4M3 comes without 2^8
  return w;
}

}  // namespace llm_fp4
