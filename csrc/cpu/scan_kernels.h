// Vectorised inner loops of corner and center pooling, for the instruction set of this processor.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "simd.h"

namespace d2ext {

template <typename scalar_t>
using cpu_arithmetic_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

// Adjacent lines that a column loop keeps in registers.
template <typename T>
constexpr int64_t kScanColumns = 4 * Simd<T>::kLanes;

namespace scans {

template <typename T>
using Vector = typename Simd<T>::Vector;
template <typename T>
using Mask = typename Simd<T>::Mask;
template <typename T>
using Integer = std::conditional_t<std::is_same_v<T, double>, int64_t, int32_t>;

template <typename T>
constexpr T kLowest = -std::numeric_limits<T>::infinity();

}  // namespace scans

// The loops of scan_loops.h, compiled for one instruction set.
template <typename scalar_t>
struct ScanKernels {
  using T = cpu_arithmetic_t<scalar_t>;
  using I = scans::Integer<T>;

  void (*column_scan)(const scalar_t* x, const scalar_t* addend, scalar_t* out, int64_t length,
                      int64_t step, int64_t count);
  void (*column_scan_backward)(const scalar_t* x, const scalar_t* grad, scalar_t* grad_x,
                               int64_t length, int64_t step, int64_t count, I* taken);
  void (*row_scan)(const scalar_t* x, const scalar_t* addend, scalar_t* out, int64_t length,
                   bool reverse);
  void (*row_scan_backward)(const scalar_t* x, const scalar_t* grad, scalar_t* grad_x,
                            int64_t length, bool reverse, I* taken);
  void (*center_plane)(const scalar_t* vertical, const scalar_t* horizontal, scalar_t* out,
                       int64_t height, int64_t width, T* maxima);
  void (*center_plane_backward)(const scalar_t* grad, const scalar_t* vertical,
                                const scalar_t* horizontal, scalar_t* grad_vertical,
                                scalar_t* grad_horizontal, int64_t height, int64_t width, T* maxima,
                                T* sums, I* holders);
};

#if defined(__clang__)
#define D2EXT_SHUFFLE(a, b, INDEX, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define D2EXT_SHUFFLE(a, b, INDEX, ...) __builtin_shuffle(a, b, (INDEX){__VA_ARGS__})
#endif

namespace scans {
#define D2EXT_LOOPS "scan_loops.h"
#include "each_target.h"
}  // namespace scans

#undef D2EXT_SHUFFLE

template <typename scalar_t>
const ScanKernels<scalar_t>& scan_kernels() {
  static const ScanKernels<scalar_t> kernels = [] {
#ifdef D2EXT_X86_TARGETS
    if (has_avx512()) {
      return scans::avx512::scan_kernels<scalar_t>();
    }
    if (has_avx2()) {
      return scans::avx2::scan_kernels<scalar_t>();
    }
#endif
    return scans::baseline::scan_kernels<scalar_t>();
  }();
  return kernels;
}

}  // namespace d2ext
