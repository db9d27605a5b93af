// The two shapes of product that adapters need, in registers: sums that are as wide as the rank, and rank-many outer products.
#pragma once

#include "block.h"

namespace echolora {
namespace ECHOLORA_ISA {

// out[i][:] += sum_j x[i * stride_i + j * stride_j] thin[j][:] for ROWS rows of VECTORS vectors. UNROLL independent
// sums hide the latency of the additions where there are few rows.
template <int ROWS, int VECTORS, int UNROLL, class A>
inline void gather_tile(const A* x, int64_t stride_i, int64_t stride_j, const A* thin, int64_t ld_thin, int64_t count,
                        A* out, int64_t ld_out) {
  Vec<A> sums[UNROLL][ROWS][VECTORS] = {};
  int64_t j = 0;
  for (; j + UNROLL <= count; j += UNROLL)
    for (int u = 0; u < UNROLL; u++) {
      Vec<A> b_thin[VECTORS];
      for (int v = 0; v < VECTORS; v++) b_thin[v] = load(thin + (j + u) * ld_thin + v * LANES<A>);
      for (int i = 0; i < ROWS; i++) {
        const Vec<A> b_x = splat(x[i * stride_i + (j + u) * stride_j]);
        for (int v = 0; v < VECTORS; v++) sums[u][i][v] += b_x * b_thin[v];
      }
    }
  for (; j < count; j++)
    for (int i = 0; i < ROWS; i++)
      for (int v = 0; v < VECTORS; v++)
        sums[0][i][v] += splat(x[i * stride_i + j * stride_j]) * load(thin + j * ld_thin + v * LANES<A>);
  for (int i = 0; i < ROWS; i++)
    for (int v = 0; v < VECTORS; v++) {
      Vec<A> sum = sums[0][i][v];
      for (int u = 1; u < UNROLL; u++) sum += sums[u][i][v];
      A* to = out + i * ld_out + v * LANES<A>;
      store(to, load(to) + sum);
    }
}

// Rows of one tile: few enough that the lines they lie in, a power of two apart, share a set of the L1 cache.
constexpr int GATHER_ROWS = 8;

template <int VECTORS, class A>
inline void gather_rows(const A* x, int64_t stride_i, int64_t stride_j, int64_t rows, const A* thin, int64_t ld_thin,
                        int64_t count, A* out, int64_t ld_out) {
  constexpr int ROWS = GATHER_ROWS * VECTORS <= ACCUMULATORS ? GATHER_ROWS : ACCUMULATORS / VECTORS;
  constexpr int UNROLL = ROWS * VECTORS * 2 <= ACCUMULATORS ? 2 : 1;
  int64_t i = 0;
  for (; i + ROWS <= rows; i += ROWS)
    gather_tile<ROWS, VECTORS, UNROLL>(x + i * stride_i, stride_i, stride_j, thin, ld_thin, count, out + i * ld_out, ld_out);
  for (; i < rows; i++)
    gather_tile<1, VECTORS, 2>(x + i * stride_i, stride_i, stride_j, thin, ld_thin, count, out + i * ld_out, ld_out);
}

// out[i][0 .. padded) += sum_j x(i, j) thin[j][:]
template <class A>
inline void gather(const A* x, int64_t stride_i, int64_t stride_j, int64_t rows, const A* thin, int64_t padded,
                   int64_t count, A* out) {
  constexpr int MOST = ACCUMULATORS >= 24 ? 4 : 2;
  for (int64_t at = 0; at < padded;) {
    const int64_t left = (padded - at) / LANES<A>;
    if (left >= 4 && MOST >= 4) {
      gather_rows<MOST>(x, stride_i, stride_j, rows, thin + at, padded, count, out + at, padded);
      at += MOST * LANES<A>;
    } else if (left >= 2) {
      gather_rows<2>(x, stride_i, stride_j, rows, thin + at, padded, count, out + at, padded);
      at += 2 * LANES<A>;
    } else {
      gather_rows<1>(x, stride_i, stride_j, rows, thin + at, padded, count, out + at, padded);
      at += LANES<A>;
    }
  }
}

// One vector of finish(i, col, lanes, sums) for each of ROWS rows and VECTORS vectors: sums = sum_r thin[i][r] wide[r][:].
template <int ROWS, int VECTORS, class A, class Finish>
inline void spread_tile(const A* thin, int64_t ld_thin, int64_t rank, const A* wide, int64_t ld_wide, int64_t row,
                        int64_t col, int64_t cols, const Finish& finish) {
  Vec<A> sums[ROWS][VECTORS] = {};
  for (int64_t r = 0; r < rank; r++) {
    Vec<A> b_wide[VECTORS];
    for (int v = 0; v < VECTORS; v++) b_wide[v] = load(wide + r * ld_wide + col + v * LANES<A>);
    for (int i = 0; i < ROWS; i++) {
      const Vec<A> b_thin = splat(thin[(row + i) * ld_thin + r]);
      for (int v = 0; v < VECTORS; v++) sums[i][v] += b_thin * b_wide[v];
    }
  }
  for (int i = 0; i < ROWS; i++)
    for (int v = 0; v < VECTORS; v++) {
      const int64_t at = col + v * LANES<A>;
      if (at < cols) finish(row + i, at, static_cast<int>(at_most(LANES<A>, cols - at)), sums[i][v]);
    }
}

// finish(i, col, lanes, sums) for every vector of thin [rows, rank] times wide [rank, cols]; rows of `wide` are padded
// to a multiple of SPREAD_COLS columns
template <class A>
constexpr int64_t SPREAD_COLS = (ACCUMULATORS >= 24 ? 4 : 2) * LANES<A>;

template <class A, class Finish>
inline void spread(const A* thin, int64_t ld_thin, int64_t rank, const A* wide, int64_t ld_wide, int64_t rows,
                   int64_t cols, const Finish& finish) {
  constexpr int VECTORS = SPREAD_COLS<A> / LANES<A>, ROWS = ACCUMULATORS / VECTORS;
  for (int64_t col = 0; col < cols; col += SPREAD_COLS<A>) {
    int64_t row = 0;
    for (; row + ROWS <= rows; row += ROWS)
      spread_tile<ROWS, VECTORS>(thin, ld_thin, rank, wide, ld_wide, row, col, cols, finish);
    for (; row < rows; row++)
      spread_tile<1, VECTORS>(thin, ld_thin, rank, wide, ld_wide, row, col, cols, finish);
  }
}

}  // namespace ECHOLORA_ISA
}  // namespace echolora
