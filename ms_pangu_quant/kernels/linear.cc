// Compiled without contraction of a * b + c: the float operations after the integer sum are exactly the ones written, so
// every instruction set gives the same bits, and the same as MindSpore's plain operators.
#include "linear.h"

#include <cstdlib>
#include <vector>

#include "isa.h"
#include "operator.h"
#include "parallel.h"
#include "scratch.h"

namespace pangu {
namespace {

#define PANGU_BODY "linear_body.h"
#include "every_isa.h"

constexpr int64_t kRowsAtOnce = 512;  // bounds the scratch memory of a long prefill

struct Scratch {
  std::vector<int8_t> codes;
  std::vector<int32_t> sums, kept;
  std::vector<float> scale;
};

}  // namespace

void linear(Linear p, const InputRow& input) {
  static thread_local Scratch scratch;
  Scratch& s = scratch;  // the caller's, whichever thread reads it below
  const int64_t groups = p.groups();
  // Rows a multiple of 4096 bytes apart would fall on the same few lines of the L1 cache.
  int64_t stride = (groups * p.padded_group() + 63) / 64 * 64;
  if (stride % 1024 == 0) stride += 64;
  const int64_t panels = (p.outputs + kPanel - 1) / kPanel, all = p.rows;
  for (int64_t first = 0; first < all; first += kRowsAtOnce) {
    p.rows = all - first < kRowsAtOnce ? all - first : kRowsAtOnce;
    s.codes.resize(p.rows * stride), s.sums.resize(p.rows * groups), s.scale.resize(p.rows);
    const auto quantize = [&](int64_t m) {
      static thread_local std::vector<float> kept;
      const float* x = input(first + m, room_for(p.inputs, kept));
      DISPATCH(quantize_row(p, x, s.codes.data() + m * stride, stride, s.sums.data() + m * groups, &s.scale[m]));
    };
    if (p.rows * p.inputs < 16384)
      for (int64_t m = 0; m < p.rows; m++) quantize(m);
    else
      parallel_for(p.rows, quantize);
    const Codes codes{s.codes.data(), stride, s.sums.data(), s.scale.data()};
    parallel_for(panels, [&](int64_t index) {
      static thread_local std::vector<int32_t> kept;
      if (kept.size() < static_cast<size_t>(p.rows * kPanel)) kept.resize(p.rows * kPanel);
      DISPATCH(panel(p, codes, p.rows, index, kept.data()));
    });
    p.y += p.rows * p.outputs;
    if (p.residual) p.residual += p.rows * p.outputs;
  }
}

namespace {

// Reorders each panel of 64 rows of a matrix in place; `pack` writes a panel's n rows of `bytes` from its copy.
template <class Pack>
void repack(uint8_t* data, int64_t outputs, int64_t bytes, const Pack& pack) {
  parallel_for((outputs + kPanel - 1) / kPanel, [&](int64_t index) {
    static thread_local std::vector<uint8_t> copy;
    const int64_t first = index * kPanel, n = outputs - first < kPanel ? outputs - first : kPanel;
    uint8_t* panel = data + first * bytes;
    copy.assign(panel, panel + n * bytes);
    pack(copy.data(), panel, n);
  });
}

InputRow rows_of(const float* x, int64_t inputs) {
  return [x, inputs](int64_t m, float*) { return x + m * inputs; };
}

}  // namespace
}  // namespace pangu

using namespace pangu;

