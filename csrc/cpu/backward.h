// CPU kernels of the backward pass: adapter_backward, lora_a_backward and input_epilogue; docs in csrc/library.cpp.
#pragma once

#include "forward.h"

namespace echolora {
namespace ECHOLORA_ISA {

// Sums over rows are cut into chunks by the number of rows alone, so that any number of threads gives the same bits.
struct Chunks {
  int64_t count, rows;
  explicit Chunks(int64_t total) {
    rows = round_up((total + 63) / 64, ROWS_PER_TASK);
    if (rows < 4 * ROWS_PER_TASK) rows = 4 * ROWS_PER_TASK;
    count = (total + rows - 1) / rows;
  }
};

// Where adapter_backward keeps its partial sums: per chunk B's gradient, bias's, gain's, and two samples' of Delta.
template <class A>
struct Partials {
  int64_t padded, width, per_chunk;
  A *b, *sums;
  Partials(const AdapterBackward& p, A* work) : padded(padded_rank<A>(p.rank)), width(p.dy.width) {
    b = work;
    sums = work + width * padded;
    per_chunk = width * ((p.db ? padded : 0) + (p.dbias ? 1 : 0) + (p.dgain ? 1 : 0) + (p.ddelta ? 2 : 0));
  }
  A* db(const AdapterBackward&, int64_t chunk) const { return sums + chunk * per_chunk; }
  A* dbias(const AdapterBackward& p, int64_t chunk) const { return db(p, chunk) + (p.db ? width * padded : 0); }
  A* dgain(const AdapterBackward& p, int64_t chunk) const { return dbias(p, chunk) + (p.dbias ? width : 0); }
  A* ddelta(const AdapterBackward& p, int64_t chunk) const { return dgain(p, chunk) + (p.dgain ? width : 0); }
};

template <class E>
int64_t adapter_backward_work(const AdapterBackward& p) {
  const Partials<Acc<E>> partials(p, nullptr);
  return p.dy.width * partials.padded + Chunks(p.dy.total()).count * partials.per_chunk;
}

// Adds one sub-block's rows [first, first + here) of columns [col, col + cols) to the chunk's sums.
template <class E>
inline void add_column_sums(const AdapterBackward& p, const Block<Acc<E>>& block, const Partials<Acc<E>>& partials,
                            int64_t chunk, int64_t chunk_first, int64_t chunk_last, int64_t first, int64_t here,
                            int64_t col, int64_t cols) {
  using A = Acc<E>;
  for (int64_t i = 0; i < here; i++) {
    const int64_t m = first + i;
    const A* dy = block.data + i * block.stride;
    if (p.dbias) {
      A* dbias = partials.dbias(p, chunk) + col;
      for (int64_t j = 0; j < cols; j++) dbias[j] += dy[j];
    }
    if (p.dgain) {
      A* dgain = partials.dgain(p, chunk) + col;
      const E* z = static_cast<const E*>(p.z) + m * p.dy.width + col;
      for (int64_t j = 0; j < cols; j++) dgain[j] += dy[j] * widen(z[j]);
    }
    if (p.ddelta) {
      const A weight = static_cast<const A*>(p.mask)[m];
      if (weight == 0) continue;
      const int64_t sample = m / p.dy.per_sample, from = chunk_first / p.dy.per_sample;
      A* ddelta = static_cast<A*>(p.ddelta) + sample * p.dy.width;  // a sample that no other chunk has rows of
      if (sample == from) ddelta = partials.ddelta(p, chunk);
      else if (sample == (chunk_last - 1) / p.dy.per_sample) ddelta = partials.ddelta(p, chunk) + p.dy.width;
      for (int64_t j = 0; j < cols; j++) ddelta[col + j] += weight * dy[j];
    }
  }
}

template <class A>
inline void add_partials(const AdapterBackward& p, const Partials<A>& partials, const Chunks& chunks, Parallel parallel) {
  const A* gain = static_cast<const A*>(p.gain);
  const int64_t width = p.dy.width, total = p.dy.total(), per_sample = p.dy.per_sample;
  run(parallel, (width + 63) / 64, [&](int64_t task) {
    const int64_t first = task * 64, last = at_most(first + 64, width);
    if (p.db)
      for (int64_t n = first; n < last; n++) {
        A* sum = partials.db(p, 0) + n * partials.padded;
        for (int64_t c = 1; c < chunks.count; c++)
          for (int64_t r = 0; r < partials.padded; r++) sum[r] += partials.db(p, c)[n * partials.padded + r];
        for (int64_t r = 0; r < p.rank; r++) static_cast<A*>(p.db)[n * p.rank + r] = gain ? gain[n] * sum[r] : sum[r];
      }
    for (int64_t n = first; n < last; n++) {
      A bias = 0, of_gain = 0;
      for (int64_t c = 0; c < chunks.count; c++) {
        if (p.dbias) bias += partials.dbias(p, c)[n];
        if (p.dgain) of_gain += partials.dgain(p, c)[n];
      }
      if (p.dbias) static_cast<A*>(p.dbias)[n] = bias;
      if (p.dgain) static_cast<A*>(p.dgain)[n] = of_gain;
    }
    if (p.ddelta)
      for (int64_t c = 0; c < chunks.count; c++) {
        const int64_t chunk_last = at_most((c + 1) * chunks.rows, total) - 1;
        const int64_t from = c * chunks.rows / per_sample, to = chunk_last / per_sample;
        for (int64_t slot = 0; slot < (to > from ? 2 : 1); slot++)
          for (int64_t n = first; n < last; n++)
            static_cast<A*>(p.ddelta)[(slot ? to : from) * width + n] += partials.ddelta(p, c)[slot * width + n];
      }
  });
}

template <class E>
void adapter_backward(const AdapterBackward& p, Parallel parallel) {
  using A = Acc<E>;
  const int64_t rows = p.dy.total(), width = p.dy.width;
  const Chunks chunks(rows);
  const Partials<A> partials(p, static_cast<A*>(p.work));
  const int64_t padded = partials.padded;
  if (p.ds) pack_columns(transposed(p.b), p.rank, width, padded, static_cast<const A*>(p.gain), partials.b, parallel);
  if (p.ddelta)
    for (int64_t i = 0; i < p.dy.samples * width; i++) static_cast<A*>(p.ddelta)[i] = 0;
  run(parallel, chunks.count, [&](int64_t chunk) {
    const int64_t chunk_first = chunk * chunks.rows, chunk_last = at_most(chunk_first + chunks.rows, rows);
    alignas(64) A scratch[ROWS_PER_TASK * BLOCK_COLS], s[ROWS_PER_TASK * 256], ds[ROWS_PER_TASK * 256];
    std::memset(partials.db(p, chunk), 0, sizeof(A) * partials.per_chunk);
    for (int64_t first = chunk_first; first < chunk_last; first += ROWS_PER_TASK) {
      const int64_t here = at_most(ROWS_PER_TASK, chunk_last - first);
      if (p.db) pack_rows(p.s, first, here, p.rank, padded, s);
      for (int64_t i = 0; i < here * padded; i++) ds[i] = 0;
      for (int64_t col = 0; col < width; col += BLOCK_COLS) {
        const int64_t cols = at_most(BLOCK_COLS, width - col);
        const Block<A> block = read_block<E>(p.dy, {}, first, here, col, cols, scratch);
        if (p.ds) gather<A>(block.data, block.stride, 1, here, partials.b + col * padded, padded, cols, ds);
        if (p.db)
          gather<A>(block.data, 1, block.stride, cols, s, padded, here, partials.db(p, chunk) + col * padded);
        if (p.dbias || p.dgain || p.ddelta)
          add_column_sums<E>(p, block, partials, chunk, chunk_first, chunk_last, first, here, col, cols);
      }
      if (p.ds)
        for (int64_t i = 0; i < here; i++)
          for (int64_t r = 0; r < p.rank; r++)
            static_cast<A*>(p.ds)[(first + i) * p.rank + r] = static_cast<A>(p.scaling) * ds[i * padded + r];
    }
  });
  add_partials(p, partials, chunks, parallel);
}

template <class E>
void lora_a_backward(const LoraABackward& p, Parallel parallel) {
  using A = Acc<E>;
  const int64_t rows = p.x.total(), width = p.x.width, padded = padded_rank<A>(p.rank);
  // columns a task: sixteen tasks where the rows are short, else runs long enough to stream
  int64_t block_cols = round_up((width + 15) / 16, 64);
  if (block_cols > BLOCK_COLS) block_cols = BLOCK_COLS;
  const Reading<A> reading{p.dropout, static_cast<const A*>(p.delta), static_cast<const A*>(p.mask)};
  run(parallel, (width + block_cols - 1) / block_cols, [&](int64_t task) {
    const int64_t col = task * block_cols, cols = at_most(block_cols, width - col);
    alignas(64) A scratch[ROWS_PER_TASK * BLOCK_COLS], ds[ROWS_PER_TASK * 256], sums[BLOCK_COLS * 256];
    std::memset(sums, 0, sizeof(A) * cols * padded);
    for (int64_t first = 0; first < rows; first += ROWS_PER_TASK) {
      const int64_t here = at_most(ROWS_PER_TASK, rows - first);
      pack_rows(p.ds, first, here, p.rank, padded, ds);
      const Block<A> block = read_block<E>(p.x, reading, first, here, col, cols, scratch);
      gather<A>(block.data, 1, block.stride, cols, ds, padded, here, sums);
    }
    for (int64_t r = 0; r < p.rank; r++)
      for (int64_t j = 0; j < cols; j++) static_cast<A*>(p.da)[r * width + col + j] = sums[j * padded + r];
  });
}

template <class E>
int64_t input_epilogue_work(const InputEpilogue& p) {
  return p.rank * round_up(p.width, SPREAD_COLS<Acc<E>>);
}

template <class E>
void input_epilogue(const InputEpilogue& p, Parallel parallel) {
  using A = Acc<E>;
  const int64_t padded = round_up(p.width, SPREAD_COLS<A>);
  A* wide = static_cast<A*>(p.work);
  pack_wide(transposed(p.a), p.rank, p.width, wide, parallel);
  const E* product = static_cast<const E*>(p.product);
  E* dx = static_cast<E*>(p.dx);
  run(parallel, row_tasks(p.total), [&](int64_t task) {
    const int64_t first = task * ROWS_PER_TASK, here = at_most(ROWS_PER_TASK, p.total - first);
    alignas(64) A ds[ROWS_PER_TASK * 256], factors[ROWS_PER_TASK * BLOCK_COLS];
    pack_rows(p.ds, first, here, p.rank, p.rank, ds);
    for (int64_t strip = 0; strip < p.width; strip += BLOCK_COLS) {
      const int64_t cols = at_most(BLOCK_COLS, p.width - strip);
      if (p.dropout.below)
        for (int64_t i = 0; i < here; i++)
          dropout_factors(p.dropout, first + i, strip, cols, p.width, factors + i * BLOCK_COLS);
      spread(ds, p.rank, p.rank, wide + strip, padded, here, cols, [&](int64_t i, int64_t col, int lanes, Vec<A> sum) {
        const int64_t at = (first + i) * p.width + strip + col;
        if (product) sum += load_part(product + at, lanes);
        if (p.dropout.below) sum *= load_part(factors + i * BLOCK_COLS + col, lanes);
        if (p.accumulate) sum += load_part(dx + at, lanes);
        store_part(dx + at, sum, lanes);
      });
    }
  });
}

}  // namespace ECHOLORA_ISA
}  // namespace echolora
