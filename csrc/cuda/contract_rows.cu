// The sums over rows: B1 (dB, dbias, dgain, dDelta from dY, and dS on the way) and B2 (dA from drop(x)).
//
// A block takes 256 columns, a chunk of the rank and a run of row tiles; a warp 32 of the columns. No tile straddles
// two samples, so that a tile's sum belongs to one row of Delta. What several blocks share is written as partial sums
// in a fixed layout and added in a fixed order: the same inputs give the same bits.

#include "product.cuh"

namespace echolora {
namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr int COLS = WARP * CHUNK;  // a warp reads one row of a tile at a time

// Rows of a tile: what fits in shared memory beside B, and in registers beside the sums of a thick adapter.
template <typename E, int NT>
constexpr int ROWS = NT == 8 ? 32 : 128 / sizeof(E);

// Blocks per processor that registers have room for.
template <typename E, int NT, bool SUMS>
constexpr int BLOCKS = SUMS && (sizeof(E) == 8 || NT == 8) ? 1 : 2;

struct Plan {
  int rank_tiles;    // 8 ranks each, per block
  int rank_chunks;   // blocks of the same columns
  int col_tiles;     // parts of dS
  int sample_tiles;  // parts of a row of dDelta
  int tiles;         // of rows, in all samples
  int split_tiles;   // of them, per block
  int splits;        // parts of the product, dbias and dgain
};

struct ContractParams {
  echolora_rows rows;
  echolora_matrix left;  // s or dS, [M, rank]
  int64_t rank;
  Plan plan;
  // B2
  echolora_dropout dropout;
  const void* delta;
  int product_by_rank;  // the product is [rank, width]
  // B1
  echolora_matrix b;
  double scaling;
  const void *gain, *z;
  // both
  const void* mask;
  void *product, *ds, *dbias, *dgain, *ddelta;  // partial sums, or the results where there is one part
};

template <typename E, int NT, bool SUMS>
size_t shared_bytes(bool need_ds) {
  constexpr size_t STRIDE = COLS + PAD<E>, LEFT_STRIDE = 8 * NT + PAD<E>;
  const size_t tiles = ROWS<E, NT> * (STRIDE + LEFT_STRIDE) + (need_ds ? 8 * NT * STRIDE : 0);
  return tiles * sizeof(E) + (SUMS ? WARPS * COLS * sizeof(Acc<E>) : 0);
}

template <typename A>
__device__ __forceinline__ void put_warp_sums(A* warp_sums, const Values<A>& sums) {
#pragma unroll
  for (int q = 0; q < CHUNK; ++q) warp_sums[threadIdx.x / WARP * COLS + threadIdx.x % WARP * CHUNK + q] = sums.v[q];
}

template <typename A>
__device__ __forceinline__ A column_sum(const A* warp_sums) {
  A sum = 0;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) sum += warp_sums[w * COLS + threadIdx.x];
  return sum;
}

