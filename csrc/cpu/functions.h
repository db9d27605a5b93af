// Functions of a vector's lanes, to about the last bit. Infinities saturate, NaN stays one.
#pragma once

#include "vector.h"

namespace echolora {
namespace ECHOLORA_ISA {

// ((first x + rest[0]) x + rest[1]) x + ...
template <int COUNT>
inline Vec<float> polynomial(Vec<float> x, float first, const float (&rest)[COUNT]) {
  Vec<float> y = splat(first);
  for (float c : rest) y = y * x + c;
  return y;
}

// Double serves checks alone: lane by lane, by the C library.
inline Vec<double> exponential(Vec<double> x) {
  for (int i = 0; i < LANES<double>; i++) x[i] = __builtin_exp(x[i]);
  return x;
}

inline Vec<float> exponential(Vec<float> x) {
  x = x < -87.0f ? splat(-87.0f) : x;
  x = x > 88.0f ? splat(88.0f) : x;
  const Vec<float> shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the low bits are round(x / ln 2)
  const Vec<float> n = shifted - 12582912.0f;
  const Vec<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // less n ln 2, in two parts
  const Vec<float> tail = polynomial(  // Cephes' expf
      r, 1.9875691500e-4f, {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f});
  return (tail * (r * r) + r + 1.0f) * (Vec<float>)(((UintVec)shifted << 23) + 0x3f800000u);
}

template <class V>
inline V logistic(V x) {
  return 1 / (1 + exponential(-x));
}

inline Vec<double> tangent(Vec<double> x) {
  for (int i = 0; i < LANES<double>; i++) x[i] = __builtin_tanh(x[i]);
  return x;
}

// The hyperbolic one; 1 - 2 / (exp(2 x) + 1) would lose what is small against 1.
inline Vec<float> tangent(Vec<float> x) {
  const Vec<float> z = x * x, size = x < 0.0f ? -x : x;
  const Vec<float> tail = polynomial(  // Cephes' tanhf
      z, -5.70498872745e-3f, {2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f, -3.33332819422e-1f});
  const Vec<float> large = 1.0f - 2.0f / (exponential(2.0f * size) + 1.0f);
  return size < 0.625f ? tail * z * x + x : x < 0.0f ? -large : large;
}

}  // namespace ECHOLORA_ISA
}  // namespace echolora
