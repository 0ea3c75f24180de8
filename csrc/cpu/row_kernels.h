// Vectorised inner loops of prototype mask assembly, each over one row of cells or pixels.
//
// Every loop is compiled for several instruction sets and the widest one that the processor has is
// chosen when the library is loaded: a wheel built anywhere runs fast everywhere. The loops are
// written with the vector extensions that GCC and Clang share, without intrinsics, so other
// architectures (Arm) compile the same source.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace d2ext {

#define D2EXT_INLINE inline __attribute__((always_inline))

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

namespace rows {

template <typename V, typename T>
D2EXT_INLINE void load(V& vector, const T* source) {
  std::memcpy(&vector, source, sizeof(V));
}

template <typename V, typename T>
D2EXT_INLINE void store(T* target, const V& vector) {
  std::memcpy(target, &vector, sizeof(V));
}

// exp(z), within 2 units in the last place where that is a normal number; NaN stays NaN.
// exp(z) = 2^n exp(r) with z = n ln 2 + r, |r| <= ln(2) / 2, and exp(r) by its Taylor polynomial of
// degree 7 (relative error below 6e-9). z is clamped to the range in which 2^n is a normal number.
D2EXT_INLINE void exponential(Simd<float>::Vector& z) {
  using V = Simd<float>::Vector;
  using I = Simd<float>::Mask;
  const V lowest = V{} - 87.0f;
  const V highest = V{} + 87.0f;
  z = z < lowest ? lowest : z;
  z = z > highest ? highest : z;
  // Adding 1.5 * 2^23 rounds to the nearest integer.
  const V shifted = z * 1.44269504f + 12582912.0f;
  const V n = shifted - 12582912.0f;
  // ln 2 in two parts, the first exact in few bits, so that z - n ln 2 keeps its precision.
  const V r = (z - n * 0.693359375f) + n * 2.12194440e-4f;
  V e = r * (1.0f / 5040) + (1.0f / 720);
  e = e * r + (1.0f / 120);
  e = e * r + (1.0f / 24);
  e = e * r + (1.0f / 6);
  e = e * r + 0.5f;
  e = e * r + 1.0f;
  e = e * r + 1.0f;
  // shifted's mantissa holds n; move n + 127 into the exponent of a power of two. Casts between
  // vectors of one size keep the bits.
  const I bits = ((I)shifted + 127) << 23;
  z = e * (V)bits;
}

// 1 / (1 + exp(-x)), within 3 units in the last place; NaN stays NaN.
D2EXT_INLINE void sigmoid(Simd<float>::Vector& x) {
  x = -x;
  exponential(x);
  x = 1.0f / (1.0f + x);
}

D2EXT_INLINE void sigmoid(Simd<double>::Vector& x) {
  for (int i = 0; i < Simd<double>::kLanes; ++i) {
    x[i] = 1.0 / (1.0 + std::exp(-x[i]));
  }
}

// sigmoid(prototypes . coefficients) of `kVectors` vectors of cells.
template <typename T, int kVectors>
D2EXT_INLINE void probability_block(const T* prototypes, int64_t stride, const T* coefficients,
                                    int64_t channels, T* output) {
  using V = typename Simd<T>::Vector;
  constexpr int kLanes = Simd<T>::kLanes;
  V sums[kVectors] = {};
  for (int64_t c = 0; c < channels; ++c) {
    const T coefficient = coefficients[c];
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      V cells;
      load(cells, prototypes + c * stride + i * kLanes);
      sums[i] += cells * coefficient;
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kVectors; ++i) {
    sigmoid(sums[i]);
    store(output + i * kLanes, sums[i]);
  }
}

// prototypes: (channels, stride) of one grid row; begin and end: multiples of the vector's lanes.
template <typename T>
D2EXT_INLINE void probability_row(const T* prototypes, int64_t stride, const T* coefficients,
                                  int64_t channels, int64_t begin, int64_t end, T* output) {
  constexpr int kLanes = Simd<T>::kLanes;
  int64_t x = begin;
  for (; x + 4 * kLanes <= end; x += 4 * kLanes) {
    probability_block<T, 4>(prototypes + x, stride, coefficients, channels, output + x);
  }
  if (x + 2 * kLanes <= end) {
    probability_block<T, 2>(prototypes + x, stride, coefficients, channels, output + x);
    x += 2 * kLanes;
  }
  if (x < end) {
    probability_block<T, 1>(prototypes + x, stride, coefficients, channels, output + x);
  }
}

// output[x] = low_weight[x] * cells[low[x]] + high_weight[x] * cells[high[x]] on [begin, end).
template <typename T>
D2EXT_INLINE void interpolate_row(const T* cells, const int32_t* low, const int32_t* high,
                                  const T* low_weight, const T* high_weight, int64_t begin,
                                  int64_t end, T* __restrict__ output) {
  for (int64_t x = begin; x < end; ++x) {
    output[x] = low_weight[x] * cells[low[x]] + high_weight[x] * cells[high[x]];
  }
}

// output[x] = low_weight * low[x] + high_weight * high[x] > threshold on [begin, end).
// low and high may be read up to one vector past end.
template <typename T>
D2EXT_INLINE void threshold_row(const T* low, const T* high, T low_weight, T high_weight,
                                T threshold, int64_t begin, int64_t end, uint8_t* output) {
  using V = typename Simd<T>::Vector;
  using M = typename Simd<T>::Mask;
  using B = typename Simd<T>::Bytes;
  constexpr int kLanes = Simd<T>::kLanes;
  for (int64_t x = begin; x < end; x += kLanes) {
    V a;
    V b;
    load(a, low + x);
    load(b, high + x);
    const M above = (a * low_weight + b * high_weight > threshold) & 1;
    const B bytes = __builtin_convertvector(above, B);
    if (x + kLanes <= end) {
      store(output + x, bytes);
    } else {
      std::memcpy(output + x, &bytes, static_cast<size_t>(end - x));
    }
  }
}

// For one detection and `count` grid rows, with grad_logits = d loss / d logit of each cell:
//   grad_prototypes[y][c][x] += coefficients[c] * grad_logits[y][x]
//   grad_coefficients[c] = sum over y and x of prototypes[y][c][x] * grad_logits[y][x]
// prototypes and grad_prototypes: (count, channels, stride); grad_logits: (count, stride);
// begin and end: multiples of the vector's lanes.
template <typename T>
D2EXT_INLINE void gradient_rows(const T* prototypes, int64_t stride, const T* coefficients,
                                int64_t channels, const T* grad_logits, int64_t count,
                                int64_t begin, int64_t end, T* grad_prototypes,
                                T* grad_coefficients) {
  using V = typename Simd<T>::Vector;
  constexpr int kLanes = Simd<T>::kLanes;
  for (int64_t c = 0; c < channels; ++c) {
    const T coefficient = coefficients[c];
    V sum = {};
    for (int64_t y = 0; y < count; ++y) {
      const T* row = prototypes + (y * channels + c) * stride;
      T* target = grad_prototypes + (y * channels + c) * stride;
      for (int64_t x = begin; x < end; x += kLanes) {
        V grad;
        V cells;
        V total;
        load(grad, grad_logits + y * stride + x);
        load(cells, row + x);
        load(total, target + x);
        sum += cells * grad;
        store(target + x, V(total + grad * coefficient));
      }
    }
    T lanes = 0;
    for (int i = 0; i < kLanes; ++i) {
      lanes += sum[i];
    }
    grad_coefficients[c] = lanes;
  }
}

}  // namespace rows

