// Power means of scaled rows and what each channel has in them (transforms/smooth_search.py, weighed_means).
#include <algorithm>
#include <cmath>
#include <vector>

#include "isa.h"
#include "operator.h"
#include "parallel.h"
#include "scratch.h"

namespace pangu {
namespace {

typedef double f64x8 __attribute__((vector_size(64)));

struct Means {
  const float* values;
  const double *factor, *weight;
  int64_t groups, width, squarings;
  double* squares;
};

#define PANGU_BODY "mean_body.h"
#include "every_isa.h"

}  // namespace
}  // namespace pangu

using namespace pangu;

extern "C" {

// values [rows, groups * width] >= 0, factor [groups * width], weight [rows] -> squares [rows, groups], shares [pieces, groups *
// width], each piece of so many rows but for the last.
EXPORT void pangu_power_means(const float* values, const double* factor, const double* weight, int64_t rows, int64_t groups,
                              int64_t width, int64_t squarings, int64_t piece, double* squares, double* shares) {
  const Means m{values, factor, weight, groups, width, squarings, squares};
  parallel_for((rows + piece - 1) / piece, [&](int64_t i) {
    static thread_local std::vector<double> kept;
    double* room = room_for((width + 7) / 8 * 8, kept);
    double* own = shares + i * groups * width;
    std::fill(own, own + groups * width, 0.0);
    for (int64_t row = i * piece; row < rows && row < (i + 1) * piece; row++) DISPATCH(means_of_row(m, row, room, own));
  });
}
}
