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

}  // namespace pangu
