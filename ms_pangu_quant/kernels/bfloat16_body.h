// Packing into pairs of bfloat16 and tiles of them, for CPUs with AVX512-BF16; included by bfloat16.cc.

// Two inputs of a row or column in 32 bits, the first in the low half; rounded to nearest even, denormals are zero.
PANGU_INLINE __m512i pairs(__m512 first, __m512 second) {
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(first));
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(second));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

PANGU_INLINE __mmask16 lanes(int64_t left) { return left >= 16 ? 0xFFFF : left <= 0 ? 0 : (1u << left) - 1; }

// n of WIDTH rows or columns, source[k * step + i], become panels [pairs][width] each `apart` behind the one before.
template <int64_t WIDTH>
void pack_along(const float* source, int64_t step, int64_t inputs, int64_t n, int64_t width, int64_t apart, uint32_t* out) {
  alignas(64) uint32_t whole[WIDTH];
  for (int64_t k = 0; k < inputs; k += 2, source += 2 * step, out += width) {
    for (int64_t i = 0; i < WIDTH; i += 16) {
      const __m512 second = k + 1 < inputs ? _mm512_maskz_loadu_ps(lanes(n - i), source + step + i) : _mm512_setzero_ps();
      _mm512_store_si512(whole + i, pairs(_mm512_maskz_loadu_ps(lanes(n - i), source + i), second));
    }
    for (int64_t i = 0; i < n; i += width) memcpy(out + i / width * apart, whole + i, width * sizeof(uint32_t));
  }
}

// n of `width` rows or columns become out [pairs][width], inputs beside each other: source[i * step + k]. 16 pairs of each at a
// time stay in the cache.
void pack_across(const float* source, int64_t step, int64_t inputs, int64_t n, int64_t width, uint32_t* out) {
  alignas(64) uint32_t row[16];
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  for (int64_t k = 0; k < inputs; k += 32) {
    const int64_t count = inputs - k < 32 ? (inputs - k + 1) / 2 : 16;
    for (int64_t i = 0; i < width; i++) {
      __m512 low = _mm512_setzero_ps(), high = low;
      if (i < n) {
        low = _mm512_maskz_loadu_ps(lanes(inputs - k), source + i * step + k);
        high = _mm512_maskz_loadu_ps(lanes(inputs - k - 16), source + i * step + k + 16);
      }
      _mm512_store_si512(row, pairs(_mm512_permutex2var_ps(low, even, high), _mm512_permutex2var_ps(low, odd, high)));
      for (int64_t p = 0; p < count; p++) out[(k / 2 + p) * width + i] = row[p];
    }
  }
}

#define LOAD_ROW(at, a, b, c, d)                                                                                        \
  "vmovups " #at "(%[sums]),%%zmm" #a "\n\tvmovups " #at "+64(%[sums]),%%zmm" #b "\n\tvmovups " #at "+128(%[sums]),%%zmm" #c \
  "\n\tvmovups " #at "+192(%[sums]),%%zmm" #d "\n\t"
#define STORE_ROW(at, a, b, c, d)                                                                                       \
  "vmovups %%zmm" #a "," #at "(%[sums])\n\tvmovups %%zmm" #b "," #at "+64(%[sums])\n\tvmovups %%zmm" #c "," #at        \
  "+128(%[sums])\n\tvmovups %%zmm" #d "," #at "+192(%[sums])\n\t"
#define ADD_ROW(at, x, a, b, c, d)                                                                                 \
  "vpbroadcastd " #at "(%[rows]),%%zmm" #x "\n\tvdpbf16ps %%zmm" #x ",%%zmm0,%%zmm" #a "\n\tvdpbf16ps %%zmm" #x    \
  ",%%zmm1,%%zmm" #b "\n\tvdpbf16ps %%zmm" #x ",%%zmm2,%%zmm" #c "\n\tvdpbf16ps %%zmm" #x ",%%zmm3,%%zmm" #d "\n\t"

// 6 rows [pairs][6] times 64 columns [pairs][64], added to sums [6][64]. In assembly: GCC 12 would keep the sums in memory.
inline void tile(const uint32_t* rows, const uint32_t* columns, int64_t count, float* sums) {
  asm volatile(
      LOAD_ROW(0, 8, 9, 10, 11) LOAD_ROW(256, 12, 13, 14, 15) LOAD_ROW(512, 16, 17, 18, 19)
      LOAD_ROW(768, 20, 21, 22, 23) LOAD_ROW(1024, 24, 25, 26, 27) LOAD_ROW(1280, 28, 29, 30, 31)
      ".p2align 5\n1:\n\t"
      "vmovups (%[columns]),%%zmm0\n\tvmovups 64(%[columns]),%%zmm1\n\t"
      "vmovups 128(%[columns]),%%zmm2\n\tvmovups 192(%[columns]),%%zmm3\n\t"
      ADD_ROW(0, 4, 8, 9, 10, 11) ADD_ROW(4, 5, 12, 13, 14, 15) ADD_ROW(8, 6, 16, 17, 18, 19)
      ADD_ROW(12, 7, 20, 21, 22, 23) ADD_ROW(16, 4, 24, 25, 26, 27) ADD_ROW(20, 5, 28, 29, 30, 31)
      "add $24,%[rows]\n\tadd $256,%[columns]\n\tdec %[count]\n\tjnz 1b\n\t"
      STORE_ROW(0, 8, 9, 10, 11) STORE_ROW(256, 12, 13, 14, 15) STORE_ROW(512, 16, 17, 18, 19)
      STORE_ROW(768, 20, 21, 22, 23) STORE_ROW(1024, 24, 25, 26, 27) STORE_ROW(1280, 28, 29, 30, 31)
      : [rows] "+r"(rows), [columns] "+r"(columns), [count] "+r"(count)
      : [sums] "r"(sums)
      : "cc", "memory", "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8", "zmm9", "zmm10", "zmm11",
        "zmm12", "zmm13", "zmm14", "zmm15", "zmm16", "zmm17", "zmm18", "zmm19", "zmm20", "zmm21", "zmm22", "zmm23", "zmm24",
        "zmm25", "zmm26", "zmm27", "zmm28", "zmm29", "zmm30", "zmm31");
}

#undef LOAD_ROW
#undef STORE_ROW
#undef ADD_ROW
