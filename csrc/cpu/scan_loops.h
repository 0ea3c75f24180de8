// Inner loops of corner and center pooling. Arithmetic is in T; scalar_t is the element type in
// memory. Included by each_target.h, once for each instruction set.

template <typename T, typename scalar_t>
D2EXT_INLINE void read(Vector<T>& vector, const scalar_t* source) {
  if constexpr (std::is_same_v<T, scalar_t>) {
    load(vector, source);
  } else {
    T values[Simd<T>::kLanes];
    for (int i = 0; i < Simd<T>::kLanes; ++i) {
      values[i] = static_cast<T>(source[i]);
    }
    load(vector, values);
  }
}

template <typename T, typename scalar_t>
D2EXT_INLINE void write(scalar_t* target, const Vector<T>& vector) {
  if constexpr (std::is_same_v<T, scalar_t>) {
    store(target, vector);
  } else {
    T values[Simd<T>::kLanes];
    store(values, vector);
    for (int i = 0; i < Simd<T>::kLanes; ++i) {
      target[i] = static_cast<scalar_t>(values[i]);
    }
  }
}

// b where it is greater or NaN, else a. V is a vector (Mask its comparison) or a number.
template <typename V>
D2EXT_INLINE void raise(V& a, const V& b) {
  a = (b > a) | (b != b) ? b : a;
}

// Whether x takes over from the running maximum m: strictly greater, NaN being the greatest.
template <typename V>
D2EXT_INLINE auto takes_over(const V& x, const V& m) {
  return (m == m) & ((x > m) | (x != x));
}

// ---------------------------------------------------------------- shifts within a vector

// Element i becomes element i - kStep of v, or i + kStep; what comes from outside is `fill`'s.
// V: a vector of 16 elements of 4 bytes, or of 8 of 8 bytes.
template <int kStep, typename V>
D2EXT_INLINE void shift_right(V& v, const V& fill) {
  constexpr int kS = kStep;
  if constexpr (sizeof(v[0]) == 4) {
    v = D2EXT_SHUFFLE(fill, v, Simd<float>::Mask, 16 - kS, 17 - kS, 18 - kS, 19 - kS, 20 - kS,
                      21 - kS, 22 - kS, 23 - kS, 24 - kS, 25 - kS, 26 - kS, 27 - kS, 28 - kS,
                      29 - kS, 30 - kS, 31 - kS);
  } else {
    v = D2EXT_SHUFFLE(fill, v, Simd<double>::Mask, 8 - kS, 9 - kS, 10 - kS, 11 - kS, 12 - kS,
                      13 - kS, 14 - kS, 15 - kS);
  }
}

template <int kStep, typename V>
D2EXT_INLINE void shift_left(V& v, const V& fill) {
  constexpr int kS = kStep;
  if constexpr (sizeof(v[0]) == 4) {
    v = D2EXT_SHUFFLE(v, fill, Simd<float>::Mask, kS, kS + 1, kS + 2, kS + 3, kS + 4, kS + 5,
                      kS + 6, kS + 7, kS + 8, kS + 9, kS + 10, kS + 11, kS + 12, kS + 13, kS + 14,
                      kS + 15);
  } else {
    v = D2EXT_SHUFFLE(v, fill, Simd<double>::Mask, kS, kS + 1, kS + 2, kS + 3, kS + 4, kS + 5,
                      kS + 6, kS + 7);
  }
}

// The elements kStep earlier (later) in scan order.
template <bool kReverse, int kStep, typename V>
D2EXT_INLINE void take_earlier(V& v, const V& fill) {
  kReverse ? shift_left<kStep>(v, fill) : shift_right<kStep>(v, fill);
}
template <bool kReverse, int kStep, typename V>
D2EXT_INLINE void take_later(V& v, const V& fill) {
  kReverse ? shift_right<kStep>(v, fill) : shift_left<kStep>(v, fill);
}

template <typename T, bool kReverse, int kStep>
D2EXT_INLINE void scan_step(Vector<T>& running) {
  Vector<T> earlier = running;
  take_earlier<kReverse, kStep>(earlier, Vector<T>{} + kLowest<T>);
  raise(earlier, running);
  running = earlier;
}

