// Inner loops of prototype mask assembly, each over one row of cells or pixels. Included by
// each_target.h, once for each instruction set.

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
D2EXT_TARGET void probability_row(const T* prototypes, int64_t stride, const T* coefficients,
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
D2EXT_TARGET void interpolate_row(const T* cells, const int32_t* low, const int32_t* high,
                                  const T* low_weight, const T* high_weight, int64_t begin,
                                  int64_t end, T* __restrict__ output) {
  for (int64_t x = begin; x < end; ++x) {
    output[x] = low_weight[x] * cells[low[x]] + high_weight[x] * cells[high[x]];
  }
}

// output[x] = low_weight * low[x] + high_weight * high[x] > threshold on [begin, end).
// low and high may be read up to one vector past end.
template <typename T>
D2EXT_TARGET void threshold_row(const T* low, const T* high, T low_weight, T high_weight,
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
D2EXT_TARGET void gradient_rows(const T* prototypes, int64_t stride, const T* coefficients,
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

template <typename T>
RowKernels<T> row_kernels() {
  return {probability_row<T>, interpolate_row<T>, threshold_row<T>, gradient_rows<T>};
}
