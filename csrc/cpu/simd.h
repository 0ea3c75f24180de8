// Vectors of 64 bytes, written with the vector extensions that GCC and Clang share, without
// intrinsics, so that other architectures (Arm) compile the same source; and which instruction sets
// this processor has.
//
// Loops over vectors are compiled for several instruction sets and the widest one that the
// processor has is chosen when the library is loaded: a wheel built anywhere runs fast everywhere.
// GCC splits vectors to what a function's own target has before it inlines the function, so that
// each function must name its target, small ones too: each_target.h includes a file of loops once
// for each.
#pragma once

#include <cstdint>

namespace d2ext {

// 64 bytes of T: one AVX-512 register; the compiler splits it where registers are narrower.
template <typename T>
struct Simd;

template <>
struct Simd<float> {
  static constexpr int kLanes = 16;
  typedef float Vector __attribute__((vector_size(64)));
  typedef int32_t Mask __attribute__((vector_size(64)));
  typedef uint8_t Bytes __attribute__((vector_size(16)));
};

template <>
struct Simd<double> {
  static constexpr int kLanes = 8;
  typedef double Vector __attribute__((vector_size(64)));
  typedef int64_t Mask __attribute__((vector_size(64)));
  typedef uint8_t Bytes __attribute__((vector_size(8)));
};

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define D2EXT_X86_TARGETS

inline bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

inline bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

}  // namespace d2ext
