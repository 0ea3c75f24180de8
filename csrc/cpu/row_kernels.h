// Vectorised inner loops of prototype mask assembly, for the instruction set of this processor.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace d2ext {

// The loops of row_loops.h, compiled for one instruction set.
template <typename T>
struct RowKernels {
  void (*probability_row)(const T* prototypes, int64_t stride, const T* coefficients,
                          int64_t channels, int64_t begin, int64_t end, T* output);
  void (*interpolate_row)(const T* cells, const int32_t* low, const int32_t* high,
                          const T* low_weight, const T* high_weight, int64_t begin, int64_t end,
                          T* output);
  void (*threshold_row)(const T* low, const T* high, T low_weight, T high_weight, T threshold,
                        int64_t begin, int64_t end, uint8_t* output);
  void (*gradient_rows)(const T* prototypes, int64_t stride, const T* coefficients,
                        int64_t channels, const T* grad_logits, int64_t count, int64_t begin,
                        int64_t end, T* grad_prototypes, T* grad_coefficients);
};

namespace rows {
#define D2EXT_LOOPS "row_loops.h"
#include "each_target.h"
}  // namespace rows

template <typename T>
const RowKernels<T>& row_kernels() {
  static const RowKernels<T> kernels = [] {
#ifdef D2EXT_X86_TARGETS
    if (has_avx512()) {
      return rows::avx512::row_kernels<T>();
    }
    if (has_avx2()) {
      return rows::avx2::row_kernels<T>();
    }
#endif
    return rows::baseline::row_kernels<T>();
  }();
  return kernels;
}

}  // namespace d2ext
