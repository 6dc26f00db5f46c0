// Integer tiles, R rows of codes times a panel, for one instruction set; included by linear_body.h, which ends EACH_ROW.

#if PANGU_LEVEL == 2

// Every loop over a tile is unrolled completely, or GCC keeps the sums in memory.
#define EACH_ROW _Pragma("GCC unroll 8") for (int r = 0; r < R; r++)
#define EACH_VECTOR _Pragma("GCC unroll 4") for (int j = 0; j < 4; j++)

template <int R>
struct Tile {
  __m512i sum[R][4];
  PANGU_INLINE void clear() { EACH_ROW EACH_VECTOR sum[r][j] = _mm512_setzero_si512(); }
  PANGU_INLINE void load_from(const int32_t* p) {
    EACH_ROW EACH_VECTOR sum[r][j] = _mm512_loadu_si512(p + r * kPanel + 16 * j);
  }
  PANGU_INLINE void store_to(int32_t* p) const {
    EACH_ROW EACH_VECTOR _mm512_storeu_si512(p + r * kPanel + 16 * j, sum[r][j]);
  }
  PANGU_INLINE i32x16 get(int r, int j) const { return (i32x16)sum[r][j]; }
};

// One asm for each instruction: with the intrinsic, GCC 12 spills the sums of a tile of 6 rows.
PANGU_INLINE void multiply_add(__m512i& sum, __m512i weight, __m512i codes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weight), "v"(codes));
}

template <int R>
PANGU_INLINE void four_inputs(Tile<R>& t, const int8_t* a, int64_t lda, __m512i w0, __m512i w1, __m512i w2, __m512i w3) {
  EACH_ROW {
    int32_t quad;
    memcpy(&quad, a + r * lda, 4);
    const __m512i v = _mm512_set1_epi32(quad);
    multiply_add(t.sum[r][0], w0, v);
    multiply_add(t.sum[r][1], w1, v);
    multiply_add(t.sum[r][2], w2, v);
    multiply_add(t.sum[r][3], w3, v);
  }
}

// Adds `steps` steps of a panel of n outputs; FULL: n is 64.
template <int BITS, int R, bool FULL>
PANGU_INLINE void add_steps(Tile<R>& t, const int8_t* a, int64_t lda, const uint8_t* w, int64_t steps, int64_t n) {
  const __m512i low = _mm512_set1_epi8(15);
  __mmask16 mask[4] = {0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF};
  if (!FULL)
    for (int j = 0; j < 4; j++) mask[j] = n <= 16 * j ? 0 : n >= 16 * j + 16 ? 0xFFFF : (1u << (n - 16 * j)) - 1;
  const int64_t stride = FULL ? 4 * kPanel : 4 * n;
  for (int64_t s = 0; s < steps; s++, w += stride, a += BITS == 8 ? 4 : 8) {
    __m512i w0, w1, w2, w3;
    if (FULL) {
      w0 = _mm512_loadu_si512(w), w1 = _mm512_loadu_si512(w + 64);
      w2 = _mm512_loadu_si512(w + 128), w3 = _mm512_loadu_si512(w + 192);
    } else {
      w0 = _mm512_maskz_loadu_epi32(mask[0], w), w1 = _mm512_maskz_loadu_epi32(mask[1], w + 64);
      w2 = _mm512_maskz_loadu_epi32(mask[2], w + 128), w3 = _mm512_maskz_loadu_epi32(mask[3], w + 192);
    }
    if (BITS == 8) {
      four_inputs<R>(t, a, lda, w0, w1, w2, w3);
    } else {
      four_inputs<R>(t, a, lda, _mm512_and_si512(w0, low), _mm512_and_si512(w1, low), _mm512_and_si512(w2, low),
                     _mm512_and_si512(w3, low));
      w0 = _mm512_and_si512(_mm512_srli_epi16(w0, 4), low), w1 = _mm512_and_si512(_mm512_srli_epi16(w1, 4), low);
      w2 = _mm512_and_si512(_mm512_srli_epi16(w2, 4), low), w3 = _mm512_and_si512(_mm512_srli_epi16(w3, 4), low);
      four_inputs<R>(t, a + 4, lda, w0, w1, w2, w3);
    }
  }
}

#else

#define EACH_ROW for (int r = 0; r < R; r++)
#define EACH_VECTOR for (int j = 0; j < 4; j++)

template <int R>
struct Tile {
  int32_t sum[R][kPanel];
  PANGU_INLINE void clear() { memset(sum, 0, sizeof sum); }
  PANGU_INLINE void load_from(const int32_t* p) { memcpy(sum, p, sizeof sum); }
  PANGU_INLINE void store_to(int32_t* p) const { memcpy(p, sum, sizeof sum); }
  PANGU_INLINE i32x16 get(int r, int j) const {
    i32x16 v;
    memcpy(&v, &sum[r][16 * j], sizeof v);
    return v;
  }
};

#if PANGU_LEVEL == 1

