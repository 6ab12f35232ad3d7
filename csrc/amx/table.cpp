// AMX for many rows, AVX-512 for the rest: Sapphire Rapids and later. Compiled, and its arithmetic checked against an
// emulation of the tile instructions, but never run on such a machine by the authors: hence the trial before it is offered.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "avx512/avx512.h"

namespace llm_fp4 {
namespace {

constexpr int kTile = 16;          // rows of a tile; its 64 bytes are 16 dwords
constexpr int kPanelBytes = 256;   // of a dword's 64 outputs in a panel, and of a row of sums

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 to 3 are sums (rows a, rows b) x (outputs 0-15, 16-31), 4 and 5 inputs of rows a and b, 6 and 7 weights.
void configure(int64_t a, int64_t b) {
  TileConfig config;
  const int64_t rows[8] = {a, a, b, b, a, b, kTile, kTile};
  for (int i = 0; i < 8; ++i) {
    config.rows[i] = static_cast<uint8_t>(rows[i]);
    config.row_bytes[i] = rows[i] ? 64 : 0;
  }
  _tile_loadconfig(&config);
}

// 32 outputs of one or two tiles of rows
template <bool kTwo>
void strip(const uint8_t* panel, int64_t dwords, const int8_t* rows, int64_t stride, int32_t* sums, bool more) {
  int32_t* sums_b = sums + kTile * kPanel;
  if (more) {
    _tile_loadd(0, sums, kPanelBytes);
    _tile_loadd(1, sums + 16, kPanelBytes);
    if (kTwo) {
      _tile_loadd(2, sums_b, kPanelBytes);
      _tile_loadd(3, sums_b + 16, kPanelBytes);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if (kTwo) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  for (int64_t d = 0; d < dwords; d += 16) {
    _tile_loadd(6, panel + d * kPanelBytes, kPanelBytes);
    _tile_loadd(7, panel + d * kPanelBytes + 64, kPanelBytes);
    _tile_loadd(4, rows + d * 4, stride);
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    if (kTwo) {
      _tile_loadd(5, rows + kTile * stride + d * 4, stride);
      _tile_dpbsud(2, 5, 6);
      _tile_dpbsud(3, 5, 7);
    }
  }
  _tile_stored(0, sums, kPanelBytes);
  _tile_stored(1, sums + 16, kPanelBytes);
  if (kTwo) {
    _tile_stored(2, sums_b, kPanelBytes);
    _tile_stored(3, sums_b + 16, kPanelBytes);
  }
}

void product(const uint8_t* panel, int64_t dwords, const Rows& x, int32_t* sums, bool more) {
  int64_t configured = 0;
  for (int64_t r = 0; r < x.count; r += 2 * kTile) {
    const int64_t count = x.count - r < 2 * kTile ? x.count - r : 2 * kTile;
    if (count != configured) configure(count < kTile ? count : kTile, count > kTile ? count - kTile : 0);
    configured = count;
    for (int64_t out = 0; out < kPanel; out += 32) {
      const auto some = count > kTile ? strip<true> : strip<false>;
      some(panel + out * 4, dwords, x.data + r * x.stride, x.stride, sums + r * kPanel + out, more);
    }
  }
  _tile_release();
}

// The system lends a process the tile registers on request only.
bool granted() {
#if defined(__linux__)
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

// Whether the product equals AVX-512's on this machine.
bool trial() {
  constexpr int64_t kDwords = 32, kRows = 41, kStride = kDwords * 4;
  alignas(64) static uint8_t panel[kDwords * kPanelBytes];
  alignas(64) static int8_t rows[kRows * kStride];
  alignas(64) static int32_t got[kRows * kPanel], want[kRows * kPanel];
  uint32_t state = 1;
  const auto next = [&state] { return (state = state * 1664525u + 1013904223u) >> 24; };
  for (uint8_t& v : panel) v = static_cast<uint8_t>(next());
  for (int8_t& v : rows) v = static_cast<int8_t>(next());
  for (int more = 0; more < 2; ++more) {
    product(panel, kDwords, {rows, kStride, kRows}, got, more);
    avx512::product(panel, kDwords, {rows, kStride, kRows}, want, more);
  }
  return std::memcmp(got, want, sizeof(got)) == 0;
}

bool supported() {
  static const bool works = avx512_kernels().supported() && __builtin_cpu_supports("amx-tile") &&
                            __builtin_cpu_supports("amx-int8") && granted() && trial();
  return works;
}

}  // namespace

const Kernels& amx_kernels() {
  static const Kernels kernels = [] {
    Kernels k = avx512_kernels();
    k.name = "amx";
    k.supported = supported;
    k.product = product;
    return k;
  }();
  return kernels;
}

}  // namespace llm_fp4
