// The linear layers for one instruction set; included by linear.cc in a namespace for each (see isa.h).
// PANGU_LEVEL is 2 for AVX512-VNNI, 1 for AVX2, 0 for none in particular.

PANGU_INLINE f32x16 load(const float* p) {
  f32x16 v;
  memcpy(&v, p, sizeof v);
  return v;
}
PANGU_INLINE i32x16 load_int(const int32_t* p) {
  i32x16 v;
  memcpy(&v, p, sizeof v);
  return v;
}
PANGU_INLINE void store(float* p, f32x16 v) { memcpy(p, &v, sizeof v); }
PANGU_INLINE f32x16 splat(float x) { return x - f32x16{}; }

// ---- activations -> codes ----------------------------------------------------------------------------------------------

constexpr float kTiny = 1.1754944e-38f;  // smallest normal float32
constexpr float kMagic = 12582912.0f;    // 1.5 * 2^23: adding it rounds to an integer, half to even, in the low bits
constexpr int32_t kMagicBits = 0x4B400000;
constexpr int32_t kInfinity = 0x7F800000;

PANGU_INLINE int32_t bits_of(float x) {
  int32_t b;
  memcpy(&b, &x, sizeof b);
  return b;
}
PANGU_INLINE int8_t round_code(float t) { return static_cast<int8_t>(bits_of(t + kMagic) - kMagicBits); }
PANGU_INLINE i8x16 round_codes(f32x16 t) { return __builtin_convertvector((i32x16)(t + splat(kMagic)) - kMagicBits, i8x16); }

// Largest |x| as the bits of a float; above kInfinity where there is a NaN, since NaNs compare as the largest integers.
PANGU_INLINE int32_t largest_bits(const float* x, int64_t count) {
  i32x16 top0 = {}, top1 = {};
  int64_t k = 0;
  for (; k + 32 <= count; k += 32) {
    const i32x16 a = (i32x16)load(x + k) & 0x7FFFFFFF, b = (i32x16)load(x + k + 16) & 0x7FFFFFFF;
    top0 = a > top0 ? a : top0;
    top1 = b > top1 ? b : top1;
  }
  top0 = top1 > top0 ? top1 : top0;
  int32_t top = 0;
  for (int i = 0; i < kLanes; i++) top = top0[i] > top ? top0[i] : top;
  for (; k < count; k++) {
    const int32_t a = bits_of(x[k]) & 0x7FFFFFFF;
    top = a > top ? a : top;
  }
  return top;
}

// Codes of one row of x; returns its scale, NaN where the row has a NaN or an infinity.
PANGU_INLINE float quantize_dynamic(const float* x, int64_t count, int8_t* codes) {
  const int32_t top = largest_bits(x, count);
  if (top >= kInfinity) {
    memset(codes, 0, count);
    return __builtin_nanf("");
  }
  float absmax;
  memcpy(&absmax, &top, sizeof absmax);
  const float scale = absmax / 127.0f, divisor = scale > kTiny ? scale : kTiny;
  const f32x16 divisors = splat(divisor);
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) {
    const i8x16 q = round_codes(load(x + k) / divisors);
    memcpy(codes + k, &q, sizeof q);
  }
  for (; k < count; k++) codes[k] = round_code(x[k] / divisor);
  return scale;
}

// Codes of one row with stored factors and offsets; returns 1, or NaN where the row has a NaN or an infinity.
PANGU_INLINE float quantize_static(const float* x, const float* factor, const int8_t* offset, int64_t count, int8_t* codes) {
  for (int64_t k = 0; k < count; k++) {
    float t = x[k] * factor[k];
    t = t > -1024.0f ? t : -1024.0f;  // far outside of what survives the clamp below, near enough for kMagic
    t = t < 1024.0f ? t : 1024.0f;
    int32_t q = bits_of(t + kMagic) - kMagicBits + offset[k];
    q = q > -128 ? q : -128;
    codes[k] = static_cast<int8_t>(q < 127 ? q : 127);
  }
  return largest_bits(x, count) >= kInfinity ? __builtin_nanf("") : 1.0f;
}

// ---- integer tiles: R rows of codes times a panel ----------------------------------------------------------------------

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

// ---- rows of a panel -----------------------------------------------------------------------------------------------------

struct Codes {
  const int8_t* codes;  // [rows][stride]; every segment begins at a multiple of padded_group and ends in zeros
  int64_t stride;
  const int32_t* sums;  // [rows][groups]: of the codes of a segment
  const float* scale;   // [rows]
};

