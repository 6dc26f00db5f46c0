// Norm, rope, SwiGLU, attention, embedding and head for one instruction set; included by layer.cc (see isa.h).
// Sums over a row have 16 partial sums, always combined in the same order.

#include "lanes_body.h"

#if PANGU_LEVEL == 2
constexpr int kRows = 4;  // rows a register tile holds
#else
constexpr int kRows = 1;
#endif
#define EACH_ROW _Pragma("GCC unroll 4") for (int r = 0; r < R; r++)
#define EACH_VECTOR _Pragma("GCC unroll 4") for (int j = 0; j < V; j++)

PANGU_INLINE float sum_of(f32x16 v) {
#if PANGU_LEVEL == 2
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
#endif
  float lane[16];
  store(lane, v);
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; i++) lane[i] += lane[i + width];
  return lane[0];
}
PANGU_INLINE float max_of(f32x16 v) {
  float top = v[0];
  for (int i = 1; i < kLanes; i++) top = v[i] > top ? v[i] : top;
  return top;
}

// e^x within 2 units in the last place for -87 <= x <= 88, and e^-87 or e^88 beyond; NaN stays NaN. Coefficients: Cephes.
PANGU_INLINE f32x16 exp_of(f32x16 x) {
  const f32x16 low = splat(-87.0f), high = splat(88.0f), magic = splat(12582912.0f);
  x = x < low ? low : x;
  x = x > high ? high : x;
  const f32x16 shifted = x * splat(1.44269504088896341f) + magic;
  const f32x16 n = shifted - magic;
  f32x16 r = x - n * splat(0.693359375f);
  r = r - n * splat(-2.12194440e-4f);
  f32x16 p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * (r * r) + r + splat(1.0f);
  const i32x16 power = ((i32x16)shifted - 0x4B400000 + 127) << 23;
  return p * (f32x16)power;
}

PANGU_INLINE void norm_of(const float* x, const float* weight, float eps, int64_t count, float* y) {
  f32x16 a = {}, b = {};
  int64_t k = 0;
  for (; k + 32 <= count; k += 32) {
    const f32x16 u = load(x + k), v = load(x + k + 16);
    a = a + u * u;
    b = b + v * v;
  }
  float sum = sum_of(a + b);
  for (; k < count; k++) sum += x[k] * x[k];
  const float scale = 1.0f / __builtin_sqrtf(sum / static_cast<float>(count) + eps);
  for (k = 0; k < count; k++) y[k] = x[k] * (scale * weight[k]);
}

PANGU_INLINE void rotate(const float* x, const float* cosine, const float* sine, int64_t heads, int64_t dim,
                       float* __restrict__ y) {
  const int64_t half = dim / 2;
  for (int64_t h = 0; h < heads; h++, x += dim, y += dim)
    for (int64_t i = 0; i < half; i++) {
      y[i] = x[i] * cosine[i] - x[i + half] * sine[i];
      y[i + half] = x[i + half] * cosine[i + half] + x[i] * sine[i + half];
    }
}

PANGU_INLINE f32x16 silu(f32x16 x) { return x / (splat(1.0f) + exp_of(-x)); }

PANGU_INLINE void gated(const float* gate, const float* up, int64_t count, float* y) {
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) store(y + k, load(up + k) * silu(load(gate + k)));
  if (k == count) return;
  float g[kLanes] = {}, u[kLanes] = {};
  memcpy(g, gate + k, (count - k) * sizeof(float));
  memcpy(u, up + k, (count - k) * sizeof(float));
  store(g, load(u) * silu(load(g)));
  memcpy(y + k, g, (count - k) * sizeof(float));
}

// ---- attention ----------------------------------------------------------------------------------------------------------

// R rows of queries [.][dim] times 16 V keys; keys[j] points to [dim] vectors that lie `stride` apart.
template <int R, int V, class T>
PANGU_INLINE void score_rows(const float* q, int64_t dim, const T* const* keys, int64_t stride, float* scores) {
  f32x16 sum[R][V];
  EACH_ROW EACH_VECTOR sum[r][j] = f32x16{};
  for (int64_t e = 0; e < dim; e++) {
    f32x16 k[V];
    EACH_VECTOR k[j] = load(keys[j] + e * stride);
    EACH_ROW {
      const f32x16 v = splat(q[r * dim + e]);
      EACH_VECTOR sum[r][j] = sum[r][j] + v * k[j];
    }
  }
  EACH_ROW EACH_VECTOR store(scores + r * 64 + 16 * j, sum[r][j]);
}

