// Sixteen lanes in and out of memory, for one instruction set; included first by every body (see isa.h).

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
PANGU_INLINE f32x16 load(const int8_t* p) {
#if PANGU_LEVEL == 2
  return (f32x16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif PANGU_LEVEL == 1
  const __m256 half[2] = {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))),
                          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8))))};
  f32x16 v;
  memcpy(&v, half, sizeof v);
  return v;
#else
  i8x16 v;
  memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, f32x16);
#endif
}
PANGU_INLINE void store(float* p, f32x16 v) { memcpy(p, &v, sizeof v); }
PANGU_INLINE f32x16 splat(float x) { return x - f32x16{}; }
