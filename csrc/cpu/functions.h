// Functions of a vector's lanes, to about the last bit. NaN stays one.
#pragma once

#include "vector.h"

namespace echolora {
namespace ECHOLORA_ISA {

template <class A>
struct BitsOf {
  using type = UintVec;
};
template <>
struct BitsOf<double> {
  typedef uint64_t type __attribute__((vector_size(VECTOR_BYTES)));
};

// e^r = 1 + r + r^2 P(r) for |r| <= ln(2) / 2: P from its highest power down, and the two parts of ln(2)
inline Vec<float> reduced_exponential(Vec<float> n, Vec<float> x) {
  const Vec<float> r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  constexpr float powers[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  Vec<float> p = splat(1.9875691500e-4f);
  for (const float c : powers) p = p * r + c;
  return (p * (r * r) + r) + 1.0f;
}
inline Vec<double> reduced_exponential(Vec<double> n, Vec<double> x) {
  const Vec<double> r = (x - n * 0.693145751953125) - n * 1.42860682030941723212e-6;
  constexpr double powers[] = {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
                               1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 1.0 / 2};
  Vec<double> p = splat(1.0 / 6227020800);
  for (const double c : powers) p = p * r + c;
  return (p * (r * r) + r) + 1.0;
}

template <class A>
struct ExponentialRange;
template <>
struct ExponentialRange<float> {
  static constexpr float LOWEST = -87.0f, HIGHEST = 88.0f, ROUNDER = 12582912.0f;  // 1.5 * 2^23: what is added to it loses its fraction
  static constexpr int FRACTION = 23;
  static constexpr uint32_t ONE = 127u << 23;
};
template <>
struct ExponentialRange<double> {
  static constexpr double LOWEST = -708.0, HIGHEST = 709.0, ROUNDER = 6755399441055744.0;
  static constexpr int FRACTION = 52;
  static constexpr uint64_t ONE = 1023ull << 52;
};

// 0 where the result would be less than the smallest normal number, and never infinite: exp(HIGHEST) at most.
template <class A>
inline Vec<A> exponential(Vec<A> x) {
  using Range = ExponentialRange<A>;
  const Vec<A> zero{}, lowest = splat(Range::LOWEST), highest = splat(Range::HIGHEST);
  Vec<A> inside = x < lowest ? lowest : x;
  inside = inside > highest ? highest : inside;
  const Vec<A> shifted = inside * A(1.4426950408889634) + Range::ROUNDER;
  const Vec<A> n = shifted - Range::ROUNDER;
  const auto scale = ((typename BitsOf<A>::type)shifted << Range::FRACTION) + Range::ONE;  // 2^n
  const Vec<A> result = reduced_exponential(n, inside) * (Vec<A>)scale;
  return x < lowest ? zero : result;
}

template <class A>
inline Vec<A> logistic(Vec<A> x) {
  return A(1) / (A(1) + exponential<A>(-x));
}

template <class A>
inline Vec<A> tangent(Vec<A> x);

// Double serves checks alone: lane by lane, by the C library.
template <>
inline Vec<double> tangent<double>(Vec<double> x) {
  for (int i = 0; i < LANES<double>; i++) x[i] = __builtin_tanh(x[i]);
  return x;
}

// The hyperbolic one; 1 - 2 / (exp(2 x) + 1) would lose what is small against 1.
template <>
inline Vec<float> tangent<float>(Vec<float> x) {
  const Vec<float> z = x * x, size = x < 0.0f ? -x : x;
  constexpr float powers[] = {2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f, -3.33332819422e-1f};
  Vec<float> p = splat(-5.70498872745e-3f);  // Cephes' tanhf
  for (const float c : powers) p = p * z + c;
  const Vec<float> large = 1.0f - 2.0f / (exponential<float>(2.0f * size) + 1.0f);
  return size < 0.625f ? p * z * x + x : x < 0.0f ? -large : large;
}

inline double logarithm(double value) { return __builtin_log(value); }

}  // namespace ECHOLORA_ISA
}  // namespace echolora
