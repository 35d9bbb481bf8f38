// sigmoid and silu for CPU code. In f64 they are the textbook expressions; in f32 the exponential is a polynomial, so that loops vectorise.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>

namespace longhand {

inline double exp_of(double x) {
  return std::exp(x);
}

/// e^x for |x| <= 87 and saturated beyond: x = n ln 2 + r with |r| <= ln(2)/2, then the Taylor series of e^r up to r^7, whose remainder
/// is below 6e-9: about one rounding of error. NaN stays NaN.
inline float exp_of(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 87.0f ? 87.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to the nearest integer
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts: the first product is exact
  float p = 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * std::bit_cast<float>((std::bit_cast<int32_t>(shifted) - 0x4b400000 + 127) << 23);  // times 2^n
}

template <class T>
T sigmoid(T x) {
  return T(1) / (T(1) + exp_of(-x));
}
template <class T>
T silu(T x) {
  return x * sigmoid(x);
}
/// d silu / dx
template <class T>
T silu_slope(T x) {
  const T s = sigmoid(x);
  return s * (T(1) + x * (T(1) - s));
}

}  // namespace longhand