struct Panel {
  const uint8_t* weight;
  int64_t first, n;
  alignas(64) float scale[kPanel], bias[kPanel], sum_bias[kPanel];
};

template <bool STATIC>
PANGU_INLINE void finish(const Linear& p, const Panel& panel, int64_t row, float token_scale, const f32x16* value) {
  float out[kPanel];
  float* y = p.y + row * p.outputs + panel.first;
  float* to = panel.n == kPanel ? y : out;
  for (int j = 0; j < 4; j++) {
    f32x16 v = value[j];
    if (STATIC)
      v = (v + load(panel.sum_bias + 16 * j)) * load(panel.scale + 16 * j) * splat(token_scale);  // by 1 or NaN
    if (p.bias) v = v + load(panel.bias + 16 * j);
    store(to + 16 * j, v);
  }
  if (to == out) memcpy(y, out, panel.n * sizeof(float));
}

// R rows, one scale for each output. Inputs are cut into slices whose part of the panel stays in the cache while all rows
// pass over it; sums [rows][64] wait in `kept` from slice to slice.
template <int BITS, int R, bool FULL>
void rows_per_channel(const Linear& p, const Panel& panel, const Codes& c, int64_t row, int64_t begin, int64_t end,
                      int32_t* kept) {
  constexpr int kInputs = BITS == 8 ? 4 : 8;
  const int32_t offset = BITS == 8 ? 128 : 8;
  const int64_t steps = p.inputs / kInputs, left = p.inputs % kInputs;
  const int8_t* a = c.codes + row * c.stride;
  Tile<R> t;
  if (begin == 0)
    t.clear();
  else
    t.load_from(kept);
  add_steps<BITS, R, FULL>(t, a + begin * kInputs, c.stride, panel.weight + begin * 4 * panel.n, end - begin, panel.n);
  if (end == steps && left) {
    uint8_t step[4 * kPanel];
    last_step<BITS>(panel.weight + steps * 4 * panel.n, left, panel.n, step);
    add_steps<BITS, R, true>(t, a + steps * kInputs, c.stride, step, 1, kPanel);
  }
  t.store_to(kept);
  if (end < steps) return;
  for (int r = 0; r < R; r++) {
    f32x16 value[4];
    const int32_t extra = offset * c.sums[row + r];
    const f32x16 token = splat(c.scale[row + r]);
    for (int j = 0; j < 4; j++) {
      value[j] = __builtin_convertvector(load_int(kept + r * kPanel + 16 * j) - extra, f32x16);
      if (!p.input_scale) value[j] = value[j] * (token * load(panel.scale + 16 * j));
    }
    if (p.input_scale)
      finish<true>(p, panel, row + r, c.scale[row + r], value);
    else
      finish<false>(p, panel, row + r, 1, value);
  }
}

// R rows, a scale for each group of inputs: groups are added up in float32, first to last, and scaled by the token at the end.
template <int R, bool FULL>
void rows_per_group(const Linear& p, const Panel& panel, const Codes& c, int64_t row, int64_t begin, int64_t end,
                    float* kept) {
  const int64_t groups = p.groups(), steps = p.group / 8, left = p.group % 8, bytes = p.segment_bytes(panel.n);
  const float* scales = p.scale + panel.first * groups;
  if (begin == 0) memset(kept, 0, sizeof(float) * R * kPanel);
  for (int64_t g = begin; g < end; g++) {
    const uint8_t* w = panel.weight + g * bytes;
    const int8_t* a = c.codes + row * c.stride + g * p.padded_group();
    Tile<R> t;
    t.clear();
    add_steps<4, R, FULL>(t, a, c.stride, w, steps, panel.n);
    if (left) {
      uint8_t step[4 * kPanel];
      last_step<4>(w + steps * 4 * panel.n, left, panel.n, step);
      add_steps<4, R, true>(t, a + steps * 8, c.stride, step, 1, kPanel);
    }
    float padded[kPanel];
    const float* scale = scales + g * panel.n;
    if (!FULL) {
      memset(padded, 0, sizeof padded);
      memcpy(padded, scale, panel.n * sizeof(float));
      scale = padded;
    }
    EACH_ROW {
      const int32_t extra = 8 * c.sums[(row + r) * groups + g];
      EACH_VECTOR {
        float* sum = kept + r * kPanel + 16 * j;
        store(sum, load(sum) + __builtin_convertvector(t.get(r, j) - extra, f32x16) * load(scale + 16 * j));
      }
    }
  }
  if (end < groups) return;
  for (int r = 0; r < R; r++) {
    f32x16 value[4];
    for (int j = 0; j < 4; j++) value[j] = load(kept + r * kPanel + 16 * j) * splat(c.scale[row + r]);
    finish<false>(p, panel, row + r, 1, value);
  }
}

