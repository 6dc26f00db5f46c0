// Compiled with contraction of a * b + c where the instruction set has it: these are float kernels, equal to the plain
// operators up to rounding. Within one instruction set a token's result does not depend on the other tokens.
#include "layer.h"

#include <vector>

#include "isa.h"
#include "operator.h"
#include "parallel.h"

namespace pangu {
namespace {

#define PANGU_BODY "layer_body.h"
#include "every_isa.h"

template <class T>
T stored(float x, const float*, const float*, int64_t) {
  return x;
}

// The bounds keep the rounding by addition exact, and keep the compiler from contracting it with the product. NaN: -128.
template <>
int8_t stored<int8_t>(float x, const float* scale, const float* offset, int64_t e) {
  constexpr float kMagic = 12582912.0f;
  float y = x * (1.0f / scale[e]);
  y = y > -300.0f ? y : -300.0f;
  y = y < 300.0f ? y : 300.0f;
  y = (y + kMagic) - kMagic + offset[e];
  y = y > -128.0f ? y : -128.0f;
  return static_cast<int8_t>(y < 127.0f ? y : 127.0f);
}

template <class T>
void write_cache(const Attention& a, int64_t head) {
  const float* grid[4] = {};
  for (int64_t i = 0; a.grid && i < 4; i++) grid[i] = a.grid + (i * a.kv_heads + head) * a.dim;
  for (int64_t t = 0; t < a.tokens; t++) {
    const int64_t block = a.slots[t] / a.block_size * a.kv_heads + head, offset = a.slots[t] % a.block_size;
    const int64_t from = t * a.key_stride + head * a.dim;
    T* keys = static_cast<T*>(a.key_cache) + block * a.dim * a.block_size + offset;
    for (int64_t e = 0; e < a.dim; e++) keys[e * a.block_size] = stored<T>(a.key[from + e], grid[0], grid[1], e);
    T* values = static_cast<T*>(a.value_cache) + (block * a.block_size + offset) * a.width;
    for (int64_t e = 0; e < a.dim; e++) values[e] = stored<T>(a.value[from + e], grid[2], grid[3], e);
  }
}

}  // namespace

bool valid(const Attention& a) {
  int64_t tokens = 0;
  for (int64_t b = 0; b < a.batch; b++) {
    if (a.q_lens[b] < 1 || a.valid[b] < a.q_lens[b] || a.valid[b] > a.table_width * a.block_size) return false;
    tokens += a.q_lens[b];
  }
  return tokens == a.tokens && a.block_size % kLanes == 0 && a.heads <= kTileRows * a.kv_heads;
}

void attention(const Attention& a) {
  const auto write = [&](int64_t h) { a.grid ? write_cache<int8_t>(a, h) : write_cache<float>(a, h); };
  if (a.tokens < 16)
    for (int64_t h = 0; h < a.kv_heads; h++) write(h);
  else
    parallel_for(a.kv_heads, write);
  const int64_t share = a.heads / a.kv_heads, tokens = kTileRows / share > 1 ? kTileRows / share : 1;
  std::vector<AttentionTile> tiles;
  for (int64_t b = 0, start = 0; b < a.batch; start += a.q_lens[b++])
    for (int64_t first = (a.q_lens[b] - 1) / tokens * tokens; first >= 0; first -= tokens)  // the longest first
      for (int64_t h = 0; h < a.kv_heads; h++) {
        const int64_t left = a.q_lens[b] - first;
        tiles.push_back({b, h, first, left < tokens ? left : tokens, start + first, a.valid[b] - a.q_lens[b] + first});
      }
  parallel_for(static_cast<int64_t>(tiles.size()), [&](int64_t i) {
    static thread_local std::vector<float> scratch;
    const size_t needed = kTileRows * (a.dim + a.width + 64 + 2);
    if (scratch.size() < needed) scratch.resize(needed);
    DISPATCH(attend(a, tiles[i], scratch.data()));
  });
}

void rms_norm(const float* x, const float* weight, float eps, int64_t count, float* y) {
  DISPATCH(norm_row(x, weight, eps, count, y));
}
void rope(const float* x, const float* cosine, const float* sine, int64_t heads, int64_t dim, float* y) {
  DISPATCH(rope_row(x, cosine, sine, heads, dim, y));
}
void swiglu(const float* gate, const float* up, int64_t count, float* y) { DISPATCH(swiglu_row(gate, up, count, y)); }

}  // namespace pangu

using namespace pangu;

