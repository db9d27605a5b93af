// CPU kernels of the backward pass: adapter_backward, lora_a_backward and input_epilogue; docs in csrc/library.cpp.
#pragma once

#include "forward.h"

namespace echolora {
namespace ECHOLORA_ISA {

// Sums over rows are cut into chunks by sizes alone, so that any number of threads gives the same bits: eight of them
// where there are few rows, up to 64 where there are many, fewer (but eight) where their sums would be large together.
struct Chunks {
  static constexpr int64_t MOST_SUMS = 1 << 24;  // 64 MiB of float32
  int64_t count, rows;
  Chunks(int64_t total, int64_t per_chunk) {
    const int64_t most = at_most(64, MOST_SUMS / (per_chunk + 1)), wanted = at_most(total / 128, most);
    const int64_t pieces = wanted < 8 ? 8 : wanted;
    rows = round_up((total + pieces - 1) / pieces, BLOCK_ROWS);
    count = rows == 0 ? 0 : (total + rows - 1) / rows;
  }
};

// Where adapter_backward keeps its partial sums: per chunk B's gradient, bias's, gain's, and two samples' of Delta.
template <class P>
struct Partials {
  using A = typename P::A;
  int64_t padded, width, per_chunk;  // width: padded to whole blocks
  A *b, *sums;
  Partials(const AdapterBackward& p, void* work)
      : padded(P::padded_rank(p.rank)), width(round_up(p.dy.width, BLOCK_COLS)), b(static_cast<A*>(work)) {
    sums = b + P::packed_size(width, p.rank);
    per_chunk = width * ((p.sums_b() ? padded : 0) + (p.dbias ? 1 : 0) + (p.dgain ? 1 : 0) + (p.ddelta ? 2 : 0));
  }
  A* db(const AdapterBackward&, int64_t chunk) const { return sums + chunk * per_chunk; }
  A* dbias(const AdapterBackward& p, int64_t chunk) const { return db(p, chunk) + (p.sums_b() ? width * padded : 0); }
  A* dgain(const AdapterBackward& p, int64_t chunk) const { return dbias(p, chunk) + (p.dbias ? width : 0); }
  A* ddelta(const AdapterBackward& p, int64_t chunk) const { return dgain(p, chunk) + (p.dgain ? width : 0); }
};

// B's sums of one chunk, by which rows are cut whether they are wanted or not.
template <class P>
inline int64_t lora_b_partial(const AdapterBackward& p) {
  return round_up(p.dy.width, BLOCK_COLS) * P::padded_rank(p.rank);
}

template <class P>
inline int64_t adapter_work(const AdapterBackward& p, const Chunks& chunks) {
  return P::packed_size(p.dy.width, p.rank) + chunks.count * Partials<P>(p, nullptr).per_chunk;
}

template <class P>
int64_t adapter_backward_work(const AdapterBackward& p) {
  return adapter_work<P>(p, Chunks(p.dy.total(), lora_b_partial<P>(p)));
}

// to[j] += sum_i factor(i, j, lanes) block[i][j] over rows [first, last) and `cols` columns; four sums a column, so that
// rounding errors grow as slowly as in torch's own sums
template <class P, class Factor>
inline void add_rows(const typename P::Packed* block, int64_t first, int64_t last, int64_t cols, typename P::A* to,
                     const Factor& factor) {
  using A = typename P::A;
  for (int64_t j = 0; j < cols; j += LANES<A>) {
    const int lanes = static_cast<int>(at_most(LANES<A>, cols - j));
    Vec<A> sums[4] = {};
    for (int64_t i = first; i < last; i++)
      sums[(i - first) % 4] += factor(i, j, lanes) * load_part(block + i * BLOCK_COLS + j, lanes);
    store_part(to + j, load_part(to + j, lanes) + ((sums[0] + sums[1]) + (sums[2] + sums[3])), lanes);
  }
}

// Adds rows [first, first + here) of columns [col, col + cols) to the chunk's sums over columns. `from` and `to` are the
// samples of the chunk's first and last row.
template <class P>
inline void add_column_sums(const AdapterBackward& p, const typename P::Packed* block, const Partials<P>& partials,
                            int64_t chunk, int64_t from, int64_t to, int64_t first, int64_t here, int64_t col,
                            int64_t cols) {
  using A = typename P::A;
  using E = typename P::Element;
  if (p.dbias)
    add_rows<P>(block, 0, here, cols, partials.dbias(p, chunk) + col, [](int64_t, int64_t, int) { return splat(A(1)); });
  if (p.dgain) {
    const E* z = static_cast<const E*>(p.z) + first * p.dy.width + col;
    add_rows<P>(block, 0, here, cols, partials.dgain(p, chunk) + col,
                [&](int64_t i, int64_t j, int lanes) { return load_part(z + i * p.dy.width + j, lanes); });
  }
  if (!p.ddelta) return;
  const A* mask = static_cast<const A*>(p.mask) + first;
  for (int64_t i = 0; i < here;) {  // rows of one sample at a time
    const int64_t sample = (first + i) / p.dy.per_sample;
    const int64_t last = at_most(here, (sample + 1) * p.dy.per_sample - first);
    A* ddelta = static_cast<A*>(p.ddelta) + sample * p.dy.width;  // a sample that no other chunk has rows of
    if (sample == from) ddelta = partials.ddelta(p, chunk);
    else if (sample == to) ddelta = partials.ddelta(p, chunk) + partials.width;
    add_rows<P>(block, i, last, cols, ddelta + col, [&](int64_t row, int64_t, int) { return splat(mask[row]); });
    i = last;
  }
}

// sums[c] for c > 0 added to sums[0], in that order: [chunks, width, padded], columns of one block
template <class A>
inline void add_chunks(A* sums, int64_t chunks, int64_t stride, int64_t first, int64_t count) {
  for (int64_t c = 1; c < chunks; c++)
    for (int64_t i = first; i < first + count; i++) sums[i] += sums[c * stride + i];
}

// Columns of one task, all chunks' sums added up.
template <class P>
inline void finish_adapter(const AdapterBackward& p, const Partials<P>& partials, const Chunks& chunks, int64_t task) {
  using A = typename P::A;
  const A* gain = static_cast<const A*>(p.gain);
  const int64_t width = p.dy.width, total = p.dy.total(), per_sample = p.dy.per_sample, padded = partials.padded;
  const int64_t first = task * BLOCK_COLS, last = at_most(first + BLOCK_COLS, width);
  A low_rank[BLOCK_COLS] = {};  // sum over rows of dy times s B^T
  if (p.sums_b()) {
    A* sums = partials.db(p, 0);
    add_chunks(sums, chunks.count, partials.per_chunk, first * padded, BLOCK_COLS * padded);
    if (p.dgain && p.add_low_rank)
      each_element<A>(p.b, first, last - first, p.rank, [&](int64_t n, int64_t r, A b) {
        low_rank[n] += b * sums[P::sum_at(first + n, r, padded)];
      });
    for (int64_t n = first; n < last && p.db; n++)
      for (int64_t r = 0; r < p.rank; r++) {
        const A sum = sums[P::sum_at(n, r, padded)];
        static_cast<A*>(p.db)[n * p.rank + r] = gain ? gain[n] * sum : sum;
      }
  }
  for (int64_t n = first; n < last; n++) {
    A bias = 0, of_gain = 0;
    for (int64_t c = 0; c < chunks.count; c++) {
      if (p.dbias) bias += partials.dbias(p, c)[n];
      if (p.dgain) of_gain += partials.dgain(p, c)[n];
    }
    if (p.dbias) static_cast<A*>(p.dbias)[n] = bias;
    if (p.dgain) static_cast<A*>(p.dgain)[n] = of_gain + low_rank[n - first];
  }
  if (p.ddelta)
    for (int64_t c = 0; c < chunks.count; c++) {
      const int64_t chunk_last = at_most((c + 1) * chunks.rows, total) - 1;
      const int64_t from = c * chunks.rows / per_sample, to = chunk_last / per_sample;
      for (int64_t slot = 0; slot < (to > from ? 2 : 1); slot++)
        for (int64_t n = first; n < last; n++)
          static_cast<A*>(p.ddelta)[(slot ? to : from) * width + n] += partials.ddelta(p, c)[slot * partials.width + n];
    }
}

// Rows [first, first + here) of one chunk: their dS, and their part of the chunk's sums.
template <class P>
inline void adapter_rows(const AdapterBackward& p, const Partials<P>& partials, const Chunks& chunks, int64_t chunk,
                         int64_t first, int64_t here) {
  using A = typename P::A;
  using Packed = typename P::Packed;
  const int64_t width = p.dy.width, padded = partials.padded;
  const int64_t from = chunk * chunks.rows / p.dy.per_sample;
  const int64_t to = (at_most((chunk + 1) * chunks.rows, p.dy.total()) - 1) / p.dy.per_sample;
  const Packed* b = reinterpret_cast<const Packed*>(partials.b);
  Ahead<typename P::Element> ahead;
  alignas(64) Packed block[BLOCK_ROWS * BLOCK_COLS], s[BLOCK_ROWS * MAX_RANK];
  alignas(64) A ds[BLOCK_ROWS * MAX_RANK];
  if (p.sums_b()) P::pack_rows(p.s, first, here, p.rank, padded, s);
  if (p.ds) std::memset(ds, 0, sizeof(A) * BLOCK_ROWS * padded);
  for (int64_t col = 0; col < width; col += BLOCK_COLS) {
    const int64_t cols = at_most(BLOCK_COLS, width - col);
    P::read(p.dy, {}, first, here, col, cols, block, &ahead);
    if (p.ds) P::gather_rows(block, here, cols, b + col * padded, padded, ds, &ahead);
    if (p.sums_b()) P::gather_cols(block, here, cols, s, padded, partials.db(p, chunk) + col * padded, &ahead);
    if (p.dbias || p.dgain || p.ddelta)
      add_column_sums<P>(p, block, partials, chunk, from, to, first, here, col, cols);
  }
  if (p.ds) write_thin(p.ds, p.ds_type, first, here, p.rank, static_cast<A>(p.scaling), ds, padded);
}

// rows(chunk, first, here) for every block of rows, chunk by chunk, after begin(chunk)
template <class P, class Begin, class RowsOf>
inline void each_block(const Chunks& chunks, int64_t total, Parallel parallel, const Begin& begin, const RowsOf& rows) {
  run(parallel, chunks.count, [&](int64_t chunk) {
    [[maybe_unused]] const typename P::Session session;
    const int64_t last = at_most((chunk + 1) * chunks.rows, total);
    begin(chunk);
    for (int64_t first = chunk * chunks.rows; first < last; first += BLOCK_ROWS)
      rows(chunk, first, at_most(BLOCK_ROWS, last - first));
  });
}

template <class P>
void adapter_backward(const AdapterBackward& p, Parallel parallel) {
  using A = typename P::A;
  const Chunks chunks(p.dy.total(), lora_b_partial<P>(p));
  const Partials<P> partials(p, p.work);
  if (p.ds) pack_all<P>(p.b, p.dy.width, p.rank, p.gain, partials.b, parallel);
  if (p.ddelta) std::memset(p.ddelta, 0, sizeof(A) * p.dy.samples * p.dy.width);
  each_block<P>(
      chunks, p.dy.total(), parallel,
      [&](int64_t chunk) { std::memset(partials.db(p, chunk), 0, sizeof(A) * partials.per_chunk); },
      [&](int64_t chunk, int64_t first, int64_t here) { adapter_rows<P>(p, partials, chunks, chunk, first, here); });
  run(parallel, col_tasks(p.dy.width), [&](int64_t task) { finish_adapter<P>(p, partials, chunks, task); });
}

template <class P>
inline int64_t lora_a_partial(const LoraABackward& p) {
  return round_up(p.x.width, BLOCK_COLS) * P::padded_rank(p.rank);
}

template <class P>
int64_t lora_a_backward_work(const LoraABackward& p) {
  return Chunks(p.x.total(), lora_a_partial<P>(p)).count * lora_a_partial<P>(p);
}

// Rows [first, first + here): their part of one chunk's sums.
template <class P>
inline void lora_a_rows(const LoraABackward& p, typename P::A* sums, int64_t first, int64_t here) {
  using A = typename P::A;
  using Packed = typename P::Packed;
  const int64_t padded = P::padded_rank(p.rank);
  const Reading<A> reading{p.dropout, static_cast<const A*>(p.delta), static_cast<const A*>(p.mask)};
  Ahead<typename P::Element> ahead;
  alignas(64) Packed block[BLOCK_ROWS * BLOCK_COLS], ds[BLOCK_ROWS * MAX_RANK];
  P::pack_rows(p.ds, first, here, p.rank, padded, ds);
  for (int64_t col = 0; col < p.x.width; col += BLOCK_COLS) {
    const int64_t cols = at_most(BLOCK_COLS, p.x.width - col);
    P::read(p.x, reading, first, here, col, cols, block, &ahead);
    P::gather_cols(block, here, cols, ds, padded, sums + col * padded, &ahead);
  }
}

// Columns of one task, all chunks' sums added up.
template <class P>
inline void finish_lora_a(const LoraABackward& p, const Chunks& chunks, int64_t task) {
  using A = typename P::A;
  const int64_t padded = P::padded_rank(p.rank), first = task * BLOCK_COLS;
  A* sums = static_cast<A*>(p.work);
  add_chunks(sums, chunks.count, lora_a_partial<P>(p), first * padded, BLOCK_COLS * padded);
  for (int64_t r = 0; r < p.rank; r++)
    for (int64_t k = first; k < at_most(first + BLOCK_COLS, p.x.width); k++)
      static_cast<A*>(p.da)[r * p.x.width + k] = sums[P::sum_at(k, r, padded)];
}

template <class P>
void lora_a_backward(const LoraABackward& p, Parallel parallel) {
  using A = typename P::A;
  const int64_t partial = lora_a_partial<P>(p);
  const Chunks chunks(p.x.total(), partial);
  A* sums = static_cast<A*>(p.work);
  each_block<P>(
      chunks, p.x.total(), parallel,
      [&](int64_t chunk) { std::memset(sums + chunk * partial, 0, sizeof(A) * partial); },
      [&](int64_t chunk, int64_t first, int64_t here) { lora_a_rows<P>(p, sums + chunk * partial, first, here); });
  run(parallel, col_tasks(p.x.width), [&](int64_t task) { finish_lora_a<P>(p, chunks, task); });
}

template <class P>
int64_t input_epilogue_work(const InputEpilogue& p) {
  return P::wide_size(p.rank, p.width);
}

// dx of one vector, given the adapter's share of it. What `DX_ALONE` promises is the common case: added to dx, no dropout.
template <class P, bool DX_ALONE>
struct FinishInput {
  using A = typename P::A;
  using E = typename P::Element;
  E* dx;  // from the strip's first element on
  const E* product;
  const A* factors;
  int64_t width;
  bool accumulate;

