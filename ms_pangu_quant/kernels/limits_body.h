// Loops that do nothing but multiply and add, for one instruction set; included by limits.cc (see isa.h).

#define EACH _Pragma("GCC unroll 12") for (int i = 0; i < kChains; i++)
constexpr int kChains = 12;  // enough independent sums to hide the latency of one operation

// Returns the operations done, a multiplication and an addition being two.
double fp32_loop(int64_t rounds, float* sink) {
#if PANGU_LEVEL == 2
  __m512 sum[kChains], a = _mm512_set1_ps(*sink);
  EACH sum[i] = a;
  for (int64_t n = 0; n < rounds; n++) EACH asm volatile("vfmadd231ps %1, %1, %0" : "+v"(sum[i]) : "v"(a));
  float out[16];
  EACH {
    _mm512_storeu_ps(out, sum[i]);
    *sink += out[0];
  }
  return 2.0 * 16 * kChains * rounds;
#elif PANGU_LEVEL == 1
  __m256 sum[kChains], a = _mm256_set1_ps(*sink);
  EACH sum[i] = a;
  for (int64_t n = 0; n < rounds; n++) EACH asm volatile("vfmadd231ps %1, %1, %0" : "+x"(sum[i]) : "x"(a));
  float out[8];
  EACH {
    _mm256_storeu_ps(out, sum[i]);
    *sink += out[0];
  }
  return 2.0 * 8 * kChains * rounds;
#else
  typedef float f32x4 __attribute__((vector_size(16)));
  f32x4 sum[kChains], a = *sink - f32x4{};
  EACH sum[i] = a;
  for (int64_t n = 0; n < rounds; n++) {
    EACH sum[i] = sum[i] + a * sum[i];
    asm volatile("" ::: "memory");
  }
  EACH* sink += sum[i][0];
  return 2.0 * 4 * kChains * rounds;
#endif
}

double int8_loop(int64_t rounds, float* sink) {
#if PANGU_LEVEL == 2
  __m512i sum[kChains], a = _mm512_set1_epi8(1);
  EACH sum[i] = a;
  for (int64_t n = 0; n < rounds; n++) EACH asm volatile("vpdpbusd %1, %1, %0" : "+v"(sum[i]) : "v"(a));
  int32_t out[16];
  EACH {
    _mm512_storeu_si512(out, sum[i]);
    *sink += static_cast<float>(out[0]);
  }
  return 2.0 * 64 * kChains * rounds;
#elif PANGU_LEVEL == 1
  __m256i sum[kChains], a = _mm256_set1_epi8(1), product;
  EACH sum[i] = a;
  for (int64_t n = 0; n < rounds; n++)
    EACH {
      asm volatile("vpmaddwd %1, %1, %0" : "=x"(product) : "x"(a));
      sum[i] = _mm256_add_epi32(sum[i], product);
    }
  int32_t out[8];
  EACH {
    _mm256_storeu_si256((__m256i*)out, sum[i]);
    *sink += static_cast<float>(out[0]);
  }
  return 2.0 * 16 * kChains * rounds;
#else
  return fp32_loop(rounds, sink);  // 16-bit products of plain vectors are no faster
#endif
}
#undef EACH