// out[r][0..16V) = out * keep[r] + weights[r] . values; values[j] points to 16 keys' rows `width` apart.
template <int R, int V, class T>
PANGU_INLINE void mix_rows(const float* weights, const float* keep, const T* const* values, int64_t count,
                           int64_t width, int64_t column, float* out) {
  f32x16 sum[R][V];
  EACH_ROW EACH_VECTOR sum[r][j] = load(out + r * width + column + 16 * j) * splat(keep[r]);
  for (int64_t key = 0; key < count; key++) {
    const T* from = values[key / 16] + key % 16 * width + column;
    f32x16 x[V];
    EACH_VECTOR x[j] = load(from + 16 * j);
    EACH_ROW {
      const f32x16 w = splat(weights[r * 64 + key]);
      EACH_VECTOR sum[r][j] = sum[r][j] + w * x[j];
    }
  }
  EACH_ROW EACH_VECTOR store(out + r * width + column + 16 * j, sum[r][j]);
}

template <int R, class T>
PANGU_INLINE void attend_rows(const float* q, int64_t dim, const T* const* keys, int64_t stride, const T* const* values,
                              int64_t first_key, int64_t count, const int64_t* position, int64_t width, float* scores,
                              float* top, float* total, float* out) {
  score_rows<R, 4>(q, dim, keys, stride, scores);
  float keep[R];
  for (int r = 0; r < R; r++) {
    f32x16 best = splat(-__builtin_inff());
    float* row = scores + r * 64;
    const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const int32_t visible = static_cast<int32_t>(position[r] - first_key);  // keys up to this one
    for (int j = 0; j < 4; j++) {
      f32x16 s = load(row + 16 * j);
      s = lane + 16 * j <= visible ? s : splat(-__builtin_inff());
      store(row + 16 * j, s);
      best = s > best ? s : best;
    }
    const float found = max_of(best), raised = found > top[r] ? found : top[r];
    f32x16 sum = {};
    for (int j = 0; j < 4; j++) {
      f32x16 e = exp_of(load(row + 16 * j) - splat(raised));
      e = lane + 16 * j <= visible ? e : f32x16{};
      store(row + 16 * j, e);
      sum = sum + e;
    }
    keep[r] = exp_of(splat(top[r] - raised))[0];
    total[r] = total[r] * keep[r] + sum_of(sum);
    top[r] = raised;
  }
  int64_t column = 0;
  for (; column + 64 <= width; column += 64) mix_rows<R, 4>(scores, keep, values, count, width, column, out);
  for (; column < width; column += 16) mix_rows<R, 1>(scores, keep, values, count, width, column, out);
}

// Softmax over 64 keys at a time, from the first key on (Milakov and Gimelshein 2018): a query's result depends on its own
// keys alone. scratch: kTileRows * (dim + width + 64 + 2) floats. A cache of int8 codes is read as it is: the keys' scales are
// multiplied into the query, the values' into the result; the keys' zero points add the same to all scores of a query, which
// softmax ignores, and the values' come off the result, since its weights sum to one.
template <class T>
PANGU_INLINE void attend_to(const Attention& a, const AttentionTile& tile, float* scratch) {
  constexpr bool kCodes = sizeof(T) == 1;
  const int64_t share = a.heads / a.kv_heads, rows = tile.count * share, channels = a.kv_heads * a.dim;
  const float* grid = kCodes ? a.grid + tile.kv_head * a.dim : nullptr;
  float* q = scratch;
  float* out = q + kTileRows * a.dim;
  float* scores = out + kTileRows * a.width;
  float *top = scores + kTileRows * 64, *total = top + kTileRows;
  int64_t position[kTileRows];
  for (int64_t i = 0; i < tile.count; i++)
    for (int64_t s = 0; s < share; s++) {
      const int64_t r = i * share + s;
      const float* from = a.query + (tile.token + i) * a.query_stride + (tile.kv_head * share + s) * a.dim;
      for (int64_t e = 0; e < a.dim; e++) q[r * a.dim + e] = from[e] * a.scale * (kCodes ? grid[e] : 1.0f);
      position[r] = tile.position + i;
      top[r] = -__builtin_inff(), total[r] = 0;
    }
  memset(out, 0, rows * a.width * sizeof(float));
  const int64_t last = tile.position + tile.count - 1;
  const int32_t* table = a.table + tile.b * a.table_width;
  for (int64_t first_key = 0; first_key <= last; first_key += 64) {
    const T *keys[4], *values[4];
    for (int j = 0; j < 4; j++) {
      int64_t key = first_key + 16 * j;
      if (key > last) key = first_key;  // masked; any key that exists will do
      const int64_t head = table[key / a.block_size] * a.kv_heads + tile.kv_head, offset = key % a.block_size;
      keys[j] = static_cast<const T*>(a.key_cache) + head * a.dim * a.block_size + offset;
      values[j] = static_cast<const T*>(a.value_cache) + (head * a.block_size + offset) * a.width;
    }
    // Not beyond the last key: what an earlier owner of the block left there could be NaN, and 0 * NaN is NaN.
    const int64_t count = last - first_key + 1 < 64 ? last - first_key + 1 : 64;
    int64_t r = 0;
#define ATTEND(R)                                                                                                         \
  attend_rows<R>(q + r * a.dim, a.dim, keys, a.block_size, values, first_key, count, position + r, a.width, scores,       \
                 top + r, total + r, out + r * a.width)
    for (; r + kRows <= rows; r += kRows) ATTEND(kRows);
    if (kRows > 1)
      for (; r + 2 <= rows; r += 2) ATTEND(2);
    for (; r < rows; r++) ATTEND(1);
#undef ATTEND
  }
  for (int64_t r = 0; r < rows; r++) {
    float* to = a.out + ((tile.token + r / share) * a.heads + tile.kv_head * share + r % share) * a.dim;
    for (int64_t e = 0; e < a.dim; e++) {
      const float mean = out[r * a.width + e] / total[r];
      to[e] = kCodes ? (mean - grid[3 * channels + e]) * grid[2 * channels + e] : mean;
    }
  }
}