// Running maximum within a vector, in log2(lanes) steps.
template <typename T, bool kReverse>
D2EXT_INLINE void scan_vector(Vector<T>& running) {
  scan_step<T, kReverse, 1>(running);
  scan_step<T, kReverse, 2>(running);
  scan_step<T, kReverse, 4>(running);
  if constexpr (Simd<T>::kLanes == 16) {
    scan_step<T, kReverse, 8>(running);
  }
}

template <typename T, bool kReverse, int kStep>
D2EXT_INLINE void sum_step(Vector<T>& sums, Mask<T>& broken) {
  Vector<T> later = sums;
  Mask<T> later_broken = broken;
  take_later<kReverse, kStep>(later, Vector<T>{});
  take_later<kReverse, kStep>(later_broken, Mask<T>{});
  sums += broken ? Vector<T>{} : later;
  broken |= later_broken;
}

// Sums from each element on to the first break (broken: between it and the next), or to the end of
// the vector; broken becomes whether there was one.
template <typename T, bool kReverse>
D2EXT_INLINE void sum_runs(Vector<T>& sums, Mask<T>& broken) {
  sum_step<T, kReverse, 1>(sums, broken);
  sum_step<T, kReverse, 2>(sums, broken);
  sum_step<T, kReverse, 4>(sums, broken);
  if constexpr (Simd<T>::kLanes == 16) {
    sum_step<T, kReverse, 8>(sums, broken);
  }
}

// ---------------------------------------------------------------- lines across the memory

// `count` (<= kScanColumns) adjacent lines of `length` elements, `step` apart in scan order.
// out = running maximum (+ addend, unless null).
template <typename T, typename scalar_t, int kVectors>
D2EXT_INLINE void column_block(const scalar_t* x, const scalar_t* addend, scalar_t* out,
                               int64_t length, int64_t step) {
  constexpr int kLanes = Simd<T>::kLanes;
  Vector<T> running[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    running[v] = Vector<T>{} + kLowest<T>;
  }
  for (int64_t l = 0; l < length; ++l) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int64_t place = l * step + v * kLanes;
      Vector<T> value;
      read<T>(value, x + place);
      raise(running[v], value);
      if (addend == nullptr) {
        write<T>(out + place, running[v]);
      } else {
        read<T>(value, addend + place);
        write<T>(out + place, Vector<T>(running[v] + value));
      }
    }
  }
}

template <typename T, typename scalar_t>
D2EXT_TARGET void column_scan(const scalar_t* x, const scalar_t* addend, scalar_t* out,
                              int64_t length, int64_t step, int64_t count) {
  constexpr int kLanes = Simd<T>::kLanes;
  if (count == kScanColumns<T>) {
    column_block<T, scalar_t, 4>(x, addend, out, length, step);
    return;
  }
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) {
    column_block<T, scalar_t, 1>(x + c, addend == nullptr ? nullptr : addend + c, out + c, length,
                                 step);
  }
  for (; c < count; ++c) {
    T running = kLowest<T>;
    for (int64_t l = 0; l < length; ++l) {
      const int64_t place = l * step + c;
      raise(running, static_cast<T>(x[place]));
      out[place] = static_cast<scalar_t>(
          addend == nullptr ? running : running + static_cast<T>(addend[place]));
    }
  }
}

