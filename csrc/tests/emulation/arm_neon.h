// The NEON instructions that csrc/neon uses, in plain C++, so that its arithmetic is tested on other machines.
#pragma once

#include <cstdint>
#include <cstring>

template <typename T, int kCount>
struct Vector {
  T v[kCount];
};
using int8x16_t = Vector<int8_t, 16>;
using uint8x16_t = Vector<uint8_t, 16>;
using int32x4_t = Vector<int32_t, 4>;

template <typename V, typename F>
V each(F f) {
  V out;
  for (unsigned i = 0; i < sizeof(out.v) / sizeof(out.v[0]); ++i) out.v[i] = static_cast<decltype(out.v[0] + 0)>(f(i));
  return out;
}

template <typename To, typename From>
To reinterpreted(From x) {
  To out;
  std::memcpy(&out, &x, sizeof(out));
  return out;
}

inline int8x16_t vld1q_s8(const int8_t* p) { return reinterpreted<int8x16_t>(*reinterpret_cast<const Vector<int8_t, 16>*>(p)); }
inline uint8x16_t vld1q_u8(const uint8_t* p) { return *reinterpret_cast<const uint8x16_t*>(p); }
inline int32x4_t vld1q_s32(const int32_t* p) { return *reinterpret_cast<const int32x4_t*>(p); }
inline void vst1q_u8(uint8_t* p, uint8x16_t x) { std::memcpy(p, &x, 16); }
inline void vst1q_s32(int32_t* p, int32x4_t x) { std::memcpy(p, &x, 16); }
inline uint8x16_t vdupq_n_u8(uint8_t x) { return each<uint8x16_t>([&](int) { return x; }); }
inline int8x16_t vdupq_n_s8(int8_t x) { return each<int8x16_t>([&](int) { return x; }); }
inline int32x4_t vdupq_n_s32(int32_t x) { return each<int32x4_t>([&](int) { return x; }); }
inline uint8x16_t vandq_u8(uint8x16_t a, uint8x16_t b) { return each<uint8x16_t>([&](int i) { return a.v[i] & b.v[i]; }); }
inline uint8x16_t vaddq_u8(uint8x16_t a, uint8x16_t b) { return each<uint8x16_t>([&](int i) { return static_cast<uint8_t>(a.v[i] + b.v[i]); }); }
inline uint8x16_t vsubq_u8(uint8x16_t a, uint8x16_t b) { return each<uint8x16_t>([&](int i) { return static_cast<uint8_t>(a.v[i] - b.v[i]); }); }
inline uint8x16_t vcgeq_u8(uint8x16_t a, uint8x16_t b) { return each<uint8x16_t>([&](int i) { return a.v[i] >= b.v[i] ? 255 : 0; }); }
inline uint8x16_t vbslq_u8(uint8x16_t m, uint8x16_t a, uint8x16_t b) {
  return each<uint8x16_t>([&](int i) { return static_cast<uint8_t>((a.v[i] & m.v[i]) | (b.v[i] & ~m.v[i])); });
}
inline uint8x16_t vshrq_n_u8(uint8x16_t a, int n) { return each<uint8x16_t>([&](int i) { return a.v[i] >> n; }); }
inline int8x16_t vshrq_n_s8(int8x16_t a, int n) { return each<int8x16_t>([&](int i) { return a.v[i] >> n; }); }
inline int8x16_t veorq_s8(int8x16_t a, int8x16_t b) { return each<int8x16_t>([&](int i) { return a.v[i] ^ b.v[i]; }); }
inline int8x16_t vsubq_s8(int8x16_t a, int8x16_t b) { return each<int8x16_t>([&](int i) { return static_cast<int8_t>(a.v[i] - b.v[i]); }); }
inline int8x16_t vqtbl1q_s8(int8x16_t t, uint8x16_t i) { return each<int8x16_t>([&](int j) { return i.v[j] < 16 ? t.v[i.v[j]] : 0; }); }
inline uint8x16_t vqtbl1q_u8(uint8x16_t t, uint8x16_t i) { return each<uint8x16_t>([&](int j) { return i.v[j] < 16 ? t.v[i.v[j]] : 0; }); }
inline int8x16_t vreinterpretq_s8_u8(uint8x16_t a) { return reinterpreted<int8x16_t>(a); }
inline int8x16_t vreinterpretq_s8_s32(int32x4_t a) { return reinterpreted<int8x16_t>(a); }
inline int32_t wrapped(int32_t sum, int32_t product) { return static_cast<int32_t>(static_cast<uint32_t>(sum) + static_cast<uint32_t>(product)); }
inline int32_t vaddvq_s32(int32x4_t a) { return wrapped(wrapped(a.v[0], a.v[1]), wrapped(a.v[2], a.v[3])); }

template <typename A>
int32x4_t four_products(int32x4_t sum, A a, int8x16_t b) {
  for (int i = 0; i < 16; ++i) sum.v[i / 4] = wrapped(sum.v[i / 4], a.v[i] * b.v[i]);
  return sum;
}
inline int32x4_t vdotq_s32(int32x4_t sum, int8x16_t a, int8x16_t b) { return four_products(sum, a, b); }
inline int32x4_t vusdotq_s32(int32x4_t sum, uint8x16_t a, int8x16_t b) { return four_products(sum, a, b); }
