// The inner loop of GPTQ (quantizers/gptq.py, round_block, which is its specification): the bits are those of the operations as
// written there, one after another.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "isa.h"
#include "operator.h"
#include "parallel.h"

namespace pangu {
namespace {

struct Rounded {
  const float *target, *inside, *steps;
  float* carried;
  const int64_t* group;
  float least, most;
  int64_t channels, rows;
  int8_t* codes;
  float* error;
};

#define PANGU_BODY "gptq_body.h"
#include "every_isa.h"

}  // namespace
}  // namespace pangu

using namespace pangu;

extern "C" {

// target, carried, error, codes [channels, rows]; inside [channels, channels]; steps [groups, rows]; group [channels].
EXPORT void pangu_gptq_block(const float* target, float* carried, const float* inside, const float* steps,
                             const int64_t* group, int64_t least, int64_t most, int64_t channels, int64_t rows, int8_t* codes,
                             float* error) {
  const Rounded r{target, inside, steps, carried, group, float(least), float(most), channels, rows, codes, error};
  constexpr int64_t kOnce = 4 * kLanes;
  parallel_for((rows + kOnce - 1) / kOnce, [&](int64_t i) {
    const int64_t first = i * kOnce, last = first + kOnce < rows ? first + kOnce : rows;
    DISPATCH(round_rows(r, first, last));
  });
}
}
