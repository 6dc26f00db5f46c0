// A whole decoder block of quantized linear layers as one operator, and many of them. The operators it replaces spend more
// time in MindSpore's executor than in the kernels when a few tokens are decoded, and carry their results through memory when
// many are prefilled. Each step is the function the operator of its own calls, so the bits are the same.
#include <cstring>
#include <vector>

#include "hadamard.h"
#include "layer.h"
#include "linear.h"
#include "operator.h"
#include "parallel.h"
#include "scratch.h"

namespace pangu {
namespace {

constexpr int kLinearInputs = 6;  // weight, scale, input_scale, input_offset, sum_bias, bias; of one element: there is none

// The linear layer whose parameters begin at input i, without rows, residual and y.
Linear linear_at(const Arguments& a, const char** dtypes, int i) {
  Linear p{};
  p.bits = strcmp(dtypes[i], "uint8") == 0 ? 4 : 8;
  p.weight = a.data<uint8_t>(i), p.scale = a.data<float>(i + 1);
  p.outputs = a.dim(i, 0), p.inputs = a.dim(i, 1) * 8 / p.bits;
  p.group = p.bits == 4 ? p.inputs / a.dim(i + 1, 1) : p.inputs;
  if (a.dim(i + 2, 0) == p.inputs) {
    p.input_scale = a.data<float>(i + 2), p.input_offset = a.data<int8_t>(i + 3), p.sum_bias = a.data<int32_t>(i + 4);
  }
  p.bias = a.bias(i + 5, p.outputs);
  return p;
}

// The matrix whose signs and scale are inputs i and i + 1; signs of one element: there is none.
Hadamard hadamard_at(const Arguments& a, int i, int64_t size) {
  if (a.size(i) == 1) return Hadamard{};
  return {a.data<uint8_t>(i), a.dim(i, 0), size, *a.data<float>(i + 1)};
}

void run(Linear p, int64_t rows, const InputRow& input, const float* residual, float* y) {
  p.rows = rows, p.residual = residual, p.y = y;
  linear(p, input);
}

// Rotates the first `heads` heads of each row in place.
void rotate(float* x, int64_t rows, int64_t stride, int64_t heads, int64_t dim, const float* cosine, const float* sine) {
  const auto row = [&](int64_t m) {
    static thread_local std::vector<float> room;
    float* y = room_for(heads * dim, room);
    rope(x + m * stride, cosine + m * dim, sine + m * dim, heads, dim, y);
    memcpy(x + m * stride, y, heads * dim * sizeof(float));
  };
  if (rows < 16)
    for (int64_t m = 0; m < rows; m++) row(m);
  else
    parallel_for(rows, row);
}

}  // namespace
}  // namespace pangu

using namespace pangu;

