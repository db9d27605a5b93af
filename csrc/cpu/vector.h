// Vectors of the accumulator's type, as wide as the instruction set this file is built for, and their element types.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

#include "types.h"

namespace echolora {
namespace ECHOLORA_ISA {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, ACCUMULATORS = 24;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32, ACCUMULATORS = 12;
#else
constexpr int VECTOR_BYTES = 16, ACCUMULATORS = 12;
#endif

struct bf16 {
  uint16_t bits;
};
using f16 = _Float16;

template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class E>
using Acc = typename AccumulatorOf<E>::type;

template <class A>
struct VectorOf {
  typedef A type __attribute__((vector_size(VECTOR_BYTES)));
};
template <class A>
using Vec = typename VectorOf<A>::type;
template <class A>
constexpr int LANES = VECTOR_BYTES / sizeof(A);

typedef uint32_t UintVec __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t HalfBits __attribute__((vector_size(VECTOR_BYTES / 2)));

template <class A>
inline Vec<A> splat(A value) {
  return value - Vec<A>{};  // folds into one broadcast, which 0 + value, being wrong for -0, does not
}

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(f16 value) { return static_cast<float>(value); }
inline float widen(bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

inline void narrow(float value, float* out) { *out = value; }
inline void narrow(double value, double* out) { *out = value; }
inline void narrow(float value, f16* out) { *out = static_cast<f16>(value); }
inline void narrow(float value, bf16* out) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  // to nearest, ties to even; a NaN stays one
  out->bits = value != value ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <class E>
inline Vec<Acc<E>> load(const E* from) {
  Vec<E> vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}
template <>
inline Vec<float> load<bf16>(const bf16* from) {
  HalfBits half;
  std::memcpy(&half, from, sizeof(half));
  return (Vec<float>)(__builtin_convertvector(half, UintVec) << 16);
}
template <>
inline Vec<float> load<f16>(const f16* from) {
  Vec<float> vector;
  for (int i = 0; i < LANES<float>; i++) vector[i] = widen(from[i]);
  return vector;
}

template <class E>
inline void store(E* to, Vec<Acc<E>> vector) {
  std::memcpy(to, &vector, sizeof(vector));
}
template <>
inline void store<bf16>(bf16* to, Vec<float> vector) {
#if defined(__AVX512BF16__)
  const __m256bh half = _mm512_cvtneps_pbh((__m512)vector);
#else
  const UintVec bits = (UintVec)vector;
  UintVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  rounded = vector == vector ? rounded : UintVec{} + 0x7fc0;
  const HalfBits half = __builtin_convertvector(rounded, HalfBits);
#endif
  std::memcpy(to, &half, sizeof(half));
}
template <>
inline void store<f16>(f16* to, Vec<float> vector) {
  for (int i = 0; i < LANES<float>; i++) narrow(vector[i], to + i);
}

// the first `count` lanes; the others are zero
template <class E>
inline Vec<Acc<E>> load_part(const E* from, int count) {
  if (count == LANES<Acc<E>>) return load(from);
  Vec<Acc<E>> vector{};
  for (int i = 0; i < count; i++) vector[i] = widen(from[i]);
  return vector;
}
template <class E>
inline void store_part(E* to, Vec<Acc<E>> vector, int count) {
  if (count == LANES<Acc<E>>) return store(to, vector);
  for (int i = 0; i < count; i++) narrow(vector[i], to + i);
}

template <class A>
inline A sum_lanes(Vec<A> vector) {
  A sum = 0;
  for (int i = 0; i < LANES<A>; i++) sum += vector[i];
  return sum;
}

inline float square_root(float value) { return __builtin_sqrtf(value); }
inline double square_root(double value) { return __builtin_sqrt(value); }

inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

}  // namespace ECHOLORA_ISA
}  // namespace echolora
