// Vectors of 16 lanes that every compiler target can hold, and how one source is compiled for several instruction sets.
//
// A kernel's body is a header that is included once for each instruction set, in a namespace of its own, between
// PANGU_BEGIN_x and PANGU_END. Standard headers come before, so that no inline function of theirs is compiled for an
// instruction set the CPU may lack.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#define PANGU_X86 1
#endif

#if defined(__clang__)
#define PANGU_STRING(x) #x
#define PANGU_TARGET(set) _Pragma(PANGU_STRING(clang attribute push(__attribute__((target(set))), apply_to = function)))
#define PANGU_END _Pragma("clang attribute pop")
#else
#define PANGU_STRING(x) #x
#define PANGU_TARGET(set) _Pragma("GCC push_options") _Pragma(PANGU_STRING(GCC target(set)))
#define PANGU_END _Pragma("GCC pop_options")
#endif
#define PANGU_BEGIN_VNNI PANGU_TARGET("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#define PANGU_BEGIN_AVX2 PANGU_TARGET("avx2,fma")

#define PANGU_INLINE inline __attribute__((always_inline))

namespace pangu {

constexpr int kLanes = 16;
typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef int8_t i8x16 __attribute__((vector_size(16)));

}  // namespace pangu