extern "C" {

// x [tokens, hidden], cos, sin [tokens, dim], key_cache, value_cache (both written), slot_mapping, block_tables,
// batch_valid_length, q_seq_lens, attention scale [1], cache_grid (see PanguAttention), eps [1], weights of the two norms
// [hidden], signs and scale of the Hadamard matrix in front of down (see PanguHadamard; signs [1]: there is none), and the
// linear layers of query, key and value together, of the attention's output, of gate and up together, and down -> like x
OPERATOR(PanguBlock) {
  const Arguments a(params, ndims, shapes);
  constexpr int kFirst = 16;
  const Linear qkv = linear_at(a, dtypes, kFirst), out = linear_at(a, dtypes, kFirst + kLinearInputs);
  const Linear gate_up = linear_at(a, dtypes, kFirst + 2 * kLinearInputs);
  const Linear down = linear_at(a, dtypes, kFirst + 3 * kLinearInputs);
  const Hadamard turn = hadamard_at(a, 14, down.inputs);
  const int64_t tokens = a.dim(0, 0), hidden = a.dim(0, 1);
  const float *x = a.data<float>(0), eps = *a.data<float>(11);
  static thread_local std::vector<float> scratch[4];
  float* packed = room_for(tokens * qkv.outputs, scratch[0]);
  float* context = room_for(tokens * out.inputs, scratch[1]);
  float* middle = room_for(tokens * hidden, scratch[2]);
  float* inner = room_for(tokens * gate_up.outputs, scratch[3]);

  Attention p{};
  p.key_cache = a.data<void>(3), p.value_cache = a.data<void>(4);
  p.grid = a.size(10) == 1 ? nullptr : a.data<float>(10);
  p.slots = a.data<int32_t>(5), p.table = a.data<int32_t>(6), p.valid = a.data<int32_t>(7), p.q_lens = a.data<int32_t>(8);
  p.scale = *a.data<float>(9), p.tokens = tokens, p.batch = a.dim(6, 0), p.table_width = a.dim(6, 1);
  p.kv_heads = a.dim(3, 1), p.dim = a.dim(3, 2), p.block_size = a.dim(3, 3), p.width = a.dim(4, 3);
  p.heads = out.inputs / p.dim;
  p.query = packed, p.key = packed + p.heads * p.dim, p.value = p.key + p.kv_heads * p.dim;
  p.query_stride = p.key_stride = qkv.outputs, p.out = context;
  if (qkv.outputs != (p.heads + 2 * p.kv_heads) * p.dim || gate_up.outputs != 2 * down.inputs || !valid(p)) return 1;
  if (p.grid && a.size(10) != 4 * p.kv_heads * p.dim) return 1;
  if (turn.order && (!valid(turn) || a.size(14) != turn.order * turn.order / 4)) return 1;

  const auto normed = [&](const float* from, int weight) -> InputRow {
    return [=, &a](int64_t m, float* room) {
      rms_norm(from + m * hidden, a.data<float>(weight), eps, hidden, room);
      return room;
    };
  };
  run(qkv, tokens, normed(x, 12), nullptr, packed);
  rotate(packed, tokens, qkv.outputs, p.heads + p.kv_heads, p.dim, a.data<float>(1), a.data<float>(2));
  attention(p);
  run(out, tokens, [&](int64_t m, float*) { return context + m * out.inputs; }, x, middle);
  run(gate_up, tokens, normed(middle, 13), nullptr, inner);
  const InputRow gated = [&](int64_t m, float* room) {
    const float* gate = inner + m * gate_up.outputs;
    swiglu(gate, gate + down.inputs, down.inputs, room);
    if (turn.order) hadamard(turn, room, room);
    return room;
  };
  run(down, tokens, gated, middle, a.data<float>(kFirst + 4 * kLinearInputs));
  return 0;
}
SHAPE_OF(PanguBlock) { return std::vector<int64_t>(shapes[0], shapes[0] + ndims[0]); }

// x, cos, sin, slot_mapping, block_tables, batch_valid_length, q_seq_lens as for PanguBlock, and table int64
// [blocks, inputs of PanguBlock, kEntry] -> like x: one block after another. An entry says where an input is: address, or
// -1 - i for input i of this operator; 1 where it is of uint8; number of dimensions, dimensions.
// With weights as inputs of the graph, MindSpore's executor spends as long on them as memory does on a third of them.
OPERATOR(PanguStack) {
  const Arguments a(params, ndims, shapes);
  constexpr int kTable = 7, kEntry = 7;
  const int64_t blocks = a.dim(kTable, 0), inputs = a.dim(kTable, 1);
  if (a.dim(kTable, 2) != kEntry) return 1;
  std::vector<void*> data(inputs + 1);
  std::vector<int> dims(inputs + 1);
  std::vector<int64_t*> sizes(inputs + 1);
  std::vector<const char*> types(inputs + 1);
  data[inputs] = params[kTable + 1], dims[inputs] = ndims[0], sizes[inputs] = shapes[0], types[inputs] = dtypes[0];
  for (int64_t block = 0; block < blocks; block++) {
    for (int64_t i = 0; i < inputs; i++) {
      int64_t* entry = a.data<int64_t>(kTable) + (block * inputs + i) * kEntry;
      if (entry[0] == 0) return 1;  // no weights have been loaded
      if (entry[0] < 0) {
        const int own = static_cast<int>(-1 - entry[0]);
        data[i] = params[own], dims[i] = ndims[own], sizes[i] = shapes[own], types[i] = dtypes[own];
      } else {
        data[i] = reinterpret_cast<void*>(entry[0]), types[i] = entry[1] ? "uint8" : "";
        dims[i] = static_cast<int>(entry[2]), sizes[i] = entry + 3;
      }
    }
    if (block > 0) data[0] = data[inputs];  // a block reads its input for the last time before it writes its output
    if (const int failed = PanguBlock(static_cast<int>(inputs) + 1, data.data(), dims.data(), sizes.data(), types.data(),
                                      stream, extra))
      return failed;
  }
  return 0;
}
SHAPE_OF(PanguStack) { return std::vector<int64_t>(shapes[0], shapes[0] + ndims[0]); }
}
