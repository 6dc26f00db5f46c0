// Linear layers of floats for many tokens: calibration runs hundreds through each block. A weight lies in panels of 64
// outputs, [inputs][n] each, so it is packed once for all batches, where MindSpore's MatMul reorders it in every call.
// Equal to the plain operator up to rounding; a token's result does not depend on the others, nor on the threads.
#include <vector>

#include "isa.h"
#include "linear.h"
#include "operator.h"
#include "parallel.h"

namespace pangu {
namespace {

#define PANGU_BODY "matrix_body.h"
#include "every_isa.h"

constexpr int64_t kSlice = 1024;  // inputs: 256 KiB of a panel, a quarter of the L2 cache of current server CPUs

struct Matrix {
  const float *x, *weight, *bias;
  int64_t rows, inputs, outputs;
  float* y;
};

void panel(const Matrix& p, int64_t index) {
  static thread_local std::vector<float> sums, wide;
  const int64_t first = index * kPanel, n = p.outputs - first < kPanel ? p.outputs - first : kPanel;
  alignas(64) float bias[kPanel] = {};
  if (p.bias) memcpy(bias, p.bias + first, n * sizeof(float));
  float* y = p.y + first;
  int64_t stride = p.outputs;
  if (n < kPanel) {  // computed as a whole one, beside the outputs
    sums.resize(p.rows * kPanel), wide.assign(kSlice * kPanel, 0.0f);
    y = sums.data(), stride = kPanel;
  }
  for (int64_t begin = 0; begin < p.inputs; begin += kSlice) {
    const int64_t count = p.inputs - begin < kSlice ? p.inputs - begin : kSlice;
    const float* weight = p.weight + first * p.inputs + begin * n;
    if (n < kPanel) {
      for (int64_t k = 0; k < count; k++) memcpy(&wide[k * kPanel], weight + k * n, n * sizeof(float));
      weight = wide.data();
    }
    DISPATCH(slice(p.x + begin, p.rows, p.inputs, weight, count, begin ? nullptr : bias, y, stride));
  }
  if (n < kPanel)
    for (int64_t m = 0; m < p.rows; m++) memcpy(p.y + m * p.outputs + first, y + m * kPanel, n * sizeof(float));
}

}  // namespace
}  // namespace pangu

using namespace pangu;

extern "C" {

// weight float32 [outputs, inputs] -> panels, in place.
EXPORT void pangu_pack_f32(float* weight, int64_t outputs, int64_t inputs) {
  parallel_for((outputs + kPanel - 1) / kPanel, [&](int64_t index) {
    static thread_local std::vector<float> copy;
    const int64_t first = index * kPanel, n = outputs - first < kPanel ? outputs - first : kPanel;
    float* panel = weight + first * inputs;
    copy.assign(panel, panel + n * inputs);
    for (int64_t k = 0; k < inputs; k += kLanes)  // a cache line of each row at a time
      for (int64_t j = 0; j < n; j++)
        for (int64_t i = k; i < k + kLanes && i < inputs; i++) panel[i * n + j] = copy[j * inputs + i];
  });
}

// x [.., inputs], weight [outputs, inputs] packed, bias [outputs] (or [1]: none) -> [.., outputs]
OPERATOR(PanguFloat) {
  const Arguments a(params, ndims, shapes);
  const int64_t outputs = a.dim(1, 0);
  const Matrix p{a.data<float>(0), a.data<float>(1), a.bias(2, outputs), a.rows(0), a.dim(1, 1), outputs, a.data<float>(3)};
  parallel_for((outputs + kPanel - 1) / kPanel, [&](int64_t index) { panel(p, index); });
  return 0;
}
SHAPE_OF_LINEAR(PanguFloat)
}