// grad_x of column_scan: in scan order a run begins with each element that takes over; the sum of
// the run's gradients goes to it. taken: room for length * kScanColumns.
template <typename T, typename scalar_t, int kVectors>
D2EXT_INLINE void column_block_backward(const scalar_t* x, const scalar_t* grad, scalar_t* grad_x,
                                        int64_t length, int64_t step, Integer<T>* taken) {
  constexpr int kLanes = Simd<T>::kLanes;
  Vector<T> running[kVectors];
  for (int64_t l = 0; l < length; ++l) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Vector<T> value;
      read<T>(value, x + l * step + v * kLanes);
      Mask<T> mask = Mask<T>{} - 1;
      if (l > 0) {
        mask = takes_over(value, running[v]);
        raise(running[v], value);
      } else {
        running[v] = value;
      }
      store(taken + (l * kVectors + v) * kLanes, mask);
    }
  }
  Vector<T> sums[kVectors] = {};
  for (int64_t l = length - 1; l >= 0; --l) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Vector<T> value;
      Mask<T> mask;
      read<T>(value, grad + l * step + v * kLanes);
      load(mask, taken + (l * kVectors + v) * kLanes);
      sums[v] += value;
      write<T>(grad_x + l * step + v * kLanes, Vector<T>(mask ? sums[v] : Vector<T>{}));
      sums[v] = mask ? Vector<T>{} : sums[v];
    }
  }
}

template <typename T, typename scalar_t>
D2EXT_TARGET void column_scan_backward(const scalar_t* x, const scalar_t* grad, scalar_t* grad_x,
                                       int64_t length, int64_t step, int64_t count,
                                       Integer<T>* taken) {
  constexpr int kLanes = Simd<T>::kLanes;
  if (count == kScanColumns<T>) {
    column_block_backward<T, scalar_t, 4>(x, grad, grad_x, length, step, taken);
    return;
  }
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) {
    column_block_backward<T, scalar_t, 1>(x + c, grad + c, grad_x + c, length, step, taken);
  }
  for (; c < count; ++c) {
    T running = kLowest<T>;
    for (int64_t l = 0; l < length; ++l) {
      const T value = static_cast<T>(x[l * step + c]);
      taken[l] = l == 0 || takes_over(value, running);
      raise(running, value);
    }
    T sum = 0;
    for (int64_t l = length - 1; l >= 0; --l) {
      sum += static_cast<T>(grad[l * step + c]);
      grad_x[l * step + c] = static_cast<scalar_t>(taken[l] ? sum : T(0));
      sum = taken[l] ? T(0) : sum;
    }
  }
}

// ---------------------------------------------------------------- lines along the memory

// Where block `b` of a line begins: blocks are counted in scan order. What is left of whole blocks
// comes last in it.
template <typename T, bool kReverse>
D2EXT_INLINE int64_t block_begin(int64_t length, int64_t b) {
  constexpr int kLanes = Simd<T>::kLanes;
  return kReverse ? length - (b + 1) * kLanes : b * kLanes;
}

template <typename T, typename scalar_t, bool kReverse>
D2EXT_TARGET void row_scan_loop(const scalar_t* x, const scalar_t* addend, scalar_t* out,
                                int64_t length) {
  constexpr int kLanes = Simd<T>::kLanes;
  T carry = kLowest<T>;
  const int64_t blocks = length / kLanes;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t begin = block_begin<T, kReverse>(length, b);
    Vector<T> running;
    read<T>(running, x + begin);
    scan_vector<T, kReverse>(running);
    Vector<T> all = Vector<T>{} + carry;
    raise(all, running);
    carry = all[kReverse ? 0 : kLanes - 1];
    if (addend != nullptr) {
      Vector<T> other;
      read<T>(other, addend + begin);
      all += other;
    }
    write<T>(out + begin, all);
  }
  for (int64_t i = blocks * kLanes; i < length; ++i) {
    const int64_t place = kReverse ? length - 1 - i : i;
    raise(carry, static_cast<T>(x[place]));
    out[place] =
        static_cast<scalar_t>(addend == nullptr ? carry : carry + static_cast<T>(addend[place]));
  }
}

