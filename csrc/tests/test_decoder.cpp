// The blocks of a decoder against plain loops in double precision, and every set against the scalar one, bit for bit.
#include <cstring>
#include <vector>

#include "decoder.h"
#include "hadamard.h"
#include "tests/check.h"

namespace llm_fp4 {
namespace {

using Doubles = std::vector<double>;

bool near(double got, double want, double scale) { return std::fabs(got - want) <= 1e-4 * scale + 1e-6; }

Doubles normalized(const Norm& norm, const Doubles& x) {
  const double n = static_cast<double>(x.size());
  double mean = 0.0, squares = 0.0;
  for (double v : x) mean += norm.centered ? v / n : 0.0;
  for (double v : x) squares += (v - mean) * (v - mean) / n;
  Doubles y(x.size());
  for (size_t j = 0; j < x.size(); ++j)
    y[j] = (x[j] - mean) / std::sqrt(squares + norm.eps) * norm.weight[j] + (norm.bias ? norm.bias[j] : 0.0f);
  return y;
}

// the transform by its definition: entry (i, j) of a run's matrix is -1 to the number of bits that i and j share
Doubles transformed(const Doubles& x) {
  const int64_t n = static_cast<int64_t>(x.size()), size = n & -n;
  Doubles y(x.size());
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < size; ++j)
      y[i] += x[i / size * size + j] * (__builtin_popcountll(static_cast<uint64_t>(i % size & j)) % 2 ? -1 : 1);
    y[i] /= std::sqrt(static_cast<double>(size));
  }
  return y;
}

// Weights of an input, random.
struct Layer {
  Site site{};
  Operand operands[3]{};
  std::vector<uint8_t> codes[3], block_scales[3], shift;
  std::vector<float> scale[3], bias[3];
  float step = 0.3f, second = 0x1p-7f;

  Layer(int64_t in, std::vector<int64_t> outs, bool quantized) {
    const Format formats[] = {{1, 2, true}, {2, 1, true}, {3, 0, true}};
    const bool blocks = quantized && below(2), e8m0 = below(2);
    const int block_size = 16 << below(2);
    for (size_t i = 0; i < outs.size(); ++i) {
      const Format f = formats[below(3)];
      codes[i].resize(outs[i] * ((in + 1) / 2));
      for (auto& c : codes[i]) c = static_cast<uint8_t>(below(256));
      for (int64_t o = 0; o < outs[i]; ++o) {
        scale[i].push_back((0.5f + static_cast<float>(below(100)) * 0.01f) / static_cast<float>(f.max_level() * in));
        bias[i].push_back(normal() * 0.1f);
      }
      block_scales[i].resize(outs[i] * ((in + block_size - 1) / block_size));
      for (auto& s : block_scales[i]) s = static_cast<uint8_t>(e8m0 ? 119 + below(4) : below(60));
      operands[i] = {codes[i].data(), scale[i].data(), below(2) ? bias[i].data() : nullptr, outs[i], f.exponent_bits, f.mantissa_bits,
                     blocks ? block_scales[i].data() : nullptr, block_size, e8m0 ? 1 : 0, e8m0 ? nullptr : &second};
    }
    const Format input = formats[below(3)];
    const int max_shift = below(4);
    for (int64_t j = 0; j < in; ++j) shift.push_back(static_cast<uint8_t>(below(max_shift + 1)));
    site = {in, quantized ? &step : nullptr, shift.data(), nullptr, input.exponent_bits, input.mantissa_bits, 1, max_shift, below(2),
            below(2), static_cast<int64_t>(outs.size()), operands, blocks ? block_size : 0, e8m0 ? 1 : 0};
    if (blocks && e8m0) step = 1.0f;  // nothing lies over powers of two
  }

  Doubles plain(Doubles x) const {
    if (site.hadamard) x = transformed(x);
    Doubles y;
    for (const Operand* w = site.operands; w < site.operands + site.count; ++w) {
      const Format f{static_cast<int>(w->exponent_bits), static_cast<int>(w->mantissa_bits), true};
      for (int64_t o = 0; o < w->out; ++o) {
        double sum = 0.0;
        for (int64_t j = 0; j < site.in; ++j)
          sum += level_of_code(w->codes[o * ((site.in + 1) / 2) + j / 2] >> (4 * (j % 2)) & 15, f) * x[j];
        y.push_back(sum * w->scale[o] + (w->bias ? w->bias[o] : 0.0f));
      }
    }
    return y;
  }
};

struct Model {
  int64_t heads, kv_heads, d, width, inner, capacity, rotary;
  std::vector<float> gains, keys, values;
  Layer qkv, output, gate_up, down;
  Block block{};

  explicit Model(bool quantized)
      : heads(2 * (1 + below(2))), kv_heads(heads / (1 + below(2))), d(2 * (1 + below(12))), width(1 + below(150)), inner(1 + below(200)),
        capacity(6), rotary(below(2) ? d : d / 2 / 2 * 2), qkv(width, {heads * d, kv_heads * d, kv_heads * d}, quantized),
        output(heads * d, {width}, quantized), gate_up(width, {inner, inner}, quantized), down(inner, {width}, quantized) {
    for (int64_t i = 0; i < 2 * width + 2 * d; ++i) gains.push_back(0.5f + static_cast<float>(below(100)) * 0.01f);
    keys.resize(kv_heads * capacity * d);
    values.resize(kv_heads * capacity * d);
    const bool head_norms = below(2);
    const float* of_heads = gains.data() + 2 * width;
    block = {{gains.data(), nullptr, 1e-5, 0}, {head_norms ? of_heads : nullptr, nullptr, 1e-5, 0},
             {head_norms ? of_heads + d : nullptr, nullptr, 1e-5, 0}, {gains.data() + width, nullptr, 1e-5, below(2)},
             qkv.site, output.site, gate_up.site, down.site, heads, kv_heads, d, 1.0 / std::sqrt(static_cast<double>(d)),
             keys.data(), values.data(), capacity};
  }