// SUMS: some of dbias, dgain and ddelta are wanted.
template <typename E, int NT, bool SUMS>
__global__ void __launch_bounds__(THREADS, BLOCKS<E, NT, SUMS>) contract_rows_kernel(const ContractParams p) {
  using A = Acc<E>;
  constexpr int RANKS = 8 * NT, STRIDE = COLS + PAD<E>, LEFT_STRIDE = RANKS + PAD<E>;
  constexpr int FETCHES = ROWS<E, NT> / WARPS, LEFT_CHUNKS = ROWS<E, NT> * NT;
  // one chain over all rows loses digits, which plain torch's results in 16 bits do not have
  constexpr bool BY_TILE = SUMS && sizeof(E) > 2;
  extern __shared__ uint4 shared[];
  E* tile = reinterpret_cast<E*>(shared);                                      // [row][column]
  E* left_tile = tile + ROWS<E, NT> * STRIDE;                                  // [row][rank]
  A* warp_sums = reinterpret_cast<A*>(left_tile + ROWS<E, NT> * LEFT_STRIDE);  // [warp][column]
  E* b_tile = reinterpret_cast<E*>(warp_sums + (SUMS ? WARPS * COLS : 0));     // [rank][column]

  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const Rows<E> source(p.rows);
  const int width = source.width, length = source.length, rank = static_cast<int>(p.rank);
  const int64_t total = p.rows.samples * p.rows.length;
  const int col_tile = blockIdx.x / p.plan.rank_chunks, rank0 = blockIdx.x % p.plan.rank_chunks * RANKS;
  const int col0 = col_tile * COLS, col = col0 + lane * CHUNK;
  const bool sums_here = SUMS && rank0 == 0;
  const Matrix<E> left(p.left), b(p.b);
  const Dropout<E> dropout(p.dropout, width);
  const Dense<A> delta(p.delta, width);
  const Dense<E> z(p.z, width);
  const A* gain = static_cast<const A*>(p.gain);
  const A* mask = static_cast<const A*>(p.mask);

  if (p.ds != nullptr) {
    const int n = col0 + threadIdx.x;  // COLS threads
    const A g = gain != nullptr && n < width ? gain[n] : A(1);
    for (int r = 0; r < RANKS; r += CHUNK) {
      const Values<A> v = widen(b.load(n, rank0 + r, n < width ? rank - rank0 - r : 0));
#pragma unroll
      for (int q = 0; q < CHUNK; ++q) b_tile[(r + q) * STRIDE + threadIdx.x] = static_cast<E>(v.v[q] * g);
    }
  }

  Chunk<E> next[FETCHES];
  const auto fetch = [&](int i_tile) {
    const int sample = i_tile / p.plan.sample_tiles, t0 = (i_tile - sample * p.plan.sample_tiles) * ROWS<E, NT>;
#pragma unroll
    for (int i = 0; i < FETCHES; ++i) {
      const int t = t0 + warp + i * WARPS;
      next[i] = source.load(source.offset(sample, t), col, t < length);
    }
  };

  A acc[2][NT][4] = {};
  Values<A> dbias = {}, dgain = {};
  const int first = blockIdx.y * p.plan.split_tiles;
  const int last = first + p.plan.split_tiles < p.plan.tiles ? first + p.plan.split_tiles : p.plan.tiles;
  fetch(first);
  for (int i_tile = first; i_tile < last; ++i_tile) {
    const int sample = i_tile / p.plan.sample_tiles, t0 = (i_tile - sample * p.plan.sample_tiles) * ROWS<E, NT>;
    const int row0 = sample * length + t0, rows_here = length - t0 < ROWS<E, NT> ? length - t0 : ROWS<E, NT>;

    __syncthreads();  // every warp is done with the previous tiles
    if (p.product != nullptr)
      for (int i = threadIdx.x; i < LEFT_CHUNKS; i += THREADS) {
        const int row = i / NT, r = i % NT * CHUNK;
        const Chunk<E> c = left.load(row0 + row, rank0 + r, row < rows_here ? rank - rank0 - r : 0);
        write_chunk(left_tile + row * LEFT_STRIDE + r, c);
      }
    Values<A> tile_dbias = {}, tile_dgain = {}, ddelta = {};
    Values<A>&sum_dbias = BY_TILE ? tile_dbias : dbias, &sum_dgain = BY_TILE ? tile_dgain : dgain;
#pragma unroll
    for (int i = 0; i < FETCHES; ++i) {
      const int local = warp + i * WARPS, row = row0 + local;
      if (local < rows_here) {
        Values<A> wide = widen(next[i]);
        if (SUMS) {
          if (sums_here) {
            Values<A> v_z = {};
            if (p.dgain != nullptr) v_z = z.load(row, col);
            const A weight = p.ddelta != nullptr ? mask[row] : A(0);
#pragma unroll
            for (int q = 0; q < CHUNK; ++q) {
              sum_dbias.v[q] += wide.v[q];
              sum_dgain.v[q] += wide.v[q] * v_z.v[q];
              ddelta.v[q] += wide.v[q] * weight;
            }
          }
        } else if (dropout.active || p.delta != nullptr) {
          if (dropout.active) dropout.apply(wide, row, col);
          if (p.delta != nullptr) add_echo(wide, delta, mask, row, sample, col);
          next[i] = narrow<E>(wide);
        }
      }
      write_chunk(tile + local * STRIDE + lane * CHUNK, next[i]);
    }
    if (BY_TILE && sums_here) {
#pragma unroll
      for (int q = 0; q < CHUNK; ++q) {
        dbias.v[q] += tile_dbias.v[q];
        dgain.v[q] += tile_dgain.v[q];
      }
    }
    if (sums_here && p.ddelta != nullptr) put_warp_sums(warp_sums, ddelta);
    __syncthreads();

    if (i_tile + 1 < last) fetch(i_tile + 1);
    if (sums_here && p.ddelta != nullptr && col0 + threadIdx.x < width)
      static_cast<A*>(p.ddelta)[static_cast<int64_t>(i_tile) * width + col0 + threadIdx.x] = column_sum(warp_sums);
    if (p.product != nullptr)
      multiply_tiles<E, true, false>(acc, tile + WARP * warp, STRIDE, left_tile, LEFT_STRIDE, ROWS<E, NT>);
    if (p.ds != nullptr) {
      constexpr int ROW_TILES = ROWS<E, NT> / 16;
      for (int i = warp; i < ROW_TILES * NT; i += WARPS) {
        const int local = i % ROW_TILES * 16, r = i / ROW_TILES * 8;
        A v[1][1][4] = {};
        multiply_tiles<E, false, false>(v, tile + local * STRIDE, STRIDE, b_tile + r * STRIDE, STRIDE, COLS);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = local + lane / 4 + 8 * (e / 2), at = rank0 + r + 2 * (lane % 4) + e % 2;
          if (row < rows_here && at < rank)
            static_cast<A*>(p.ds)[(col_tile * total + row0 + row) * rank + at] = static_cast<A>(p.scaling) * v[0][0][e];
        }
      }
    }
  }

  const int64_t split = blockIdx.y;
  if (p.product != nullptr)
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < NT; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int n = col0 + WARP * warp + 16 * i + lane / 4 + 8 * (e / 2);
          const int r = rank0 + 8 * j + 2 * (lane % 4) + e % 2;
          if (n >= width || r >= rank) continue;
          const int64_t offset = p.product_by_rank ? (split * rank + r) * width + n : (split * width + n) * rank + r;
          static_cast<A*>(p.product)[offset] = gain != nullptr ? acc[i][j][e] * gain[n] : acc[i][j][e];
        }
  if (sums_here) {
    for (int which = 0; which < 2; ++which) {
      A* out = static_cast<A*>(which == 0 ? p.dbias : p.dgain);
      if (out == nullptr) continue;
      __syncthreads();
      put_warp_sums(warp_sums, which == 0 ? dbias : dgain);
      __syncthreads();
      if (col0 + threadIdx.x < width) out[split * width + col0 + threadIdx.x] = column_sum(warp_sums);
    }
  }
}

