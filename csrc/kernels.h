// What one instruction set provides: a table of functions, all working on rows of the checkpoint's own layout.
//
// Integer products are of unsigned weights with signed inputs: a weight's level plus `offset` fits a byte, and
// offset times the sum of the input row is subtracted at the end. That needs a sum per token, none per weight.
#pragma once

#include <cstdint>

namespace llm_fp4 {

constexpr int64_t kBlock = 128;    // columns of one 64-byte run of 4-bit codes; arranged rows are padded to this
constexpr int64_t kPanel = 64;     // outputs of an expanded panel
constexpr int64_t kFewRows = 8;    // up to so many rows, `dot` expands codes in registers
constexpr int64_t kFloatRows = 4;  // `float_dot` and `block_dot` take up to so many
constexpr int64_t kLane = 8;       // columns that one of sixteen sums of a run holds: blocks are of whole lanes

// How an input becomes levels.
struct Quantizer {
  int64_t in;
  const uint8_t* shift;  // (in,) or null
  const float* smooth;   // (in,) or null
  int max_shift;
  int mantissa_bits;
  float low, top;  // the range of levels
  bool bfloat16;   // the input's type, else float32
  bool wide;       // the levels' type is int16, else int8
};

// How an input becomes levels under a scale for each block.
struct BlockQuantizer {
  int64_t in;
  int block_size;
  bool e8m0;            // the scales' type, else E4M3
  float second;         // over the scales
  float standard_step;  // of the format in the scales' unit
  float largest;        // its largest value in that unit
  int largest_exponent;
  int mantissa_bits;
  float top;  // the largest level
  bool bfloat16;
};

// How a block's scale is stored.
enum class ScaleType { kE4m3, kE8m0, kFloat16 };

// Packed rows of 4-bit codes (low nibble first) or 8-bit sign-magnitude codes.
struct Weight {
  const uint8_t* codes;
  int64_t out, in, row_bytes;
  int bits;
  int offset;         // what makes every level unsigned
  uint8_t table[16];  // level + offset of each 4-bit code
  float levels[16];   // level of each 4-bit code
  const uint8_t* scales;  // (out, blocks) of blocks of columns, one or two bytes each, or null
  int64_t blocks;         // of a row
  int block_size;         // 8, 16, 32, 64 or 128
  ScaleType scale_type;
  float unit;  // what a product of levels and block scales is multiplied with; 1 where there are none
};

// Limb rows in the order of the codes: for each 128 columns the 64 even ones, then the 64 odd ones (4-bit codes), or
// as they are (8-bit codes). Columns beyond `in` are 0. int16 levels are two limb rows: the high one, then the low one.
struct Rows {
  const int8_t* data;
  int64_t stride;
  int64_t count;
};

// Limb rows as above with, for each lane, what undoes the weights' offset, -offset * (sum of its columns), and the scale of
// its block. Lanes are of 8 columns, sixteen a run of 128; those beyond `in` hold 0.
struct BlockRows {
  Rows limbs;
  const int32_t* corrections;  // (count, lanes)
  const float* scales;         // (count, lanes)
  int64_t lanes;
};

// Float rows side by side: element 8 * lane + nibble of row r in block b stands at ((b * 8 + nibble) * count + r) * 16 + lane,
// blocks being of 128 columns, the last one filled with 0. Shifting dwords of codes by nibbles yields that order.
struct FloatRows {
  const float* data;
  int64_t count;
};

// Sums of products of limb rows and `outs` outputs, and what turns them into float32 outputs.
struct Finish {
  const int32_t* sums;  // (count, stride)
  int64_t stride;
  const int32_t* row_sums;  // (count,) sum of each limb row
  const float* step;        // (1 or tokens,)
  int64_t step_stride;      // 0 or 1
  const float* scale;       // (outs,)
  const float* bias;        // (outs,) or null
  int64_t tokens, outs;
  int limbs, offset;
  float* y;
  int64_t y_stride;
};

struct Kernels {
  const char* name;
  bool (*supported)();
  // largest |x| times its multiplier in a row; NaN if the row holds one
  float (*row_top)(const Quantizer&, const void* x);
  // levels of a row; returns whether it holds no NaN
  bool (*quantize_row)(const Quantizer&, float inverse_step, const void* x, void* levels);
  // levels (in,) to one or two limb rows with their sums
  void (*arrange)(const void* levels, bool wide, int64_t in, int bits, int8_t* rows, int64_t stride, int32_t* row_sums);
  // sums (count, stride) of outputs [first, last), at most kFewRows rows
  void (*dot)(const Weight&, const Rows&, int64_t first, int64_t last, int32_t* sums, int64_t stride);
  // kPanel rows of codes from `first_byte` on to [dword][output][4 columns] of unsigned levels; null: only `dot`
  void (*expand)(const Weight&, int64_t first_out, int64_t first_byte, int64_t bytes, uint8_t* panel);
  // sums (count, kPanel) of a panel's dwords with rows; added to what is there if `more`
  void (*product)(const uint8_t* panel, int64_t dwords, const Rows&, int32_t* sums, bool more);
  void (*finish)(const Finish&);
  // levels and block scales of a row; `inverses` is working memory as long as the scales
  void (*quantize_blocks)(const BlockQuantizer&, const void* x, int8_t* levels, float* scales, float* inverses);
  // sums (count, stride) of outputs [first, last), at most kFloatRows rows: exact within a lane, times both blocks' scales,
  // then in float32: run after run in sixteen lanes, which are folded in halves
  void (*block_dot)(const Weight&, const BlockRows&, int64_t first, int64_t last, float* sums, int64_t stride);
  // block scales of kPanel rows, for runs of 128 columns, to [block][output], blocks being of `lanes` lanes; null: only `block_dot`
  void (*expand_scales)(const Weight&, int64_t first_out, int64_t first_run, int64_t runs, int lanes, float* scales);
  // sums (count, kPanel) of a panel of `expand` and its scales with rows whose corrections at a block's first lane are the whole
  // block's: exact within a block, times both scales, then in float32 block after block; added to what is there if `more`
  void (*block_product)(const uint8_t* panel, const float* scales, int64_t runs, int lanes, const BlockRows&, float* sums, bool more);
  // float sums (count, stride) of outputs [first, last) over `bytes` bytes of codes from `first_byte`, both multiples of
  // 64 but at a row's end; with the weights' block scales where there are any
  void (*float_dot)(const Weight&, const FloatRows&, int64_t first, int64_t last, int64_t first_byte, int64_t bytes, float* sums,
                    int64_t stride, bool more);
  // kPanel rows of codes to [column][output] of float levels, or to [two columns][output] of pairs of bfloat16 ones, times the
  // weights' block scales where there are any; null: only `float_dot`
  void (*expand_floats)(const Weight&, int64_t first_out, int64_t first_byte, int64_t bytes, bool pairs, float* panel);
  // sums (rows, kPanel) of rows of float x with such a panel; added to what is there if `more`
  void (*float_product)(const float* panel, int64_t columns, const void* x, int64_t stride, int64_t rows, float* sums, bool more);
  // the same of bfloat16 x with a panel of pairs, `columns` and `stride` even; null where there is none
  void (*bfloat16_product)(const float* panel, int64_t columns, const void* x, int64_t stride, int64_t rows, float* sums, bool more);
  // softmax of scale * (keys q) applied to values; keys, values (tokens, d), scores (tokens,) of working memory
  void (*attend)(const float* q, const float* keys, const float* values, int64_t tokens, int64_t d, float scale, float* scores,
                 float* y);
  // SiLU of gate times up
  void (*gated)(const float* gate, const float* up, int64_t n, float* y);
};

const Kernels& scalar_kernels();
const Kernels& avx2_kernels();
const Kernels& avx_vnni_kernels();
const Kernels& avx512_kernels();
const Kernels& amx_kernels();
const Kernels& neon_kernels();
const Kernels& neon_i8mm_kernels();

}  // namespace llm_fp4
