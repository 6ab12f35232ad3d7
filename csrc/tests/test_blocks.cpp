// Products of block formats against plain loops in double precision, and every set against the scalar one, or a plain loop in
// the order of many rows, bit for bit.
#include <cstring>
#include <vector>

#include "hadamard.h"
#include "tests/check.h"

namespace llm_fp4 {
namespace {

double e4m3(int code) {
  const int field = code >> 3 & 15, fraction = code & 7;
  return field ? std::ldexp(8.0 + fraction, field - 10) : std::ldexp(fraction, -9);
}

double stored_value(int code, bool e8m0) {
  if (code == 255) return NAN;
  return e8m0 ? std::ldexp(1.0, code - 127) : e4m3(code);
}

// the nearest value of E4M3 from 0 to 448, of two as near the one with the even code
float nearest_e4m3(float v) {
  if (std::isnan(v)) return v;
  int best = 0;
  for (int code = 1; code < 127; ++code) {
    const double now = std::fabs(e4m3(code) - std::min(v, 448.0f)), before = std::fabs(e4m3(best) - std::min(v, 448.0f));
    if (now < before || (now == before && code % 2 == 0)) best = code;
  }
  return static_cast<float>(e4m3(best));
}

float scale_of(float top, const Format& f, const BlockScales& blocks) {
  const float largest = static_cast<float>(f.max_level()) * f.standard_step();
  if (blocks.type == ScaleType::kE4m3) return nearest_e4m3(top / blocks.second / largest);
  if (top == 0.0f || std::isnan(top)) return top == 0.0f ? 1.0f : top;
  int exponent = 0;
  const float fraction = std::isinf(top) ? INFINITY : std::frexp(top, &exponent);
  if (fraction >= 1.0f - std::ldexp(1.0f, -f.mantissa_bits - 2)) exponent += 1;
  const int code = exponent - 1 - std::ilogb(largest) + 127;
  return std::ldexp(1.0f, std::min(std::max(code, 2), 254) - 127);
}

}  // namespace

void test_blocks(const Kernels& k) {
  const Format formats[] = {{1, 2, true}, {2, 1, true}, {3, 0, true}, {2, 3, true}};
  const Format input = formats[below(4)], f = formats[below(3)];
  const int sizes[] = {8, 16, 32, 64, 128};
  const int size = sizes[below(5)], input_size = sizes[below(5)];
  const bool e8m0 = below(2), input_e8m0 = below(2), bfloat16 = below(2), with_bias = below(2), wild = below(4) == 0;
  const int64_t tokens = below(10) ? below(10) : 20 + below(30), in = below(8) ? below(700) : 2000 + below(2000), out = below(150), row_bytes = (in + 1) / 2;
  const int64_t blocks = (in + size - 1) / size;
  const float second = e8m0 ? 1.0f : 0x1p-6f, input_second = input_e8m0 ? 1.0f : 0x1p-5f;
  std::vector<uint8_t> codes(out * row_bytes), scales(out * blocks);  // exactly as long as the kernels may read
  std::vector<float> x(tokens * in), bias(out), y(tokens * out), z(tokens * out), plain(tokens * out);
  std::vector<uint16_t> half(tokens * in);
  for (auto& c : codes) c = static_cast<uint8_t>(below(256));
  for (auto& s : scales) s = static_cast<uint8_t>(e8m0 ? 110 + below(30) : below(127));
  for (auto& b : bias) b = normal();
  if (wild && !scales.empty()) scales[below(static_cast<int>(scales.size()))] = e8m0 ? 255 : 127;
  for (size_t i = 0; i < x.size(); ++i) {
    x[i] = wild && below(100) == 0 ? any_float() : normal() * std::ldexp(1.0f, -(static_cast<int>(i) / 40 % 12));
    uint32_t bits;
    std::memcpy(&bits, &x[i], 4);
    half[i] = static_cast<uint16_t>(bits >> 16);
    if (bfloat16) bits &= 0xFFFF0000u, std::memcpy(&x[i], &bits, 4);
  }
  const Weight w = make_block_weight(codes.data(), out, in, f, {scales.data(), size, e8m0 ? ScaleType::kE8m0 : ScaleType::kE4m3, second});
  const BlockInput call{bfloat16 ? static_cast<const void*>(half.data()) : x.data(), bfloat16, tokens, input,
                        {nullptr, input_size, input_e8m0 ? ScaleType::kE8m0 : ScaleType::kE4m3, input_second}};
  const float* added = with_bias ? bias.data() : nullptr;
  const int threads = 1 + below(3);
  block_linear(k, w, call, added, y.data(), threads);
  block_linear(scalar_kernels(), w, call, added, plain.data(), threads);
  float_linear(k, w, call.x, bfloat16, tokens, nullptr, added, z.data(), threads);
  bool same = true, close = true, float_close = true;
  const bool by_blocks = tokens > kBlockRowsOfAStream && k.block_product;  // another order of sums than the scalar set's
  const int64_t least = std::min(size, input_size);
  for (int64_t t = 0; t < tokens; ++t) {
    std::vector<double> value(in);
    std::vector<int> level(in);
    std::vector<float> input_scale(in);
    for (int64_t begin = 0; begin < in; begin += input_size) {
      const int64_t end = std::min<int64_t>(begin + input_size, in);
      float top = 0.0f;
      for (int64_t j = begin; j < end; ++j) top = std::isnan(top) || std::isnan(x[t * in + j]) ? NAN : std::fmax(top, std::fabs(x[t * in + j]));
      const float step = scale_of(top, input, call.blocks) * input.standard_step() * input_second;
      const float inverse = step > 0.0f ? 1.0f / step : 0.0f;
      for (int64_t j = begin; j < end; ++j) {
        level[j] = level_of(x[t * in + j] * inverse, input);
        value[j] = double{step} * level[j];
        input_scale[j] = step;
      }
    }
    for (int64_t o = 0; o < out; ++o) {
      double sum = 0.0, magnitude = 0.0, float_sum = 0.0, float_magnitude = 0.0;
      float ordered = 0.0f;
      int exact = 0;
      for (int64_t j = 0; j < in; ++j) {
        const int of_weight = level_of_code(codes[o * row_bytes + j / 2] >> (4 * (j % 2)) & 15, f);
        const double scale = stored_value(scales[o * blocks + j / size] | (!e8m0 && scales[o * blocks + j / size] == 127 ? 128 : 0), e8m0) *
                             f.standard_step() * second;
        const double weight = of_weight * scale;
        exact += of_weight * level[j];
        if ((j + 1) % least == 0 || j + 1 == in) {
          ordered = std::fma(static_cast<float>(exact), static_cast<float>(scale) * input_scale[j], ordered);
          exact = 0;
        }
        sum += value[j] * weight;
        magnitude += std::fabs(value[j] * weight);
        float_sum += double{x[t * in + j]} * weight;
        float_magnitude += std::fabs(double{x[t * in + j]} * weight);
      }
      const double b = with_bias ? bias[o] : 0.0, unit = 0x1p-24;
      const float got = y[t * out + o], other = by_blocks ? (with_bias ? ordered + bias[o] : ordered) : plain[t * out + o];
      const float floating = z[t * out + o];
      same &= std::memcmp(&got, &other, 4) == 0 || (std::isnan(got) && std::isnan(other));
      const double bound = (static_cast<double>(in) / 16 + 12) * unit;  // sums of sixteen lanes, and of blocks
      if (std::isnan(sum)) {
        close &= std::isnan(got);
      } else {
        close &= std::fabs(got - (sum + b)) <= bound * magnitude + 2 * unit * std::fabs(b) + 1e-37;
      }
      if (std::isnan(float_sum) || std::isinf(float_magnitude)) {
        float_close &= !std::isfinite(floating);
      } else {
        float_close &= std::fabs(floating - (float_sum + b)) <= 4 * bound * float_magnitude + 2 * unit * std::fabs(b) + 1e-37;
      }
    }
  }
  expect(same, k.name, "block_linear in its order", tokens, in, out);
  expect(close, k.name, "block_linear", tokens, in, out);
  expect(float_close, k.name, "float_linear with block scales", tokens, in, out);

  std::vector<float> turned(x);
  for (int64_t t = 0; t < tokens; ++t) hadamard(turned.data() + t * in, in, turned.data() + t * in);
  BlockInput mixed = call, apart = call;
  mixed.hadamard = true;
  apart.x = turned.data(), apart.bfloat16 = false;
  block_linear(k, w, mixed, added, y.data(), threads);
  block_linear(k, w, apart, added, z.data(), threads);
  bool alike = true;
  for (size_t i = 0; i < y.size(); ++i) alike &= y[i] == z[i] || (std::isnan(y[i]) && std::isnan(z[i]));
  expect(alike, k.name, "block_linear of a transformed input", tokens, in, out);
}

void test_half_scales(const Kernels& k) {
  const Format formats[] = {{1, 2, true}, {2, 1, true}, {3, 0, true}};
  const Format f = formats[below(3)];
  const int size = 8 << below(5);
  const bool bfloat16 = below(2), wild = below(4) == 0;
  const int64_t tokens = below(4) ? below(10) : 20 + below(30), in = below(700), out = below(150), row_bytes = (in + 1) / 2;
  const int64_t blocks = (in + size - 1) / size;
  std::vector<uint8_t> codes(out * row_bytes), scales(2 * out * blocks);  // exactly as long as the kernels may read
  std::vector<float> x(tokens * in), y(tokens * out);
  std::vector<uint16_t> half(tokens * in);
  for (auto& c : codes) c = static_cast<uint8_t>(below(256));
  for (size_t i = 0; i < scales.size() / 2; ++i) {
    const int bits = below(wild ? 0x10000 : 0x7C00);  // of all finite positive ones, subnormals too; or infinity and NaN as well
    scales[2 * i] = static_cast<uint8_t>(bits & 255), scales[2 * i + 1] = static_cast<uint8_t>(bits >> 8);
  }
  for (size_t i = 0; i < x.size(); ++i) {
    uint32_t bits;
    x[i] = normal();
    std::memcpy(&bits, &x[i], 4);
    half[i] = static_cast<uint16_t>(bits >> 16);
    if (bfloat16) bits &= 0xFFFF0000u, std::memcpy(&x[i], &bits, 4);
  }
  const Weight w = make_block_weight(codes.data(), out, in, f, {scales.data(), size, ScaleType::kFloat16, 1.0f});
  float_linear(k, w, bfloat16 ? static_cast<const void*>(half.data()) : x.data(), bfloat16, tokens, nullptr, nullptr, y.data(), 1 + below(3));
  bool close = true;
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t o = 0; o < out; ++o) {
      double sum = 0.0, magnitude = 0.0;
      for (int64_t j = 0; j < in; ++j) {
        const int64_t at = 2 * (o * blocks + j / size);
        const int bits = scales[at] | scales[at + 1] << 8, field = bits >> 10 & 31, fraction = bits & 1023;
        double scale = field ? std::ldexp(1024.0 + fraction, field - 25) : std::ldexp(1.0 * fraction, -24);
        if (field == 31) scale = fraction ? NAN : INFINITY;
        const double part = double{x[t * in + j]} * level_of_code(codes[o * row_bytes + j / 2] >> (4 * (j % 2)) & 15, f) *
                            (bits & 0x8000 ? -scale : scale) * f.standard_step();
        sum += part, magnitude += std::fabs(part);
      }
      const float got = y[t * out + o];
      close &= std::isfinite(sum) ? std::fabs(got - sum) <= (in / 4 + 48) * 0x1p-24 * magnitude + 1e-37 : !std::isfinite(got);
    }
  }
  expect(close, k.name, "float_linear with float16 scales", tokens, in, out);
}

}  // namespace llm_fp4
