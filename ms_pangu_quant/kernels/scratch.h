// Memory that a thread keeps from call to call.
#pragma once
#include <cstdint>
#include <vector>

namespace pangu {

// Room for so many numbers in `kept`, which grows where it must, from a whole cache line on: a vector that lies across two costs
// twice as much to read.
template <class T>
T* room_for(int64_t count, std::vector<T>& kept) {
  constexpr size_t kLine = 64;
  const size_t needed = static_cast<size_t>(count) + kLine / sizeof(T);
  if (kept.size() < needed) kept.resize(needed);
  return kept.data() + (kLine - reinterpret_cast<uintptr_t>(kept.data()) % kLine) % kLine / sizeof(T);
}

}  // namespace pangu
