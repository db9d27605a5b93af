// Blocks of a strided matrix in the accumulator's type: as it lies, or copied with dropout and the echo applied.
#pragma once

#include "vector.h"

namespace echolora {
namespace ECHOLORA_ISA {

constexpr int64_t BLOCK_COLS = 256;  // a multiple of the 4 columns that share one random draw
constexpr int DRAWS = 16;            // counters of Philox at a time: one vector

// Philox4x32 with 7 rounds: words[j][i] is word j of counter first + i. The Triton and CUDA kernels draw the same.
inline void philox(uint64_t seed, uint64_t first, uint32_t words[4][DRAWS]) {
  uint32_t c0[DRAWS], c1[DRAWS], c2[DRAWS], c3[DRAWS];
  for (int i = 0; i < DRAWS; i++) {
    c0[i] = static_cast<uint32_t>(first + i);
    c1[i] = static_cast<uint32_t>((first + i) >> 32);
    c2[i] = c3[i] = 0;
  }
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 7; round++) {
    for (int i = 0; i < DRAWS; i++) {
      const uint64_t product0 = static_cast<uint64_t>(c0[i]) * 0xD2511F53u;
      const uint64_t product2 = static_cast<uint64_t>(c2[i]) * 0xCD9E8D57u;
      c0[i] = static_cast<uint32_t>(product2 >> 32) ^ c1[i] ^ key0;
      c2[i] = static_cast<uint32_t>(product0 >> 32) ^ c3[i] ^ key1;
      c1[i] = static_cast<uint32_t>(product2);
      c3[i] = static_cast<uint32_t>(product0);
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  for (int i = 0; i < DRAWS; i++) words[0][i] = c0[i], words[1][i] = c1[i], words[2][i] = c2[i], words[3][i] = c3[i];
}

// factors[i]: what dropout multiplies column first_col + i of row m with, 0 or keep_scale; first_col is a multiple of 4
template <class A>
inline void dropout_factors(const Dropout& dropout, int64_t m, int64_t first_col, int64_t cols, int64_t width, A* factors) {
  const uint64_t row = static_cast<uint64_t>(m) * static_cast<uint64_t>((width + 3) / 4);
  const uint32_t below = static_cast<uint32_t>(dropout.below);
  const A scale = static_cast<A>(dropout.keep_scale);
  for (int64_t col = 0; col < cols; col += 4 * DRAWS) {
    uint32_t words[4][DRAWS];
    philox(dropout.seed, row + static_cast<uint64_t>((first_col + col) / 4), words);
    const int64_t here = at_most(4 * DRAWS, cols - col);
    if (here == 4 * DRAWS) {
      for (int i = 0; i < DRAWS; i++)
        for (int j = 0; j < 4; j++) factors[col + 4 * i + j] = (words[j][i] >> 8) >= below ? scale : A(0);
    } else {
      for (int64_t i = 0; i < here; i++) factors[col + i] = (words[i % 4][i / 4] >> 8) >= below ? scale : A(0);
    }
  }
}

template <class E>
inline const E* row_start(const Rows& x, int64_t m) {
  return static_cast<const E*>(x.data) + m / x.per_sample * x.stride_n + m % x.per_sample * x.stride_t;
}

template <class A>
struct Block {
  const A* data;
  int64_t stride;  // between rows
};

// What is done to the elements of a matrix as they are read.
template <class A>
struct Reading {
  Dropout dropout;
  const A* delta = nullptr;  // added to every row that the mask marks: [samples, width]
  const A* mask = nullptr;
};

// rows first .. first + count of columns first_col .. first_col + cols; `scratch` has room for [count, BLOCK_COLS]
template <class E>
inline Block<Acc<E>> read_block(const Rows& x, const Reading<Acc<E>>& reading, int64_t first, int64_t count,
                                int64_t first_col, int64_t cols, Acc<E>* scratch) {
  using A = Acc<E>;
  const bool plain = reading.dropout.below == 0 && reading.delta == nullptr;
  const bool uniform = x.samples == 1 || first / x.per_sample == (first + count - 1) / x.per_sample ||
                       x.stride_n == x.per_sample * x.stride_t;
  if constexpr (sizeof(E) == sizeof(A)) {
    if (plain && uniform && x.stride_w == 1) return {row_start<E>(x, first) + first_col, x.stride_t};
  }
  for (int64_t i = 0; i < count; i++) {
    const E* from = row_start<E>(x, first + i) + first_col * x.stride_w;
    A* to = scratch + i * BLOCK_COLS;
    int64_t col = 0;
    if (x.stride_w == 1)
      for (; col + LANES<A> <= cols; col += LANES<A>) store(to + col, load(from + col));
    for (; col < cols; col++) to[col] = widen(from[col * x.stride_w]);
    if (reading.dropout.below) {
      A factors[BLOCK_COLS];
      dropout_factors(reading.dropout, first + i, first_col, cols, x.width, factors);
      for (col = 0; col < cols; col++) to[col] *= factors[col];
    }
    if (reading.delta) {
      const A* delta = reading.delta + (first + i) / x.per_sample * x.width + first_col;
      const A weight = reading.mask[first + i];
      for (col = 0; col < cols; col++) to[col] += weight * delta[col];
    }
  }
  return {scratch, BLOCK_COLS};
}

template <class A>
inline A read(const Thin& thin, int64_t row, int64_t col) {
  const int64_t at = row * thin.stride_row + col * thin.stride_col;
  switch (thin.type) {
    case Type::f32: return static_cast<A>(static_cast<const float*>(thin.data)[at]);
    case Type::f64: return static_cast<A>(static_cast<const double*>(thin.data)[at]);
    case Type::bf16: return static_cast<A>(widen(static_cast<const bf16*>(thin.data)[at]));
    default: return static_cast<A>(widen(static_cast<const f16*>(thin.data)[at]));
  }
}

// packed[i][j] = thin[i, j] for count rows from `first`, padded with zeros to `padded` columns
template <class A>
inline void pack_rows(const Thin& thin, int64_t first, int64_t count, int64_t cols, int64_t padded, A* packed) {
  for (int64_t i = 0; i < count; i++)
    for (int64_t j = 0; j < padded; j++) packed[i * padded + j] = j < cols ? read<A>(thin, first + i, j) : A(0);
}

// to[j] = thin[row, first_col + j]
template <class A>
inline void read_row(const Thin& thin, int64_t row, int64_t first_col, int64_t cols, A* to) {
  for (int64_t j = 0; j < cols; j++) to[j] = read<A>(thin, row, first_col + j);
}

inline Thin transposed(const Thin& thin) { return {thin.data, thin.type, thin.stride_col, thin.stride_row}; }

template <class A>
inline int64_t padded_rank(int64_t rank) {
  return round_up(rank, LANES<A>);
}

}  // namespace ECHOLORA_ISA
}  // namespace echolora
