// CPU kernels of the forward pass: shrink, linear_epilogue, dora_norm and drop; docs of each in csrc/library.cpp.
#pragma once

#include "products.h"

namespace echolora {
namespace ECHOLORA_ISA {

inline int64_t row_tasks(int64_t rows) { return (rows + BLOCK_ROWS - 1) / BLOCK_ROWS; }
inline int64_t col_tasks(int64_t cols) { return (cols + BLOCK_COLS - 1) / BLOCK_COLS; }

// BLOCK_COLS rows of an adapter [width, rank] as `gather_rows` takes it.
template <class P>
inline void pack_task(const Thin& thin, int64_t width, int64_t rank, const void* factor, void* packed, int64_t task) {
  const int64_t padded = P::padded_rank(rank), first = task * BLOCK_COLS, here = at_most(BLOCK_COLS, width - first);
  P::pack(thin, first, here, rank, padded, static_cast<const typename P::A*>(factor),
          static_cast<typename P::Packed*>(packed) + first * padded);
}

template <class P>
inline void pack_all(const Thin& thin, int64_t width, int64_t rank, const void* factor, void* packed, Parallel parallel) {
  run(parallel, col_tasks(width), [&](int64_t task) { pack_task<P>(thin, width, rank, factor, packed, task); });
}

// The same as `spread` takes it.
template <class P>
inline void pack_wide_task(const Thin& thin, int64_t width, int64_t rank, void* wide, int64_t task) {
  P::pack_wide(thin, task * BLOCK_COLS, width, rank, static_cast<typename P::Packed*>(wide));
}

template <class P>
inline void pack_wide_all(const Thin& thin, int64_t width, int64_t rank, void* wide, Parallel parallel) {
  run(parallel, col_tasks(width), [&](int64_t task) { pack_wide_task<P>(thin, width, rank, wide, task); });
}

// to[i][0 .. rank) = scaling * sums[i][0 .. rank) for `rows` rows, in the type of an adapter
template <class A>
inline void write_thin(void* to, Type type, int64_t first, int64_t rows, int64_t rank, A scaling, const A* sums,
                       int64_t padded) {
  const auto write = [&](auto* out) {
    for (int64_t i = 0; i < rows; i++)
      for (int64_t r = 0; r < rank; r += LANES<A>)
        store_part(out + (first + i) * rank + r, splat(scaling) * load(sums + i * padded + r),
                   static_cast<int>(at_most(LANES<A>, rank - r)));
  };
  if constexpr (sizeof(A) == 8) return write(static_cast<double*>(to));
  else if (type == Type::f32) write(static_cast<float*>(to));
  else if (type == Type::bf16) write(static_cast<bf16*>(to));
  else write(static_cast<f16*>(to));
}

template <class P>
int64_t shrink_work(const Shrink& p) {
  return P::packed_size(p.x.width, p.rank);
}

// Rows [first, first + here) of S; A is packed in p.work.
template <class P>
inline void shrink_rows(const Shrink& p, int64_t first, int64_t here) {
  using A = typename P::A;
  using Packed = typename P::Packed;
  const int64_t padded = P::padded_rank(p.rank);
  const Packed* packed = static_cast<const Packed*>(p.work);
  const A *delta = static_cast<const A*>(p.delta), *mask = static_cast<const A*>(p.mask);
  const Reading<A> reading{p.dropout, p.site == Site::adapter_input ? delta : nullptr, mask};
  Ahead<typename P::Element> ahead;
  alignas(64) Packed block[BLOCK_ROWS * BLOCK_COLS];
  alignas(64) A sums[BLOCK_ROWS * MAX_RANK];
  std::memset(sums, 0, sizeof(A) * BLOCK_ROWS * padded);
  for (int64_t col = 0; col < p.x.width; col += BLOCK_COLS) {
    const int64_t cols = at_most(BLOCK_COLS, p.x.width - col);
    P::read(p.x, reading, first, here, col, cols, block, &ahead);
    P::gather_rows(block, here, cols, packed + col * padded, padded, sums, &ahead);
  }
  if (p.site == Site::rank)
    for (int64_t i = 0; i < here; i++)
      for (int64_t r = 0; r < p.rank; r++)
        sums[i * padded + r] += mask[first + i] * delta[(first + i) / p.x.per_sample * p.rank + r];
  write_thin(p.s, p.s_type, first, here, p.rank, static_cast<A>(p.scaling), sums, padded);
}

template <class P>
void shrink(const Shrink& p, Parallel parallel) {
  pack_all<P>(transposed(p.a), p.x.width, p.rank, p.gain, p.work, parallel);
  run(parallel, row_tasks(p.x.total()), [&](int64_t task) {
    [[maybe_unused]] const typename P::Session session;
    const int64_t first = task * BLOCK_ROWS;
    shrink_rows<P>(p, first, at_most(BLOCK_ROWS, p.x.total() - first));
  });
}

template <class P>
int64_t linear_epilogue_work(const LinearEpilogue& p) {
  return P::wide_size(p.rank, p.width);
}

// y of one vector, given the adapter's share of it. What `Z_ALONE` promises is the common case: LoRA, z is y.
template <class P, bool Z_ALONE>
struct FinishLinear {
  using A = typename P::A;
  using E = typename P::Element;
  E* y;  // from the task's first row on
  const E *z, *base;
  const A *gain, *bias, *delta, *mask;
  int64_t first, per_sample, width;

