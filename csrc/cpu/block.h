// Blocks of a strided matrix, copied to the accumulator's type with dropout and the echo applied.
#pragma once

#include "vector.h"

namespace echolora {
namespace ECHOLORA_ISA {

// a block of rows, its packed operand and its sums fit the L1 cache together
constexpr int64_t BLOCK_ROWS = 32;
constexpr int64_t BLOCK_COLS = 128;  // a multiple of the 4 columns that share one random draw
constexpr int DRAWS = VECTOR_BYTES / 4;  // counters of Philox at a time: one vector
constexpr int64_t DRAWN_COLS = 4 * DRAWS;

typedef uint64_t LongVec __attribute__((vector_size(VECTOR_BYTES)));

// low halves of the 64-bit lanes times a constant
inline LongVec multiply_low(LongVec a, uint32_t constant) {
#if defined(__AVX512F__)
  return (LongVec)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(constant));
#elif defined(__AVX2__)
  return (LongVec)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(constant));
#else
  return (a & 0xffffffffu) * constant;
#endif
}

// lanes of a and b in turn, beginning with lane `half * lanes / 2`
template <class V>
inline V interleave(V a, V b, int half) {
  UintVec order{};
  for (int i = 0; i < DRAWS; i++) order[i] = (i % 2 ? DRAWS : 0) + i / 2 + half * DRAWS / 2;
  return __builtin_shuffle(a, b, order);
}

// One Philox product: high and low 32 bits of every lane of c times a constant.
inline void philox_product(UintVec c, uint32_t constant, UintVec* high, UintVec* low) {
  const LongVec even = multiply_low((LongVec)c, constant), odd = multiply_low((LongVec)c >> 32, constant);
  const LongVec upper = LongVec{} + 0xffffffff00000000u;
  *high = (UintVec)((even >> 32) | (odd & upper));
  *low = (UintVec)((even & ~upper) | (odd << 32));
}

// kept[4 i + j]: 1 where word j of counter first + i, by Philox4x32 with 7 rounds, keeps its element, else 0. The Triton
// and CUDA kernels draw the same.
inline void draw(uint64_t seed, uint64_t first, uint32_t below, float* kept) {
  UintVec c0{}, c1{}, c2{}, c3{};
  for (int i = 0; i < DRAWS; i++) c0[i] = i;
  const uint32_t low = static_cast<uint32_t>(first), high = static_cast<uint32_t>(first >> 32);
  c0 += low;
  c1 += high;
  c1 -= (UintVec)(c0 < low);  // the carry: a true comparison is -1
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 7; round++) {
    UintVec high0, low0, high2, low2;
    philox_product(c0, 0xD2511F53u, &high0, &low0);
    philox_product(c2, 0xCD9E8D57u, &high2, &low2);
    c0 = high2 ^ c1 ^ key0;
    c2 = high0 ^ c3 ^ key1;
    c1 = low2;
    c3 = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  const Vec<float> one = splat(1.0f), zero{};
  const Vec<float> k0 = (c0 >> 8) >= below ? one : zero, k1 = (c1 >> 8) >= below ? one : zero;
  const Vec<float> k2 = (c2 >> 8) >= below ? one : zero, k3 = (c3 >> 8) >= below ? one : zero;
  for (int half = 0; half < 2; half++) {
    const Vec<float> even = interleave(k0, k2, half), odd = interleave(k1, k3, half);
    for (int quarter = 0; quarter < 2; quarter++)
      store(kept + (2 * half + quarter) * DRAWS, interleave(even, odd, quarter));
  }
}

// factors[i]: what dropout multiplies column first_col + i of row m with, 0 or keep_scale; first_col is a multiple of 4
template <class A>
inline void dropout_factors(const Dropout& dropout, int64_t m, int64_t first_col, int64_t cols, int64_t width, A* factors) {
  const uint64_t row = static_cast<uint64_t>(m) * static_cast<uint64_t>((width + 3) / 4);
  const A scale = static_cast<A>(dropout.keep_scale);
  for (int64_t col = 0; col < cols; col += DRAWN_COLS) {
    float kept[DRAWN_COLS];
    draw(dropout.seed, row + static_cast<uint64_t>((first_col + col) / 4), static_cast<uint32_t>(dropout.below), kept);
    const int64_t here = at_most(DRAWN_COLS, cols - col);
    for (int64_t i = 0; i < here; i++) factors[col + i] = scale * kept[i];
  }
}

