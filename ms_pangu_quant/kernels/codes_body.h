// Activations -> int8 codes, for one instruction set; included by linear_body.h.

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