// The loops above, compiled for one instruction set.
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

#define D2EXT_DEFINE_ROW_KERNELS(SUFFIX, TARGET)                                                   \
  template <typename T>                                                                            \
  TARGET void probability_row_##SUFFIX(const T* prototypes, int64_t stride, const T* coefficients, \
                                       int64_t channels, int64_t begin, int64_t end, T* output) {  \
    rows::probability_row<T>(prototypes, stride, coefficients, channels, begin, end, output);      \
  }                                                                                                \
  template <typename T>                                                                            \
  TARGET void interpolate_row_##SUFFIX(const T* cells, const int32_t* low, const int32_t* high,    \
                                       const T* low_weight, const T* high_weight, int64_t begin,   \
                                       int64_t end, T* output) {                                   \
    rows::interpolate_row<T>(cells, low, high, low_weight, high_weight, begin, end, output);       \
  }                                                                                                \
  template <typename T>                                                                            \
  TARGET void threshold_row_##SUFFIX(const T* low, const T* high, T low_weight, T high_weight,     \
                                     T threshold, int64_t begin, int64_t end, uint8_t* output) {   \
    rows::threshold_row<T>(low, high, low_weight, high_weight, threshold, begin, end, output);     \
  }                                                                                                \
  template <typename T>                                                                            \
  TARGET void gradient_rows_##SUFFIX(const T* prototypes, int64_t stride, const T* coefficients,   \
                                     int64_t channels, const T* grad_logits, int64_t count,        \
                                     int64_t begin, int64_t end, T* grad_prototypes,               \
                                     T* grad_coefficients) {                                       \
    rows::gradient_rows<T>(prototypes, stride, coefficients, channels, grad_logits, count, begin,  \
                           end, grad_prototypes, grad_coefficients);                               \
  }                                                                                                \
  template <typename T>                                                                            \
  RowKernels<T> row_kernels_##SUFFIX() {                                                           \
    return {probability_row_##SUFFIX<T>, interpolate_row_##SUFFIX<T>, threshold_row_##SUFFIX<T>,   \
            gradient_rows_##SUFFIX<T>};                                                            \
  }

D2EXT_DEFINE_ROW_KERNELS(baseline, )
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define D2EXT_X86_TARGETS
D2EXT_DEFINE_ROW_KERNELS(avx2, __attribute__((target("avx2,fma"))))
D2EXT_DEFINE_ROW_KERNELS(avx512,
                         __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))))
#endif

#ifdef D2EXT_X86_TARGETS
inline bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

inline bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

template <typename T>
RowKernels<T> choose_row_kernels() {
#ifdef D2EXT_X86_TARGETS
  if (has_avx512()) {
    return row_kernels_avx512<T>();
  }
  if (has_avx2()) {
    return row_kernels_avx2<T>();
  }
#endif
  return row_kernels_baseline<T>();
}

template <typename T>
const RowKernels<T>& row_kernels() {
  static const RowKernels<T> kernels = choose_row_kernels<T>();
  return kernels;
}

}  // namespace d2ext
