// The products that adapters need, by vector instructions. `Amx` (amx.h) has the same members for bfloat16.
#pragma once

#include "block.h"

// On loops over a tile's sums: unless all of them are unrolled, the sums live in memory.
#define ECHOLORA_UNROLL _Pragma("GCC unroll 24")

namespace echolora {
namespace ECHOLORA_ISA {

// out[i][:] += sum_j x[i * STRIDE_I + j * STRIDE_J] thin[j][:] for ROWS rows of VECTORS vectors. The strides are constants
// so that they are part of the instructions: as many as there are rows would not fit the registers.
template <int ROWS, int VECTORS, int64_t STRIDE_I, int64_t STRIDE_J, class A, class Ahead>
inline void gather_tile(const A* x, const A* thin, int64_t ld_thin, int64_t count, A* out, int64_t ld_out, Ahead* ahead) {
  Vec<A> sums[ROWS][VECTORS];
  ECHOLORA_UNROLL
  for (int i = 0; i < ROWS; i++)
    for (int v = 0; v < VECTORS; v++) sums[i][v] = Vec<A>{};
  const int64_t line = ahead->at;
  for (int64_t j = 0; j < count; j++) {
    ahead->ask(line + j);
    Vec<A> b_thin[VECTORS];
    for (int v = 0; v < VECTORS; v++) b_thin[v] = load(thin + j * ld_thin + v * LANES<A>);
    for (int i = 0; i < ROWS; i++) {
      const Vec<A> b_x = splat(x[i * STRIDE_I + j * STRIDE_J]);
      for (int v = 0; v < VECTORS; v++) sums[i][v] += b_x * b_thin[v];
    }
  }
  ahead->at = line + count;
  ECHOLORA_UNROLL
  for (int i = 0; i < ROWS; i++)
    for (int v = 0; v < VECTORS; v++) {
      A* to = out + i * ld_out + v * LANES<A>;
      store(to, load(to) + sums[i][v]);
    }
}

template <int VECTORS, int64_t STRIDE_I, int64_t STRIDE_J, class A, class Ahead>
inline void gather_some(const A* x, int64_t rows, const A* thin, int64_t ld_thin, int64_t count, A* out, int64_t ld_out,
                        Ahead* ahead) {
  constexpr int ROWS = VECTORS == 1 ? ACCUMULATORS / 3 * 2 : VECTORS == 2 ? ACCUMULATORS / 3 : ACCUMULATORS / VECTORS;
  int64_t i = 0;
  for (; i + ROWS <= rows; i += ROWS)
    gather_tile<ROWS, VECTORS, STRIDE_I, STRIDE_J>(x + i * STRIDE_I, thin, ld_thin, count, out + i * ld_out, ld_out, ahead);
  for (; i + 2 <= rows; i += 2)
    gather_tile<2, VECTORS, STRIDE_I, STRIDE_J>(x + i * STRIDE_I, thin, ld_thin, count, out + i * ld_out, ld_out, ahead);
  if (i < rows)
    gather_tile<1, VECTORS, STRIDE_I, STRIDE_J>(x + i * STRIDE_I, thin, ld_thin, count, out + i * ld_out, ld_out, ahead);
}

// One vector of finish(i, col, lanes, sums) for each of ROWS rows and VECTORS vectors: sums = sum_r thin[i][r] wide[r][:].
// finish.ahead(i, col) asks for what finish will read at the same rows of the next strip.
template <int ROWS, int VECTORS, class A, class Finish>
inline void spread_tile(const A* thin, int64_t ld_thin, int64_t rank, const A* wide, int64_t ld_wide, int64_t row,
                        int64_t col, int64_t cols, const Finish& finish) {
  Vec<A> sums[ROWS][VECTORS];
  ECHOLORA_UNROLL
  for (int i = 0; i < ROWS; i++)
    for (int v = 0; v < VECTORS; v++) {
      finish.ahead(row + i, col + (VECTORS + v) * LANES<A>);
      sums[i][v] = Vec<A>{};
    }
  for (int64_t r = 0; r < rank; r++) {
    Vec<A> b_wide[VECTORS];
    for (int v = 0; v < VECTORS; v++) b_wide[v] = load(wide + r * ld_wide + col + v * LANES<A>);
    for (int i = 0; i < ROWS; i++) {
      const Vec<A> b_thin = splat(thin[(row + i) * ld_thin + r]);
      for (int v = 0; v < VECTORS; v++) sums[i][v] += b_thin * b_wide[v];
    }
  }
  ECHOLORA_UNROLL
  for (int i = 0; i < ROWS; i++)
    for (int v = 0; v < VECTORS; v++) {
      const int64_t at = col + v * LANES<A>;
      if (at < cols) finish(row + i, at, static_cast<int>(at_most(LANES<A>, cols - at)), sums[i][v]);
    }
}

// How the products are computed: from operands that are packed once, block by block. Layouts are each policy's own;
// offsets are the same: column `col` of a packed operand begins at col * padded.
template <class E>
struct Vectors {
  using A = Acc<E>;
  using Packed = A;
  using Element = E;
  struct Session {};  // what a task needs while it computes

  static constexpr int64_t SPREAD_COLS = (ACCUMULATORS >= 24 ? 4 : 2) * LANES<A>;