  FinishLinear(const LinearEpilogue& p, int64_t first_row)
      : y(static_cast<E*>(p.y) + first_row * p.width), z(static_cast<const E*>(p.z)), base(static_cast<const E*>(p.base)),
        gain(static_cast<const A*>(p.gain)), bias(static_cast<const A*>(p.bias)),
        delta(static_cast<const A*>(p.delta)), mask(static_cast<const A*>(p.mask)), first(first_row),
        per_sample(p.per_sample), width(p.width) {
    if (z) z += first_row * width;
    if (base) base += first_row * width;
  }

  void ahead(int64_t i, int64_t col) const {
    if (Z_ALONE || z) __builtin_prefetch(z + i * width + col);
  }

  void operator()(int64_t i, int64_t col, int lanes, Vec<A> sum) const {
    const int64_t at = i * width + col;
    if constexpr (Z_ALONE) return store_part(y + at, sum + load_part(z + at, lanes), lanes);
    const int64_t m = first + i;
    Vec<A> product{};
    if (z) {
      product = load_part(z + at, lanes);
      sum += product;
    }
    if (gain) sum *= load_part(gain + col, lanes);
    if (base) sum += load_part(base + at, lanes) - product;
    if (bias) sum += load_part(bias + col, lanes);
    if (delta) sum += splat(mask[m]) * load_part(delta + m / per_sample * width + col, lanes);
    store_part(y + at, sum, lanes);
  }
};

// Rows [first, first + here) of y; B is packed in p.work.
template <class P>
inline void linear_rows(const LinearEpilogue& p, int64_t first, int64_t here) {
  using Packed = typename P::Packed;
  alignas(64) Packed s[BLOCK_ROWS * MAX_RANK];
  P::pack_spread(p.s, first, here, p.rank, typename P::A(1), s);
  const Packed* wide = static_cast<const Packed*>(p.work);
  if (p.z && !p.base && !p.gain && !p.bias && !p.delta)
    P::spread(s, p.rank, wide, p.width, here, p.width, FinishLinear<P, true>(p, first));
  else
    P::spread(s, p.rank, wide, p.width, here, p.width, FinishLinear<P, false>(p, first));
}

template <class P>
void linear_epilogue(const LinearEpilogue& p, Parallel parallel) {
  const int64_t rows = p.samples * p.per_sample;
  pack_wide_all<P>(p.b, p.width, p.rank, p.work, parallel);
  run(parallel, row_tasks(rows), [&](int64_t task) {
    [[maybe_unused]] const typename P::Session session;
    const int64_t first = task * BLOCK_ROWS;
    linear_rows<P>(p, first, at_most(BLOCK_ROWS, rows - first));
  });
}

template <class P>
int64_t linear_forward_work(const LinearForward& p) {
  return shrink_work<P>(p.shrink) + linear_epilogue_work<P>(p.epilogue);
}

// Both in one pass over the rows.
template <class P>
void linear_forward(LinearForward p, Parallel parallel) {
  p.epilogue.work = static_cast<typename P::A*>(p.shrink.work) + shrink_work<P>(p.shrink);
  const int64_t rows = p.shrink.x.total(), of_a = col_tasks(p.shrink.x.width);
  run(parallel, of_a + col_tasks(p.epilogue.width), [&](int64_t task) {
    if (task < of_a) pack_task<P>(transposed(p.shrink.a), p.shrink.x.width, p.shrink.rank, p.shrink.gain, p.shrink.work, task);
    else pack_wide_task<P>(p.epilogue.b, p.epilogue.width, p.epilogue.rank, p.epilogue.work, task - of_a);
  });
  run(parallel, row_tasks(rows), [&](int64_t task) {
    [[maybe_unused]] const typename P::Session session;
    const int64_t first = task * BLOCK_ROWS, here = at_most(BLOCK_ROWS, rows - first);
    shrink_rows<P>(p.shrink, first, here);
    linear_rows<P>(p.epilogue, first, here);
  });
}

template <class P>
int64_t dora_norm_work(const DoraNorm& p) {
  return P::wide_size(p.rank, p.d_in);
}

// squares[i] += the squares of one vector of weight + scaling B A
template <class A>
struct AddSquares {
  const A* weight;
  Vec<A>* squares;
  void ahead(int64_t, int64_t) const {}
  void operator()(int64_t i, int64_t at, int lanes, Vec<A> sum) const {
    sum += load_part(weight + i * BLOCK_COLS + at, lanes);
    squares[i] += sum * sum;  // the lanes past the last column hold zeros
  }
};

template <class P>
void dora_norm(const DoraNorm& p, Parallel parallel) {
  using A = typename P::A;
  const A* wide = static_cast<const A*>(p.work);
  pack_wide_all<P>(transposed(p.a), p.d_in, p.rank, p.work, parallel);
  run(parallel, row_tasks(p.d_out), [&](int64_t task) {
    const int64_t first = task * BLOCK_ROWS, here = at_most(BLOCK_ROWS, p.d_out - first);
    alignas(64) A b[BLOCK_ROWS * MAX_RANK], weight[BLOCK_ROWS * BLOCK_COLS];
    Vec<A> squares[BLOCK_ROWS] = {};
    P::pack_spread(p.b, first, here, p.rank, static_cast<A>(p.scaling), b);
    for (int64_t col = 0; col < p.d_in; col += BLOCK_COLS) {
      const int64_t cols = at_most(BLOCK_COLS, p.d_in - col);
      Thin strip = p.weight;
      with_data(strip, [&](const auto* data) { strip.data = data + col * strip.stride_col; });
      each_element<A>(strip, first, here, cols, [&](int64_t i, int64_t j, A value) { weight[i * BLOCK_COLS + j] = value; });
      P::spread(b, p.rank, wide + P::wide_at(col, p.rank), p.d_in, here, cols, AddSquares<A>{weight, squares});
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
    const int64_t first = task * BLOCK_ROWS, here = at_most(BLOCK_ROWS, rows - first);
    Ahead<E> ahead;
    alignas(64) A block[BLOCK_ROWS * BLOCK_COLS];
    for (int64_t col = 0; col < p.x.width; col += BLOCK_COLS) {
      const int64_t cols = at_most(BLOCK_COLS, p.x.width - col);
      read_block<E>(p.x, reading, first, here, col, cols, block, &ahead);
      for (int64_t i = 0; i < here; i++)
        for (int64_t j = 0; j < cols; j += LANES<A>)
          store_part(static_cast<E*>(p.out) + (first + i) * p.x.width + col + j, load(block + i * BLOCK_COLS + j),
                     static_cast<int>(at_most(LANES<A>, cols - j)));
    }
  });
}

}  // namespace ECHOLORA_ISA
}  // namespace echolora
