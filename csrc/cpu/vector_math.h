// Loads, stores and functions of vectors. Included by each_target.h, once for each instruction set.

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