  Doubles heads_of(const Norm& norm, const Doubles& x, const float* cosine, const float* sine) const {
    Doubles y;
    for (size_t at = 0; at < x.size(); at += d) {
      Doubles head(x.begin() + at, x.begin() + at + d);
      if (norm.weight) head = normalized(norm, head);
      Doubles turned = head;
      for (int64_t j = 0; j < rotary; ++j) {
        const double other = j < rotary / 2 ? -head[j + rotary / 2] : head[j - rotary / 2];
        turned[j] = head[j] * cosine[j] + other * sine[j];
      }
      y.insert(y.end(), turned.begin(), turned.end());
    }
    return y;
  }

  // one token after those whose keys and values are in `past`, which grows
  Doubles plain(const Doubles& hidden, const float* cosine, const float* sine, std::vector<Doubles>& past_keys,
                std::vector<Doubles>& past_values) const {
    const Doubles three = qkv.plain(normalized(block.before_attention, hidden));
    const auto key_at = three.begin() + heads * d, value_at = key_at + kv_heads * d;
    const Doubles queries = heads_of(block.of_queries, Doubles(three.begin(), key_at), cosine, sine);
    past_keys.push_back(heads_of(block.of_keys, Doubles(key_at, value_at), cosine, sine));
    past_values.push_back(Doubles(value_at, three.end()));
    Doubles context(heads * d);
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t from = head / (heads / kv_heads) * d;
      double total = 0.0;
      for (size_t t = 0; t < past_keys.size(); ++t) {
        double score = 0.0;
        for (int64_t j = 0; j < d; ++j) score += queries[head * d + j] * past_keys[t][from + j];
        const double weight = std::exp(score * block.attention_scale);
        total += weight;
        for (int64_t j = 0; j < d; ++j) context[head * d + j] += weight * past_values[t][from + j];
      }
      for (int64_t j = 0; j < d; ++j) context[head * d + j] /= total;
    }
    Doubles out = hidden;
    const Doubles attended = output.plain(context);
    for (int64_t j = 0; j < width; ++j) out[j] += attended[j];
    const Doubles two = gate_up.plain(normalized(block.before_mlp, out));
    Doubles product(inner);
    for (int64_t j = 0; j < inner; ++j) product[j] = two[j] / (1.0 + std::exp(-two[j])) * two[inner + j];
    const Doubles added = down.plain(product);
    for (int64_t j = 0; j < width; ++j) out[j] += added[j];
    return out;
  }
};

}  // namespace

void test_decoder(const Kernels& k) {
  const bool quantized = below(2);
  Model model(quantized);
  std::vector<Doubles> past_keys, past_values;
  std::vector<float> other_keys(model.keys.size()), other_values(model.values.size());
  Block other = model.block;
  other.keys = other_keys.data();
  other.values = other_values.data();
  const int threads = 1 + below(3);
  bool good = true;
  for (int64_t position = 0; position < model.capacity; ++position) {
    std::vector<float> hidden, cosine, sine;
    for (int64_t j = 0; j < model.width; ++j) hidden.push_back(normal());
    for (int64_t j = 0; j < model.rotary; ++j) {
      const double angle = static_cast<double>(position) / (1.0 + static_cast<double>(j % (model.rotary / 2)));
      cosine.push_back(static_cast<float>(std::cos(angle)));
      sine.push_back(static_cast<float>(std::sin(angle)));
    }
    std::vector<float> same = hidden;
    const Doubles input(hidden.begin(), hidden.end());
    run_block(k, model.block, hidden.data(), cosine.data(), sine.data(), model.rotary, position, threads);
    if (quantized) {  // integers: no sum may differ
      run_block(scalar_kernels(), other, same.data(), cosine.data(), sine.data(), model.rotary, position, 1);
      good &= std::memcmp(hidden.data(), same.data(), hidden.size() * sizeof(float)) == 0;
    } else {
      const Doubles want = model.plain(input, cosine.data(), sine.data(), past_keys, past_values);
      for (int64_t j = 0; j < model.width; ++j) good &= near(hidden[j], want[j], 1.0 + std::fabs(want[j]));
    }
  }
  expect(good, k.name, quantized ? "run_block of quantized inputs" : "run_block", model.heads, model.width, model.inner);
}

void test_rows() {
  const int64_t in = 1 + below(400);
  std::vector<float> x(in), weight(in), bias(in), y(in), z(in);
  for (int64_t j = 0; j < in; ++j) x[j] = normal(), weight[j] = normal(), bias[j] = normal();
  const Norm norm{weight.data(), below(2) ? bias.data() : nullptr, 1e-5, below(2)};
  normalize(norm, x.data(), in, y.data());
  hadamard(x.data(), in, z.data());
  const Doubles input(x.begin(), x.end()), normal_row = normalized(norm, input), mixed = transformed(input);
  double squares = 0.0;
  for (double v : input) squares += v * v;
  bool good = true, mixed_good = true;
  for (int64_t j = 0; j < in; ++j) {
    good &= std::fabs(y[j] - normal_row[j]) <= 1e-6 * (std::fabs(normal_row[j]) + std::fabs(bias[j]) + 1e-3);
    mixed_good &= std::fabs(z[j] - mixed[j]) <= 1e-6 * std::sqrt(squares);
  }
  expect(good, "all", "normalize", 1, in, 0);
  expect(mixed_good, "all", "hadamard", 1, in, 0);
}

}  // namespace llm_fp4
