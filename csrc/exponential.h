// The exponential function and the sigmoid, which the compiler vectorises in loops.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace d2ext {

// exp(z), within 2 units in the last place where that is a normal number; below 0, above infinity;
// NaN stays NaN.
// exp(z) = 2^n exp(r) with z = n ln 2 + r, |r| <= ln(2) / 2, and exp(r) by its Taylor polynomial of
// degree 7 (relative error below 6e-9). z is clamped so that n is in -127..128, for which the bits
// of 2^n are those of 0 and of infinity at the ends.
D2EXT_HOST_DEVICE float exponential(float z) {
  z = z < -88.0f ? -88.0f : z;
  z = z > 89.0f ? 89.0f : z;
  // Adding 1.5 * 2^23 rounds to the nearest integer.
  const float shifted = z * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  // ln 2 in two parts, the first exact in few bits, so that z - n ln 2 keeps its precision.
  const float r = (z - n * 0.693359375f) + n * 2.12194440e-4f;
  float e = r * (1.0f / 5040) + (1.0f / 720);
  e = e * r + (1.0f / 120);
  e = e * r + (1.0f / 24);
  e = e * r + (1.0f / 6);
  e = e * r + 0.5f;
  e = e * r + 1.0f;
  e = e * r + 1.0f;
  // shifted's mantissa holds n; n + 127 goes into the exponent of a power of two.
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = static_cast<int32_t>(static_cast<uint32_t>(bits + 127) << 23);
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return e * power;
}

// 1 / (1 + exp(-x)), within 3 units in the last place; NaN stays NaN.
inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }
inline double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

}  // namespace d2ext