  void ahead(int64_t i, int64_t col) const {
    if (DX_ALONE || accumulate) __builtin_prefetch(dx + i * width + col);
    if (!DX_ALONE && product) __builtin_prefetch(product + i * width + col);
  }

  void operator()(int64_t i, int64_t col, int lanes, Vec<A> sum) const {
    const int64_t at = i * width + col;
    if constexpr (DX_ALONE) return store_part(dx + at, sum + load_part(dx + at, lanes), lanes);
    if (product) sum += load_part(product + at, lanes);
    if (factors) sum *= load_part(factors + i * BLOCK_COLS + col, lanes);
    if (accumulate) sum += load_part(dx + at, lanes);
    store_part(dx + at, sum, lanes);
  }
};

// Rows [first, first + here) of dx; A is packed in p.work.
template <class P>
inline void input_rows(const InputEpilogue& p, int64_t first, int64_t here) {
  using A = typename P::A;
  using E = typename P::Element;
  using Packed = typename P::Packed;
  alignas(64) Packed ds[BLOCK_ROWS * MAX_RANK];
  alignas(64) A factors[BLOCK_ROWS * BLOCK_COLS];
  P::pack_spread(p.ds, first, here, p.rank, A(1), ds);
  for (int64_t strip = 0; strip < p.width; strip += BLOCK_COLS) {
    const int64_t cols = at_most(BLOCK_COLS, p.width - strip), at = first * p.width + strip;
    if (p.dropout.below)
      for (int64_t i = 0; i < here; i++)
        dropout_factors(p.dropout, first + i, strip, cols, p.width, factors + i * BLOCK_COLS);
    const E* product = static_cast<const E*>(p.product);
    E* dx = static_cast<E*>(p.dx) + at;
    const A* kept = p.dropout.below ? factors : nullptr;
    product = product ? product + at : nullptr;
    const Packed* wide = static_cast<const Packed*>(p.work) + P::wide_at(strip, p.rank);
    if (p.accumulate && !product && !kept)
      P::spread(ds, p.rank, wide, p.width, here, cols, FinishInput<P, true>{dx, product, kept, p.width, true});
    else
      P::spread(ds, p.rank, wide, p.width, here, cols, FinishInput<P, false>{dx, product, kept, p.width, p.accumulate});
  }
}

template <class P>
void input_epilogue(const InputEpilogue& p, Parallel parallel) {
  pack_wide_all<P>(transposed(p.a), p.width, p.rank, p.work, parallel);
  run(parallel, row_tasks(p.total), [&](int64_t task) {
    [[maybe_unused]] const typename P::Session session;
    const int64_t first = task * BLOCK_ROWS;
    input_rows<P>(p, first, at_most(BLOCK_ROWS, p.total - first));
  });
}

// Where linear_backward keeps its scratch: what adapter_backward wants, A's sums, and A for dx.
template <class P>
struct LinearScratch {
  int64_t partial;  // A's sums of one chunk
  Chunks chunks;
  int64_t lora_a, input, size;
  explicit LinearScratch(const LinearBackward& p)
      : partial(p.need_a ? lora_a_partial<P>(p.lora_a) : 0),
        chunks(p.adapter.dy.total(), lora_b_partial<P>(p.adapter) + partial), lora_a(adapter_work<P>(p.adapter, chunks)),
        input(lora_a + chunks.count * partial), size(input + (p.need_x ? input_epilogue_work<P>(p.input) : 0)) {}
};

template <class P>
int64_t linear_backward_work(const LinearBackward& p) {
  return LinearScratch<P>(p).size;
}

// The three above in one pass: what one needs of a row is still in the cache when another has left it there.
template <class P>
void linear_backward(LinearBackward p, Parallel parallel) {
  using A = typename P::A;
  const int64_t rows = p.adapter.dy.total(), width = p.adapter.dy.width;
  const LinearScratch<P> scratch(p);
  const Chunks chunks = scratch.chunks;
  const int64_t partial = scratch.partial;
  A* sums = static_cast<A*>(p.adapter.work) + scratch.lora_a;
  p.lora_a.work = sums;
  p.input.work = static_cast<A*>(p.adapter.work) + scratch.input;
  const Partials<P> partials(p.adapter, p.adapter.work);
  const int64_t of_b = col_tasks(width), of_a = p.need_a ? col_tasks(p.lora_a.x.width) : 0;
  run(parallel, of_b + (p.need_x ? col_tasks(p.input.width) : 0), [&](int64_t task) {
    if (task >= of_b) pack_wide_task<P>(transposed(p.input.a), p.input.width, p.input.rank, p.input.work, task - of_b);
    else if (p.adapter.ds) pack_task<P>(p.adapter.b, width, p.adapter.rank, p.adapter.gain, partials.b, task);
  });
  if (p.adapter.ddelta) std::memset(p.adapter.ddelta, 0, sizeof(A) * p.adapter.dy.samples * width);
  each_block<P>(
      chunks, rows, parallel,
      [&](int64_t chunk) {
        std::memset(partials.db(p.adapter, chunk), 0, sizeof(A) * partials.per_chunk);
        std::memset(sums + chunk * partial, 0, sizeof(A) * partial);
      },
      [&](int64_t chunk, int64_t first, int64_t here) {
        adapter_rows<P>(p.adapter, partials, chunks, chunk, first, here);
        if (p.need_a) lora_a_rows<P>(p.lora_a, sums + chunk * partial, first, here);
        if (p.need_x) input_rows<P>(p.input, first, here);
      });
  run(parallel, of_b + of_a, [&](int64_t task) {
    if (task >= of_b) finish_lora_a<P>(p.lora_a, chunks, task - of_b);
    else finish_adapter<P>(p.adapter, partials, chunks, task);
  });
}

}  // namespace ECHOLORA_ISA
}  // namespace echolora