// taken: room for `length`.
template <typename T, typename scalar_t, bool kReverse>
D2EXT_TARGET void row_scan_backward_loop(const scalar_t* x, const scalar_t* grad, scalar_t* grad_x,
                                         int64_t length, Integer<T>* taken) {
  constexpr int kLanes = Simd<T>::kLanes;
  const int64_t blocks = length / kLanes;
  T carry = kLowest<T>;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t begin = block_begin<T, kReverse>(length, b);
    Vector<T> value;
    read<T>(value, x + begin);
    Vector<T> running = value;
    scan_vector<T, kReverse>(running);
    Vector<T> all = Vector<T>{} + carry;
    const Vector<T> carried = all;
    raise(all, running);
    Vector<T> before = all;
    take_earlier<kReverse, 1>(before, carried);
    store(taken + begin, Mask<T>(takes_over(value, before)));
    carry = all[kReverse ? 0 : kLanes - 1];
  }
  for (int64_t i = blocks * kLanes; i < length; ++i) {
    const int64_t place = kReverse ? length - 1 - i : i;
    const T value = static_cast<T>(x[place]);
    taken[place] = takes_over(value, carry) ? -1 : 0;
    raise(carry, value);
  }
  // The first element takes over whatever it is, -inf too.
  taken[kReverse ? length - 1 : 0] = -1;

  T sum = 0;
  for (int64_t i = length - 1; i >= blocks * kLanes; --i) {
    const int64_t place = kReverse ? length - 1 - i : i;
    sum += static_cast<T>(grad[place]);
    grad_x[place] = static_cast<scalar_t>(taken[place] ? sum : T(0));
    sum = taken[place] ? T(0) : sum;
  }
  for (int64_t b = blocks - 1; b >= 0; --b) {
    const int64_t begin = block_begin<T, kReverse>(length, b);
    Vector<T> sums;
    Mask<T> holds;
    read<T>(sums, grad + begin);
    load(holds, taken + begin);
    Mask<T> broken = holds;
    take_later<kReverse, 1>(broken, Mask<T>{});
    sum_runs<T, kReverse>(sums, broken);
    sums += broken ? Vector<T>{} : Vector<T>{} + sum;
    write<T>(grad_x + begin, Vector<T>(holds ? sums : Vector<T>{}));
    constexpr int kFirst = kReverse ? kLanes - 1 : 0;
    sum = holds[kFirst] ? T(0) : sums[kFirst];
  }
}

// ---------------------------------------------------------------- planes

// out = maximum of each column of `vertical` + maximum of each row of `horizontal`.
// maxima: room for `width`.
template <typename T, typename scalar_t>
D2EXT_TARGET void center_plane(const scalar_t* vertical, const scalar_t* horizontal, scalar_t* out,
                               int64_t height, int64_t width, T* maxima) {
  constexpr int kLanes = Simd<T>::kLanes;
  std::fill(maxima, maxima + width, kLowest<T>);
  for (int64_t y = 0; y < height; ++y) {
    const scalar_t* row = vertical + y * width;
    int64_t x = 0;
    for (; x + kLanes <= width; x += kLanes) {
      Vector<T> value;
      Vector<T> maximum;
      read<T>(value, row + x);
      read<T>(maximum, maxima + x);
      raise(maximum, value);
      write<T>(maxima + x, maximum);
    }
    for (; x < width; ++x) {
      raise(maxima[x], static_cast<T>(row[x]));
    }
  }
  for (int64_t y = 0; y < height; ++y) {
    const scalar_t* row = horizontal + y * width;
    Vector<T> running = Vector<T>{} + kLowest<T>;
    int64_t x = 0;
    for (; x + kLanes <= width; x += kLanes) {
      Vector<T> value;
      read<T>(value, row + x);
      raise(running, value);
    }
    T maximum = kLowest<T>;
    for (int i = 0; i < kLanes; ++i) {
      raise(maximum, T(running[i]));
    }
    for (; x < width; ++x) {
      raise(maximum, static_cast<T>(row[x]));
    }
    scalar_t* target = out + y * width;
    for (x = 0; x + kLanes <= width; x += kLanes) {
      Vector<T> value;
      read<T>(value, maxima + x);
      write<T>(target + x, Vector<T>(value + maximum));
    }
    for (; x < width; ++x) {
      target[x] = static_cast<scalar_t>(maxima[x] + maximum);
    }
  }
}

// x is not less than the maximum m, NaN being the greatest: later elements win ties.
template <typename V>
D2EXT_INLINE auto equals_or_exceeds(const V& x, const V& m) {
  return (x >= m) | (x != x);
}

