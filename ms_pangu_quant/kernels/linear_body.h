// The linear layers for one instruction set: rows of codes times the panels of a weight; included by linear.cc (see isa.h).

#include "lanes_body.h"

#include "codes_body.h"
#include "tile_body.h"

struct Panel {
  const uint8_t* weight;
  int64_t first, n;
  alignas(64) float scale[kPanel], bias[kPanel], sum_bias[kPanel];
};

template <bool STATIC>
PANGU_INLINE void finish(const Linear& p, const Panel& panel, int64_t row, float token_scale, const f32x16* value) {
  float out[kPanel], rest[kPanel];
  float* y = p.y + row * p.outputs + panel.first;
  float* to = panel.n == kPanel ? y : out;
  const float* residual = p.residual ? p.residual + row * p.outputs + panel.first : nullptr;
  if (residual && panel.n < kPanel) residual = static_cast<const float*>(memcpy(rest, residual, panel.n * sizeof(float)));
  for (int j = 0; j < 4; j++) {
    f32x16 v = value[j];
    if (STATIC)
      v = (v + load(panel.sum_bias + 16 * j)) * load(panel.scale + 16 * j) * splat(token_scale);  // by 1 or NaN
    if (p.bias) v = v + load(panel.bias + 16 * j);
    if (residual) v = v + load(residual + 16 * j);
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

#undef EACH_ROW
#undef EACH_VECTOR
