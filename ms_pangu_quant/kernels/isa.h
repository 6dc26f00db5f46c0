// Vectors of 16 lanes that every compiler target can hold, and how one source is compiled for several instruction sets.
//
// A kernel's body is a header that every_isa.h includes once for each instruction set, in a namespace of its own, with
// PANGU_LEVEL 2 for AVX512-VNNI, 1 for AVX2, 0 for none in particular. Standard headers come before, so that no inline
// function of theirs is compiled for an instruction set the CPU may lack. DISPATCH(call) is the call for this CPU's set.
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

#if PANGU_X86
#define DISPATCH(call) (isa() == VNNI ? vnni::call : isa() == AVX2 ? avx2::call : portable::call)
#else
#define DISPATCH(call) portable::call
#endif

#define PANGU_INLINE inline __attribute__((always_inline))

namespace pangu {

constexpr int kLanes = 16;
typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef int8_t i8x16 __attribute__((vector_size(16)));

}  // namespace pangu
