// Compiled without contraction of a * b + c: every instruction set gives the same bits.
#include "hadamard.h"

#include "isa.h"
#include "operator.h"
#include "parallel.h"
#include "scratch.h"

namespace pangu {
namespace {

#define PANGU_BODY "hadamard_body.h"
#include "every_isa.h"

}  // namespace

bool valid(const Hadamard& h) {
  if (h.order < 4 || h.order % 4 || h.size % h.order) return false;
  const int64_t columns = h.size / h.order;
  return columns > 0 && (columns & (columns - 1)) == 0;
}

void hadamard(const Hadamard& h, const float* x, float* y) {
  static thread_local std::vector<float> kept;
  float* sums = room_for(64 * h.order, kept);
  DISPATCH(hadamard_row(h, x, y, sums));
}

}  // namespace pangu

using namespace pangu;

extern "C" {

// x [.., size], signs uint8 [order, order / 4], scale [1] -> like x
OPERATOR(PanguHadamard) {
  const Arguments a(params, ndims, shapes);
  const Hadamard h{a.data<uint8_t>(1), a.dim(1, 0), a.last(0), *a.data<float>(2)};
  if (!valid(h) || a.size(1) != h.order * h.order / 4) return 1;
  each_row(a.rows(0), h.size,
           [&](int64_t m) { hadamard(h, a.data<float>(0) + m * h.size, a.data<float>(3) + m * h.size); });
  return 0;
}
SHAPE_OF(PanguHadamard) { return std::vector<int64_t>(shapes[0], shapes[0] + ndims[0]); }
}
