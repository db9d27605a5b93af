// F1: S = scaling (drop(x) (a * gain)^T + echo), the contraction over columns; also dS = scaling dY (gain * b).
//
// A block takes 64 rows and a chunk of the rank, a warp 16 of those rows. Tiles go from global memory through
// registers, where dropout, echo and gain apply, to shared memory; the loads of the next tile run while this one is
// multiplied. Where rows alone do not fill the device, several blocks share one row's contraction and leave partial
// sums.

#include "product.cuh"

namespace echolora {
namespace {

constexpr int THREADS = 128;
constexpr int ROWS = 64;
constexpr int DEPTH = 64;
constexpr int CHUNKS = DEPTH / CHUNK;
enum Site { NO_ECHO, ADAPTER_INPUT, RANK };

struct Plan {
  int64_t rows;
  int rank_tiles;     // 8 ranks each, per block
  int rank_chunks;    // blocks beside each other
  int splits;         // blocks that share one row
  int64_t per_split;  // columns of each, a multiple of DEPTH
};

Plan plan_of(const echolora_shrink_args& p) {
  Plan plan;
  plan.rows = p.x.samples * p.x.length;
  plan.rank_tiles = p.rank <= 16 || p.x.dtype == ECHOLORA_FLOAT64 ? 2 : p.rank <= 32 ? 4 : 8;
  plan.rank_chunks = static_cast<int>(ceil_div(p.rank, 8 * plan.rank_tiles));
  const int64_t blocks = ceil_div(plan.rows, ROWS) * plan.rank_chunks, steps = ceil_div(p.x.width, DEPTH);
  // four blocks fit on a processor; fewer than four steps are not worth a partial sum
  const int64_t wanted = 4 * processors() / blocks, most = steps / 4;
  const int64_t splits = wanted < most ? wanted : most;
  plan.per_split = ceil_div(steps, splits < 1 ? 1 : splits) * DEPTH;
  plan.splits = static_cast<int>(ceil_div(p.x.width, plan.per_split));
  return plan;
}

// Blocks per processor that registers have room for.
template <typename E, int NT>
constexpr int BLOCKS = sizeof(E) == 2              ? (NT == 2   ? 5
                                                      : NT == 4 ? 4
                                                                : 3)
                       : sizeof(E) == 4 && NT == 2 ? 4
                                                   : 2;

template <typename E, int NT>
__global__ void __launch_bounds__(THREADS, BLOCKS<E, NT>) shrink_kernel(const echolora_shrink_args p, const Plan plan) {
  using A = Acc<E>;
  constexpr int RANKS = 8 * NT, STRIDE = DEPTH + PAD<E>;
  constexpr int X_CHUNKS = ROWS * CHUNKS / THREADS, A_CHUNKS = RANKS * CHUNKS / THREADS;
  constexpr int ROW_STEP = THREADS / CHUNKS;
  __shared__ alignas(16) E x_tile[ROWS * STRIDE];
  __shared__ alignas(16) E a_tile[RANKS * STRIDE];

  const Rows<E> x(p.x);
  const Matrix<E> a(p.a);
  const Dropout<E> dropout(p.dropout, x.width);
  const Dense<A> delta(p.delta, p.site == RANK ? p.rank : x.width);
  const Dense<A> gain(p.gain, x.width);
  const A* mask = static_cast<const A*>(p.mask);
  const int rows = static_cast<int>(plan.rows), rank = static_cast<int>(p.rank);
  // blocks of the same rows run side by side, so that x comes from memory once
  const int row0 = blockIdx.x / plan.rank_chunks * ROWS, rank0 = blockIdx.x % plan.rank_chunks * RANKS;
  const int split = blockIdx.y;

  const int x_row = threadIdx.x / CHUNKS, x_col = threadIdx.x % CHUNKS * CHUNK;
  int64_t x_offset[X_CHUNKS];
#pragma unroll
  for (int i = 0; i < X_CHUNKS; ++i) {
    const int row = row0 + x_row + i * ROW_STEP;
    x_offset[i] = row < rows ? x.offset(row) : 0;
  }
  // neighbouring threads read neighbouring memory: along the columns of a, or along its rows where a is transposed
  const bool a_transposed = a.stride_col != 1;
  const int a_row = a_transposed ? threadIdx.x % RANKS : x_row, a_row_step = a_transposed ? 0 : ROW_STEP;
  const int a_col = a_transposed ? threadIdx.x / RANKS * CHUNK : x_col;
  const int a_col_step = a_transposed ? THREADS / RANKS * CHUNK : 0;

  Chunk<E> next_x[X_CHUNKS], next_a[A_CHUNKS];
  const auto fetch = [&](int k) {
#pragma unroll
    for (int i = 0; i < X_CHUNKS; ++i) next_x[i] = x.load(x_offset[i], k + x_col, row0 + x_row + i * ROW_STEP < rows);
#pragma unroll
    for (int i = 0; i < A_CHUNKS; ++i) {
      const int r = rank0 + a_row + i * a_row_step, col = k + a_col + i * a_col_step;
      next_a[i] = a.load(r, col, r < rank ? x.width - col : 0);
    }
  };
  const auto keep = [&](int k) {  // what was fetched becomes the current tiles
#pragma unroll
    for (int i = 0; i < X_CHUNKS; ++i) {
      const int local = x_row + i * ROW_STEP, row = row0 + local, col = k + x_col;
      if (dropout.active || p.site == ADAPTER_INPUT) {
        Values<A> wide = widen(next_x[i]);
        if (dropout.active) dropout.apply(wide, row, col);
        if (p.site == ADAPTER_INPUT && row < rows) add_echo(wide, delta, mask, row, x.sample(row), col);
        next_x[i] = narrow<E>(wide);
      }
      write_chunk(x_tile + local * STRIDE + x_col, next_x[i]);
    }
#pragma unroll
    for (int i = 0; i < A_CHUNKS; ++i) {
      const int local = a_row + i * a_row_step, col = a_col + i * a_col_step;
      if (p.gain != nullptr) {
        Values<A> wide = widen(next_a[i]);
        const Values<A> g = gain.load(0, k + col);
#pragma unroll
        for (int q = 0; q < CHUNK; ++q) wide.v[q] *= g.v[q];
        next_a[i] = narrow<E>(wide);
      }
      write_chunk(a_tile + local * STRIDE + col, next_a[i]);
    }
  };

  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  A acc[1][NT][4] = {};
  const int begin = static_cast<int>(split * plan.per_split);
  const int end = static_cast<int>(begin + plan.per_split < x.width ? begin + plan.per_split : x.width);
  fetch(begin);
  for (int k = begin; k < end; k += DEPTH) {
    __syncthreads();  // every warp is done with the previous tiles
    keep(k);
    __syncthreads();
    if (k + DEPTH < end) fetch(k + DEPTH);
    multiply_tiles<E, false, false>(acc, x_tile + 16 * warp * STRIDE, STRIDE, a_tile, STRIDE, DEPTH);
  }

  A* partial = plan.splits > 1 ? static_cast<A*>(p.workspace) + split * plan.rows * rank : static_cast<A*>(p.out);
#pragma unroll
  for (int j = 0; j < NT; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int row = row0 + 16 * warp + lane / 4 + 8 * (e / 2), r = rank0 + 8 * j + 2 * (lane % 4) + e % 2;
      if (row >= rows || r >= rank) continue;
      A v = acc[0][j][e];
      if (p.site == RANK && split == 0)
        v += mask[row] * static_cast<const A*>(p.delta)[static_cast<int64_t>(x.sample(row)) * rank + r];
      v *= static_cast<A>(p.scaling);
      const int64_t offset = static_cast<int64_t>(row) * rank + r;
      if (plan.splits > 1 || p.out_wide)
        partial[offset] = v;
      else
        static_cast<E*>(p.out)[offset] = static_cast<E>(v);
    }
}

template <typename E, int NT>
int launch_shrink(const echolora_shrink_args& p, const Plan& plan, void* stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(plan.rows, ROWS) * plan.rank_chunks), plan.splits);
  return launch(shrink_kernel<E, NT>, grid, THREADS, 0, stream, p, plan);
}

}  // namespace
}  // namespace echolora

int64_t echolora_cuda_shrink_workspace(const echolora_shrink_args* p) {
  const echolora::Plan plan = echolora::plan_of(*p);
  return plan.splits > 1 ? plan.splits * plan.rows * p->rank * echolora::acc_size(p->x.dtype) : 0;
}

int echolora_cuda_shrink(const echolora_shrink_args* p, void* stream) {
  using namespace echolora;
  const Plan plan = plan_of(*p);
  const int error = with_type(p->x.dtype, [&](auto type) -> int {
    using E = typename decltype(type)::type;
    if constexpr (!std::is_same_v<E, double>) {
      if (plan.rank_tiles == 8) return launch_shrink<E, 8>(*p, plan, stream);
      if (plan.rank_tiles == 4) return launch_shrink<E, 4>(*p, plan, stream);
    }
    return launch_shrink<E, 2>(*p, plan, stream);
  });
  if (error != 0 || plan.splits == 1) return error;
  const int acc = p->x.dtype == ECHOLORA_FLOAT64 ? ECHOLORA_FLOAT64 : ECHOLORA_FLOAT32;
  return sum_partials(p->workspace, acc, p->out, p->out_wide ? acc : p->x.dtype, 1, plan.splits, plan.rows * p->rank,
                      stream);
}