// vpmaddubsw would saturate: bytes are widened to int16 as even and odd inputs, whose products vpmaddwd adds exactly.
template <int R>
PANGU_INLINE void four_inputs(__m256i (*sum)[2], const int8_t* a, int64_t lda, __m256i w0, __m256i w1) {
  const __m256i even = _mm256_set1_epi32(0x00FF00FF);
  const __m256i e0 = _mm256_and_si256(w0, even), o0 = _mm256_srli_epi16(w0, 8);
  const __m256i e1 = _mm256_and_si256(w1, even), o1 = _mm256_srli_epi16(w1, 8);
  for (int r = 0; r < R; r++) {
    int32_t quad;
    memcpy(&quad, a + r * lda, 4);
    const __m256i v = _mm256_set1_epi32(quad);
    const __m256i ve = _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8), vo = _mm256_srai_epi16(v, 8);
    sum[r][0] = _mm256_add_epi32(sum[r][0], _mm256_add_epi32(_mm256_madd_epi16(e0, ve), _mm256_madd_epi16(o0, vo)));
    sum[r][1] = _mm256_add_epi32(sum[r][1], _mm256_add_epi32(_mm256_madd_epi16(e1, ve), _mm256_madd_epi16(o1, vo)));
  }
}

template <int BITS, int R>  // 16 outputs, whose 64 bytes of each step lie `stride` bytes apart
PANGU_INLINE void add_columns(int32_t (*out)[kPanel], const int8_t* a, int64_t lda, const uint8_t* w, int64_t stride,
                              int64_t steps) {
  __m256i sum[R][2];
  for (int r = 0; r < R; r++)
    for (int j = 0; j < 2; j++) sum[r][j] = _mm256_loadu_si256((const __m256i*)(out[r] + 8 * j));
  const __m256i low = _mm256_set1_epi8(15);
  for (int64_t s = 0; s < steps; s++, w += stride, a += BITS == 8 ? 4 : 8) {
    const __m256i w0 = _mm256_loadu_si256((const __m256i*)w), w1 = _mm256_loadu_si256((const __m256i*)(w + 32));
    if (BITS == 8) {
      four_inputs<R>(sum, a, lda, w0, w1);
    } else {
      four_inputs<R>(sum, a, lda, _mm256_and_si256(w0, low), _mm256_and_si256(w1, low));
      four_inputs<R>(sum, a + 4, lda, _mm256_and_si256(_mm256_srli_epi16(w0, 4), low),
                     _mm256_and_si256(_mm256_srli_epi16(w1, 4), low));
    }
  }
  for (int r = 0; r < R; r++)
    for (int j = 0; j < 2; j++) _mm256_storeu_si256((__m256i*)(out[r] + 8 * j), sum[r][j]);
}

#endif

// One output at a time in the outer loop's lanes; also what AVX2 uses for the columns beside its last 16.
template <int BITS, int R>
PANGU_INLINE void add_plain(int32_t (*out)[kPanel], const int8_t* a, int64_t lda, const uint8_t* w, int64_t stride,
                            int64_t steps, int64_t begin, int64_t n) {
  for (int64_t s = 0; s < steps; s++, w += stride, a += BITS == 8 ? 4 : 8)
    for (int r = 0; r < R; r++) {
      const int8_t* v = a + r * lda;
      for (int64_t j = begin; j < n; j++) {
        const uint8_t* b = w + 4 * j;
        if (BITS == 8)
          out[r][j] += b[0] * v[0] + b[1] * v[1] + b[2] * v[2] + b[3] * v[3];
        else
          out[r][j] += (b[0] & 15) * v[0] + (b[1] & 15) * v[1] + (b[2] & 15) * v[2] + (b[3] & 15) * v[3] +
                       (b[0] >> 4) * v[4] + (b[1] >> 4) * v[5] + (b[2] >> 4) * v[6] + (b[3] >> 4) * v[7];
      }
    }
}

template <int BITS, int R, bool FULL>
PANGU_INLINE void add_steps(Tile<R>& t, const int8_t* a, int64_t lda, const uint8_t* w, int64_t steps, int64_t n) {
  const int64_t width = FULL ? kPanel : n, stride = 4 * width;
  int64_t j = 0;
#if PANGU_LEVEL == 1
  for (; j + 16 <= width; j += 16) {
    int r = 0;
    for (; r + 2 <= R; r += 2)
      add_columns<BITS, 2>((int32_t(*)[kPanel]) & t.sum[r][j], a + r * lda, lda, w + 4 * j, stride, steps);
    if (r < R) add_columns<BITS, 1>((int32_t(*)[kPanel]) & t.sum[r][j], a + r * lda, lda, w + 4 * j, stride, steps);
  }
#endif
  if (PANGU_LEVEL == 0 || !FULL) add_plain<BITS, R>(t.sum, a, lda, w, stride, steps, j, width);
}

#endif

// The inputs at the end of a segment that do not fill a step, spread over one: what lies beside them meets zero codes.
template <int BITS>
PANGU_INLINE void last_step(const uint8_t* w, int64_t left, int64_t n, uint8_t* step) {
  memset(step, 0, 4 * kPanel);
  const int64_t bytes = BITS == 8 ? left : left / 2;
  for (int64_t j = 0; j < n; j++)
    for (int64_t b = 0; b < bytes; b++) {
      const uint8_t byte = w[j * bytes + b];
      if (BITS == 8) {
        step[4 * j + b] = byte;
        continue;
      }
      for (int half = 0; half < 2; half++) {
        const int64_t k = 2 * b + half;
        const uint8_t nibble = half ? byte >> 4 : byte & 15;
        step[4 * j + k % 4] |= k < 4 ? nibble : nibble << 4;
      }
    }
}
