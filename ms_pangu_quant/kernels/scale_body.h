// A row's groups, for one instruction set; included by scale.cc (see isa.h).

#include "lanes_body.h"

// Sum of factor * (w / scale - code)^2 over a group, which zeros fill up to whole vectors, times scale^2.
inline float weighted_error(const float* group, const float* factor, int64_t wide, float scale, float least, float most) {
  const f32x16 inverse = splat(1.0f / scale), low = splat(least), high = splat(most), half = splat(12582912.0f);
  f32x16 sum{};
  for (int64_t i = 0; i < wide; i += kLanes) {
    const f32x16 wanted = load(group + i) * inverse;
    f32x16 code = (wanted + half) - half;  // to the nearest, half to even
    code = code < low ? low : code;
    code = code > high ? high : code;
    const f32x16 error = wanted - code;
    sum += load(factor + i) * (error * error);
  }
  float total = 0;
  for (int i = 0; i < kLanes; i++) total += sum[i];
  return total * (scale * scale);
}

inline void best_scales(const Search& p, int64_t row, int64_t wide, float* group, float* factor) {
  memset(group, 0, 2 * wide * sizeof(float));
  for (int64_t g = 0; g < p.groups; g++) {
    memcpy(group, p.weight + (row * p.groups + g) * p.width, p.width * sizeof(float));
    memcpy(factor, p.factors + g * p.width, p.width * sizeof(float));
    float best = 0;
    for (int64_t c = 0; c < p.count; c++) {
      const float scale = p.scales[(c * p.rows + row) * p.groups + g];
      const float error = weighted_error(group, factor, wide, scale, p.least, p.most);
      if (c == 0 || error < best) {
        best = error;
        p.chosen[row * p.groups + g] = scale;
      }
    }
  }
}
