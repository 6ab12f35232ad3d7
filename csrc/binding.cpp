// The C interface that Python loads; kernels/cpu.py declares it once more. Arguments are checked there.
#include <new>

#include "buffer.h"
#include "decoder.h"
#include "dispatch.h"
#include "hadamard.h"
#include "linear.h"
#include "parallel.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

using namespace llm_fp4;

// Raised with every change of an argument list. `transform`: whether rows pass the Hadamard transform before they are rounded.
EXPORT int llm_fp4_version() { return 6; }

EXPORT int llm_fp4_select(const char* name) { return select(name) ? 1 : 0; }

EXPORT const char* llm_fp4_selected() { return kernels().name; }

// The name of the index-th best set of kernels this machine runs; null beyond the last.
EXPORT const char* llm_fp4_available(int index) {
  const Kernels* k = available(index);
  return k ? k->name : nullptr;
}

// All return 0, or 1 if working memory ran out.
EXPORT int llm_fp4_quantize_input(const void* x, int bfloat16, int64_t tokens, int64_t in, const float* scale, const uint8_t* shift,
                                  const float* smooth, int exponent_bits, int mantissa_bits, int is_signed, int max_shift,
                                  int per_token, int transform, void* levels, float* step, int threads) try {
  const Format format{exponent_bits, mantissa_bits, is_signed != 0};
  quantize_input(kernels(), {x, bfloat16 != 0, tokens, in, scale, shift, smooth, format, max_shift, per_token != 0, levels, step, transform != 0},
                 threads);
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

EXPORT int llm_fp4_int_linear(const void* levels, int wide, int64_t tokens, int64_t in, const float* step, int64_t step_stride,
                              const uint8_t* codes, int64_t out, const float* scale, const float* bias, int exponent_bits,
                              int mantissa_bits, float* y, int threads) try {
  const Weight w = make_weight(codes, out, in, {exponent_bits, mantissa_bits, true});
  int_linear(kernels(), w, {levels, wide != 0, tokens, step, step_stride, scale, bias, y}, threads);
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

// quantize_input and int_linear in one call
EXPORT int llm_fp4_quantized_linear(const void* x, int bfloat16, int64_t tokens, int64_t in, const float* scale, const uint8_t* shift,
                                    const float* smooth, int exponent_bits, int mantissa_bits, int is_signed, int max_shift,
                                    int per_token, const uint8_t* codes, int64_t out, const float* weight_scale, const float* bias,
                                    int weight_exponent_bits, int weight_mantissa_bits, int transform, float* y, int threads) try {
  thread_local Buffer level_buffer, step_buffer;
  const Format format{exponent_bits, mantissa_bits, is_signed != 0};
  const bool wide = format.max_level() << max_shift > 127;
  void* levels = level_buffer.get<int8_t>(tokens * in * (wide ? 2 : 1));
  float* step = step_buffer.get<float>(tokens);
  quantize_input(kernels(), {x, bfloat16 != 0, tokens, in, scale, shift, smooth, format, max_shift, per_token != 0, levels, step, transform != 0},
                 threads);
  const Weight w = make_weight(codes, out, in, {weight_exponent_bits, weight_mantissa_bits, true});
  int_linear(kernels(), w, {levels, wide, tokens, step, 1, weight_scale, bias, y}, threads);
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

EXPORT int llm_fp4_float_linear(const void* x, int bfloat16, int64_t tokens, int64_t in, const uint8_t* codes, int64_t out, const float* scale,
                                const float* bias, int exponent_bits, int mantissa_bits, float* y, int threads) try {
  const Weight w = make_weight(codes, out, in, {exponent_bits, mantissa_bits, true});
  float_linear(kernels(), w, x, bfloat16 != 0, tokens, scale, bias, y, threads);
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

// weights with block scales, inputs as they are; `second` may be null
EXPORT int llm_fp4_block_float_linear(const void* x, int bfloat16, int64_t tokens, int64_t in, const uint8_t* codes, int64_t out,
                                      const uint8_t* scales, int block_size, int scale_type, const float* second, const float* bias,
                                      int exponent_bits, int mantissa_bits, float* y, int threads) try {
  const BlockScales blocks{scales, block_size, static_cast<ScaleType>(scale_type), second ? *second : 1.0f};
  const Weight w = make_block_weight(codes, out, in, {exponent_bits, mantissa_bits, true}, blocks);
  float_linear(kernels(), w, x, bfloat16 != 0, tokens, nullptr, bias, y, threads);
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

// the same of inputs that are quantized block by block as they arrive
EXPORT int llm_fp4_quantized_block_linear(const void* x, int bfloat16, int64_t tokens, int64_t in, int input_block_size, int input_scale_type,
                                          const float* input_second, int input_exponent_bits, int input_mantissa_bits,
                                          const uint8_t* codes, int64_t out, const uint8_t* scales, int block_size, int scale_type,
                                          const float* second, const float* bias, int exponent_bits, int mantissa_bits,
                                          int transform, float* y, int threads) try {
  const BlockScales blocks{scales, block_size, static_cast<ScaleType>(scale_type), second ? *second : 1.0f};
  const Weight w = make_block_weight(codes, out, in, {exponent_bits, mantissa_bits, true}, blocks);
  const Format input{input_exponent_bits, input_mantissa_bits, true};
  const BlockScales of_input{nullptr, input_block_size, static_cast<ScaleType>(input_scale_type), *input_second};
  block_linear(kernels(), w, {x, bfloat16 != 0, tokens, input, of_input, transform != 0}, bias, y, threads);
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

EXPORT int llm_fp4_norm_quantize_input(const void* x, int bfloat16, int64_t tokens, int64_t in, const float* weight, const float* bias,
                                       double eps, int centered, const float* scale, const uint8_t* shift, const float* smooth,
                                       int exponent_bits, int mantissa_bits, int is_signed, int max_shift, int per_token, void* levels,
                                       float* step, int threads) try {
  const Format format{exponent_bits, mantissa_bits, is_signed != 0};
  norm_quantize_input(kernels(), {weight, bias, eps, centered},
                      {x, bfloat16 != 0, tokens, in, scale, shift, smooth, format, max_shift, per_token != 0, levels, step}, threads);
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

EXPORT int llm_fp4_hadamard(const float* x, int64_t rows, int64_t in, float* y, int threads) {
  parallel_for(threads, rows, 1 + 16384 / (in + 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) hadamard(x + row * in, in, y + row * in);
  });
  return 0;
}

// `norm` may be null
EXPORT int llm_fp4_site_linear(const Norm* norm, const Site* site, const float* x, float* y, int threads) try {
  site_linear(kernels(), norm, *site, x, y, threads);
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

EXPORT int llm_fp4_run_blocks(const Block* blocks, int64_t count, float* hidden, const float* cosine, const float* sine, int64_t rotary,
                              int64_t position, int threads) try {
  for (int64_t i = 0; i < count; ++i) run_block(kernels(), blocks[i], hidden, cosine, sine, rotary, position, threads);
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}