extern "C" {

// weight int8 [outputs, inputs] -> packed, in place.
EXPORT void pangu_pack_w8(uint8_t* weight, int64_t outputs, int64_t inputs) {
  repack(weight, outputs, inputs, [&](const uint8_t* from, uint8_t* to, int64_t n) {
    const int64_t full = inputs / 4 * 4, left = inputs - full;
    for (int64_t k = 0; k < full; k += 4)
      for (int64_t j = 0; j < n; j++, to += 4) {
        uint32_t quad;
        memcpy(&quad, from + j * inputs + k, 4);
        quad ^= 0x80808080;
        memcpy(to, &quad, 4);
      }
    for (int64_t j = 0; j < n; j++)
      for (int64_t b = 0; b < left; b++) *to++ = from[j * inputs + full + b] ^ 0x80;
  });
}

// weight uint8 [outputs, inputs / 2] (low nibble: even input, code + 8) -> packed, in place.
EXPORT void pangu_pack_w4(uint8_t* weight, int64_t outputs, int64_t inputs, int64_t group) {
  repack(weight, outputs, inputs / 2, [&](const uint8_t* from, uint8_t* to, int64_t n) {
    const auto spread = [](uint32_t x) {  // four nibbles -> the low halves of four bytes
      x = (x | x << 8) & 0x00FF00FF;
      return (x | x << 4) & 0x0F0F0F0F;
    };
    for (int64_t g = 0; g < inputs; g += group) {
      const int64_t full = g + group / 8 * 8;
      for (int64_t k = g; k < full; k += 8)
        for (int64_t j = 0; j < n; j++, to += 4) {
          uint32_t step;  // eight nibbles, the first input lowest
          memcpy(&step, from + (j * inputs + k) / 2, 4);
          step = spread(step & 0xFFFF) | spread(step >> 16) << 4;
          memcpy(to, &step, 4);
        }
      for (int64_t j = 0; j < n; j++)
        for (int64_t k = full; k < g + group; k += 2) *to++ = from[(j * inputs + k) / 2];
    }
  });
}

// scale float32 [outputs, groups] -> panels [groups][n], in place.
EXPORT void pangu_pack_scale(float* scale, int64_t outputs, int64_t groups) {
  repack(reinterpret_cast<uint8_t*>(scale), outputs, groups * 4, [&](const uint8_t* from, uint8_t* to, int64_t n) {
    const float* in = reinterpret_cast<const float*>(from);
    float* out = reinterpret_cast<float*>(to);
    for (int64_t g = 0; g < groups; g++)
      for (int64_t j = 0; j < n; j++) *out++ = in[j * groups + g];
  });
}

// stored int8 [inputs, outputs / 2] (low nibble: even output, two's complement) -> uint8 [outputs, inputs / 2] (low nibble:
// even input, code + 8): formats.packing.pack_offset_along_in(unpack_along_out(stored)).
EXPORT void pangu_transpose_w4(const uint8_t* stored, uint8_t* out, int64_t outputs, int64_t inputs) {
  constexpr int64_t kBlock = 64;  // byte columns at a time: whole cache lines of `stored`
  const int64_t columns = outputs / 2, width = inputs / 2;
  parallel_for((columns + kBlock - 1) / kBlock, [&](int64_t block) {
    const int64_t last = (block + 1) * kBlock < columns ? (block + 1) * kBlock : columns;
    for (int64_t begin = 0; begin < width; begin += kBlock)
      for (int64_t j = block * kBlock; j < last; j++)
        for (int64_t i = begin; i < begin + kBlock && i < width; i++) {
          const uint8_t a = stored[2 * i * columns + j] ^ 0x88, b = stored[(2 * i + 1) * columns + j] ^ 0x88;
          out[2 * j * width + i] = static_cast<uint8_t>((a & 15) | b << 4);
          out[(2 * j + 1) * width + i] = static_cast<uint8_t>(a >> 4 | (b & 0xF0));
        }
  });
}

// ---- operators: x [.., inputs], then the parameters, then out [.., outputs] ----------------------------------------------

// weight int8 [outputs, inputs], w_scale [outputs], bias [outputs] (or [1]: none)
OPERATOR(PanguW8A8Dynamic) {
  const Arguments a(params, ndims, shapes);
  Linear p{};
  p.weight = a.data<uint8_t>(1), p.scale = a.data<float>(2), p.bias = a.bias(3, a.dim(1, 0));
  p.y = a.data<float>(4);
  p.bits = 8, p.rows = a.rows(0), p.inputs = p.group = a.dim(1, 1), p.outputs = a.dim(1, 0);
  linear(p, rows_of(a.data<float>(0), p.inputs));
  return 0;
}
SHAPE_OF_LINEAR(PanguW8A8Dynamic)

// weight, deq_scale [outputs], input_scale [inputs], input_offset int8 [inputs], quant_bias int32 [outputs], bias
OPERATOR(PanguW8A8Static) {
  const Arguments a(params, ndims, shapes);
  Linear p{};
  p.weight = a.data<uint8_t>(1), p.scale = a.data<float>(2), p.input_scale = a.data<float>(3);
  p.input_offset = a.data<int8_t>(4), p.sum_bias = a.data<int32_t>(5), p.bias = a.bias(6, a.dim(1, 0));
  p.y = a.data<float>(7);
  p.bits = 8, p.rows = a.rows(0), p.inputs = p.group = a.dim(1, 1), p.outputs = a.dim(1, 0);
  linear(p, rows_of(a.data<float>(0), p.inputs));
  return 0;
}
SHAPE_OF_LINEAR(PanguW8A8Static)

// weight uint8 [outputs, inputs / 2], group_scale [outputs, groups], bias
OPERATOR(PanguW4A8Dynamic) {
  const Arguments a(params, ndims, shapes);
  Linear p{};
  p.weight = a.data<uint8_t>(1), p.scale = a.data<float>(2), p.bias = a.bias(3, a.dim(1, 0));
  p.y = a.data<float>(4);
  p.bits = 4, p.rows = a.rows(0), p.inputs = 2 * a.dim(1, 1), p.outputs = a.dim(1, 0), p.group = p.inputs / a.dim(2, 1);
  linear(p, rows_of(a.data<float>(0), p.inputs));
  return 0;
}
SHAPE_OF_LINEAR(PanguW4A8Dynamic)

// x has integers from -128 to 127 as floats; weight and group_scale as in PanguW4A8Dynamic, ones [inputs], zeros int8 [inputs]:
// what PanguW4A8Dynamic computes before the token's scale and the bias
OPERATOR(PanguW4A8Codes) {
  const Arguments a(params, ndims, shapes);
  Linear p{};
  p.weight = a.data<uint8_t>(1), p.scale = a.data<float>(2), p.input_scale = a.data<float>(3);
  p.input_offset = a.data<int8_t>(4), p.y = a.data<float>(5);
  p.bits = 4, p.rows = a.rows(0), p.inputs = 2 * a.dim(1, 1), p.outputs = a.dim(1, 0), p.group = p.inputs / a.dim(2, 1);
  linear(p, rows_of(a.data<float>(0), p.inputs));
  return 0;
}
SHAPE_OF_LINEAR(PanguW4A8Codes)
}