void attend(const Attention& a, const AttentionTile& tile, float* scratch) {
  a.grid ? attend_to<int8_t>(a, tile, scratch) : attend_to<float>(a, tile, scratch);
}

// ---- bfloat16 weights ---------------------------------------------------------------------------------------------------

PANGU_INLINE f32x16 widen(const uint16_t* p) {
#if PANGU_LEVEL == 2  // GCC 12 makes six instructions of the portable form
  return (f32x16)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#endif
  u16x16 half;
  memcpy(&half, p, sizeof half);
  return (f32x16)(__builtin_convertvector(half, u32x16) << 16);
}
PANGU_INLINE float widen_one(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

PANGU_INLINE void embed(const uint16_t* row, int64_t count, float* y) {
  for (int64_t k = 0; k < count; k++) y[k] = widen_one(row[k]);
}

// y[r][j] = x[r] . w[j] for R rows of x and V rows of w, `inputs` long. A sum is one vector of partial sums whatever R and V
// are. One row of x reads w row by row: rows side by side come from memory at half the speed.
template <int R, int V>
PANGU_INLINE void dots(const float* x, const uint16_t* w, int64_t inputs, float* y, int64_t outputs) {
  f32x16 sum[R][V];
  EACH_ROW EACH_VECTOR sum[r][j] = f32x16{};
  int64_t k = 0;
  for (; k + kLanes <= inputs; k += kLanes) {
    f32x16 b[V];
    EACH_VECTOR b[j] = widen(w + j * inputs + k);
    EACH_ROW {
      const f32x16 v = load(x + r * inputs + k);
      EACH_VECTOR sum[r][j] = sum[r][j] + v * b[j];
    }
  }
  EACH_ROW EACH_VECTOR {
    float total = sum_of(sum[r][j]);
    for (int64_t t = k; t < inputs; t++) total += x[r * inputs + t] * widen_one(w[j * inputs + t]);
    y[r * outputs + j] = total;
  }
}

template <int V>
PANGU_INLINE void dot_columns(const float* x, int64_t rows, const uint16_t* w, int64_t inputs, float* y, int64_t outputs) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) dots<kRows, V>(x + r * inputs, w, inputs, y + r * outputs, outputs);
  for (; r < rows; r++) dots<1, V>(x + r * inputs, w, inputs, y + r * outputs, outputs);
}

// Outputs first..last-1 of all rows.
void head(const float* x, int64_t rows, const uint16_t* w, int64_t inputs, int64_t first, int64_t last, float* y,
          int64_t outputs) {
  int64_t j = first;
  if (rows > 1)
    for (; j + 4 <= last; j += 4) dot_columns<4>(x, rows, w + j * inputs, inputs, y + j, outputs);
  for (; j < last; j++) dot_columns<1>(x, rows, w + j * inputs, inputs, y + j, outputs);
}

#undef EACH_ROW
#undef EACH_VECTOR

// ---- one row each, out of line so that layer.cc can call them ------------------------------------------------------------

void norm_row(const float* x, const float* weight, float eps, int64_t n, float* y) { norm_of(x, weight, eps, n, y); }
void rope_row(const float* x, const float* c, const float* s, int64_t heads, int64_t dim, float* y) {
  rotate(x, c, s, heads, dim, y);
}
void swiglu_row(const float* gate, const float* up, int64_t n, float* y) { gated(gate, up, n, y); }
void embed_row(const uint16_t* row, int64_t n, float* y) { embed(row, n, y); }
