// 64 rows of codes to a panel: [dword][output][4 columns] of unsigned levels, the layout VNNI and AMX multiply.
#include "avx512/codes.h"
#include "avx512/avx512.h"
#include "avx512/transpose.h"

namespace llm_fp4 {
namespace avx512 {
void expand(const Weight& w, int64_t first_out, int64_t first_byte, int64_t bytes, uint8_t* panel) {
  const Codes codes(w);
  for (int64_t group = 0; group < kPanel / 16; ++group) {
    for (int64_t at = 0; at < bytes; at += 64) {
      const __mmask64 mask = first_bytes(w.row_bytes - first_byte - at);
      __m512i row[16];
      for (int64_t i = 0; i < 16; ++i) {
        const int64_t out = first_out + group * 16 + i;
        const uint8_t* from = w.codes + out * w.row_bytes + first_byte + at;
        row[i] = out < w.out ? _mm512_maskz_loadu_epi8(mask, from) : _mm512_setzero_si512();
        _mm_prefetch(reinterpret_cast<const char*>(from) + 512, _MM_HINT_T0);
      }
      transpose(row);
      uint8_t* to = panel + at * (w.bits == 4 ? 2 : 1) * kPanel + group * 64;
      for (int64_t i = 0; i < 16; ++i) {
        if (w.bits == 4) {
          __m512i even, odd;
          codes.nibbles(row[i], even, odd);
          _mm512_store_si512(to + i * kPanel * 4, even);
          _mm512_store_si512(to + (i + 16) * kPanel * 4, odd);
        } else {
          _mm512_store_si512(to + i * kPanel * 4, codes.bytes(row[i]));
        }
      }
    }
  }
}

}  // namespace avx512
}  // namespace llm_fp4