Plan plan_of(const echolora_rows& rows, int64_t rank) {
  Plan plan;
  int row_step;
  if (rows.dtype == ECHOLORA_FLOAT64) {
    plan.rank_tiles = 2;
    row_step = ROWS<double, 2>;
  } else if (rows.dtype == ECHOLORA_FLOAT32) {
    plan.rank_tiles = rank <= 16 ? 2 : 4;
    row_step = ROWS<float, 4>;
  } else {
    plan.rank_tiles = rank <= 16 ? 2 : rank <= 32 ? 4 : 8;
    row_step = plan.rank_tiles == 8 ? ROWS<__half, 8> : ROWS<__half, 4>;
  }
  plan.rank_chunks = static_cast<int>(ceil_div(rank, 8 * plan.rank_tiles));
  plan.col_tiles = static_cast<int>(ceil_div(rows.width, COLS));
  plan.sample_tiles = static_cast<int>(ceil_div(rows.length, row_step));
  plan.tiles = static_cast<int>(rows.samples) * plan.sample_tiles;
  // two blocks for every processor; a partial sum is worth at least two tiles
  const int64_t wanted = 2 * processors() / (static_cast<int64_t>(plan.col_tiles) * plan.rank_chunks);
  const int64_t most = plan.tiles / 2, splits = wanted < most ? wanted : most;
  plan.split_tiles = static_cast<int>(ceil_div(plan.tiles, splits < 1 ? 1 : splits));
  plan.splits = static_cast<int>(ceil_div(plan.tiles, plan.split_tiles));
  return plan;
}

// An output that several blocks share goes through partial sums, in the workspace.
class Workspace {
 public:
  Workspace(void* base, int dtype)
      : base_(static_cast<char*>(base)), acc_(dtype == ECHOLORA_FLOAT64 ? ECHOLORA_FLOAT64 : ECHOLORA_FLOAT32) {}

  int64_t bytes() const { return used_; }

  // where the kernel writes `out`, [outer, inner], of which it leaves [outer, count, inner]
  void* parts(void* out, int64_t outer, int64_t count, int64_t inner) {
    if (out == nullptr || count == 1) return out;
    shared_[n_shared_++] = {out, outer, count, inner, used_};
    used_ += ceil_div(outer * count * inner * acc_size(acc_), sizeof(uint4)) * static_cast<int64_t>(sizeof(uint4));
    return base_ + shared_[n_shared_ - 1].offset;
  }

