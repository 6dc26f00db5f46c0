// A small pool of threads, and which instructions the kernels use.
#pragma once
#include <cstdint>

namespace pangu {

// Calls f(i) for i in 0..count-1 on all threads, each i once. What f(i) computes must not depend on who computes it: then
// results do not depend on the number of threads. A call from inside f, or while another caller holds the pool, runs
// serially. Threads: as pangu_threads() was told, else one for each CPU this process may run on.
template <class F>
void parallel_for(int64_t count, const F& f);

enum Isa : int { PORTABLE = 0, AVX2 = 1, VNNI = 2 };

Isa isa();  // the best this CPU has, unless pangu_select() chose a lesser one

namespace detail {
void run(int64_t count, void (*call)(const void*, int64_t), const void* context);
}

template <class F>
void parallel_for(int64_t count, const F& f) {
  detail::run(count, [](const void* context, int64_t i) { (*static_cast<const F*>(context))(i); }, &f);
}

// f(row) for each of so many rows of so many floats; serially where threads would cost more than they save.
template <class F>
void each_row(int64_t rows, int64_t floats, const F& f) {
  constexpr int64_t kSmall = 16384;
  if (rows * floats < kSmall) {
    for (int64_t m = 0; m < rows; m++) f(m);
    return;
  }
  const int64_t at_once = floats < kSmall / 4 ? kSmall / 4 / (floats ? floats : 1) : 1;
  parallel_for((rows + at_once - 1) / at_once, [&](int64_t i) {
    for (int64_t m = i * at_once; m < rows && m < (i + 1) * at_once; m++) f(m);
  });
}

}  // namespace pangu
