// Of several scales of a group of weights the one with the least weighted error (quantizers/clip.py).
#include <algorithm>
#include <vector>

#include "isa.h"
#include "operator.h"
#include "parallel.h"
#include "scratch.h"

namespace pangu {
namespace {

struct Search {
  const float *weight, *scales, *factors;
  int64_t rows, groups, width, count;
  float least, most;
  float* chosen;
};

#define PANGU_BODY "scale_body.h"
#include "every_isa.h"

}  // namespace
}  // namespace pangu

using namespace pangu;

extern "C" {

// weight [rows, groups * width], scales [count, rows, groups], factors [groups * width] -> chosen [rows, groups], the first of
// equal ones.
EXPORT void pangu_best_scale(const float* weight, const float* scales, const float* factors, int64_t rows, int64_t groups,
                             int64_t width, int64_t count, int64_t least, int64_t most, float* chosen) {
  const Search s{weight, scales, factors, rows, groups, width, count, float(least), float(most), chosen};
  parallel_for(rows, [&](int64_t row) {
    static thread_local std::vector<float> kept;
    const int64_t wide = (width + kLanes - 1) / kLanes * kLanes;
    float* group = room_for(2 * wide, kept);
    DISPATCH(best_scales(s, row, wide, group, group + wide));
  });
}
}
