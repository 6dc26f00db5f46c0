// What this machine can do at most, to set beside what the kernels reach: all threads, registers only, or memory only.
#include <chrono>
#include <memory>
#include <vector>

#include "isa.h"
#include "operator.h"
#include "parallel.h"

namespace pangu {
namespace {

#define PANGU_BODY "limits_body.h"
#include "every_isa.h"

// Calls f(piece) for one piece a thread, and returns (sum of what it returns) / seconds; the best of `repeats`.
template <class F>
double best_rate(int threads, int repeats, const F& f) {
  std::vector<double> done(threads);
  double best = 0;
  for (int i = 0; i < repeats; i++) {
    const auto start = std::chrono::steady_clock::now();
    parallel_for(threads, [&](int64_t piece) { done[piece] = f(piece); });
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    double total = 0;
    for (const double each : done) total += each;
    best = total / seconds > best ? total / seconds : best;
  }
  return best;
}

}  // namespace
}  // namespace pangu

using namespace pangu;

extern "C" {

EXPORT int pangu_threads(int wanted);

// Operations a second: integers 1 for int8 products summed in int32, 0 for float32.
EXPORT double pangu_peak(int integers) {
  const int threads = pangu_threads(0);
  std::vector<float> sink(16 * threads, 0.0f);
  return best_rate(threads, 10, [&](int64_t piece) { 
    float* to = &sink[16 * piece];
    return integers ? DISPATCH(int8_loop(400000, to)) : DISPATCH(fp32_loop(400000, to));
   });
}

// Bytes a second read from memory, from a buffer of `megabytes` for each thread, larger than any cache.
EXPORT double pangu_bandwidth(int megabytes, int repeats) {
  const int threads = pangu_threads(0);
  const int64_t words = static_cast<int64_t>(megabytes) * (1 << 20) / 8;
  std::unique_ptr<uint64_t[]> data(new uint64_t[words * threads]);
  std::vector<uint64_t> sink(8 * threads);
  parallel_for(threads, [&](int64_t piece) { memset(&data[piece * words], 1, words * 8); });
  return best_rate(threads, repeats, [&](int64_t piece) {
    const uint64_t* from = &data[piece * words];
    uint64_t sum[8] = {};
    for (int64_t i = 0; i < words; i += 8)
      for (int j = 0; j < 8; j++) sum[j] += from[i + j];
    for (int j = 0; j < 8; j++) sink[8 * piece] += sum[j];
    return 8.0 * static_cast<double>(words);
  });
}
}