template <class E>
inline const E* row_start(const Rows& x, int64_t m) {
  return static_cast<const E*>(x.data) + m / x.per_sample * x.stride_n + m % x.per_sample * x.stride_t;
}

// Where the next block lies; its lines are asked for one by one while this block is computed with.
template <class E>
struct Ahead {
  static constexpr int64_t LINE = 64 / sizeof(E), LINES = BLOCK_COLS / LINE;  // elements of a line, lines of a row
  const E* rows[BLOCK_ROWS];
  int64_t at = 0, count = 0;

  void ask(int64_t line) const {
    if (line < count) __builtin_prefetch(rows[line / LINES] + line % LINES * LINE);
  }
};

// What is done to the elements of a matrix as they are read.
template <class A>
struct Reading {
  Dropout dropout;
  const A* delta = nullptr;  // added to every row that the mask marks: [samples, width]
  const A* mask = nullptr;
};

// Copies rows first .. first + count of columns first_col .. first_col + cols to block [count, BLOCK_COLS]. Plain rows
// are copied too: as they lie, a power of two apart, they would share a few sets of the cache.
template <class E>
inline void read_block(const Rows& x, const Reading<Acc<E>>& reading, int64_t first, int64_t count, int64_t first_col,
                       int64_t cols, Acc<E>* block, Ahead<E>* ahead) {
  using A = Acc<E>;
  ahead->at = 0;
  ahead->count = x.stride_w == 1 ? count * Ahead<E>::LINES : 0;
  for (int64_t i = 0; i < count; i++) {
    const E* from = row_start<E>(x, first + i) + first_col * x.stride_w;
    // what is read next: the same rows further on, or the rows below
    const E* next = first_col + cols < x.width ? from + cols : row_start<E>(x, at_most(first + i + count, x.total() - 1));
    ahead->rows[i] = next;
    A* to = block + i * BLOCK_COLS;
    int64_t col = 0;
    if (x.stride_w == 1 && cols == BLOCK_COLS) {
      for (; col < BLOCK_COLS; col += LANES<A>) store(to + col, load(from + col));
    } else if (x.stride_w == 1) {
      for (; col + LANES<A> <= cols; col += LANES<A>) store(to + col, load(from + col));
    }
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
}

// visit(data) with data of the type that thin has
template <class Visit>
inline void with_data(const Thin& thin, const Visit& visit) {
  switch (thin.type) {
    case Type::f32: return visit(static_cast<const float*>(thin.data));
    case Type::f64: return visit(static_cast<const double*>(thin.data));
    case Type::bf16: return visit(static_cast<const bf16*>(thin.data));
    default: return visit(static_cast<const f16*>(thin.data));
  }
}

// put(i, j, thin[first + i, j]) for all i < rows, j < cols; column by column where that is how it lies or is wanted
template <class A, class Put>
inline void each_element(const Thin& thin, int64_t first, int64_t rows, int64_t cols, const Put& put,
                         bool by_column = false) {
  with_data(thin, [&](const auto* data) {
    data += first * thin.stride_row;
    if (thin.stride_row == 1 || by_column) {
      for (int64_t j = 0; j < cols; j++)
        for (int64_t i = 0; i < rows; i++)
          put(i, j, static_cast<A>(widen(data[i * thin.stride_row + j * thin.stride_col])));
    } else {
      for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < cols; j++)
          put(i, j, static_cast<A>(widen(data[i * thin.stride_row + j * thin.stride_col])));
    }
  });
}

inline Thin transposed(const Thin& thin) { return {thin.data, thin.type, thin.stride_col, thin.stride_row}; }

constexpr int64_t MAX_RANK = 256;

// Calls body(task) for every task through `parallel`, which knows nothing of lambdas.
template <class Body>
inline void run(Parallel parallel, int64_t tasks, const Body& body) {
  parallel(tasks, [](int64_t task, void* context) { (*static_cast<const Body*>(context))(task); },
           const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace ECHOLORA_ISA
}  // namespace echolora
