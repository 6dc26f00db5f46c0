// What lies between the linear layers: attention over the paged cache.
#pragma once
#include <cstdint>

namespace pangu {

// Sequence b contributes q_lens[b] tokens, the last of which has position valid[b] - 1. Token t's key and value go to slot
// slots[t] = block * block_size + offset; table[b] lists the blocks of sequence b.
struct Attention {
  const float *query, *key, *value;  // [tokens, heads * dim], [tokens, kv_heads * dim] twice
  int64_t query_stride, key_stride;  // floats from token to token; value's is key's
  void* key_cache;    // [blocks, kv_heads, dim, block_size]: 16 tokens side by side make one vector of scores
  void* value_cache;  // [blocks, kv_heads, block_size, width]; width: dim rounded up to 16
  // [4, kv_heads, dim]: key scale and offset, value scale and offset of int8 caches; null: the caches are float. A number x
  // is held as the code rint(x / scale) + offset.
  const float* grid;
  const int32_t *slots, *table, *valid, *q_lens;
  float scale;
  float* out;  // [tokens, heads * dim]
  int64_t tokens, batch, table_width, heads, kv_heads, dim, width, block_size;
};

struct AttentionTile {  // query tokens first..first+count-1 of sequence b, as seen by one key head
  int64_t b, kv_head, first, count, token, position;  // token and position of the first one
};

constexpr int kTileRows = 32;  // query rows of a tile: tokens times the heads that share a key head

// False where the lengths contradict each other or the cache, or a head is not what a tile holds.
bool valid(const Attention& a);
void attention(const Attention& a);

// One row, for this CPU's instruction set.
void rms_norm(const float* x, const float* weight, float eps, int64_t count, float* y);
void rope(const float* x, const float* cosine, const float* sine, int64_t heads, int64_t dim, float* y);
void swiglu(const float* gate, const float* up, int64_t count, float* y);

}  // namespace pangu
