// What lies between the linear layers: attention over the paged cache.
#pragma once
#include <cstdint>

namespace pangu {

// Sequence b contributes q_lens[b] tokens, the last of which has position valid[b] - 1. Token t's key and value go to slot
// slots[t] = block * block_size + offset; table[b] lists the blocks of sequence b.
struct Attention {
  const float *query, *key, *value;  // [tokens, heads * dim], [tokens, kv_heads * dim] twice
  float* key_cache;                  // [blocks, kv_heads, dim, block_size]: 16 tokens side by side make one vector of scores
  float* value_cache;                // [blocks, kv_heads, block_size, width]; width: dim rounded up to 16
  const int32_t *slots, *table, *valid, *q_lens;
  float scale;
  float* out;  // like query
  int64_t tokens, batch, table_width, heads, kv_heads, dim, width, block_size;
};

struct AttentionTile {  // query tokens first..first+count-1 of sequence b, as seen by one key head
  int64_t b, kv_head, first, count, token, position;  // token and position of the first one
};

constexpr int kTileRows = 32;  // query rows of a tile: tokens times the heads that share a key head

}  // namespace pangu
