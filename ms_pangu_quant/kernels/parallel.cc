#include "parallel.h"

#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace pangu {
namespace {

// A waiting thread spins this often before it sleeps: longer than the gap between two operators of one layer, short
// enough to leave the CPU to others between two calls of the network.
constexpr int kSpins = 4000;

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

std::atomic<int> wanted_threads{0};  // survives fork(); 0: one for each CPU

int allowed_threads() {
  if (const int wanted = wanted_threads.load()) return wanted;
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
  const unsigned found = std::thread::hardware_concurrency();
  return found ? static_cast<int>(found) : 1;
}

class Pool {
 public:
  explicit Pool(int threads) : threads_(threads), owner_(getpid()) {
    for (int i = 1; i < threads_; i++) std::thread(&Pool::loop, this).detach();
  }

  int threads() const { return threads_; }
  bool usable() const { return owner_ == getpid(); }  // threads do not survive fork()

  void run(int64_t count, void (*call)(const void*, int64_t), const void* context) {
    bool idle = false;
    if (threads_ == 1 || count < 2 || count >= kClosed || !busy_.compare_exchange_strong(idle, true)) {
      for (int64_t i = 0; i < count; i++) call(context, i);
      return;
    }
    const uint64_t generation = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
    ticket_.store(generation << 32 | kClosed);  // from here on no one can claim, so the job may be replaced
    call_.store(call, std::memory_order_relaxed);
    context_.store(context, std::memory_order_relaxed);
    count_.store(count, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    ticket_.store(generation << 32);
    if (sleepers_.load() > 0) {
      std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_all();
    }
    while (claim()) {
    }
    // Only what others have begun is waited for, never a thread that has not woken up.
    for (int spins = 0; done_.load(std::memory_order_acquire) < count;) {
      relax();
      if (++spins > kSpins) std::this_thread::yield(), spins = 0;
    }
    busy_.store(false);
  }

 private:
  static constexpr int64_t kClosed = 0xffffffff;

  // Does one piece of the job; false if none is left. A claim succeeds only if the ticket has not changed since the job was
  // read, and the ticket holds the job's number: a late thread cannot run a piece of another job.
  bool claim() {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    const int64_t i = static_cast<int64_t>(ticket & 0xffffffff);
    const auto call = call_.load(std::memory_order_relaxed);
    const auto context = context_.load(std::memory_order_relaxed);
    if (i >= count_.load(std::memory_order_relaxed)) return false;
    if (ticket_.compare_exchange_strong(ticket, ticket + 1, std::memory_order_acq_rel)) {
      call(context, i);
      done_.fetch_add(1, std::memory_order_release);
    }
    return true;
  }

  void loop() {
    for (uint64_t seen = 0;;) {
      for (int spins = 0; ticket_.load() >> 32 == seen && spins < kSpins; spins++) relax();
      if (ticket_.load() >> 32 == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        sleepers_.fetch_add(1);
        wake_.wait(lock, [&] { return ticket_.load() >> 32 != seen; });
        sleepers_.fetch_sub(1);
      }
      seen = ticket_.load() >> 32;
      while ((ticket_.load() & 0xffffffff) == kClosed) relax();  // the job is being written
      while (claim()) {
      }
    }
  }

  const int threads_;
  const pid_t owner_;
  std::atomic<bool> busy_{false};
  std::atomic<uint64_t> ticket_{kClosed};  // number of the job << 32 | next piece
  std::atomic<void (*)(const void*, int64_t)> call_{nullptr};
  std::atomic<const void*> context_{nullptr};
  std::atomic<int64_t> count_{0}, done_{0};
  std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};

std::mutex pool_mutex;
std::atomic<Pool*> current{nullptr};

Pool& pool(int threads = 0) {
  Pool* found = current.load(std::memory_order_acquire);
  if (found && found->usable() && threads == 0) return *found;
  std::lock_guard<std::mutex> lock(pool_mutex);
  found = current.load();
  if (!found || !found->usable() || (threads && threads != found->threads())) {
    found = new Pool(threads ? threads : allowed_threads());  // an old one is left to its sleeping threads
    current.store(found, std::memory_order_release);
  }
  return *found;
}

Isa best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni"))
    return VNNI;
  if (avx2) return AVX2;
#endif
  return PORTABLE;
}

const Isa kBest = best();
std::atomic<int> selected{-1};

}  // namespace

Isa isa() {
  const int chosen = selected.load(std::memory_order_relaxed);
  return chosen < 0 ? kBest : static_cast<Isa>(chosen);
}

namespace detail {
void run(int64_t count, void (*call)(const void*, int64_t), const void* context) { pool().run(count, call, context); }
}  // namespace detail

}  // namespace pangu

// For Python, through ctypes.
extern "C" {
#define EXPORT __attribute__((visibility("default")))
EXPORT int pangu_best_isa() { return pangu::kBest; }
EXPORT int pangu_isa() { return pangu::isa(); }
// Use a lesser path than the best, for tests and comparisons; returns the one in use. -1 is the best.
EXPORT int pangu_select(int isa) {
  pangu::selected.store(isa <= pangu::kBest ? isa : -1);
  return pangu::isa();
}
EXPORT int pangu_threads(int wanted) {  // 0 asks
  if (wanted > 0) pangu::wanted_threads.store(wanted);
  return pangu::pool(wanted).threads();
}
}