  int sum(void* stream) const {
    for (int i = 0; i < n_shared_; ++i) {
      const Shared& s = shared_[i];
      const int error = sum_partials(base_ + s.offset, acc_, s.out, acc_, s.outer, s.count, s.inner, stream);
      if (error != 0) return error;
    }
    return 0;
  }

 private:
  struct Shared {
    void* out;
    int64_t outer, count, inner, offset;
  };
  char* base_;
  int acc_, n_shared_ = 0;
  int64_t used_ = 0;
  Shared shared_[5];
};

ContractParams params_of(const echolora_adapter_backward_args& args, Workspace& workspace) {
  ContractParams p = {};
  p.rows = args.dy;
  p.left = args.s;
  p.rank = args.rank;
  p.plan = plan_of(args.dy, args.rank);
  p.b = args.b;
  p.scaling = args.scaling;
  p.gain = args.gain;
  p.z = args.z;
  p.mask = args.mask;
  const int64_t total = args.dy.samples * args.dy.length, width = args.dy.width;
  p.ds = workspace.parts(args.ds, 1, p.plan.col_tiles, total * args.rank);
  p.product = workspace.parts(args.db, 1, p.plan.splits, width * args.rank);
  p.dbias = workspace.parts(args.dbias, 1, p.plan.splits, width);
  p.dgain = workspace.parts(args.dgain, 1, p.plan.splits, width);
  p.ddelta = workspace.parts(args.ddelta, args.dy.samples, p.plan.sample_tiles, width);
  return p;
}

ContractParams params_of(const echolora_lora_a_backward_args& args, Workspace& workspace) {
  ContractParams p = {};
  p.rows = args.x;
  p.left = args.ds;
  p.rank = args.rank;
  p.plan = plan_of(args.x, args.rank);
  p.dropout = args.dropout;
  p.delta = args.delta;
  p.mask = args.mask;
  p.product_by_rank = 1;
  p.product = workspace.parts(args.da, 1, p.plan.splits, args.x.width * args.rank);
  return p;
}

template <typename E, int NT>
int launch_contract(const ContractParams& p, void* stream) {
  const dim3 grid(p.plan.col_tiles * p.plan.rank_chunks, p.plan.splits);
  const bool sums = p.dbias != nullptr || p.dgain != nullptr || p.ddelta != nullptr, ds = p.ds != nullptr;
  return sums ? launch(contract_rows_kernel<E, NT, true>, grid, THREADS, shared_bytes<E, NT, true>(ds), stream, p)
              : launch(contract_rows_kernel<E, NT, false>, grid, THREADS, shared_bytes<E, NT, false>(ds), stream, p);
}

int contract(const ContractParams& p, const Workspace& workspace, void* stream) {
  const int error = with_type(p.rows.dtype, [&](auto type) -> int {
    using E = typename decltype(type)::type;
    if constexpr (sizeof(E) == 2)
      if (p.plan.rank_tiles == 8) return launch_contract<E, 8>(p, stream);
    if constexpr (sizeof(E) <= 4)
      if (p.plan.rank_tiles == 4) return launch_contract<E, 4>(p, stream);
    return launch_contract<E, 2>(p, stream);
  });
  return error != 0 ? error : workspace.sum(stream);
}

template <typename Args>
int64_t workspace_bytes(const Args& args, int dtype) {
  Workspace workspace(nullptr, dtype);
  params_of(args, workspace);
  return workspace.bytes();
}

}  // namespace
}  // namespace echolora

int64_t echolora_cuda_adapter_backward_workspace(const echolora_adapter_backward_args* args) {
  return echolora::workspace_bytes(*args, args->dy.dtype);
}

int64_t echolora_cuda_lora_a_backward_workspace(const echolora_lora_a_backward_args* args) {
  return echolora::workspace_bytes(*args, args->x.dtype);
}

int echolora_cuda_adapter_backward(const echolora_adapter_backward_args* args, void* stream) {
  echolora::Workspace workspace(args->workspace, args->dy.dtype);
  const echolora::ContractParams p = echolora::params_of(*args, workspace);
  return echolora::contract(p, workspace, stream);
}

int echolora_cuda_lora_a_backward(const echolora_lora_a_backward_args* args, void* stream) {
  echolora::Workspace workspace(args->workspace, args->x.dtype);
  const echolora::ContractParams p = echolora::params_of(*args, workspace);
  return echolora::contract(p, workspace, stream);
}