template <int R, bool FULL>
PANGU_INLINE void rows(const Linear& p, const Panel& panel, const Codes& c, int64_t row, int64_t begin, int64_t end,
                       int32_t* kept) {
  if (p.group != p.inputs)
    rows_per_group<R, FULL>(p, panel, c, row, begin, end, reinterpret_cast<float*>(kept));
  else if (p.bits == 8)
    rows_per_channel<8, R, FULL>(p, panel, c, row, begin, end, kept);
  else
    rows_per_channel<4, R, FULL>(p, panel, c, row, begin, end, kept);
}

// All rows of one slice of a panel: as many at a time as the registers hold, the rest in one smaller tile.
template <bool FULL>
void slice(const Linear& p, const Panel& panel, const Codes& c, int64_t count, int64_t begin, int64_t end, int32_t* kept) {
  constexpr int kRows = 6;
  int64_t row = 0;
  for (; row + kRows <= count; row += kRows) rows<kRows, FULL>(p, panel, c, row, begin, end, kept + row * kPanel);
  kept += row * kPanel;
  switch (count - row) {
    case 5: return rows<5, FULL>(p, panel, c, row, begin, end, kept);
    case 4: return rows<4, FULL>(p, panel, c, row, begin, end, kept);
    case 3: return rows<3, FULL>(p, panel, c, row, begin, end, kept);
    case 2: return rows<2, FULL>(p, panel, c, row, begin, end, kept);
    case 1: return rows<1, FULL>(p, panel, c, row, begin, end, kept);
  }
}

void panel(const Linear& p, const Codes& c, int64_t count, int64_t index, int32_t* kept) {
  Panel panel;
  panel.first = index * kPanel;
  panel.n = p.outputs - panel.first < kPanel ? p.outputs - panel.first : kPanel;
  panel.weight = p.weight + panel.first * p.inputs * p.bits / 8;
  memset(panel.scale, 0, sizeof panel.scale);
  memset(panel.bias, 0, sizeof panel.bias);
  memset(panel.sum_bias, 0, sizeof panel.sum_bias);
  if (p.group == p.inputs) memcpy(panel.scale, p.scale + panel.first, panel.n * sizeof(float));
  if (p.bias) memcpy(panel.bias, p.bias + panel.first, panel.n * sizeof(float));
  if (p.sum_bias)
    for (int64_t j = 0; j < panel.n; j++) panel.sum_bias[j] = static_cast<float>(p.sum_bias[panel.first + j]);
  // A slice is 256 KiB of the panel, a quarter of the L2 cache of current server CPUs.
  const bool grouped = p.group != p.inputs;
  const int64_t unit = grouped ? p.segment_bytes(panel.n) : 4 * panel.n;
  const int64_t units = grouped ? p.groups() : p.inputs / p.step_inputs();
  const int64_t at_once = unit < (256 << 10) ? (256 << 10) / unit : 1;
  int64_t begin = 0;
  do {
    const int64_t end = count == 1 || begin + at_once > units ? units : begin + at_once;
    if (panel.n == kPanel)
      slice<true>(p, panel, c, count, begin, end, kept);
    else
      slice<false>(p, panel, c, count, begin, end, kept);
    begin = end;
  } while (begin < units);
}

// Codes, segment sums and scale of one row.
void quantize_row(const Linear& p, const float* x, int8_t* codes, int64_t stride, int32_t* sums, float* scale) {
  const int64_t groups = p.groups(), padded = p.padded_group();
  *scale = p.input_scale ? quantize_static(x, p.input_scale, p.input_offset, p.inputs, codes)
                         : quantize_dynamic(x, p.inputs, codes);
  if (padded != p.group)  // from the last segment on, so that none is overwritten before it has moved
    for (int64_t g = groups - 1; g >= 0; g--) {
      memmove(codes + g * padded, codes + g * p.group, p.group);
      memset(codes + g * padded + p.group, 0, padded - p.group);
    }
  memset(codes + groups * padded, 0, stride - groups * padded);
  for (int64_t g = 0; g < groups; g++) {
    int32_t sum = 0;
    for (int64_t k = 0; k < p.group; k++) sum += codes[g * padded + k];
    sums[g] = sum;
  }
}

#undef EACH_ROW
#undef EACH_VECTOR
