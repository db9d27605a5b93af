// CPU kernels of the forward pass: shrink, linear_epilogue, dora_norm and drop; docs of each in csrc/library.cpp.
#pragma once

#include "products.h"

namespace echolora {
namespace ECHOLORA_ISA {

constexpr int64_t ROWS_PER_TASK = 32;

inline int64_t row_tasks(int64_t rows) { return (rows + ROWS_PER_TASK - 1) / ROWS_PER_TASK; }

// Calls body(task) for every task through `parallel`, which knows nothing of lambdas.
template <class Body>
inline void run(Parallel parallel, int64_t tasks, const Body& body) {
  parallel(tasks, [](int64_t task, void* context) { (*static_cast<const Body*>(context))(task); },
           const_cast<void*>(static_cast<const void*>(&body)));
}

// packed[j][i] = thin[i, j] * factor[j]: cols rows of `padded` accumulators, in tasks of BLOCK_COLS rows
template <class A>
inline void pack_columns(const Thin& thin, int64_t count, int64_t cols, int64_t padded, const A* factor, A* packed,
                         Parallel parallel) {
  const Thin flipped = transposed(thin);
  run(parallel, (cols + BLOCK_COLS - 1) / BLOCK_COLS, [&](int64_t task) {
    const int64_t first = task * BLOCK_COLS, here = at_most(BLOCK_COLS, cols - first);
    pack_rows(flipped, first, here, count, padded, packed + first * padded);
    if (factor)
      for (int64_t i = 0; i < here; i++)
        for (int64_t j = 0; j < count; j++) packed[(first + i) * padded + j] *= factor[first + i];
  });
}

template <class A>
inline void write_thin(void* out, Type type, int64_t at, A value) {
  switch (type) {
    case Type::f32: narrow(static_cast<float>(value), static_cast<float*>(out) + at); break;
    case Type::f64: static_cast<double*>(out)[at] = value; break;
    case Type::bf16: narrow(static_cast<float>(value), static_cast<bf16*>(out) + at); break;
    default: narrow(static_cast<float>(value), static_cast<f16*>(out) + at);
  }
}

template <class E>
int64_t shrink_work(const Shrink& p) {
  return p.x.width * padded_rank<Acc<E>>(p.rank);
}

template <class E>
void shrink(const Shrink& p, Parallel parallel) {
  using A = Acc<E>;
  const int64_t rows = p.x.total(), padded = padded_rank<A>(p.rank);
  A* packed = static_cast<A*>(p.work);
  pack_columns(p.a, p.rank, p.x.width, padded, static_cast<const A*>(p.gain), packed, parallel);
  Reading<A> reading{p.dropout};
  if (p.site == Site::adapter_input) reading.delta = static_cast<const A*>(p.delta);
  reading.mask = static_cast<const A*>(p.mask);
  run(parallel, row_tasks(rows), [&](int64_t task) {
    const int64_t first = task * ROWS_PER_TASK, here = at_most(ROWS_PER_TASK, rows - first);
    alignas(64) A scratch[ROWS_PER_TASK * BLOCK_COLS], sums[ROWS_PER_TASK * 256];
    for (int64_t i = 0; i < here * padded; i++) sums[i] = 0;
    for (int64_t col = 0; col < p.x.width; col += BLOCK_COLS) {
      const int64_t cols = at_most(BLOCK_COLS, p.x.width - col);
      const Block<A> block = read_block<E>(p.x, reading, first, here, col, cols, scratch);
      gather<A>(block.data, block.stride, 1, here, packed + col * padded, padded, cols, sums);
    }
    for (int64_t i = 0; i < here; i++) {
      const int64_t m = first + i;
      for (int64_t r = 0; r < p.rank; r++) {
        A sum = sums[i * padded + r];
        if (p.site == Site::rank)
          sum += reading.mask[m] * static_cast<const A*>(p.delta)[m / p.x.per_sample * p.rank + r];
        write_thin(p.s, p.s_type, m * p.rank + r, static_cast<A>(p.scaling) * sum);
      }
    }
  });
}

template <class E>
int64_t linear_epilogue_work(const LinearEpilogue& p) {
  return p.rank * round_up(p.width, SPREAD_COLS<Acc<E>>);
}

// wide[r][n] = thin[n, r], padded to whole strips of `spread`
template <class A>
inline void pack_wide(const Thin& thin, int64_t rank, int64_t cols, A* wide, Parallel parallel) {
  const int64_t padded = round_up(cols, SPREAD_COLS<A>);
  run(parallel, (padded + BLOCK_COLS - 1) / BLOCK_COLS, [&](int64_t task) {
    const int64_t first = task * BLOCK_COLS, last = at_most(first + BLOCK_COLS, padded);
    for (int64_t r = 0; r < rank; r++)
      for (int64_t n = first; n < last; n++) wide[r * padded + n] = n < cols ? read<A>(thin, n, r) : A(0);
  });
}

template <class E>
void linear_epilogue(const LinearEpilogue& p, Parallel parallel) {
  using A = Acc<E>;
  const int64_t rows = p.samples * p.per_sample, padded = round_up(p.width, SPREAD_COLS<A>);
  A* wide = static_cast<A*>(p.work);
  pack_wide(p.b, p.rank, p.width, wide, parallel);
  const A *gain = static_cast<const A*>(p.gain), *bias = static_cast<const A*>(p.bias);
  const A *delta = static_cast<const A*>(p.delta), *mask = static_cast<const A*>(p.mask);
  E *y = static_cast<E*>(p.y), *z = static_cast<E*>(p.z);
  const E* base = static_cast<const E*>(p.base);
  const bool plain = !gain && !bias && !delta && !z;
  run(parallel, row_tasks(rows), [&](int64_t task) {
    const int64_t first = task * ROWS_PER_TASK, here = at_most(ROWS_PER_TASK, rows - first);
    alignas(64) A s[ROWS_PER_TASK * 256];
    pack_rows(p.s, first, here, p.rank, p.rank, s);
    if (plain) {
      spread(s, p.rank, p.rank, wide, padded, here, p.width, [&](int64_t i, int64_t col, int lanes, Vec<A> sum) {
        store_part(y + (first + i) * p.width + col, sum, lanes);
      });
      return;
    }
    spread(s, p.rank, p.rank, wide, padded, here, p.width, [&](int64_t i, int64_t col, int lanes, Vec<A> sum) {
      const int64_t m = first + i, at = m * p.width + col;
      Vec<A> product{};
      if (z) {
        product = load_part(z + at, lanes);
        sum += product;
        if (p.store_z) store_part(z + at, sum, lanes);
      }
      if (gain) sum *= load_part(gain + col, lanes);
      if (base) sum += load_part(base + at, lanes) - product;
      if (bias) sum += load_part(bias + col, lanes);
      if (delta) sum += splat(mask[m]) * load_part(delta + m / p.per_sample * p.width + col, lanes);
      store_part(y + at, sum, lanes);
    });
  });
}

template <class A>
int64_t dora_norm_work(const DoraNorm& p) {
  return p.rank * round_up(p.d_in, SPREAD_COLS<A>);
}

template <class A>
void dora_norm(const DoraNorm& p, Parallel parallel) {
  A* wide = static_cast<A*>(p.work);
  pack_wide(transposed(p.a), p.rank, p.d_in, wide, parallel);
  const int64_t padded = round_up(p.d_in, SPREAD_COLS<A>);
  run(parallel, row_tasks(p.d_out), [&](int64_t task) {
    const int64_t first = task * ROWS_PER_TASK, here = at_most(ROWS_PER_TASK, p.d_out - first);
    alignas(64) A b[ROWS_PER_TASK * 256], weight[ROWS_PER_TASK * BLOCK_COLS];
    Vec<A> squares[ROWS_PER_TASK] = {};
    pack_rows(p.b, first, here, p.rank, p.rank, b);
    for (int64_t i = 0; i < here * p.rank; i++) b[i] *= static_cast<A>(p.scaling);
    for (int64_t col = 0; col < p.d_in; col += BLOCK_COLS) {
      const int64_t cols = at_most(BLOCK_COLS, p.d_in - col);
      for (int64_t i = 0; i < here; i++) read_row(p.weight, first + i, col, cols, weight + i * BLOCK_COLS);
      spread(b, p.rank, p.rank, wide + col, padded, here, cols, [&](int64_t i, int64_t at, int lanes, Vec<A> sum) {
        sum += load_part(weight + i * BLOCK_COLS + at, lanes);
        squares[i] += sum * sum;  // the lanes past the last column hold zeros
      });
    }
    for (int64_t i = 0; i < here; i++) {
      const A norm = square_root(sum_lanes<A>(squares[i])), floor = static_cast<A>(p.floor);
      static_cast<A*>(p.norm)[first + i] = norm;
      if (p.magnitude)
        static_cast<A*>(p.gain)[first + i] = static_cast<const A*>(p.magnitude)[first + i] / (norm > floor ? norm : floor);
    }
  });
}

template <class E>
void drop(const Drop& p, Parallel parallel) {
  using A = Acc<E>;
  const int64_t rows = p.x.total();
  const Reading<A> reading{p.dropout};
  run(parallel, row_tasks(rows), [&](int64_t task) {
    const int64_t first = task * ROWS_PER_TASK, here = at_most(ROWS_PER_TASK, rows - first);
    alignas(64) A scratch[ROWS_PER_TASK * BLOCK_COLS];
    for (int64_t col = 0; col < p.x.width; col += BLOCK_COLS) {
      const int64_t cols = at_most(BLOCK_COLS, p.x.width - col);
      const Block<A> block = read_block<E>(p.x, reading, first, here, col, cols, scratch);
      for (int64_t i = 0; i < here; i++)
        for (int64_t j = 0; j < cols; j++)
          narrow(block.data[i * block.stride + j], static_cast<E*>(p.out) + (first + i) * p.x.width + col + j);
    }
  });
}

}  // namespace ECHOLORA_ISA
}  // namespace echolora