  static int64_t padded_rank(int64_t rank) { return round_up(rank, LANES<A>); }
  static int64_t packed_size(int64_t width, int64_t rank) { return round_up(width, BLOCK_COLS) * padded_rank(rank); }
  static int64_t wide_size(int64_t rank, int64_t width) { return rank * round_up(width, BLOCK_COLS); }
  static int64_t wide_at(int64_t col, int64_t) { return col; }
  static int64_t sum_at(int64_t col, int64_t r, int64_t padded) { return col * padded + r; }

  static void read(const Rows& x, const Reading<A>& reading, int64_t first, int64_t count, int64_t first_col,
                   int64_t cols, Packed* block, Ahead<E>* ahead) {
    read_block<E>(x, reading, first, count, first_col, cols, block, ahead);
  }

  // thin [width, rank] times a factor per row, rows first .. first + count, for `gather_rows`
  static void pack(const Thin& thin, int64_t first, int64_t count, int64_t rank, int64_t padded, const A* factor,
                   Packed* packed) {
    std::memset(packed, 0, sizeof(A) * count * padded);
    each_element<A>(thin, first, count, rank, [&](int64_t i, int64_t r, A value) {
      packed[i * padded + r] = factor ? value * factor[first + i] : value;
    });
  }

  // rows of thin [total, rank] for `gather_cols`
  static void pack_rows(const Thin& thin, int64_t first, int64_t count, int64_t rank, int64_t padded, Packed* packed) {
    pack(thin, first, count, rank, padded, nullptr, packed);
  }

  // rows of thin [total, rank] for `spread`
  static void pack_spread(const Thin& thin, int64_t first, int64_t count, int64_t rank, A factor, Packed* packed) {
    each_element<A>(thin, first, count, rank, [&](int64_t i, int64_t r, A value) { packed[i * rank + r] = factor * value; });
  }

  // columns [first, first + BLOCK_COLS) of the transpose of thin [width, rank] for `spread`
  static void pack_wide(const Thin& thin, int64_t first, int64_t width, int64_t rank, Packed* wide) {
    const int64_t padded = round_up(width, BLOCK_COLS);
    for (int64_t r = 0; r < rank; r++) std::memset(wide + r * padded + first, 0, sizeof(A) * BLOCK_COLS);
    each_element<A>(thin, first, at_most(BLOCK_COLS, width - first), rank,
                    [&](int64_t n, int64_t r, A value) { wide[r * padded + first + n] = value; }, true);
  }

  // sums[i][:] += sum_j block[i][j] packed[j][:]
  static void gather_rows(const Packed* block, int64_t rows, int64_t cols, const Packed* packed, int64_t padded, A* sums,
                          Ahead<E>* ahead) {
    gather<BLOCK_COLS, 1>(block, rows, packed, padded, cols, sums, ahead);
  }

  // sums[j][:] += sum_i block[i][j] thin[i][:]
  static void gather_cols(const Packed* block, int64_t rows, int64_t cols, const Packed* thin, int64_t padded, A* sums,
                          Ahead<E>* ahead) {
    gather<1, BLOCK_COLS>(block, cols, thin, padded, rows, sums, ahead);
  }

  // finish(i, col, lanes, sums) for every vector of thin [rows, rank] times wide [rank, cols]
  template <class Finish>
  static void spread(const Packed* thin, int64_t rank, const Packed* wide, int64_t width, int64_t rows, int64_t cols,
                     const Finish& finish) {
    constexpr int VECTORS = SPREAD_COLS / LANES<A>, ROWS = ACCUMULATORS / VECTORS;
    const int64_t padded = round_up(width, BLOCK_COLS);
    for (int64_t col = 0; col < cols; col += SPREAD_COLS) {
      int64_t row = 0;
      for (; row + ROWS <= rows; row += ROWS)
        spread_tile<ROWS, VECTORS>(thin, rank, rank, wide, padded, row, col, cols, finish);
      for (; row + 2 <= rows; row += 2)
        spread_tile<2, VECTORS>(thin, rank, rank, wide, padded, row, col, cols, finish);
      if (row < rows) spread_tile<1, VECTORS>(thin, rank, rank, wide, padded, row, col, cols, finish);
    }
  }

 private:
  // out[i][:] += sum_j x[i * STRIDE_I + j * STRIDE_J] thin[j][:]
  template <int64_t STRIDE_I, int64_t STRIDE_J>
  static void gather(const A* x, int64_t rows, const A* thin, int64_t padded, int64_t count, A* out, Ahead<E>* ahead) {
    constexpr int MOST = ACCUMULATORS >= 24 ? 4 : 2;
    for (int64_t at = 0; at < padded;) {
      const int64_t left = (padded - at) / LANES<A>;
      if (left >= 4 && MOST >= 4) {
        gather_some<MOST, STRIDE_I, STRIDE_J>(x, rows, thin + at, padded, count, out + at, padded, ahead);
        at += MOST * LANES<A>;
      } else if (left >= 2) {
        gather_some<2, STRIDE_I, STRIDE_J>(x, rows, thin + at, padded, count, out + at, padded, ahead);
        at += 2 * LANES<A>;
      } else {
        gather_some<1, STRIDE_I, STRIDE_J>(x, rows, thin + at, padded, count, out + at, padded, ahead);
        at += LANES<A>;
      }
    }
  }
};

}  // namespace ECHOLORA_ISA
}  // namespace echolora
