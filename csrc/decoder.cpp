#include "decoder.h"

#include <cstring>

#include "buffer.h"
#include "hadamard.h"
#include "linear.h"
#include "parallel.h"

namespace llm_fp4 {
namespace {

constexpr int64_t kTokensOfAThread = 512;  // of attention: fewer are done sooner by one thread than shared

// The norm of each head, then the rotation of its first `rotary` elements: x cos + rotate_half(x) sin.
void prepare_heads(const Norm& norm, float* heads, int64_t count, int64_t d, const float* cosine, const float* sine, int64_t rotary) {
  const int64_t half = rotary / 2;
  for (float* x = heads; x < heads + count * d; x += d) {
    if (norm.weight) normalize(norm, x, d, x);
    for (int64_t j = 0; j < half; ++j) {
      const float low = x[j], high = x[j + half];
      x[j] = low * cosine[j] - high * sine[j];
      x[j + half] = high * cosine[j + half] + low * sine[j + half];
    }
  }
}

void attention(const Kernels& k, const Block& b, const float* queries, int64_t position, float* y, int threads) {
  const int64_t d = b.head_dim, group = b.heads / b.kv_heads, tokens = position + 1;
  parallel_for(tokens < kTokensOfAThread ? 1 : threads, b.heads, 1, [&](int64_t begin, int64_t end) {
    thread_local Buffer buffer;
    float* scores = buffer.get<float>(tokens);
    for (int64_t head = begin; head < end; ++head) {
      const int64_t at = head / group * b.capacity * d;
      k.attend(queries + head * d, b.keys + at, b.values + at, tokens, d, static_cast<float>(b.attention_scale), scores, y + head * d);
    }
  });
}

}  // namespace

void site_linear(const Kernels& k, const Norm* norm, const Site& site, const float* x, float* y, int threads) {
  thread_local Buffer buffer, normed;
  if (norm && norm->weight) {
    float* row = normed.get<float>(site.in);
    normalize(*norm, x, site.in, row);
    x = row;
  }
  if (site.hadamard) {
    float* row = normed.get<float>(site.in);  // where the normalized row may be already
    hadamard(x, site.in, row);
    x = row;
  }
  const Format format{static_cast<int>(site.exponent_bits), static_cast<int>(site.mantissa_bits), site.is_signed != 0};
  const bool wide = site.scale && format.max_level() << site.max_shift > 127;
  void* levels = buffer.get<int16_t>(site.in);
  float step = 0.0f;
  const bool blocks = site.block_size != 0;
  if (site.scale && !blocks) {
    quantize_input(k, {x, false, 1, site.in, site.scale, site.shift, site.smooth, format, static_cast<int>(site.max_shift),
                       site.per_token != 0, levels, &step}, 1);
  }
  for (const Operand* o = site.operands; o < site.operands + site.count; ++o) {
    const Format weight{static_cast<int>(o->exponent_bits), static_cast<int>(o->mantissa_bits), true};
    const BlockScales scales{o->block_scales, static_cast<int>(o->block_size), static_cast<ScaleType>(o->scale_type), o->second ? *o->second : 1.0f};
    const Weight w = o->block_scales ? make_block_weight(o->codes, o->out, site.in, weight, scales)
                                     : make_weight(o->codes, o->out, site.in, weight);
    const int some = w.row_bytes * w.out < 1 << 15 ? 1 : threads;
    if (blocks) {
      const BlockScales of_input{nullptr, static_cast<int>(site.block_size), static_cast<ScaleType>(site.scale_type), *site.scale};
      block_linear(k, w, {x, false, 1, format, of_input}, o->bias, y, some);
    } else if (site.scale) {
      int_linear(k, w, {levels, wide, 1, &step, 0, o->scale, o->bias, y}, some);
    } else {
      float_linear(k, w, x, false, 1, o->scale, o->bias, y, some);
    }
    y += o->out;
  }
}

void run_block(const Kernels& k, const Block& b, float* hidden, const float* cosine, const float* sine, int64_t rotary,
               int64_t position, int threads) {
  thread_local Buffer buffer;
  const int64_t width = b.qkv.in, d = b.head_dim, inner = b.down.in;
  const int64_t own = b.heads * d, shared = b.kv_heads * d;
  float* added = buffer.get<float>(width + 2 * own + 2 * shared + 3 * inner);
  float *queries = added + width, *keys = queries + own, *values = keys + shared;
  float *context = values + shared, *gate = context + own, *up = gate + inner, *product = up + inner;

  site_linear(k, &b.before_attention, b.qkv, hidden, queries, threads);
  prepare_heads(b.of_queries, queries, b.heads, d, cosine, sine, rotary);
  prepare_heads(b.of_keys, keys, b.kv_heads, d, cosine, sine, rotary);
  for (int64_t head = 0; head < b.kv_heads; ++head) {
    const int64_t at = (head * b.capacity + position) * d;
    std::memcpy(b.keys + at, keys + head * d, static_cast<size_t>(d) * sizeof(float));
    std::memcpy(b.values + at, values + head * d, static_cast<size_t>(d) * sizeof(float));
  }
  attention(k, b, queries, position, context, threads);
  site_linear(k, nullptr, b.output, context, added, threads);
  for (int64_t j = 0; j < width; ++j) hidden[j] += added[j];

  site_linear(k, &b.before_mlp, b.gate_up, hidden, gate, threads);
  k.gated(gate, up, inner, product);
  site_linear(k, nullptr, b.down, product, added, threads);
  for (int64_t j = 0; j < width; ++j) hidden[j] += added[j];
}

}  // namespace llm_fp4