extern "C" {

// x [.., hidden], weight [hidden], eps [1] -> like x
OPERATOR(PanguRMSNorm) {
  const Arguments a(params, ndims, shapes);
  const int64_t n = a.last(0);
  each_row(a.rows(0), n, [&](int64_t m) {
    rms_norm(a.data<float>(0) + m * n, a.data<float>(1), *a.data<float>(2), n, a.data<float>(3) + m * n);
  });
  return 0;
}
SHAPE_OF(PanguRMSNorm) { return std::vector<int64_t>(shapes[0], shapes[0] + ndims[0]); }

// x [tokens, heads * dim], cos and sin [tokens, dim] -> like x
OPERATOR(PanguRope) {
  const Arguments a(params, ndims, shapes);
  const int64_t n = a.last(0), dim = a.last(1);
  each_row(a.rows(0), n, [&](int64_t m) {
    rope(a.data<float>(0) + m * n, a.data<float>(1) + m * dim, a.data<float>(2) + m * dim, n / dim, dim,
         a.data<float>(3) + m * n);
  });
  return 0;
}
SHAPE_OF(PanguRope) { return std::vector<int64_t>(shapes[0], shapes[0] + ndims[0]); }

// x [.., 2 * inner]: gate, then up -> [.., inner]
OPERATOR(PanguSwiGLU) {
  const Arguments a(params, ndims, shapes);
  const int64_t n = a.last(0) / 2;
  each_row(a.rows(0), n, [&](int64_t m) {
    const float* x = a.data<float>(0) + 2 * m * n;
    swiglu(x, x + n, n, a.data<float>(1) + m * n);
  });
  return 0;
}
SHAPE_OF(PanguSwiGLU) {
  std::vector<int64_t> out(shapes[0], shapes[0] + ndims[0]);
  out.back() = out.back() < 0 ? out.back() : out.back() / 2;
  return out;
}

// query, key, value, key_cache, value_cache (both written), slot_mapping, block_tables, batch_valid_length, q_seq_lens,
// scale [1], cache_grid [4, kv_heads * dim] of int8 caches or one element -> like query
OPERATOR(PanguAttention) {
  const Arguments a(params, ndims, shapes);
  Attention p{};
  p.query = a.data<float>(0), p.key = a.data<float>(1), p.value = a.data<float>(2);
  p.key_cache = a.data<void>(3), p.value_cache = a.data<void>(4);
  p.slots = a.data<int32_t>(5), p.table = a.data<int32_t>(6), p.valid = a.data<int32_t>(7), p.q_lens = a.data<int32_t>(8);
  p.scale = *a.data<float>(9), p.grid = a.size(10) == 1 ? nullptr : a.data<float>(10), p.out = a.data<float>(11);
  p.tokens = a.dim(0, 0), p.batch = a.dim(6, 0), p.table_width = a.dim(6, 1);
  p.kv_heads = a.dim(3, 1), p.dim = a.dim(3, 2), p.block_size = a.dim(3, 3), p.width = a.dim(4, 3);
  p.heads = a.last(0) / p.dim;
  p.query_stride = a.last(0), p.key_stride = a.last(1);
  if (!valid(p) || (p.grid && a.size(10) != 4 * p.kv_heads * p.dim)) return 1;
  attention(p);
  return 0;
}
SHAPE_OF(PanguAttention) { return std::vector<int64_t>(shapes[0], shapes[0] + ndims[0]); }

// token ids [tokens], table [vocab, hidden] in bfloat16 bits -> float32 [tokens, hidden]
OPERATOR(PanguEmbedding) {
  const Arguments a(params, ndims, shapes);
  const int64_t vocab = a.dim(1, 0), n = a.dim(1, 1);
  for (int64_t t = 0; t < a.dim(0, 0); t++) {
    const int64_t id = a.data<int32_t>(0)[t];
    if (id < 0 || id >= vocab) return 1;
    DISPATCH(embed_row(a.data<uint16_t>(1) + id * n, n, a.data<float>(2) + t * n));
  }
  return 0;
}
SHAPE_OF(PanguEmbedding) { return {shapes[0][0], shapes[1][1]}; }

// x [.., hidden], weight [vocab, hidden] in bfloat16 bits -> [.., vocab]
OPERATOR(PanguHead) {
  const Arguments a(params, ndims, shapes);
  const int64_t rows = a.rows(0), inputs = a.dim(1, 1), outputs = a.dim(1, 0), columns = 64, rows_at_once = 32;
  // As many rows as stay in the cache while a block of columns passes.
  parallel_for((outputs + columns - 1) / columns, [&](int64_t i) {
    const int64_t first = i * columns, last = first + columns < outputs ? first + columns : outputs;
    for (int64_t row = 0; row < rows; row += rows_at_once) {
      const int64_t count = rows - row < rows_at_once ? rows - row : rows_at_once;
      DISPATCH(head(a.data<float>(0) + row * inputs, count, a.data<uint16_t>(1), inputs, first, last,
                    a.data<float>(2) + row * outputs, outputs));
    }
  });
  return 0;
}
SHAPE_OF_LINEAR(PanguHead)
}
