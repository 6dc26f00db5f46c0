// A Hadamard matrix times one row, for one instruction set; included by hadamard.cc (see isa.h).

#if PANGU_LEVEL == 2
typedef float Vector __attribute__((vector_size(64)));
#elif PANGU_LEVEL == 1
typedef float Vector __attribute__((vector_size(32)));  // GCC 12 keeps sums of two registers in memory
#else
typedef float Vector __attribute__((vector_size(16)));
#endif

template <class T>
PANGU_INLINE T read(const float* p) {
  T v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
PANGU_INLINE void write(float* p, T v) {
  memcpy(p, &v, sizeof v);
}

// The butterflies of each `columns` of so many numbers from `stride` on, two strides at a time: half the way through the cache.
template <class T>
PANGU_INLINE void butterflies(float* y, int64_t count, int64_t columns, int64_t stride) {
  constexpr int64_t kStep = sizeof(T) / sizeof(float);
  for (; 4 * stride <= columns; stride *= 4)
    for (int64_t first = 0; first < count; first += 4 * stride)
      for (float* p = y + first; p < y + first + stride; p += kStep) {
        const T a = read<T>(p), b = read<T>(p + stride), c = read<T>(p + 2 * stride), d = read<T>(p + 3 * stride);
        const T ab = a + b, a_b = a - b, cd = c + d, c_d = c - d;
        write<T>(p, ab + cd), write<T>(p + stride, a_b + c_d);
        write<T>(p + 2 * stride, ab - cd), write<T>(p + 3 * stride, a_b - c_d);
      }
  if (2 * stride > columns) return;
  for (int64_t first = 0; first < count; first += 2 * stride)
    for (float* p = y + first; p < y + first + stride; p += kStep) {
      const T a = read<T>(p), b = read<T>(p + stride);
      write<T>(p, a + b), write<T>(p + stride, a - b);
    }
}

// The first kInside numbers of x times scale, and their butterflies. In a register the partners of a stride are lanes of the
// same vector: the first of two, a, becomes a + b, the second, b, becomes a - b.
#if PANGU_LEVEL == 2

constexpr int64_t kInside = 16;
PANGU_INLINE void inside(const float* x, float scale, float* y) {
  __m512 v = _mm512_mul_ps(_mm512_loadu_ps(x), _mm512_set1_ps(scale));
  const auto turn = [&](__m512 partner, __mmask16 second) {
    v = _mm512_mask_sub_ps(_mm512_add_ps(v, partner), second, partner, v);
  };
  turn(_mm512_permute_ps(v, 0xB1), 0xAAAA);
  turn(_mm512_permute_ps(v, 0x4E), 0xCCCC);
  turn(_mm512_shuffle_f32x4(v, v, 0xB1), 0xF0F0);
  turn(_mm512_shuffle_f32x4(v, v, 0x4E), 0xFF00);
  _mm512_storeu_ps(y, v);
}

#elif PANGU_LEVEL == 1

constexpr int64_t kInside = 8;
PANGU_INLINE void inside(const float* x, float scale, float* y) {
  __m256 v = _mm256_mul_ps(_mm256_loadu_ps(x), _mm256_set1_ps(scale)), partner = _mm256_permute_ps(v, 0xB1);
  v = _mm256_blend_ps(_mm256_add_ps(v, partner), _mm256_sub_ps(partner, v), 0xAA);
  partner = _mm256_permute_ps(v, 0x4E);
  v = _mm256_blend_ps(_mm256_add_ps(v, partner), _mm256_sub_ps(partner, v), 0xCC);
  partner = _mm256_permute2f128_ps(v, v, 1);
  v = _mm256_blend_ps(_mm256_add_ps(v, partner), _mm256_sub_ps(partner, v), 0xF0);
  _mm256_storeu_ps(y, v);
}

#else

constexpr int64_t kInside = 4;
PANGU_INLINE void inside(const float* x, float scale, float* y) {
  for (int i = 0; i < 4; i++) y[i] = x[i] * scale;
  butterflies<float>(y, 4, 4, 1);
}

#endif

// The core times the columns of y [order][columns], as many at a time as T has. Each four rows have 16 sums with signs, of
// which every output takes one: a quarter of the additions. sums: 4 * order of T.
template <class T>
PANGU_INLINE void turn_columns(const Hadamard& h, int64_t columns, float* y, float* sums) {
  constexpr int64_t kStep = sizeof(T) / sizeof(float);
  const int64_t fours = h.order / 4;
  for (float* column = y; column < y + columns; column += kStep) {
    for (int64_t q = 0; q < fours; q++) {
      const float* p = column + 4 * q * columns;
      const T a = read<T>(p), b = read<T>(p + columns), c = read<T>(p + 2 * columns), d = read<T>(p + 3 * columns);
      const T ab = a + b, a_b = a - b, cd = c + d, c_d = c - d;
      const T left[4] = {ab, -a_b, a_b, -ab}, right[4] = {cd, -c_d, c_d, -cd};
      for (int signs = 0; signs < 16; signs++)
        write<T>(sums + (16 * q + signs) * kStep, left[signs & 3] + right[signs >> 2]);
    }
    for (int64_t j = 0; j < h.order; j += 4) {  // four at a time: one would wait for its own additions
      const uint8_t* signs = h.signs + j * fours;
      const float* from = sums;
      T total[4];
      for (int r = 0; r < 4; r++) total[r] = read<T>(from + signs[r * fours] * kStep);
      for (int64_t q = 1; q < fours; q++) {
        from += 16 * kStep;
        for (int r = 0; r < 4; r++) total[r] = total[r] + read<T>(from + signs[r * fours + q] * kStep);
      }
      for (int r = 0; r < 4; r++) write<T>(column + (j + r) * columns, total[r]);
    }
  }
}

// sums: 64 * order floats.
void hadamard_row(const Hadamard& h, const float* x, float* y, float* sums) {
  const int64_t columns = h.size / h.order;
  if (columns < kInside) {
    for (int64_t i = 0; i < h.size; i++) y[i] = x[i] * h.scale;
    butterflies<float>(y, h.size, columns, 1);
    return turn_columns<float>(h, columns, y, sums);
  }
  for (int64_t i = 0; i < h.size; i += kInside) inside(x + i, h.scale, y + i);
  butterflies<Vector>(y, h.size, columns, kInside);
  turn_columns<Vector>(h, columns, y, sums);
}
