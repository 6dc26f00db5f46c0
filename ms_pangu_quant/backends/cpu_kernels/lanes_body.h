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
PANGU_INLINE void store(float* p, f32x16 v) { memcpy(p, &v, sizeof v); }
PANGU_INLINE f32x16 splat(float x) { return x - f32x16{}; }
