// Quantized linear layers: y[m, n] = sum_k a[m, k] w[n, k] * scales + bias, a in int8, w in int8 or int4, sums in int32.
//
// Packed weights. W [out, in] is stored in panels of 64 outputs (the last may be narrower, n outputs), each in the bytes its
// rows had before, so packing is done in place. A panel is a sequence of segments: one over all inputs, or one for each
// group of inputs that has its own scale. A segment is a sequence of steps, [n][4] bytes each:
//   int8   a step is 4 inputs; a byte is code + 128
//   int4   a step is 8 inputs; byte b has input b in the low nibble and input 4 + b in the high one, each code + 8
// Inputs that do not fill a step are [n][left] bytes at the segment's end. (int8: left = inputs % 4 bytes; int4: inputs % 8 / 2
// bytes, byte b with inputs 2b and 2b + 1.) The offset makes the weight the unsigned operand that vpdpbusd wants; the sum of
// the activations times the offset is subtracted from the accumulator. Every partial sum fits
// int32 up to 65536 inputs.
#pragma once
#include <cstdint>
#include <functional>

namespace pangu {

constexpr int kPanel = 64;

struct Linear {
  const uint8_t* weight;  // packed
  int bits;               // 8 or 4
  int64_t rows, inputs, outputs;
  int64_t group;          // inputs with a common scale; inputs: one scale for each output
  const float* scale;     // dynamic: [outputs], or in panels [groups][n]; static: the factor on the integer sum [outputs]
  const float* bias;      // [outputs] or null
  const float* residual;  // [rows, outputs], added last, or null
  float* y;               // [rows, outputs]
  // Static activations: code = clamp(round(x * input_scale[k]) + input_offset[k]). Null: dynamic, scale = absmax / 127.
  const float* input_scale;
  const int8_t* input_offset;
  const int32_t* sum_bias;  // [outputs], added to the integer sum

  int64_t groups() const { return inputs / group; }
  int64_t step_inputs() const { return bits == 8 ? 4 : 8; }
  int64_t segment_bytes(int64_t width) const { return width * group * bits / 8; }
  int64_t padded_group() const { return (group + 7) / 8 * 8; }
};

struct Codes {
  const int8_t* codes;  // [rows][stride]; every segment begins at a multiple of padded_group and ends in zeros
  int64_t stride;
  const int32_t* sums;  // [rows][groups]: of the codes of a segment
  const float* scale;   // [rows]
};

// Row m of the input, which may be computed into `room`, as long as the row.
using InputRow = std::function<const float*(int64_t m, float* room)>;

void linear(Linear p, const InputRow& input);

}  // namespace pangu
