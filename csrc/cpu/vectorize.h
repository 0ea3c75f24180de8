// Loops compiled for several instruction sets; the widest that the processor has is selected at run
// time: a wheel built anywhere runs fast everywhere. Loops are plain; the compiler
// vectorises them.
#pragma once

namespace d2ext {

#if defined(__x86_64__) && defined(__GNUC__)
#define D2EXT_AVX2 "avx2,fma"
#define D2EXT_AVX512 D2EXT_AVX2 ",avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"

// flatten: all that the loop calls becomes part of the function, and so is compiled for its target.
template <typename Loop>
__attribute__((target(D2EXT_AVX2), flatten)) void run_avx2(const Loop& loop) {
  loop();
}

template <typename Loop>
__attribute__((target(D2EXT_AVX512), flatten)) void run_avx512(const Loop& loop) {
  loop();
}

template <typename Loop>
void vectorized(const Loop& loop) {
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  static const bool avx512 =
      avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512) {
    run_avx512(loop);
  } else if (avx2) {
    run_avx2(loop);
  } else {
    loop();
  }
}
#else
template <typename Loop>
void vectorized(const Loop& loop) {
  loop();
}
#endif

}  // namespace d2ext