// The sum of the gradient over a column (a row) goes to the last element that holds its maximum, 0
// to the others. Buffers: room for `width` each.
template <typename T, typename scalar_t>
D2EXT_TARGET void center_plane_backward(const scalar_t* grad, const scalar_t* vertical,
                                        const scalar_t* horizontal, scalar_t* grad_vertical,
                                        scalar_t* grad_horizontal, int64_t height, int64_t width,
                                        T* maxima, T* sums, Integer<T>* holders) {
  constexpr int kLanes = Simd<T>::kLanes;
  std::fill(maxima, maxima + width, kLowest<T>);
  std::fill(sums, sums + width, T(0));
  std::fill(holders, holders + width, Integer<T>(0));
  for (int64_t y = 0; y < height; ++y) {
    const scalar_t* row = vertical + y * width;
    const scalar_t* above = grad + y * width;
    const auto index = static_cast<Integer<T>>(y);
    int64_t x = 0;
    for (; x + kLanes <= width; x += kLanes) {
      Vector<T> value;
      Vector<T> maximum;
      Vector<T> sum;
      Vector<T> gradient;
      Mask<T> holder;
      read<T>(value, row + x);
      read<T>(gradient, above + x);
      read<T>(maximum, maxima + x);
      read<T>(sum, sums + x);
      load(holder, holders + x);
      const Mask<T> taken = equals_or_exceeds(value, maximum);
      store(holders + x, Mask<T>(taken ? Mask<T>{} + index : holder));
      write<T>(maxima + x, Vector<T>(taken ? value : maximum));
      write<T>(sums + x, Vector<T>(sum + gradient));
    }
    for (; x < width; ++x) {
      const T value = static_cast<T>(row[x]);
      sums[x] += static_cast<T>(above[x]);
      if (equals_or_exceeds(value, maxima[x])) {
        maxima[x] = value;
        holders[x] = index;
      }
    }
  }
  for (int64_t y = 0; y < height; ++y) {
    const scalar_t* row = horizontal + y * width;
    const scalar_t* above = grad + y * width;
    T maximum = kLowest<T>;
    T sum = 0;
    int64_t holder = 0;
    for (int64_t x = 0; x < width; ++x) {
      const T value = static_cast<T>(row[x]);
      sum += static_cast<T>(above[x]);
      const bool taken = equals_or_exceeds(value, maximum);
      maximum = taken ? value : maximum;
      holder = taken ? x : holder;
    }
    scalar_t* target = grad_vertical + y * width;
    for (int64_t x = 0; x < width; ++x) {
      target[x] = static_cast<scalar_t>(holders[x] == y ? sums[x] : T(0));
    }
    std::fill(grad_horizontal + y * width, grad_horizontal + (y + 1) * width, scalar_t(0));
    grad_horizontal[y * width + holder] = static_cast<scalar_t>(sum);
  }
}

template <typename T, typename scalar_t>
void row_scan(const scalar_t* x, const scalar_t* addend, scalar_t* out, int64_t length,
              bool reverse) {
  const auto loop = reverse ? row_scan_loop<T, scalar_t, true> : row_scan_loop<T, scalar_t, false>;
  loop(x, addend, out, length);
}

template <typename T, typename scalar_t>
void row_scan_backward(const scalar_t* x, const scalar_t* grad, scalar_t* grad_x, int64_t length,
                       bool reverse, Integer<T>* taken) {
  const auto loop = reverse ? row_scan_backward_loop<T, scalar_t, true>
                            : row_scan_backward_loop<T, scalar_t, false>;
  loop(x, grad, grad_x, length, taken);
}

template <typename scalar_t>
ScanKernels<scalar_t> scan_kernels() {
  using T = cpu_arithmetic_t<scalar_t>;
  return {column_scan<T, scalar_t>,  column_scan_backward<T, scalar_t>,
          row_scan<T, scalar_t>,     row_scan_backward<T, scalar_t>,
          center_plane<T, scalar_t>, center_plane_backward<T, scalar_t>};
}
