// A row's groups, for one instruction set; included by mean.cc (see isa.h).

PANGU_INLINE f64x8 load(const double* p) {
  f64x8 v;
  memcpy(&v, p, sizeof v);
  return v;
}
PANGU_INLINE void store(double* p, f64x8 v) { memcpy(p, &v, sizeof v); }

// own [groups * width] += the square of the group's mean, times the row's weight, times the share of each in the power sum.
inline void means_of_row(const Means& p, int64_t row, double* kept, double* own) {
  const int64_t wide = (p.width + 7) / 8 * 8;
  for (int64_t g = 0; g < p.groups; g++) {
    const float* values = p.values + (row * p.groups + g) * p.width;
    const double* factor = p.factor + g * p.width;
    for (int64_t i = 0; i < p.width; i++) kept[i] = values[i] * factor[i];
    for (int64_t i = p.width; i < wide; i++) kept[i] = 0;
    f64x8 most{};
    for (int64_t i = 0; i < wide; i += 8) {
      const f64x8 v = load(kept + i);
      most = v > most ? v : most;
    }
    double largest = most[0];
    for (int i = 1; i < 8; i++) largest = most[i] > largest ? most[i] : largest;
    if (!(largest > 0)) {
      p.squares[row * p.groups + g] = 0;
      continue;
    }
    f64x8 sum{};
    const double inverse = 1 / largest;
    for (int64_t i = 0; i < wide; i += 8) {
      f64x8 v = load(kept + i) * inverse;
      for (int64_t s = 0; s < p.squarings; s++) v *= v;
      store(kept + i, v);
      sum += v;
    }
    double total = 0;
    for (int i = 0; i < 8; i++) total += sum[i];
    double mean = total;
    for (int64_t s = 0; s < p.squarings; s++) mean = __builtin_sqrt(mean);
    mean *= largest;
    const double square = p.weight[row] * (mean * mean), share = square / total;
    p.squares[row * p.groups + g] = square;
    double* mine = own + g * p.width;
    for (int64_t i = 0; i < p.width; i++) mine[i] += share * kept[i];
  }
}
